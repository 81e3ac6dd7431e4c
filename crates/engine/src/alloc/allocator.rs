//! Host cluster allocation: reservations, and what becomes of freed clusters.
//!
//! Clusters are handed out from pools whose refcount is already 1 in the file (`ready`) or will be when the next flush
//! is done (`fresh`: what uses them makes that flush sync twice). Reservations are made a batch at a time and topped up
//! inside guest flushes, whose sync they share. A freed cluster keeps its refcount of 1 and goes back to a pool; only
//! what the pools do not want is written down as free. Closing gives everything back.

use std::ops::Range;
use std::sync::Arc;

use qcow2_format::Geometry;

use super::overlap::MetadataMap;
use super::quarantine::{Quarantine, Unlinked};
use super::ranges::Ranges;
use super::refcounts::{Moved, Refcounts, Write};
use crate::storage::{Operation, no_space};
use crate::{Error, ErrorKind, Result, Storage, StorageExt};

/// Bytes of clusters reserved at least, and at most, in one batch.
const BATCH_BYTES: std::ops::RangeInclusive<u64> = (16 << 20)..=(128 << 20);
/// Bytes of clusters that the pools keep; what is freed beyond goes back to the image.
const POOL_BYTES: u64 = 256 << 20;
/// Bytes of lazy refcounts that may wait.
const LAZY_BYTES: usize = 256 << 10;
/// Refcounts looked at in one search for free clusters inside the file.
const SEARCH_BUDGET: u64 = 32 << 10;

/// Clusters by what they hold in the file: nothing but zeroes, or bytes of former use.
#[derive(Debug, Default)]
pub(super) struct Pool {
    pub(super) clean: Ranges,
    pub(super) stale: Ranges,
}

impl Pool {
    fn total(&self) -> u64 {
        self.clean.total() + self.stale.total()
    }
    fn of(&mut self, clean: bool) -> &mut Ranges {
        if clean { &mut self.clean } else { &mut self.stale }
    }
}

/// Where new clusters should be: neighbours of the guest as neighbours of the host, so that one call writes both.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Wish {
    /// Host clusters that continue the guest's neighbours, the better one first.
    pub(crate) near: [Option<u64>; 2],
    /// Else: place of the first cluster in a chunk of guest clusters. A chunk of host clusters that is free as a whole
    /// keeps room for the neighbours to come. `None`: anywhere.
    pub(crate) within: Option<u64>,
    /// They are mapped and not written to: nothing asks for their space.
    pub(crate) sparse: bool,
}

/// Guest bytes that get neighbouring host clusters where that costs nothing.
const CHUNK_BYTES: u64 = 512 << 10;

/// Clusters in a chunk.
pub(crate) fn chunk_clusters(g: &Geometry) -> u64 {
    (CHUNK_BYTES / g.cluster_size()).clamp(1, 8)
}

/// Contiguous clusters handed out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Allocation {
    /// First host cluster.
    pub(crate) cluster: u64,
    /// Number of clusters.
    pub(crate) count: u64,
    /// Their bytes in the file are known to be zero.
    pub(crate) host_zero: bool,
    /// Their refcount, and that their bytes are zero, is durable.
    pub(crate) durable: bool,
}

#[derive(Debug)]
pub(crate) struct Allocator {
    pub(crate) refcounts: Refcounts,
    pub(super) storage: Arc<dyn Storage>,
    pub(super) geometry: Geometry,
    pub(super) ready: Pool,
    pub(super) fresh: Pool,
    /// Reservations that the running flush makes durable.
    settling: Pool,
    quarantine: Quarantine,
    /// First cluster behind everything in use.
    pub(super) end: u64,
    /// Where the search for free clusters inside the file goes on.
    pub(super) search: u64,
    /// Behind the last allocation: going on there keeps the file in guest order.
    next: u64,
    /// The first free clusters are taken, wherever the guest's neighbours are, and none are reserved ahead.
    first_fit: bool,
    /// The start of a chunk was placed. The first one begins at the first free cluster, so that nothing in front of it stays a hole.
    chunked: bool,
    /// Clusters handed out since the last flush, to be written to.
    pub(super) recent: u64,
    /// Host cluster that takes the next compressed data, and the bytes used in it.
    pub(crate) packing: Option<(u64, u64)>,
}

/// Takes from one set what comes nearest to the wish.
fn take(ranges: &mut Ranges, count: u64, wish: Wish, chunk: u64, next: u64) -> Option<(u64, u64)> {
    for at in wish.near.into_iter().flatten() {
        if let Some(taken) = ranges.take_at(count, at) {
            return Some(taken);
        }
    }
    let aligned = wish.within.and_then(|within| ranges.take_aligned(count, chunk, within));
    aligned.or_else(|| ranges.take(count, next))
}

impl Allocator {
    pub(crate) fn new(
        storage: &Arc<dyn Storage>,
        mut refcounts: Refcounts,
        geometry: Geometry,
    ) -> Result<Self> {
        let end = match storage.traits().block_device {
            true => refcounts.end_of_use()?,
            false => geometry.clusters_for(storage.size()?),
        };
        Ok(Self {
            refcounts,
            storage: Arc::clone(storage),
            geometry,
            ready: Pool::default(),
            fresh: Pool::default(),
            settling: Pool::default(),
            quarantine: Quarantine::default(),
            end,
            search: 0,
            next: 0,
            first_fit: false,
            chunked: false,
            recent: 0,
            packing: None,
        })
    }

    /// The same with [`WriteOptions::first_fit`](crate::WriteOptions::first_fit) as given.
    pub(crate) fn with_first_fit(self, first_fit: bool) -> Self {
        Self { first_fit, ..self }
    }

    /// Takes at least 1 and at most `count` contiguous clusters. `covered` says that every byte of them will be written
    /// and synced before it is linked: then clusters of former use do as well as clean ones, and are taken first.
    pub(crate) fn allocate(
        &mut self,
        count: u64,
        covered: bool,
        wish: Wish,
        metadata: &mut MetadataMap,
    ) -> Result<Allocation> {
        let chunk = chunk_clusters(&self.geometry);
        let mut wish = if self.first_fit { Wish { sparse: wish.sparse, ..Wish::default() } } else { wish };
        if wish.within == Some(0) && !std::mem::replace(&mut self.chunked, true) {
            wish.within = None;
        }
        let order = if covered { [false, true] } else { [true, false] };
        loop {
            for durable in [true, false] {
                for clean in order {
                    let pool = if durable { &mut self.ready } else { &mut self.fresh };
                    if let Some((cluster, count)) = take(pool.of(clean), count, wish, chunk, self.next) {
                        self.next = if self.first_fit { 0 } else { cluster + count };
                        self.recent += if wish.sparse { 0 } else { count };
                        return Ok(Allocation { cluster, count, host_zero: clean, durable });
                    }
                }
            }
            self.reserve(count.max(self.batch()), metadata)?;
        }
    }

    /// The first of `count` free clusters behind everything in use, with refcount blocks that cover them all: what counts
    /// a run that is longer than a block covers lies in front of it.
    pub(super) fn cover_run(&mut self, count: u64, metadata: &mut MetadataMap) -> Result<u64> {
        let g = self.geometry;
        loop {
            let start = self.cover_end(metadata)?;
            let run = start..start + count;
            let used = self.last_in_use(&run)?;
            let indices = g.refcount_table_index(run.start)..=g.refcount_table_index(run.end - 1);
            let Some(index) = indices.clone().find(|&index| !self.refcounts.has_block(index)) else {
                match used {
                    Some(cluster) => self.end = cluster + 1,
                    None => return Ok(start),
                }
                continue;
            };
            if self.refcounts.get(start)? != 0 {
                self.end = start + 1;
            } else if self.refcounts.fits_table(index) {
                self.refcounts.cover_from(index, start)?;
                metadata.add(start);
                self.end = start + 1;
            } else {
                // The larger table, and what counts it, lie where it begins to be needed.
                self.end = index * g.refcount_block_entries();
            }
        }
    }

    /// The last cluster of a run that has a refcount.
    pub(super) fn last_in_use(&mut self, run: &Range<u64>) -> Result<Option<u64>> {
        for cluster in run.clone().rev() {
            if self.refcounts.get(cluster)? != 0 {
                return Ok(Some(cluster));
            }
        }
        Ok(None)
    }

    /// Gives back clusters that were handed out and not linked. Their contents are unknown now.
    pub(crate) fn abandon(&mut self, allocation: Allocation) {
        let pool = if allocation.durable { &mut self.ready } else { &mut self.fresh };
        pool.stale.insert(allocation.cluster, allocation.count);
    }

    /// Clusters to reserve ahead.
    fn batch(&self) -> u64 {
        if self.first_fit {
            return 0;
        }
        let bytes = |b: &u64| (b / self.geometry.cluster_size()).max(4);
        (self.recent * 2).clamp(bytes(BATCH_BYTES.start()), bytes(BATCH_BYTES.end()))
    }

    /// Reserves clusters: free ones inside the file where a short search finds some, else behind its end.
    fn reserve(&mut self, count: u64, metadata: &mut MetadataMap) -> Result<()> {
        if self.reserve_inside(count, metadata)? > 0 { Ok(()) } else { self.reserve_end(count, metadata) }
    }

    /// Reserves the first run of free clusters inside the file that a short search finds, at most `count`; returns how many.
    fn reserve_inside(&mut self, count: u64, metadata: &mut MetadataMap) -> Result<u64> {
        while self.search < self.end {
            let (found, next) = self.refcounts.find_free(self.search, self.end, count, SEARCH_BUDGET)?;
            self.search = next;
            let Some((start, found)) = found else { break };
            if !self.refcounts.is_covered(start) {
                // Clusters of the file without a refcount block: an odd image; leave them alone.
                continue;
            }
            let usable = (start..start + found).take_while(|&c| self.refcounts.is_covered(c)).count() as u64;
            if let Some(name) = metadata.hit(start, start + usable) {
                let message = format!("the {name} has a refcount of 0");
                let error = Error::new(ErrorKind::Corrupt, message);
                let error = self.storage.located(error);
                return Err(error.with_offset(start * self.geometry.cluster_size()));
            }
            for cluster in start..start + usable {
                self.refcounts.set(cluster, 1)?;
            }
            let clean = self.punch(start, usable);
            self.fresh.of(clean).insert(start, usable);
            return Ok(usable);
        }
        Ok(0)
    }

    /// Reserves clusters inside the file where those that are reserved have no room for neighbours any more: what is left of them lies
    /// between the guest's neighbours, and a request that gets it is written in pieces.
    fn reserve_room(&mut self, target: u64, metadata: &mut MetadataMap) -> Result<()> {
        let chunk = chunk_clusters(&self.geometry);
        let has_room = self.ready.clean.has_aligned(chunk) || self.fresh.clean.has_aligned(chunk);
        // Never so many that what is beyond the pools' limit comes back to be found again.
        let most = POOL_BYTES / 2 / self.geometry.cluster_size();
        if has_room || self.ready.total() + self.fresh.total() > most {
            return Ok(());
        }
        let mut missing = target;
        while missing > 0 {
            match self.reserve_inside(missing, metadata)? {
                0 => break,
                found => missing = missing.saturating_sub(found),
            }
        }
        Ok(())
    }

    fn reserve_end(&mut self, count: u64, metadata: &mut MetadataMap) -> Result<()> {
        if self.first_fit && self.cover_behind(count, metadata)? {
            return self.reserve(count, metadata);
        }
        let start = self.cover_end(metadata)?;
        let stop = start.saturating_add(count).min(self.room()?);
        if start >= stop {
            return Err(self.no_room());
        }
        let mut end = start;
        while end < stop && self.refcounts.is_covered(end) && self.refcounts.get(end)? == 0 {
            end += 1;
        }
        if end == start {
            // A cluster behind the end with a refcount: leaked by a crash. Go on behind it.
            self.end = start + 1;
            return Ok(());
        }
        // First what can fail for want of space.
        let clean = self.extend(end)?;
        for cluster in start..end {
            self.refcounts.set(cluster, 1)?;
        }
        self.end = end;
        self.fresh.of(clean).insert(start, end - start);
        Ok(())
    }

    /// Puts the refcount block that a run of `count` clusters at the end needs behind the run, as QEMU does, where it counts itself
    /// there. The run is free space inside the file then. Returns whether there was one to put there.
    fn cover_behind(&mut self, count: u64, metadata: &mut MetadataMap) -> Result<bool> {
        let start = self.end;
        let Some(place) = start.checked_add(count).filter(|place| *place > start) else { return Ok(false) };
        let index = |cluster| self.geometry.refcount_table_index(cluster);
        let (first, last, own) = (index(start), index(place - 1), index(place));
        let missing = last == own && !self.refcounts.has_block(own) && self.refcounts.fits_table(own);
        let alone = (first..last).all(|index| self.refcounts.has_block(index));
        // Where there is no room for all, the run gets less, and the block lies in front of it.
        if !missing || !alone || place >= self.room()? {
            return Ok(false);
        }
        self.refcounts.cover(place)?;
        metadata.add(place);
        self.end = place + 1;
        self.search = self.search.min(start);
        Ok(true)
    }

    /// The first free cluster behind everything in use, with a refcount block that covers it.
    fn cover_end(&mut self, metadata: &mut MetadataMap) -> Result<u64> {
        while !self.refcounts.is_covered(self.end) {
            let covered = self.refcounts.cover(self.end)?;
            let first = self.end;
            for cluster in first..first + covered.clusters {
                metadata.add(cluster);
            }
            self.end += covered.clusters;
            if let Some(Moved { old, table_offset, table_clusters }) = covered.moved {
                metadata.set_refcount_table(&self.geometry, table_offset.0, table_clusters);
                // The header no longer names the old table, durably.
                for cluster in old.0..old.0 + old.1 {
                    self.refcounts.decrement(cluster)?;
                }
                self.search = self.search.min(old.0);
            }
        }
        Ok(self.end)
    }

    /// Clusters that there is room for. A device must not be found full by the write of a table, which poisons.
    pub(super) fn room(&self) -> Result<u64> {
        match self.storage.traits().block_device {
            true => Ok(self.storage.size()? / self.geometry.cluster_size()),
            false => Ok(u64::MAX),
        }
    }

    pub(super) fn no_room(&self) -> Error {
        self.storage
            .failure(no_space(), Operation::Write)
            .with_offset(self.end * self.geometry.cluster_size())
    }

    /// Extends the file over the reservations, so that they read as zeroes and later writes do not grow it. A file that
    /// grows fast gets their space, too, where that makes writes cheaper; closing gives back what is left. False where
    /// they may hold anything: a block device.
    fn extend(&self, end: u64) -> Result<bool> {
        if self.storage.traits().block_device {
            return Ok(false);
        }
        let bytes = end * self.geometry.cluster_size();
        let size = self.storage.size()?;
        let missing = bytes.saturating_sub(size);
        let fast = self.recent * self.geometry.cluster_size() >= *BATCH_BYTES.start();
        if missing > 0 && !(fast && self.storage.allocate_ahead(size, missing).is_ok()) {
            self.storage.resize(bytes)?;
        }
        Ok(true)
    }

    /// Frees the space of clusters that nothing refers to; true if they read as zeroes now.
    pub(super) fn punch(&self, cluster: u64, count: u64) -> bool {
        let size = self.geometry.cluster_size();
        self.storage.write_zeroes(cluster * size, count * size, true).is_ok()
    }

    /// Adds a reference to a cluster that has one already. It is not durable before the next flush.
    pub(crate) fn share(&mut self, cluster: u64) -> Result<()> {
        self.refcounts.increment(cluster).map(|_| ())
    }

    /// Whether one more reference to `cluster` fits the refcount width.
    pub(crate) fn can_share(&mut self, cluster: u64) -> Result<bool> {
        Ok(self.refcounts.get(cluster)? < self.geometry.refcount_max())
    }

    /// Tops up the reservations and takes the refcounts to write: the first step of a flush. `lazy`: none, unless many wait.
    pub(crate) fn begin_flush(&mut self, metadata: &mut MetadataMap, lazy: bool) -> Result<Vec<Write>> {
        let target = self.batch();
        if self.recent > 0 && self.ready.clean.total() + self.fresh.clean.total() < target / 2 {
            match self.reserve(target, metadata) {
                // No room for later requests: what is there is written all the same.
                Err(error) if error.is_no_room() => {}
                reserved => reserved?,
            }
        }
        if self.recent > 0 {
            self.reserve_room(target, metadata)?;
        }
        self.recent = 0;
        for clean in [true, false] {
            for (start, count) in self.fresh.of(clean).drain() {
                self.settling.of(clean).insert(start, count);
            }
        }
        let late = lazy && self.refcounts.waiting_bytes() <= LAZY_BYTES;
        Ok(if late { Vec::new() } else { self.refcounts.take_dirty() })
    }

    /// The flush is done: its reservations are durable, its unlinked clusters are in quarantine, and what no request
    /// can reach is reused.
    pub(crate) fn end_flush(&mut self, epoch: Arc<()>, unlinked: Vec<Unlinked>) -> Result<()> {
        self.refcounts.note_written();
        for clean in [true, false] {
            for (start, count) in self.settling.of(clean).drain() {
                self.ready.of(clean).insert(start, count);
            }
        }
        self.quarantine.push(epoch, unlinked);
        for run in self.quarantine.take_reachless() {
            self.reuse(run)?;
        }
        let most = (POOL_BYTES / self.geometry.cluster_size()).max(64);
        while self.ready.total() > most {
            let clean = self.ready.stale.total() == 0;
            let Some((start, count)) = self.ready.of(clean).pop_last() else { break };
            self.release(start, count)?;
        }
        Ok(())
    }

    /// Reuses what no request can reach any more; true when nothing is left in quarantine.
    pub(crate) fn drain(&mut self) -> Result<bool> {
        for run in self.quarantine.take_reachless() {
            self.reuse(run)?;
        }
        Ok(self.quarantine.is_empty())
    }

    /// As `drain`; true when every request is over that planned before the last flush.
    pub(crate) fn drain_requests(&mut self) -> Result<bool> {
        self.drain()?;
        Ok(self.quarantine.is_past())
    }

    /// Drops the reference of clusters that lost it. Those without another one go to a pool, refcount and all.
    fn reuse(&mut self, run: Unlinked) -> Result<()> {
        let mut free: Option<(u64, u64)> = None;
        for cluster in run.cluster..run.cluster + run.count {
            if self.refcounts.get(cluster)? != 1 {
                self.refcounts.decrement(cluster)?;
                continue;
            }
            if self.packing.is_some_and(|(packing, _)| packing == cluster) {
                self.packing = None;
            }
            match &mut free {
                Some((start, count)) if *start + *count == cluster => *count += 1,
                _ => {
                    if let Some((start, count)) = free.replace((cluster, 1)) {
                        self.pool_freed(start, count, run.punch);
                    }
                }
            }
        }
        if let Some((start, count)) = free {
            self.pool_freed(start, count, run.punch);
        }
        Ok(())
    }

    fn pool_freed(&mut self, start: u64, count: u64, punch: bool) {
        if punch && self.punch(start, count) {
            // That they read as zeroes is durable with the next flush.
            self.fresh.clean.insert(start, count);
        } else {
            self.ready.stale.insert(start, count);
        }
    }

    fn release(&mut self, start: u64, count: u64) -> Result<()> {
        for cluster in start..start + count {
            self.refcounts.set(cluster, 0)?;
        }
        self.search = self.search.min(start);
        Ok(())
    }

    /// Drops one reference of a cluster whose loss of it is durable already, and that no request can reach.
    pub(crate) fn drop_reference(&mut self, cluster: u64) -> Result<()> {
        self.reuse(Unlinked { cluster, count: 1, punch: false })
    }

    /// The first run of free clusters in `from..end`, and where to go on.
    pub(crate) fn find_free(&mut self, from: u64, end: u64) -> Result<(Option<(u64, u64)>, u64)> {
        self.refcounts.find_free(from, end, u64::MAX, u64::MAX)
    }

    /// Gives every reservation back: nothing is in quarantine, and nothing is being written. Returns the length that
    /// the file needs.
    pub(crate) fn give_back(&mut self) -> Result<u64> {
        debug_assert!(self.quarantine.is_empty());
        for pool in [&mut self.ready, &mut self.fresh, &mut self.settling] {
            let clean: Vec<_> = pool.clean.drain().collect();
            let stale: Vec<_> = pool.stale.drain().collect();
            for (start, count) in clean.into_iter().chain(stale) {
                for cluster in start..start + count {
                    self.refcounts.set(cluster, 0)?;
                }
            }
        }
        while self.end > 1 && self.refcounts.get(self.end - 1)? == 0 {
            self.end -= 1;
        }
        self.search = 0;
        Ok(self.end * self.geometry.cluster_size())
    }
}
