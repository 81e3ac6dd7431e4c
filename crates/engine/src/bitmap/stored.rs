//! Bitmaps in the file: table and data clusters (sections "Bitmap table" and "Bitmap data").

use qcow2_format::HostOffset;
use qcow2_format::bitmap::{BitmapCluster, BitmapDirectoryEntry};

use crate::Result;
use crate::maintenance::Session;
use crate::tracker::Bits;

impl Session<'_> {
    /// Writes bits to new clusters and a new table; returns the table's offset and entries. What was written goes to `fresh`.
    pub(super) fn store_bits(&self, bits: &Bits, fresh: &mut Vec<(u64, u64)>) -> Result<(u64, u32)> {
        let size = self.geometry().cluster_size();
        let clusters = bits.stored_length().div_ceil(size);
        let mut table = Vec::with_capacity(clusters as usize * 8);
        for index in 0..clusters {
            self.checkpoint()?;
            let start = index * size;
            let stored = bits.stored(start..start + size);
            let used = (bits.stored_length() - start).min(size) as usize;
            let used = stored.get(..used).unwrap_or_default();
            let entry = if used.iter().all(|&b| b == 0) {
                BitmapCluster::Zeroes
            } else if used.iter().all(|&b| b == 0xff) && used.len() as u64 == size {
                BitmapCluster::Ones
            } else {
                let offset = self.allocate(size)?;
                self.write_table(offset, stored)?;
                fresh.push((offset, size));
                BitmapCluster::Data(HostOffset(offset))
            };
            table.extend_from_slice(&entry.encode().to_bytes());
        }
        let length = table.len() as u64;
        let offset = self.allocate(length)?;
        self.write_table(offset, table)?;
        fresh.push((offset, length));
        // The directory's limit on granularity keeps a table far below 2^32 entries.
        Ok((offset, (length / 8) as u32))
    }

    /// Frees the clusters of a stored bitmap that nothing refers to any more. Damage is left to a check.
    pub(super) fn free_stored(&self, entry: &BitmapDirectoryEntry) -> Result<()> {
        let table = self.image.bitmap_table(entry)?;
        self.unlink(entry.table_offset.0, u64::from(entry.table_size) * 8);
        self.free_bits(&table)
    }

    /// Frees the clusters of bits that a table named.
    pub(super) fn free_bits(&self, table: &[BitmapCluster]) -> Result<()> {
        for cluster in table {
            if let BitmapCluster::Data(host) = cluster {
                self.unlink(host.0, self.geometry().cluster_size());
            }
        }
        self.limit_unlinked()
    }
}
