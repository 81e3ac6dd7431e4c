//! Calls that fail.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use qcow2_engine::storage::{Run, Traits};
use qcow2_engine::{Mem, MemMut, Storage};

use super::Op;

/// Which calls fail, and how.
#[derive(Debug, Clone)]
pub struct Fault {
    /// The calls that count and fail; empty means all.
    pub ops: Vec<Op>,
    /// Calls that still succeed.
    pub after: u64,
    /// Fails once, or from then on.
    pub once: bool,
    /// The error number: `EIO` is 5, `ENOSPC` 28.
    pub errno: i32,
}

impl Fault {
    /// Every call of `op` fails with `errno` after `after` of them succeeded.
    pub fn from(op: Op, after: u64, errno: i32) -> Self {
        Self { ops: vec![op], after, once: false, errno }
    }

    /// The call number `n` (from 0) of any kind fails with `errno`, once.
    pub fn nth(n: u64, errno: i32) -> Self {
        Self { ops: Vec::new(), after: n, once: true, errno }
    }
}

/// Fails as its [`Fault`] says.
#[derive(Debug)]
pub struct FaultStorage {
    inner: Arc<dyn Storage>,
    fault: Fault,
    calls: AtomicU64,
    failed: AtomicU64,
    hook: Hook,
}

/// What is called instead of failing.
struct Hook(Option<Box<dyn Fn() + Send + Sync>>);

impl std::fmt::Debug for Hook {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Hook({})", self.0.is_some())
    }
}

impl FaultStorage {
    /// Nothing fails: `hook` is called at call number `n` (from 0) of any kind.
    pub fn calling(inner: Arc<dyn Storage>, n: u64, hook: impl Fn() + Send + Sync + 'static) -> Self {
        Self { hook: Hook(Some(Box::new(hook))), ..Self::new(inner, Fault::nth(n, 0)) }
    }

    /// Wraps `inner`.
    pub fn new(inner: Arc<dyn Storage>, fault: Fault) -> Self {
        Self { inner, fault, calls: AtomicU64::new(0), failed: AtomicU64::new(0), hook: Hook(None) }
    }

    /// How many calls failed so far.
    pub fn failed(&self) -> u64 {
        self.failed.load(Ordering::Relaxed)
    }

    /// How many calls of the kinds that fail there were so far.
    pub fn calls(&self) -> u64 {
        self.calls.load(Ordering::Relaxed)
    }

    fn pass(&self, op: Op) -> io::Result<()> {
        if !self.fault.ops.is_empty() && !self.fault.ops.contains(&op) {
            return Ok(());
        }
        let call = self.calls.fetch_add(1, Ordering::Relaxed);
        if call < self.fault.after || (self.fault.once && call > self.fault.after) {
            return Ok(());
        }
        self.failed.fetch_add(1, Ordering::Relaxed);
        if let Hook(Some(hook)) = &self.hook {
            hook();
            return Ok(());
        }
        Err(io::Error::from_raw_os_error(self.fault.errno))
    }
}

impl Storage for FaultStorage {
    fn read_at(&self, buf: MemMut<'_>, offset: u64) -> io::Result<usize> {
        self.pass(Op::Read)?;
        self.inner.read_at(buf, offset)
    }
    fn write_at(&self, buf: Mem<'_>, offset: u64) -> io::Result<usize> {
        self.pass(Op::Write)?;
        self.inner.write_at(buf, offset)
    }
    fn write_vectored_at(&self, bufs: &[Mem<'_>], offset: u64) -> io::Result<usize> {
        self.pass(Op::Write)?;
        self.inner.write_vectored_at(bufs, offset)
    }
    fn len(&self) -> io::Result<u64> {
        self.inner.len()
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.pass(Op::SetLen)?;
        self.inner.set_len(len)
    }
    fn sync_data(&self) -> io::Result<()> {
        self.pass(Op::Sync)?;
        self.inner.sync_data()
    }
    fn write_zeroes(&self, offset: u64, length: u64, unmap: bool) -> io::Result<()> {
        self.pass(Op::Zero)?;
        self.inner.write_zeroes(offset, length, unmap)
    }
    fn discard(&self, offset: u64, length: u64) -> io::Result<()> {
        self.pass(Op::Discard)?;
        self.inner.discard(offset, length)
    }
    fn allocate(&self, offset: u64, length: u64) -> io::Result<()> {
        self.pass(Op::Allocate)?;
        self.inner.allocate(offset, length)
    }
    fn run_at(&self, offset: u64) -> io::Result<Run> {
        self.pass(Op::Run)?;
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
