//! Places for what is written beside other structures: the lowest that are free, so that a file does not grow where
//! structures move.

use std::ops::Range;

use super::allocator::Allocator;
use super::overlap::MetadataMap;
use super::refcounts::Refcounts;
use crate::{MemMut, Result, StorageExt};
use qcow2_format::refcount;

/// Where contiguous clusters are to be had.
enum Place {
    /// Counted already.
    Reserved,
    /// Free inside the file.
    Free(u64),
}

impl Refcounts {
    /// The first of the lowest `count` contiguous clusters in `from..end` that nothing uses: inside a fork neither the
    /// fork nor the image in the file. What no block counts is left alone.
    fn lowest_unused(&mut self, count: u64, from: u64, end: u64) -> Result<Option<u64>> {
        let g = self.geometry;
        let (mut start, mut at) = (from, from);
        while at < end {
            let index = g.refcount_table_index(at);
            let stop = end.min((index + 1).saturating_mul(g.refcount_block_entries()));
            if !self.has_block(index) {
                (start, at) = (stop, stop);
                continue;
            }
            let former = self.former_block(index)?;
            let order = g.refcount_order();
            let counted = |bytes: &[u8], cluster| {
                refcount::get(bytes, g.refcount_block_index(cluster) as usize, order).unwrap_or(0) != 0
            };
            let block = self.block(at)?.map(|block| block.bytes.as_slice()).unwrap_or_default();
            let mut found = None;
            while at < stop && found.is_none() {
                if counted(block, at) || former.as_ref().is_some_and(|(_, bytes)| counted(bytes, at)) {
                    start = at + 1;
                } else if at + 1 - start == count {
                    found = Some(start);
                }
                at += 1;
            }
            if let Some(fork) = &mut self.fork {
                fork.looked_at = former;
            }
            if found.is_some() {
                return Ok(found);
            }
        }
        Ok(None)
    }

    /// The block with this index as it is in the file, where the fork has another one.
    fn former_block(&mut self, index: u64) -> Result<Option<(u64, Vec<u8>)>> {
        let forked = self.is_forked(index);
        let Some(fork) = self.fork.as_mut().filter(|_| forked) else { return Ok(None) };
        if let Some(kept) = fork.looked_at.take_if(|kept| kept.0 == index) {
            return Ok(Some(kept));
        }
        let offset = fork.former(index);
        if offset == 0 {
            return Ok(None);
        }
        let mut bytes = vec![0u8; self.geometry.cluster_len()];
        self.storage
            .read_exact_at(MemMut::from(&mut bytes[..]), offset)
            .map_err(|e| e.with_field("refcount block"))?;
        Ok(Some((index, bytes)))
    }
}

impl Allocator {
    /// Takes exactly `count` contiguous clusters for a table that must be contiguous: the lowest that are free or reserved,
    /// else behind everything in use. Their refcounts may not be durable before the next flush.
    pub(crate) fn allocate_contiguous(&mut self, count: u64, metadata: &mut MetadataMap) -> Result<u64> {
        let start = match self.lowest(count, self.search, metadata)? {
            Some(Place::Reserved) => {
                if let Some(start) = self.take_reserved(count) {
                    return Ok(start);
                }
                self.run_at_end(count, metadata)?
            }
            Some(Place::Free(start)) => start,
            None => self.run_at_end(count, metadata)?,
        };
        for cluster in start..start + count {
            self.refcounts.set(cluster, 1)?;
        }
        if count == 1 {
            // All below are in use.
            self.search = self.search.max(start + 1);
        }
        self.end = self.end.max(start + count);
        Ok(start)
    }

    /// Takes `count` contiguous clusters for something new in the fork.
    pub(crate) fn allocate_beside(&mut self, count: u64, metadata: &MetadataMap) -> Result<u64> {
        loop {
            let from = self.refcounts.fork.as_ref().map_or(self.search, |fork| fork.search);
            let start = match self.lowest(count, from, metadata)? {
                Some(Place::Reserved) => {
                    if let Some(start) = self.take_reserved(count) {
                        if let Some(fork) = &mut self.refcounts.fork {
                            fork.taken.push((start, count));
                        }
                        return Ok(start);
                    }
                    self.unused_at_end(count)?
                }
                Some(Place::Free(start)) => start,
                None => self.unused_at_end(count)?,
            };
            if self.claim(start, count, metadata)? {
                return Ok(start);
            }
        }
    }

    /// Gives the block with this index a place of its own.
    pub(super) fn fork_block(&mut self, index: u64, metadata: &MetadataMap) -> Result<()> {
        let place = self.allocate_beside(1, metadata)?;
        if !self.refcounts.is_forked(index) {
            return self.refcounts.fork_block(index, place);
        }
        // It got one when another place was counted.
        self.return_beside(place)
    }

    /// Gives back a cluster that the fork took last, and does not need.
    fn return_beside(&mut self, place: u64) -> Result<()> {
        let Some(fork) = &mut self.refcounts.fork else { return Ok(()) };
        if let Some((place, count)) = fork.taken.pop_if(|taken| *taken == (place, 1)) {
            // A reservation is counted in the file as well, in a block that may not be the fork's.
            self.fresh.stale.insert(place, count);
            return Ok(());
        }
        fork.search = fork.search.min(place);
        self.refcounts.set(place, 0)
    }

    /// Counts free clusters in the fork. False where a block that counts them took a place first, perhaps one of these.
    fn claim(&mut self, start: u64, count: u64, metadata: &MetadataMap) -> Result<bool> {
        let g = self.geometry;
        let mut blocks = g.refcount_table_index(start)..=g.refcount_table_index(start + count - 1);
        let missing = blocks.find(|&index| !self.refcounts.is_forked(index));
        match missing {
            // A block may count itself.
            Some(index) if count == 1 => self.refcounts.fork_block(index, start)?,
            Some(index) => {
                self.fork_block(index, metadata)?;
                return Ok(false);
            }
            None => {}
        }
        (start..start + count).try_for_each(|cluster| self.refcounts.set(cluster, 1))?;
        self.end = self.end.max(start + count);
        self.note_holes(start..start + count)?;
        if let Some(fork) = &mut self.refcounts.fork
            && count == 1
        {
            fork.search = fork.search.max(start + 1);
        }
        Ok(missing.is_none())
    }

    /// Remembers which of the clusters that the fork takes inside the file are holes: undone, it gives their space back, and
    /// leaves others theirs, which what is done in place on a full file system needs.
    fn note_holes(&mut self, clusters: Range<u64>) -> Result<()> {
        let size = self.geometry.cluster_size();
        let Some(fork) = &mut self.refcounts.fork else { return Ok(()) };
        for cluster in clusters.start..clusters.end.min(fork.end) {
            let at = cluster * size;
            let hole = self.storage.run(at..at + size)?;
            if !hole.data {
                fork.holes.push(cluster);
            }
        }
        Ok(())
    }

    /// The lowest of what is reserved and what is free from `from` on inside the file. Structures that are not counted are
    /// left alone.
    fn lowest(&mut self, count: u64, from: u64, metadata: &MetadataMap) -> Result<Option<Place>> {
        let reserved = self.reserved(count);
        let limit = reserved.map_or(self.end, |start| start.min(self.end));
        let mut at = from;
        while let Some(start) = self.refcounts.lowest_unused(count, at, limit)? {
            if metadata.hit(start, start + count).is_none() {
                return Ok(Some(Place::Free(start)));
            }
            at = start + 1;
        }
        Ok(reserved.map(|_| Place::Reserved))
    }

    /// The lowest reserved run of `count` clusters.
    fn reserved(&self, count: u64) -> Option<u64> {
        let pools = [&self.ready, &self.fresh].into_iter().flat_map(|pool| [&pool.clean, &pool.stale]);
        pools.filter_map(|ranges| ranges.first_run(count)).min()
    }

    /// Takes the lowest reserved run: it is counted already.
    fn take_reserved(&mut self, count: u64) -> Option<u64> {
        let start = self.reserved(count)?;
        let pools = [&mut self.ready, &mut self.fresh].into_iter();
        pools
            .flat_map(|pool| [&mut pool.clean, &mut pool.stale])
            .find_map(|ranges| ranges.take_at(count, start))
            .map(|taken| taken.0)
    }

    /// The first of `count` free clusters behind everything in use, for a fork.
    fn unused_at_end(&mut self, count: u64) -> Result<u64> {
        loop {
            let run = self.end..self.end + count;
            if run.end > self.room()? {
                return Err(self.no_room());
            }
            // Leaked by a crash.
            let Some(used) = self.last_in_use(&run)? else { return Ok(run.start) };
            self.end = used + 1;
        }
    }

    /// The first of `count` free clusters behind everything in use, with refcount blocks that cover them all: what counts
    /// a run that is longer than a block covers lies in front of it.
    fn run_at_end(&mut self, count: u64, metadata: &mut MetadataMap) -> Result<u64> {
        let start = self.cover_run(count, metadata)?;
        if start + count > self.room()? { Err(self.no_room()) } else { Ok(start) }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use qcow2_format::Geometry;

    use super::*;
    use crate::Storage;
    use crate::storage::MemoryStorage;

    /// An allocator of 512-byte clusters, 256 of them in a refcount block, of which the first two are counted in full but for
    /// `free`.
    fn allocator(free: u64) -> Allocator {
        let geometry = Geometry::new(9, 4, false).unwrap();
        let storage = MemoryStorage::new();
        storage.resize(512 * geometry.cluster_size()).unwrap();
        let storage: Arc<dyn Storage> = Arc::new(storage);
        let mut refcounts = Refcounts::of_blocks(&storage, geometry, 1, [2, 3]);
        for cluster in (0..512).filter(|cluster| *cluster != free) {
            refcounts.set(cluster, 1).unwrap();
        }
        Allocator::new(&storage, refcounts, geometry).unwrap()
    }

    #[test]
    fn a_block_whose_place_forks_it_leaves_a_reservation_that_another_block_counts() {
        let mut allocator = allocator(100);
        let metadata = MetadataMap::default();
        // The only free cluster is counted by the block that wants a place; the reservation by the next one.
        allocator.ready.stale.insert(400, 1);
        allocator.fork().unwrap();
        assert_eq!(allocator.count_beside(10, true, &metadata).unwrap(), 2);
        assert_eq!(allocator.refcounts.get(100).unwrap(), 1, "the block counts itself");
        assert!(!allocator.refcounts.is_forked(1), "nothing of the second block has changed");
        assert_eq!(allocator.allocate_beside(1, &metadata).unwrap(), 400, "the reservation is there still");
        allocator.undo_fork(true);
        assert_eq!(allocator.refcounts.get(10).unwrap(), 1);
        assert_eq!(allocator.refcounts.get(400).unwrap(), 1);
    }
}
