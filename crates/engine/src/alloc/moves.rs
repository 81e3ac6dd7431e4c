//! Places for clusters that move, and refcount blocks that do.

use std::collections::BTreeSet;

use qcow2_format::refcount::RefcountTableEntry;
use qcow2_format::words;

use super::allocator::Allocator;
use super::refcounts::{PIECE, Refcounts};
use crate::{Mem, Result, StorageExt};

impl Allocator {
    /// The lowest `count` contiguous free clusters at or behind `from` that end at or before `limit`. They stay free until a
    /// refcount is set. Nothing may be reserved.
    pub(crate) fn lowest_free(&mut self, count: u64, from: u64, limit: u64) -> Result<Option<u64>> {
        let mut at = from;
        while at.saturating_add(count) <= limit {
            let (found, next) = self.refcounts.find_free(at, limit, count, u64::MAX)?;
            let Some((start, length)) = found else { return Ok(None) };
            // What no block counts is left alone.
            if length == count && (start..start + count).all(|c| self.refcounts.is_covered(c)) {
                return Ok(Some(start));
            }
            at = next.max(start + length);
        }
        Ok(None)
    }

    /// First cluster behind everything in use.
    pub(crate) fn end(&self) -> u64 {
        self.end
    }
}

impl Refcounts {
    /// Index in the table and host offset of every block.
    pub(crate) fn blocks(&self) -> Vec<(u64, u64)> {
        let blocks = (0u64..).zip(&self.table);
        blocks.map(|(index, &e)| (index, RefcountTableEntry(e).offset_bits())).filter(|b| b.1 != 0).collect()
    }

    /// Writes the block with this index, as it is in memory, to host offset `to` as well.
    pub(crate) fn copy_block(&mut self, index: u64, to: u64) -> Result<()> {
        let first = index * self.geometry.refcount_block_entries();
        let bytes = self.block(first)?.map(|block| block.bytes.clone()).unwrap_or_default();
        self.storage.write_all_at(Mem::from(bytes.as_slice()), to)
    }

    /// Writes the table entry of a block: `to` is its copy, or 0 for none.
    pub(crate) fn switch_block(&mut self, index: u64, to: u64) -> Result<()> {
        self.write_entry(index, to)?;
        if let Some(entry) = self.table.get_mut(index as usize) {
            *entry = to;
        }
        if to == 0 {
            let changed = self.blocks.remove(&index).map_or(0, |block| block.dirty.len());
            self.waiting = self.waiting.saturating_sub(changed * PIECE);
        } else if let Some(block) = self.blocks.get_mut(&index) {
            block.offset = to;
            // The copy has them.
            block.dirty = BTreeSet::new();
        }
        Ok(())
    }

    /// Whether the block counts nothing, but for itself.
    pub(crate) fn counts_nothing(&mut self, index: u64, offset: u64) -> Result<bool> {
        let g = self.geometry;
        let own = g.cluster_index(offset);
        let first = index * g.refcount_block_entries();
        for cluster in first..first + g.refcount_block_entries() {
            if cluster != own && self.get(cluster)? != 0 {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// The table was moved to `to`, and has `bytes` bytes now.
    pub(crate) fn note_table(&mut self, to: u64, bytes: usize) {
        self.table_offset = to;
        self.table.resize(bytes / 8, 0);
    }

    /// Bytes of the table up to its last entry in use.
    pub(crate) fn used_table(&self) -> Vec<u8> {
        let used = self.table.iter().rposition(|e| *e != 0).map_or(1, |last| last + 1);
        words::encode(self.table.get(..used).unwrap_or_default())
    }
}
