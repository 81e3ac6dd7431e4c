//! The seam between formats: whatever can be read as a disk is a [`GuestSource`].

use std::sync::Arc;

use crate::{Job, MemMut, Result, Storage};

/// What a run of guest bytes is made of, seen through the whole chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ExtentKind {
    /// Bytes are stored as they are; `host` says where.
    Data,
    /// Reads as zeroes by a zero flag or a hole in a layer that has the range.
    Zero,
    /// No layer has the range: reads as zeroes.
    Unallocated,
    /// Stored compressed.
    Compressed,
}

/// A run of guest bytes of one kind, from one layer.
#[derive(Debug, Clone)]
pub struct Extent {
    /// First guest byte.
    pub start: u64,
    /// Length in bytes, never 0.
    pub length: u64,
    /// What it is made of.
    pub kind: ExtentKind,
    /// Layer that decides it: 0 is the top. For `Unallocated`, the deepest layer that was asked.
    pub depth: u32,
    /// Known to read as zeroes: always for `Zero` and `Unallocated`, and for `Data` that is a hole of its file.
    pub zero: bool,
    /// File and byte offset of the stored bytes, for `Data`; for `Zero` that keeps an allocation and `Unallocated`
    /// subclusters of an allocated cluster, of the bytes that are not read. `None` for `Data` means that the bytes of
    /// no file are the guest's as they are (encrypted, or the file is not open): read them through the source.
    pub host: Option<(Arc<dyn Storage>, u64)>,
}

/// A disk that can be read: a raw file, a qcow2 chain, a snapshot view, later other formats.
pub trait GuestSource: Send + Sync {
    /// Size of the disk in bytes.
    fn virtual_size(&self) -> u64;

    /// Granularity in bytes at which the source allocates: a good unit for chunks. A power of two.
    fn cluster_size(&self) -> u64;

    /// Whether it is read front to back: then a convert reads it in guest order, whatever the number of workers.
    fn is_sequential(&self) -> bool {
        false
    }

    /// Whether it is read while its bytes are still coming: then a convert asks for no more of its tables than it needs next.
    fn is_arriving(&self) -> bool {
        false
    }

    /// All that was wanted is read: of what is still coming, waits for the end.
    ///
    /// # Errors
    /// `Aborted`, where what came was not all of it.
    fn settle(&self) -> Result<()> {
        Ok(())
    }

    /// Appends the extents of `start..start + length` to `out`, in order and without gaps, neighbours of one
    /// kind and contiguous host bytes merged. `length` is clamped to the end of the disk.
    fn extents(&self, start: u64, length: u64, job: &Job, out: &mut Vec<Extent>) -> Result<()> {
        let end = start.saturating_add(length).min(self.virtual_size());
        let mut at = start;
        while at < end {
            at = self.extents_up_to(at, end - at, usize::MAX, job, out)?;
        }
        Ok(())
    }

    /// As `extents`, but may stop early when it has appended `most` extents or more: a disk can have one for every
    /// sector, and a walk over a whole disk must not hold them all. Returns the first guest byte that is not covered,
    /// behind `start` unless there is nothing to cover.
    fn extents_up_to(
        &self,
        start: u64,
        length: u64,
        most: usize,
        job: &Job,
        out: &mut Vec<Extent>,
    ) -> Result<u64>;

    /// Fills `buf` with the guest bytes at `offset`; all of it must lie inside the disk.
    fn read_at(&self, buf: MemMut<'_>, offset: u64) -> Result<()>;
}
