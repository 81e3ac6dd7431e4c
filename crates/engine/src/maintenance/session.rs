//! Having an image to oneself, and the primitives of changing it.

use std::ops::Range;

use parking_lot::RwLockWriteGuard;
use qcow2_core::WriteBehind;
use qcow2_format::Geometry;

use crate::alloc::Unlinked;
use crate::image::{Image, Qcow2};
use crate::write::Active;
use crate::writer::Writer;
use crate::{Error, ErrorKind, Job, Mem, MemMut, Result, StorageExt};

/// Bytes of refcount blocks that may wait to be written.
pub(super) const WAITING_LIMIT: usize = 16 << 20;
/// Bytes that are written as a whole or not at all.
pub(crate) const SECTOR: u64 = 512;
/// Clusters that may wait to lose a reference.
const UNLINKED_LIMIT: usize = 1 << 16;
/// Zeroes at the end of a table that are worth a hole, in bytes.
const HOLE: usize = 64 << 10;
/// Bytes that a file system gives space to at once.
const BLOCK: usize = 4096;

/// Exclusive use of the top layer. Everything written by guests before is durable when it begins.
pub(crate) struct Session<'a> {
    pub(crate) disk: &'a Image,
    pub(crate) image: &'a Qcow2,
    pub(crate) writer: &'a Writer,
    /// What cancels it, before it has changed anything that is not beside the image.
    job: Option<&'a Job>,
    /// What is written beside the image can be all tables of a large disk.
    pub(super) behind: WriteBehind<'a>,
    _alone: RwLockWriteGuard<'a, ()>,
}

impl<'a> Session<'a> {
    /// Waits for guest writes in flight, keeps later ones waiting, and flushes.
    ///
    /// # Errors
    /// `ReadOnly`, `UnsupportedFeature` for a raw disk, and what a flush can fail with.
    pub(crate) fn begin(disk: &'a Image) -> Result<Self> {
        let Some(image) = disk.top_qcow2() else {
            let message = "a raw disk has no snapshots, bitmaps or tables";
            return Err(Error::new(ErrorKind::UnsupportedFeature, message));
        };
        let writer = image.writer()?;
        let alone = writer.gate.write();
        writer.begin(image)?;
        Active { disk, image, writer }.flush_metadata()?;
        let behind = WriteBehind::new(vec![image.storage()]);
        Ok(Self { disk, image, writer, job: None, behind, _alone: alone })
    }

    /// As [`Session::begin`], for work that `job` cancels at its checkpoints.
    pub(crate) fn begin_as(disk: &'a Image, job: &'a Job) -> Result<Self> {
        let session = Self::begin(disk)?;
        Ok(Self { job: Some(job), ..session })
    }

    /// `Err(Aborted)` once cancelled: for the time in which nothing refers to what was written.
    pub(crate) fn checkpoint(&self) -> Result<()> {
        self.job.map_or(Ok(()), Job::checkpoint)
    }

    pub(crate) fn active(&self) -> Active<'a> {
        Active { disk: self.disk, image: self.image, writer: self.writer }
    }

    pub(crate) fn geometry(&self) -> Geometry {
        *self.image.geometry()
    }

    /// Makes all that was written durable, refcounts among it; clusters that lost references before are freed.
    pub(crate) fn barrier(&self) -> Result<()> {
        if self.image.header().has_data_file() {
            // A flush that finds no waiting metadata syncs the data file alone; a session writes more than that. First,
            // because the flush frees what lost its references.
            self.image.storage().flush().map_err(|e| self.writer.poison(e))?;
        }
        self.active().flush_metadata()?;
        self.writer.drain()?;
        if self.writer.with_alloc(|alloc, _| Ok(alloc.refcounts.waiting_bytes()))? > 0 {
            self.active().flush_metadata()?;
        }
        Ok(())
    }

    /// Before space of an external data file is given up that nothing refers to any more, durably: a read that planned
    /// before finds zeroes in a hole, but not behind a door.
    pub(crate) fn end_reads(&self) -> Result<()> {
        if self.image.host_is_guest() { Ok(()) } else { self.writer.end_reads() }
    }

    /// Allocates contiguous clusters for `bytes` (at least one cluster); returns their host offset. Durable with the
    /// next barrier.
    pub(crate) fn allocate(&self, bytes: u64) -> Result<u64> {
        let g = self.geometry();
        let clusters = g.clusters_for(bytes).max(1);
        let cluster =
            self.writer.with_alloc(|alloc, metadata| alloc.allocate_contiguous(clusters, metadata))?;
        Ok(cluster * g.cluster_size())
    }

    /// Gives clusters that were allocated in this session back, after an error: nothing refers to them.
    pub(crate) fn abandon(&self, offset: u64, bytes: u64) {
        self.unlink(offset, bytes);
    }

    /// Writes `bytes` to clusters of this session that nothing refers to yet, the rest of the last one as zeroes. A full disk
    /// harms nothing there: they are given back, and the image goes on.
    pub(crate) fn write_table(&self, offset: u64, mut bytes: Vec<u8>) -> Result<()> {
        let (g, length) = (self.geometry(), bytes.len() as u64);
        let whole = g.clusters_for(length) * g.cluster_size();
        bytes.resize(whole as usize, 0);
        self.writer.check()?;
        let storage = self.image.storage();
        let used = bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
        let (front, rest) = bytes.split_at(used.next_multiple_of(BLOCK).min(bytes.len()));
        if rest.len() < HOLE {
            return self.write_filled(offset, &bytes);
        }
        let written = storage
            .write_all_at(Mem::from(front), offset)
            .and_then(|()| storage.zero(offset + front.len() as u64, rest.len() as u64, true));
        self.written_beside(offset, whole, written)
    }

    /// As [`Session::write_table`], for an L2 table: all of it has space, so that no flush of entries that it gets later fails on a
    /// file system that is full.
    pub(crate) fn write_l2_table(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.writer.check()?;
        self.write_filled(offset, bytes)
    }

    fn write_filled(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        let written = self.image.storage().write_all_at(Mem::from(bytes), offset);
        self.written_beside(offset, bytes.len() as u64, written)
    }

    /// What was written to clusters that nothing refers to is there, or the clusters are given back.
    fn written_beside(&self, offset: u64, whole: u64, written: Result<()>) -> Result<()> {
        written.map_err(|error| {
            self.abandon(offset, whole);
            self.writer.poison_unless_full(error)
        })?;
        // A read that was slow may remember an L2 table that was there.
        self.image.forget_slices(offset, whole);
        Ok(())
    }

    /// Writes metadata; a failure poisons the image, which then takes no more writes.
    pub(crate) fn write(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.writer.check()?;
        let written = self.image.storage().write_all_at(Mem::from(bytes), offset);
        written.map_err(|e| self.writer.poison(e))
    }

    /// Turns `old`, which is at `offset`, into `new`, sector by sector: what is the same is not written. Zeroes may be a hole, and
    /// a file system that is full has no space for others there.
    pub(crate) fn write_changed(&self, offset: u64, old: &[u8], new: &[u8]) -> Result<()> {
        let mut at = offset;
        let (mut old, mut new) = (old, new);
        while !new.is_empty() {
            let length = ((SECTOR - at % SECTOR) as usize).min(new.len());
            let ((was, rest_of_old), (is, rest)) =
                (old.split_at(length.min(old.len())), new.split_at(length));
            if was != is {
                self.write(at, is)?;
            }
            (old, new) = (rest_of_old, rest);
            at += length as u64;
        }
        Ok(())
    }

    /// Reads `bytes.len()` bytes of metadata.
    pub(crate) fn read(&self, offset: u64, bytes: &mut [u8]) -> Result<()> {
        self.image.storage().read_exact_at(MemMut::from(bytes), offset)
    }

    /// Takes a reference away from the clusters of a range: they are freed behind the next barriers, once no request
    /// can reach them.
    pub(crate) fn unlink(&self, offset: u64, bytes: u64) {
        let g = self.geometry();
        let count = g.clusters_for(bytes);
        if count > 0 {
            let run = Unlinked { cluster: g.cluster_index(offset), count, punch: true };
            self.image.changing().unlink(run);
        }
    }

    /// Frees what waits when that is much.
    pub(crate) fn limit_unlinked(&self) -> Result<()> {
        let waiting = self.image.mapping().unlinked();
        if waiting > UNLINKED_LIMIT { self.barrier() } else { Ok(()) }
    }

    /// Sets the refcount of a cluster to what its references need. Durable with the next barrier.
    pub(crate) fn set_refcount(&self, cluster: u64, count: u64) -> Result<()> {
        let waiting = self.writer.with_alloc(|alloc, _| {
            alloc.refcounts.set(cluster, count)?;
            Ok(alloc.refcounts.waiting_bytes())
        })?;
        if waiting > WAITING_LIMIT { self.active().flush_metadata() } else { Ok(()) }
    }

    /// Calls `visit` with each cluster of a run and its refcount. It takes no lock: the allocation's is held.
    pub(crate) fn for_counts(&self, run: Range<u64>, visit: impl FnMut(u64, u64)) -> Result<()> {
        self.writer.with_alloc(|alloc, _| alloc.refcounts.for_counts(run, visit))
    }

    /// The refcount of a cluster.
    pub(crate) fn refcount(&self, cluster: u64) -> Result<u64> {
        self.writer.with_alloc(|alloc, _| alloc.refcounts.get(cluster))
    }
}
