//! Refcounts that change beside those in the file, for a change of the image that becomes true as a whole, with one
//! write of the header.
//!
//! From [`Allocator::fork`] on a refcount block that changes gets another place first, and the refcount table changes
//! in memory alone. New clusters are the lowest that are free in the file and in the fork, or come out of the
//! reservations ([`super::places`]). So nothing in the file refers to what is written, which may happen at any time and in
//! any order, and [`Allocator::undo_fork`] only has to forget. [`Allocator::seal_fork`] gives the table its own place; when the header
//! names it, [`Allocator::adopt_fork`] makes it the image's.

use qcow2_format::limits::MAX_REFCOUNT_TABLE_BYTES;
use qcow2_format::words;

use super::allocator::Allocator;
use super::forked::Fork;
use super::overlap::MetadataMap;
use super::quarantine::Unlinked;
use super::refcounts::{Block, PIECE, Refcounts, Write};
use crate::{Error, ErrorKind, Result, StorageExt};

impl Refcounts {
    /// Whether the block with this index may change: outside a fork always, inside one if its place is the fork's.
    pub(super) fn may_change(&self, index: u64) -> bool {
        self.fork.as_ref().is_none_or(|_| self.is_forked(index))
    }

    /// Whether the block with this index exists and its place is the fork's.
    pub(super) fn is_forked(&self, index: u64) -> bool {
        let Some(fork) = &self.fork else { return false };
        let former = fork.former(index);
        self.table.get(index as usize).is_some_and(|&entry| entry != 0 && entry != former)
    }

    /// Gives the block with this index the cluster `place`, which is counted or about to be; makes it if there is none.
    pub(super) fn fork_block(&mut self, index: u64, place: u64) -> Result<()> {
        let g = self.geometry;
        let offset = place * g.cluster_size();
        let first = index * g.refcount_block_entries();
        let pieces = g.cluster_len().div_ceil(PIECE);
        if !self.is_covered(first) {
            self.cover_index(index)?;
            self.insert(index, Block::new(offset, vec![0u8; g.cluster_len()], self.clock));
        } else {
            // In memory now, whatever the table says.
            self.block(first)?;
        }
        if let Some(block) = self.blocks.get_mut(&index) {
            block.offset = offset;
            block.dirty = (0..pieces).collect();
        }
        self.waiting += pieces * PIECE;
        if let Some(entry) = self.table.get_mut(index as usize) {
            *entry = offset;
        }
        Ok(())
    }

    /// Makes the table in memory long enough for the block with this index.
    fn cover_index(&mut self, index: u64) -> Result<()> {
        if index < self.table.len() as u64 {
            return Ok(());
        }
        let per_cluster = self.geometry.cluster_size() / 8;
        let most = MAX_REFCOUNT_TABLE_BYTES / 8;
        let needed = index + 1;
        let entries = (needed + needed / 2).min(most.max(needed)).next_multiple_of(per_cluster);
        if entries > most {
            let message = "the image is at its largest size: the refcount table cannot grow";
            return Err(self.storage.located(Error::new(ErrorKind::Limit, message)));
        }
        self.table.resize(entries as usize, 0);
        Ok(())
    }
}

impl Allocator {
    /// Begins a fork. Nothing is in quarantine, and nobody else allocates until it ends. Refcounts of before that wait
    /// are written at their places in the file.
    pub(crate) fn fork(&mut self) -> Result<()> {
        let length = if self.storage.traits().block_device { 0 } else { self.storage.size()? };
        self.refcounts.write_dirty()?;
        // The fork may drop the references that keep it.
        self.packing = None;
        self.refcounts.fork = Some(Fork {
            former: self.refcounts.table.clone(),
            end: self.end,
            length,
            taken: Vec::new(),
            holes: Vec::new(),
            search: self.search,
            looked_at: None,
            table: None,
        });
        Ok(())
    }

    /// Counts one reference of a cluster more, or one less, in the fork; returns the refcount. At 0 the cluster is free
    /// in the new image, and still what it was in the old one: nobody may allocate before the switch is durable and what
    /// planned before has ended.
    pub(crate) fn count_beside(&mut self, cluster: u64, more: bool, metadata: &MetadataMap) -> Result<u64> {
        self.fork_for(cluster, metadata)?;
        if more { self.refcounts.increment(cluster) } else { self.refcounts.decrement(cluster) }
    }

    /// Gives the block that counts `cluster`, if there is one, a place of the fork's.
    pub(super) fn fork_for(&mut self, cluster: u64, metadata: &MetadataMap) -> Result<()> {
        let index = self.geometry.refcount_table_index(cluster);
        if self.refcounts.is_forked(index) || !self.refcounts.is_covered(cluster) {
            return Ok(());
        }
        self.fork_block(index, metadata)
    }

    /// Gives the table its place, and returns all that must be durable before the header may name it.
    pub(crate) fn seal_fork(&mut self, metadata: &MetadataMap) -> Result<Vec<Write>> {
        loop {
            // Allocating may make the table grow.
            let clusters = self.refcounts.table_clusters().1;
            let placed = self.refcounts.fork.as_ref().and_then(|fork| fork.table);
            if let Some((first, count)) = placed {
                if count == clusters {
                    let mut writes = self.refcounts.take_dirty();
                    let bytes = words::encode(&self.refcounts.table);
                    writes.push((first * self.geometry.cluster_size(), bytes));
                    return Ok(writes);
                }
                for cluster in first..first + count {
                    self.count_beside(cluster, false, metadata)?;
                }
            }
            let first = self.allocate_beside(clusters, metadata)?;
            if let Some(fork) = &mut self.refcounts.fork {
                fork.table = Some((first, clusters));
            }
        }
    }

    /// Host offset and clusters of the table of a sealed fork.
    pub(crate) fn fork_table(&self) -> Option<(u64, u64)> {
        let (first, clusters) = self.refcounts.fork.as_ref()?.table?;
        Some((first * self.geometry.cluster_size(), clusters))
    }

    /// The header names the fork's table: it is the image's now. Returns the clusters of the former refcount structures.
    pub(crate) fn adopt_fork(&mut self, metadata: &mut MetadataMap) -> Vec<Unlinked> {
        let Some((offset, clusters)) = self.fork_table() else { return Vec::new() };
        let Some(fork) = self.refcounts.fork.take() else { return Vec::new() };
        let g = self.geometry;
        let count = g.clusters_for(fork.former.len() as u64 * 8);
        let cluster = g.cluster_index(self.refcounts.table_offset);
        let mut unlinked = vec![Unlinked { cluster, count, punch: true }];
        for (index, &entry) in self.refcounts.table.iter().enumerate() {
            let former = fork.former(index as u64);
            if entry == former {
                continue;
            }
            if former != 0 {
                let cluster = g.cluster_index(former);
                metadata.remove(cluster);
                Unlinked { cluster, count: 1, punch: true }.push_to(&mut unlinked);
            }
            metadata.add(g.cluster_index(entry));
        }
        metadata.set_refcount_table(&g, offset, clusters);
        self.refcounts.table_offset = offset;
        // No batch is reserved before the next guest request: what the fork freed may still be read.
        self.recent = 0;
        unlinked
    }

    /// Forgets the fork: the refcounts are those in the file. `shorten`: the file may be cut to what it was.
    pub(crate) fn undo_fork(&mut self, shorten: bool) {
        let refcounts = &mut self.refcounts;
        let Some(fork) = refcounts.fork.take() else { return };
        let table = std::mem::replace(&mut refcounts.table, fork.former);
        let same = |index: u64| table.get(index as usize) == refcounts.table.get(index as usize);
        refcounts.blocks.retain(|&index, _| same(index));
        // Only blocks of the fork have changed.
        refcounts.waiting = 0;
        for (start, count) in fork.taken {
            self.fresh.stale.insert(start, count);
        }
        let storage = &self.storage;
        let shorter = storage.traits().block_device
            || (shorten
                && storage.size().is_ok_and(|now| now <= fork.length || storage.resize(fork.length).is_ok()));
        if shorter {
            self.end = fork.end;
        } else {
            // The end of the file is not zeroes: as free clusters inside it these are punched before they are used.
            self.search = self.search.min(fork.end);
        }
        if shorten {
            for cluster in fork.holes {
                self.punch(cluster, 1);
            }
        }
    }

    /// Gives the space of clusters back that became free with the fork: the switch is durable, and no request can reach
    /// them.
    pub(crate) fn give_up(&mut self, run: Unlinked) {
        self.punch(run.cluster, run.count);
        self.search = self.search.min(run.cluster);
    }
}
