//! Places for clusters that move, and moving the refcount structures themselves: for a compaction, which has the image
//! to itself.
//!
//! Order of moving a block or the table: the new place is counted and durable, the copy is durable, then one write of
//! the word that refers to it (a table entry, or the header's field) switches. The old place is freed behind the sync.

use std::collections::BTreeSet;

use qcow2_format::refcount::RefcountTableEntry;
use qcow2_format::words;

use super::alloc::Allocator;
use super::refcounts::{Refcounts, header_fields};
use super::writer::Writer;
use crate::image::{Qcow2, write_patch};
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
    fn copy_block(&mut self, index: u64, to: u64) -> Result<()> {
        let first = index * self.geometry.refcount_block_entries();
        let bytes = self.block(first)?.map(|block| block.bytes.clone()).unwrap_or_default();
        self.storage.write_all_at(Mem::from(bytes.as_slice()), to)
    }

    /// Writes the table entry of a block: `to` is its copy, or 0 for none.
    fn switch_block(&mut self, index: u64, to: u64) -> Result<()> {
        self.write_entry(index, to)?;
        if let Some(entry) = self.table.get_mut(index as usize) {
            *entry = to;
        }
        if to == 0 {
            self.blocks.remove(&index);
        } else if let Some(block) = self.blocks.get_mut(&index) {
            block.offset = to;
            // The copy has them.
            block.dirty = BTreeSet::new();
        }
        Ok(())
    }

    /// Whether the block counts nothing, but for itself.
    fn counts_nothing(&mut self, index: u64, offset: u64) -> Result<bool> {
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

    /// Bytes of the table up to its last entry in use.
    fn used_table(&self) -> Vec<u8> {
        let used = self.table.iter().rposition(|e| *e != 0).map_or(1, |last| last + 1);
        words::encode(self.table.get(..used).unwrap_or_default())
    }
}

impl Writer {
    /// Moves refcount blocks: each by its index, the old and the new host offset, which is counted durably.
    pub(crate) fn move_blocks(&self, image: &Qcow2, moves: &[(u64, u64, u64)]) -> Result<()> {
        let g = image.geometry();
        self.with_alloc(|alloc, metadata| {
            for &(index, _, to) in moves {
                alloc.refcounts.copy_block(index, to)?;
            }
            image.storage().flush()?;
            for &(index, _, to) in moves {
                alloc.refcounts.switch_block(index, to)?;
                metadata.add(g.cluster_index(to));
            }
            image.storage().flush()?;
            for &(_, from, _) in moves {
                metadata.remove(g.cluster_index(from));
                alloc.refcounts.set(g.cluster_index(from), 0)?;
            }
            Ok(())
        })
    }

    /// Gives up the blocks behind `from` that count nothing any more. What lost its references is durable. Returns how many.
    pub(crate) fn drop_blocks(&self, image: &Qcow2, from: u64) -> Result<u64> {
        let g = image.geometry();
        self.with_alloc(|alloc, metadata| {
            let mut dropped = 0;
            for (index, offset) in alloc.refcounts.blocks() {
                let first = index * g.refcount_block_entries();
                if first < from.max(1) || !alloc.refcounts.counts_nothing(index, offset)? {
                    continue;
                }
                alloc.refcounts.switch_block(index, 0)?;
                image.storage().flush()?;
                let cluster = g.cluster_index(offset);
                metadata.remove(cluster);
                if alloc.refcounts.is_covered(cluster) {
                    alloc.refcounts.set(cluster, 0)?;
                }
                dropped += 1;
            }
            Ok(dropped)
        })
    }

    /// Bytes of the refcount table that are in use, and its place: first cluster and number of clusters.
    pub(crate) fn refcount_table(&self) -> Result<(u64, u64, u64)> {
        self.with_alloc(|alloc, _| {
            let (first, clusters) = alloc.refcounts.table_clusters();
            Ok((alloc.refcounts.used_table().len() as u64, first, clusters))
        })
    }

    /// Moves the refcount table to `to`, clusters that are counted durably and have room for what is used of it.
    pub(crate) fn move_refcount_table(&self, image: &Qcow2, to: u64) -> Result<()> {
        let g = *image.geometry();
        self.with_alloc(|alloc, metadata| {
            let refcounts = &mut alloc.refcounts;
            let old = refcounts.table_clusters();
            let mut bytes = refcounts.used_table();
            let clusters = g.clusters_for(bytes.len() as u64);
            bytes.resize((clusters * g.cluster_size()) as usize, 0);
            image.storage().write_all_at(Mem::from(bytes.as_slice()), to)?;
            image.storage().flush()?;
            write_patch(&**image.storage(), &image.header().steady(), &header_fields(to, clusters))?;
            image.storage().flush()?;
            refcounts.table_offset = to;
            refcounts.table.resize(bytes.len() / 8, 0);
            metadata.set_refcount_table(&g, to, clusters);
            (old.0..old.0 + old.1).try_for_each(|cluster| refcounts.set(cluster, 0))
        })
    }
}
