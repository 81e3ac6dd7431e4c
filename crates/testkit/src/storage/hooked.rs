//! Calls with something that happens before them.

use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use qcow2_core::forward_storage;
use qcow2_engine::storage::{ReadStorage, Run};
use qcow2_engine::{Mem, MemMut, Storage};

use super::Op;

/// What happens before a call.
pub trait Before: Send + Sync {
    /// Called with the bytes of the file that the call is about (none for a sync). An error is the call's own: it
    /// does not reach the file.
    ///
    /// # Errors
    /// As the simulator wants.
    fn before(&self, op: Op, range: Range<u64>) -> io::Result<()>;
}

impl<F: Fn(Op, Range<u64>) -> io::Result<()> + Send + Sync> Before for F {
    fn before(&self, op: Op, range: Range<u64>) -> io::Result<()> {
        self(op, range)
    }
}

impl<B: Before> Before for Arc<B> {
    fn before(&self, op: Op, range: Range<u64>) -> io::Result<()> {
        (**self).before(op, range)
    }
}

/// Passes calls on once its hook let them.
pub struct Hooked<B> {
    inner: Arc<dyn Storage>,
    pub(super) hook: B,
}

impl<B: Before> Hooked<B> {
    /// Wraps `inner`.
    pub fn with(inner: Arc<dyn Storage>, hook: B) -> Self {
        Self { inner, hook }
    }

    fn pass(&self, op: Op, offset: u64, length: u64) -> io::Result<&dyn Storage> {
        self.hook.before(op, offset..offset.saturating_add(length))?;
        Ok(&*self.inner)
    }
}

impl<B> fmt::Debug for Hooked<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hooked").field("inner", &self.inner).finish_non_exhaustive()
    }
}

#[deny(clippy::missing_trait_methods, reason = "in front of another storage: a new method must be passed on")]
impl<B: Before> ReadStorage for Hooked<B> {
    fn read_at(&self, buf: MemMut<'_>, offset: u64) -> io::Result<usize> {
        self.pass(Op::Read, offset, buf.len() as u64)?.read_at(buf, offset)
    }
    fn run_in(&self, range: Range<u64>) -> io::Result<Run> {
        self.pass(Op::Run, range.start, 0)?.run_in(range)
    }
    forward_storage!(inner: len is_empty allocated_bytes identity traits io_limits path operation is_transient lock forget arriving no_fd read_each);
}

#[deny(clippy::missing_trait_methods, reason = "in front of another storage: a new method must be passed on")]
impl<B: Before> Storage for Hooked<B> {
    fn write_at(&self, buf: Mem<'_>, offset: u64) -> io::Result<usize> {
        self.pass(Op::Write, offset, buf.len() as u64)?.write_at(buf, offset)
    }
    fn write_vectored_at(&self, bufs: &[Mem<'_>], offset: u64) -> io::Result<usize> {
        let length = bufs.iter().map(|buf| buf.len() as u64).sum();
        self.pass(Op::Write, offset, length)?.write_vectored_at(bufs, offset)
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.pass(Op::SetLen, len, 0)?.set_len(len)
    }
    fn sync_data(&self) -> io::Result<()> {
        self.pass(Op::Sync, 0, 0)?.sync_data()
    }
    fn check_close(&self) -> io::Result<()> {
        self.pass(Op::Close, 0, 0)?.check_close()
    }
    fn write_zeroes(&self, offset: u64, length: u64, unmap: bool) -> io::Result<()> {
        self.pass(Op::Zero, offset, length)?.write_zeroes(offset, length, unmap)
    }
    fn discard(&self, offset: u64, length: u64) -> io::Result<()> {
        self.pass(Op::Discard, offset, length)?.discard(offset, length)
    }
    fn allocate(&self, offset: u64, length: u64) -> io::Result<()> {
        self.pass(Op::Allocate, offset, length)?.allocate(offset, length)
    }
    // What is taken ahead would make some hooks meet calls that depend on the file system.
    forward_storage!(inner: begin_sync never_ahead never_clone write_each);
}
