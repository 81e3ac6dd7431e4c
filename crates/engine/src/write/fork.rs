//! Refcounts that change beside those in the file, for a change of the image that becomes true as a whole, with one
//! write of the header.
//!
//! From [`Allocator::fork`] on a refcount block that changes gets another place first, and the refcount table changes
//! in memory alone. New clusters are free in the file, behind everything in use, or come out of the reservations. So
//! nothing in the file refers to what is written, which may happen at any time and in any order, and
//! [`Allocator::undo_fork`] only has to forget. [`Allocator::seal_fork`] gives the table its own place; when the header
//! names it, [`Allocator::adopt_fork`] makes it the image's.

use qcow2_format::limits::MAX_REFCOUNT_TABLE_BYTES;

use super::alloc::Allocator;
use super::overlap::MetadataMap;
use super::quarantine::Unlinked;
use super::refcounts::{Block, PIECE, Refcounts, Write};
use crate::image::on_file;
use crate::{Error, ErrorKind, Result, StorageExt};

/// What a fork needs to become the image's refcounts, or to be forgotten.
#[derive(Debug)]
pub(super) struct Fork {
    /// The refcount table in the file.
    former: Vec<u64>,
    /// Behind everything in use, and the length of the file, when the fork began.
    end: u64,
    length: u64,
    /// Reservations that were taken: first and number of clusters.
    taken: Vec<(u64, u64)>,
    /// First and number of clusters of the new table.
    table: Option<(u64, u64)>,
}

impl Refcounts {
    /// Whether the block with this index may change: outside a fork always, inside one if its place is the fork's.
    pub(super) fn may_change(&self, index: u64) -> bool {
        self.fork.as_ref().is_none_or(|_| self.is_forked(index))
    }

    /// Whether the block with this index exists and its place is the fork's.
    fn is_forked(&self, index: u64) -> bool {
        let Some(fork) = &self.fork else { return false };
        let former = fork.former.get(index as usize).copied().unwrap_or(0);
        self.table.get(index as usize).is_some_and(|&entry| entry != 0 && entry != former)
    }

    /// Gives the block with this index the cluster `place`, which is counted or about to be; makes it if there is none.
    fn fork_block(&mut self, index: u64, place: u64) -> Result<()> {
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
            return Err(on_file(&*self.storage, Error::new(ErrorKind::Limit, message)));
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
        let (former, end) = (self.refcounts.table.clone(), self.end);
        self.refcounts.fork = Some(Fork { former, end, length, taken: Vec::new(), table: None });
        Ok(())
    }

    /// Takes `count` contiguous clusters for something new in the fork.
    pub(crate) fn allocate_beside(&mut self, count: u64) -> Result<u64> {
        if let Some(start) = self.take_reserved(count) {
            return Ok(start);
        }
        if count == 1 {
            return self.one_at_the_end();
        }
        let g = self.geometry;
        loop {
            let (first, last) = (self.end, self.end + count - 1);
            if last >= self.room()? {
                return Err(self.no_room());
            }
            let mut blocks = g.refcount_table_index(first)..=g.refcount_table_index(last);
            if let Some(index) = blocks.find(|&index| !self.refcounts.is_forked(index)) {
                // What counts the run lies in front of it.
                self.fork_block(index)?;
                continue;
            }
            match self.last_in_use(&(first..last + 1))? {
                Some(used) => self.end = used + 1,
                None => {
                    (first..=last).try_for_each(|cluster| self.refcounts.set(cluster, 1))?;
                    self.end = last + 1;
                    return Ok(first);
                }
            }
        }
    }

    /// Counts one reference of a cluster more, or one less, in the fork; returns the refcount. At 0 the cluster is free
    /// in the new image, and still what it was in the old one: nobody may allocate before the switch is durable and what
    /// planned before has ended.
    pub(crate) fn count_beside(&mut self, cluster: u64, more: bool) -> Result<u64> {
        let index = self.geometry.refcount_table_index(cluster);
        if !self.refcounts.is_forked(index) && self.refcounts.is_covered(cluster) {
            self.fork_block(index)?;
        }
        if more { self.refcounts.increment(cluster) } else { self.refcounts.decrement(cluster) }
    }

    /// Gives the table its place, and returns all that must be durable before the header may name it.
    pub(crate) fn seal_fork(&mut self) -> Result<Vec<Write>> {
        loop {
            // Allocating may make the table grow.
            let clusters = self.refcounts.table_clusters().1;
            let placed = self.refcounts.fork.as_ref().and_then(|fork| fork.table);
            if let Some((first, count)) = placed {
                if count == clusters {
                    let mut writes = self.refcounts.take_dirty();
                    let bytes = self.refcounts.table.iter().flat_map(|e| e.to_be_bytes()).collect();
                    writes.push((first * self.geometry.cluster_size(), bytes));
                    return Ok(writes);
                }
                for cluster in first..first + count {
                    self.count_beside(cluster, false)?;
                }
            }
            let first = self.allocate_beside(clusters)?;
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
            let former = fork.former.get(index).copied().unwrap_or(0);
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
    }

    /// Gives the space of clusters back that became free with the fork: the switch is durable, and no request can reach
    /// them.
    pub(crate) fn give_up(&mut self, run: Unlinked) {
        self.punch(run.cluster, run.count);
        self.search = self.search.min(run.cluster);
    }

    /// Clusters of a reservation: counted in the file and in the fork.
    fn take_reserved(&mut self, count: u64) -> Option<u64> {
        let pools = [&mut self.ready, &mut self.fresh];
        let start = pools
            .into_iter()
            .find_map(|pool| pool.clean.take_exact(count).or_else(|| pool.stale.take_exact(count)))?;
        if let Some(fork) = &mut self.refcounts.fork {
            fork.taken.push((start, count));
        }
        Some(start)
    }

    /// Takes the next free cluster behind everything in use. Blocks that count it get their places there as well.
    fn one_at_the_end(&mut self) -> Result<u64> {
        loop {
            let cluster = self.end;
            if cluster >= self.room()? {
                return Err(self.no_room());
            }
            self.end += 1;
            if self.refcounts.get(cluster)? != 0 {
                // Leaked by a crash.
                continue;
            }
            let index = self.geometry.refcount_table_index(cluster);
            let counted = self.refcounts.is_forked(index);
            if !counted {
                self.refcounts.fork_block(index, cluster)?;
            }
            self.refcounts.set(cluster, 1)?;
            if counted {
                return Ok(cluster);
            }
        }
    }

    /// Gives the block with this index a place of its own.
    fn fork_block(&mut self, index: u64) -> Result<()> {
        let place = self.allocate_beside(1)?;
        if self.refcounts.is_forked(index) {
            // It got one when the place was counted.
            return self.refcounts.set(place, 0);
        }
        self.refcounts.fork_block(index, place)
    }
}
