//! The bytes of tables, cluster by cluster.

use qcow2_core::front_to_back::Runs;
use qcow2_format::{Geometry, HostOffset, L1Entry, L2Entry, refcount, words};

use super::internal;
use super::layout::Layout;
use crate::Result;
use crate::create::options::L1_ENTRY_SIZE;

/// Bytes of a refcount table entry.
const TABLE_ENTRY_SIZE: u64 = 8;

/// Makes tables.
#[derive(Clone, Copy)]
pub(super) struct Tables<'a> {
    pub(super) geometry: &'a Geometry,
    pub(super) layout: &'a Layout,
}

impl Tables<'_> {
    fn offset(self, cluster: u64) -> HostOffset {
        HostOffset(cluster << self.geometry.cluster_bits())
    }

    /// A cluster of the refcount table.
    pub(super) fn refcount_table(self, index: u64) -> Vec<u8> {
        let entries = self.geometry.cluster_size() / TABLE_ENTRY_SIZE;
        let blocks = self.layout.l1 - self.layout.refcount_blocks;
        let block = |number| self.offset(self.layout.refcount_blocks + number).get();
        let table: Vec<u64> = (index * entries..(index + 1) * entries)
            .map(|number| if number < blocks { block(number) } else { 0 })
            .collect();
        words::encode(&table)
    }

    /// A refcount block: everything up to the end is used once.
    pub(super) fn refcount_block(self, index: u64) -> Result<Vec<u8>> {
        let entries = self.geometry.refcount_block_entries();
        let used = (self.layout.end - (index * entries).min(self.layout.end)).min(entries);
        let mut bytes = vec![0; self.geometry.cluster_len()];
        for entry in 0..used as usize {
            refcount::set(&mut bytes, entry, self.geometry.refcount_order(), 1).ok_or_else(internal)?;
        }
        Ok(bytes)
    }

    /// A cluster of the L1 table, of which `tables` have an L2 table.
    pub(super) fn l1(self, index: u64, tables: &Runs) -> Result<Vec<u8>> {
        let entries = self.geometry.cluster_size() / L1_ENTRY_SIZE;
        let first = index * entries;
        let mut bytes = vec![0; self.geometry.cluster_len()];
        for part in tables.within(first, first + entries) {
            for i in 0..part.count {
                let host = self.offset(self.layout.l2 + part.rank + i);
                put(&mut bytes, part.first + i - first, &L1Entry::new(host, true).to_bytes())?;
            }
        }
        Ok(bytes)
    }

    /// An L2 table with these entries.
    pub(super) fn l2(self, entries: impl Iterator<Item = (u64, L2Entry)>) -> Result<Vec<u8>> {
        let size = self.geometry.l2_entry_size() as usize;
        let mut bytes = vec![0; self.geometry.cluster_len()];
        for (index, entry) in entries {
            let start = index as usize * size;
            entry.write(bytes.get_mut(start..start + size).ok_or_else(internal)?);
        }
        Ok(bytes)
    }
}

fn put(bytes: &mut [u8], index: u64, entry: &[u8]) -> Result<()> {
    let start = index as usize * entry.len();
    bytes.get_mut(start..start + entry.len()).ok_or_else(internal)?.copy_from_slice(entry);
    Ok(())
}
