//! Transfers that stop early, as the system is always allowed to.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use qcow2_engine::storage::{Run, Traits};
use qcow2_engine::{Mem, MemMut, Storage};

/// Moves 1 to `max` bytes per call, in a pattern that depends on the number of the call only.
#[derive(Debug)]
pub struct ShortIo {
    inner: Arc<dyn Storage>,
    max: usize,
    calls: AtomicU64,
}

impl ShortIo {
    /// Wraps `inner`; `max` is at least 1.
    pub fn new(inner: Arc<dyn Storage>, max: usize) -> Self {
        Self { inner, max: max.max(1), calls: AtomicU64::new(0) }
    }

    fn share(&self, wanted: usize) -> usize {
        let call = self.calls.fetch_add(1, Ordering::Relaxed);
        let mixed = call.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 33;
        wanted.min(1 + (mixed as usize) % self.max)
    }
}

impl Storage for ShortIo {
    fn read_at(&self, buf: MemMut<'_>, offset: u64) -> io::Result<usize> {
        let n = self.share(buf.len());
        self.inner.read_at(buf.split_at(n).0, offset)
    }
    fn write_at(&self, buf: Mem<'_>, offset: u64) -> io::Result<usize> {
        let n = self.share(buf.len());
        self.inner.write_at(buf.split_at(n).0, offset)
    }
    fn write_vectored_at(&self, bufs: &[Mem<'_>], offset: u64) -> io::Result<usize> {
        let mut left = self.share(bufs.iter().map(Mem::len).sum());
        let mut part = Vec::new();
        for buf in bufs {
            part.push(buf.split_at(left).0);
            left -= left.min(buf.len());
        }
        self.inner.write_vectored_at(&part, offset)
    }
    fn len(&self) -> io::Result<u64> {
        self.inner.len()
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.inner.set_len(len)
    }
    fn sync_data(&self) -> io::Result<()> {
        self.inner.sync_data()
    }
    fn write_zeroes(&self, offset: u64, length: u64, unmap: bool) -> io::Result<()> {
        self.inner.write_zeroes(offset, length, unmap)
    }
    fn discard(&self, offset: u64, length: u64) -> io::Result<()> {
        self.inner.discard(offset, length)
    }
    fn allocate(&self, offset: u64, length: u64) -> io::Result<()> {
        self.inner.allocate(offset, length)
    }
    fn run_at(&self, offset: u64) -> io::Result<Run> {
        self.inner.run_at(offset)
    }
    fn allocated_bytes(&self) -> io::Result<u64> {
        self.inner.allocated_bytes()
    }
    fn traits(&self) -> Traits {
        self.inner.traits()
    }
    fn path(&self) -> Option<&Path> {
        self.inner.path()
    }
}
