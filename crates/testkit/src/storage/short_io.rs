//! Transfers that stop early, as the system is always allowed to.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use qcow2_core::forward_storage;
use qcow2_engine::storage::ReadStorage;
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

#[deny(clippy::missing_trait_methods, reason = "in front of another storage: a new method must be passed on")]
impl ReadStorage for ShortIo {
    fn read_at(&self, buf: MemMut<'_>, offset: u64) -> io::Result<usize> {
        let n = self.share(buf.len());
        self.inner.read_at(buf.split_at(n).0, offset)
    }
    forward_storage!(inner: len is_empty run_in allocated_bytes identity traits io_limits path operation is_transient lock forget arriving no_fd
        read_each);
}

#[deny(clippy::missing_trait_methods, reason = "in front of another storage: a new method must be passed on")]
impl Storage for ShortIo {
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
    forward_storage!(inner: set_len sync_data begin_sync check_close write_zeroes discard allocate never_ahead never_clone write_each);
}
