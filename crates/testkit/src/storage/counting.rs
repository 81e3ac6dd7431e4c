//! Host calls and bytes, counted by kind.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use parking_lot::Mutex;
use qcow2_core::forward_storage;
use qcow2_engine::storage::{ReadStorage, Run};
use qcow2_engine::{Mem, MemMut, Storage};

use super::Op;

/// What one kind of call came to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Calls, failed ones included.
    pub calls: u64,
    /// Bytes that the successful ones moved (or, for `fallocate`, covered).
    pub bytes: u64,
}

/// Counts and passes on. Hands out the inner descriptor, so the kernel's copies happen, and are counted.
#[derive(Debug)]
pub struct CountingStorage {
    inner: Arc<dyn Storage>,
    counts: Mutex<BTreeMap<Op, Counts>>,
}

impl CountingStorage {
    /// Wraps `inner`.
    pub fn new(inner: Arc<dyn Storage>) -> Self {
        Self { inner, counts: Mutex::default() }
    }

    /// The counts of one kind of call.
    pub fn of(&self, op: Op) -> Counts {
        self.counts.lock().get(&op).copied().unwrap_or_default()
    }

    /// Forgets everything counted so far.
    pub fn reset(&self) {
        self.counts.lock().clear();
    }

    fn count<T>(&self, op: Op, result: io::Result<T>, bytes: impl FnOnce(&T) -> u64) -> io::Result<T> {
        let moved = result.as_ref().map_or(0, bytes);
        let mut counts = self.counts.lock();
        let entry = counts.entry(op).or_default();
        entry.calls += 1;
        entry.bytes += moved;
        drop(counts);
        result
    }
}

#[deny(clippy::missing_trait_methods, reason = "in front of another storage: a new method must be passed on")]
impl ReadStorage for CountingStorage {
    fn read_at(&self, buf: MemMut<'_>, offset: u64) -> io::Result<usize> {
        self.count(Op::Read, self.inner.read_at(buf, offset), |n| *n as u64)
    }
    fn run_in(&self, range: Range<u64>) -> io::Result<Run> {
        self.count(Op::Run, self.inner.run_in(range), |_| 0)
    }
    fn forget(&self, range: Range<u64>) {
        let length = range.end - range.start;
        self.inner.forget(range);
        let _ = self.count(Op::Forget, Ok(()), |()| length);
    }
    forward_storage!(inner: len is_empty allocated_bytes identity traits io_limits path operation is_transient lock arriving as_fd read_each);
}

#[deny(clippy::missing_trait_methods, reason = "in front of another storage: a new method must be passed on")]
impl Storage for CountingStorage {
    fn write_at(&self, buf: Mem<'_>, offset: u64) -> io::Result<usize> {
        self.count(Op::Write, self.inner.write_at(buf, offset), |n| *n as u64)
    }
    fn write_vectored_at(&self, bufs: &[Mem<'_>], offset: u64) -> io::Result<usize> {
        self.count(Op::Write, self.inner.write_vectored_at(bufs, offset), |n| *n as u64)
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.count(Op::SetLen, self.inner.set_len(len), |()| 0)
    }
    fn sync_data(&self) -> io::Result<()> {
        self.count(Op::Sync, self.inner.sync_data(), |()| 0)
    }
    fn begin_sync(&self) {
        self.inner.begin_sync();
        let _ = self.count(Op::BeginSync, Ok(()), |()| 0);
    }
    fn write_zeroes(&self, offset: u64, length: u64, unmap: bool) -> io::Result<()> {
        self.count(Op::Zero, self.inner.write_zeroes(offset, length, unmap), |()| length)
    }
    fn discard(&self, offset: u64, length: u64) -> io::Result<()> {
        self.count(Op::Discard, self.inner.discard(offset, length), |()| length)
    }
    fn allocate(&self, offset: u64, length: u64) -> io::Result<()> {
        self.count(Op::Allocate, self.inner.allocate(offset, length), |()| length)
    }
    fn allocate_ahead(&self, offset: u64, length: u64) -> io::Result<()> {
        self.count(Op::Allocate, self.inner.allocate_ahead(offset, length), |()| length)
    }
    fn clone_range(
        &self,
        from: &dyn ReadStorage,
        from_offset: u64,
        offset: u64,
        length: u64,
    ) -> io::Result<()> {
        self.count(Op::Clone, self.inner.clone_range(from, from_offset, offset, length), |()| length)
    }
    forward_storage!(inner: check_close write_each);
}
