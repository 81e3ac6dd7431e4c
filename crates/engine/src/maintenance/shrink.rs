//! Shrinking the virtual disk.
//!
//! The new L1 table, and a copy of the one L2 table that reaches over the new end, are written beside the old ones. One
//! write of the header, inside a sector, switches size and L1 table; what only the old ones refer to is freed
//! behind it. A crash leaves the old disk or the new one, and leaks. Readers that planned before go on: what
//! they use is in quarantine until they end.

use qcow2_format::{HostOffset, L1Entry};

use super::execute::encode_words;
use super::session::Session;
use crate::{Result, StorageExt};
use qcow2_core::layer::{Place, SegmentKind};

/// The L2 table that reaches over the new end.
struct Cut {
    l1_index: usize,
    /// The table's host offset before, and its bytes.
    former: HostOffset,
    bytes: Vec<u8>,
    /// Bytes of the entries that stay.
    kept: usize,
}

impl Session<'_> {
    /// Cuts the disk to `size` bytes, which are fewer than it has. What is behind is lost.
    ///
    /// # Errors
    /// `Corrupt` for damaged tables, before anything changes; else as [`crate::Image::write_at`].
    pub(crate) fn shrink(&self, size: u64) -> Result<()> {
        let g = self.geometry();
        let old_l1 = self.image.l1();
        let kept = g.l1_entries_for(size) as usize;
        // A disk of no bytes has a table, too.
        let entries = kept.max(1).min(old_l1.len().max(1));
        let mut gone = old_l1.clone();
        gone.iter_mut().take(kept).for_each(|entry| *entry = 0);
        let cut = self.cut_table(&old_l1, size)?;
        // All that will be freed is looked at before anything is changed.
        self.for_references(&gone, |_| self.checkpoint())?;
        if self.writer.bitmaps.load(self.image, true)? {
            self.barrier()?;
        }
        let mut l1 = old_l1.clone();
        l1.truncate(kept);
        l1.resize(entries, 0);
        let mut table_offset = None;
        if let Some(cut) = &cut {
            let mut table = cut.bytes.clone();
            table.get_mut(cut.kept..).unwrap_or_default().fill(0);
            let offset = self.allocate(g.cluster_size())?;
            self.write_table(offset, table)?;
            if let Some(entry) = l1.get_mut(cut.l1_index) {
                *entry = L1Entry::new(HostOffset(offset), true).0;
            }
            table_offset = Some(offset);
        }
        let written = self.allocate(entries as u64 * 8).and_then(|offset| {
            self.write_table(offset, encode_words(&l1))?;
            Ok(offset)
        });
        let offset = written.inspect_err(|_| {
            table_offset.iter().for_each(|table| self.abandon(*table, g.cluster_size()));
        })?;
        self.barrier()?;
        // At most as many entries as before.
        self.writer.write_active(self.image, size, entries as u32, offset)?;
        self.barrier()?;
        let former = self.writer.l1_offset();
        self.writer.note_active(self.image, &l1, offset);
        // The size first: who finds nothing mapped behind the end sees that it is the end.
        self.image.set_virtual_size(size);
        self.image.mapping.write().l1 = l1;
        self.image.next_generation();
        self.writer.bitmaps.resize(size, self.image.limits().max_memory)?;
        self.free_behind(&gone, cut.as_ref())?;
        self.unlink(former, old_l1.len() as u64 * 8);
        self.cut_contents(size)?;
        match self.lower(table_offset, offset) {
            // The disk is as it is to be; its file stays longer.
            Err(error) if error.is_no_room() => Ok(()),
            lowered => lowered,
        }
    }

    /// The new tables were written behind everything: they go down into what became free, so that the file is short.
    fn lower(&self, l2_table: Option<u64>, l1: u64) -> Result<()> {
        let g = self.geometry();
        self.free_now()?;
        if let Some(offset) = l2_table {
            self.lower_l2_table(offset, g.cluster_index(offset))?;
        }
        self.move_active_l1(g.cluster_index(l1))?;
        self.free_now()
    }

    /// The L2 table that has entries on both sides of the new end, where one behind it is in use.
    fn cut_table(&self, l1: &[u64], size: u64) -> Result<Option<Cut>> {
        let g = self.geometry();
        let boundary = g.clusters_for(size);
        let kept = (boundary % g.l2_entries() * g.l2_entry_size()) as usize;
        let l1_index = (boundary / g.l2_entries()) as usize;
        if kept == 0 {
            return Ok(None);
        }
        let Some(former) = self.table_of(l1.get(l1_index).copied().unwrap_or(0), l1_index)? else {
            return Ok(None);
        };
        let mut bytes = vec![0u8; g.cluster_len()];
        self.read(former.0, &mut bytes)?;
        let cut = Cut { l1_index, former, kept, bytes };
        self.for_cut(&cut, |_| ())?;
        let used = cut.bytes.get(kept..).unwrap_or_default().iter().any(|byte| *byte != 0);
        Ok(used.then_some(cut))
    }

    /// Calls `visit` with every host cluster that an entry behind the new end refers to.
    fn for_cut(&self, cut: &Cut, mut visit: impl FnMut(u64)) -> Result<()> {
        let g = self.geometry();
        let first = cut.kept / g.l2_entry_size() as usize;
        let behind = cut.bytes.get(cut.kept..).unwrap_or_default();
        for (number, entry) in super::tree::entries(behind, &g).enumerate() {
            self.clusters_of(entry, &g, cut.l1_index, first + number)?.for_each(&mut visit);
        }
        Ok(())
    }

    fn free_behind(&self, gone: &[u64], cut: Option<&Cut>) -> Result<()> {
        let size = self.geometry().cluster_size();
        self.drop_references(gone)?;
        if let Some(cut) = cut {
            self.for_cut(cut, |cluster| self.unlink(cluster * size, size))?;
            self.unlink(cut.former.0, size);
        }
        Ok(())
    }

    /// What is left of the last cluster behind the end, and of an external data file.
    fn cut_contents(&self, size: u64) -> Result<()> {
        let g = self.geometry();
        if self.image.header().has_data_file() {
            let data = self.image.data_storage()?;
            return match data.traits().block_device || data.size()? <= size {
                true => Ok(()),
                false => data.resize(size),
            };
        }
        let mut segments = Vec::new();
        self.image.plan_read(size..size.next_multiple_of(g.cluster_size()), &mut segments)?;
        for segment in segments {
            if let SegmentKind::Data(Place { host, .. }) = segment.kind
                && self.refcount(g.cluster_index(host))? == 1
            {
                self.image.storage().zero(host, segment.length, false)?;
            }
        }
        Ok(())
    }
}
