//! Calls that fail.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use qcow2_engine::Storage;

use super::Op;
use super::hooked::{Before, Hooked};

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

/// Counts calls, and fails those that its [`Fault`] says.
#[derive(Debug)]
pub struct Failing {
    fault: Fault,
    calls: AtomicU64,
    failed: AtomicU64,
}

impl Before for Failing {
    fn before(&self, op: Op, _range: Range<u64>) -> io::Result<()> {
        if !self.fault.ops.is_empty() && !self.fault.ops.contains(&op) {
            return Ok(());
        }
        let call = self.calls.fetch_add(1, Ordering::Relaxed);
        if call < self.fault.after || (self.fault.once && call > self.fault.after) {
            return Ok(());
        }
        self.failed.fetch_add(1, Ordering::Relaxed);
        Err(io::Error::from_raw_os_error(self.fault.errno))
    }
}

/// Fails as its [`Fault`] says.
pub type FaultStorage = Hooked<Failing>;

impl FaultStorage {
    /// Wraps `inner`.
    pub fn new(inner: Arc<dyn Storage>, fault: Fault) -> Self {
        Self::with(inner, Failing { fault, calls: AtomicU64::new(0), failed: AtomicU64::new(0) })
    }

    /// How many calls failed so far.
    pub fn failed(&self) -> u64 {
        self.hook.failed.load(Ordering::Relaxed)
    }

    /// How many calls of the kinds that fail there were so far.
    pub fn calls(&self) -> u64 {
        self.hook.calls.load(Ordering::Relaxed)
    }
}
