//! The bytes of tables, cluster by cluster.

use qcow2_core::front_to_back::Runs;
use qcow2_format::{Geometry, HostOffset, L1Entry, L2Mapping, refcount, words};

use super::layout::{Layout, internal};
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

    /// A refcount block: everything up to the end is used once, but for data that `data` counts, from one of its host clusters up to
    /// another one.
    pub(super) fn refcount_block(self, index: u64, data: impl Fn(u64, u64) -> Vec<u64>) -> Result<Vec<u8>> {
        let entries = self.geometry.refcount_block_entries();
        let first = index * entries;
        let end = (first + entries).min(self.layout.end);
        let mut bytes = vec![0; self.geometry.cluster_len()];
        let mut put = |cluster: u64, count: u64| {
            let entry = (cluster - first) as usize;
            refcount::set(&mut bytes, entry, self.geometry.refcount_order(), count).ok_or_else(internal)
        };
        (first..end).try_for_each(|cluster| put(cluster, 1))?;
        let begin = self.layout.data;
        if end > begin {
            let from = first.max(begin);
            let counts = data(from - begin, end - begin);
            (from..end).zip(counts).try_for_each(|(cluster, count)| put(cluster, count))?;
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

    /// The L2 table whose first guest cluster is `first`, with these clusters mapped.
    pub(super) fn l2(
        self,
        first: u64,
        mapped: impl Iterator<Item = Result<(u64, L2Mapping)>>,
    ) -> Result<Vec<u8>> {
        let size = self.geometry.l2_entry_size() as usize;
        let mut bytes = vec![0; self.geometry.cluster_len()];
        for mapping in mapped {
            let (guest, mapping) = mapping?;
            let start = (guest - first) as usize * size;
            mapping.encode(self.geometry).write(bytes.get_mut(start..start + size).ok_or_else(internal)?);
        }
        Ok(bytes)
    }
}

fn put(bytes: &mut [u8], index: u64, entry: &[u8]) -> Result<()> {
    let start = index as usize * entry.len();
    bytes.get_mut(start..start + entry.len()).ok_or_else(internal)?.copy_from_slice(entry);
    Ok(())
}
