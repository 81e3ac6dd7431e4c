//! Telling an image with preallocated metadata: its clusters are all mapped, but the file has holes in their place.

use qcow2_format::refcount::{self, RefcountTableEntry};

use super::qcow2::Qcow2;
use super::read_header;
use crate::{MemMut, Result, Storage, StorageExt};

impl Qcow2 {
    /// Whether clusters that the image counts as allocated are holes of the file, so that looking for holes pays. The
    /// rule is QEMU's, so that maps agree: more allocated clusters than the file has space for, by a tenth and by two.
    /// With an external data file, it is tables and refcounts alone that are counted.
    pub(super) fn is_metadata_preallocated(&self) -> Result<bool> {
        if let Some(known) = self.metadata_preallocated.get() {
            return Ok(*known);
        }
        let detected = self.detect_metadata_preallocation()?;
        Ok(*self.metadata_preallocated.get_or_init(|| detected))
    }

    fn detect_metadata_preallocation(&self) -> Result<bool> {
        let g = self.geometry();
        let storage = &**self.storage();
        // What has not come has no space yet; and what comes is data.
        if storage.arriving().is_some() {
            return Ok(false);
        }
        let file_clusters = g.clusters_for(storage.size()?);
        let in_use = storage.space_in_use()? / g.cluster_size();
        let threshold = (in_use.saturating_mul(10) / 9).max(in_use.saturating_add(2));
        if file_clusters < threshold {
            return Ok(false);
        }
        // The table may have moved since the image was opened.
        let header = read_header(storage)?;
        let table =
            (header.refcount_table_offset.0, u64::from(header.refcount_table_clusters) * g.cluster_size());
        let mut counted = 0u64;
        let mut block = vec![0u8; g.cluster_len()];
        for index in 0..=g.refcount_table_index(file_clusters.saturating_sub(1)) {
            if !self.read_refcount_block(storage, table, index, &mut block)? {
                continue;
            }
            let first = index * g.refcount_block_entries();
            let entries = g.refcount_block_entries().min(file_clusters - first);
            let used = (0..entries as usize)
                .filter(|&i| refcount::get(&block, i, g.refcount_order()).is_some_and(|count| count != 0));
            counted += used.count() as u64;
            if counted >= threshold {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Reads the refcount block at `index` of the table, which is at an offset and has a number of bytes; false where there is
    /// none in the file. Damage is a check's business.
    fn read_refcount_block(
        &self,
        storage: &dyn Storage,
        (table, table_bytes): (u64, u64),
        index: u64,
        block: &mut [u8],
    ) -> Result<bool> {
        let file_size = storage.size()?;
        if index * 8 >= table_bytes || table >= file_size {
            return Ok(false);
        }
        let mut entry = [0u8; 8];
        storage.read_padded_at(MemMut::from(&mut entry[..]), table + index * 8)?;
        let entry = RefcountTableEntry::entries(&entry).next().unwrap_or_default();
        match entry.block(self.geometry()) {
            Ok(Some(offset)) if offset.0 < file_size => {
                storage.read_padded_at(MemMut::from(block), offset.0)?;
                Ok(true)
            }
            _ => Ok(false),
        }
    }
}
