//! A long-running job's control block: cancellation and progress, shared with the caller's thread.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::{Error, Result};

/// Cancel flag and progress counters of one job. The job writes, its owner reads at leisure: progress is
/// polled, so a slow reader never slows the job.
#[derive(Debug, Default)]
pub struct Job {
    cancelled: AtomicBool,
    current: AtomicU64,
    total: AtomicU64,
}

impl Job {
    /// A fresh job at 0 of 0.
    pub fn new() -> Self {
        Self::default()
    }

    /// Asks the job to stop at its next chunk.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::Release);
    }

    /// Whether `cancel` was called.
    pub fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Acquire)
    }

    /// `Err(Aborted)` once cancelled: jobs call this once a chunk.
    pub fn checkpoint(&self) -> Result<()> {
        if self.is_cancelled() { Err(Error::aborted()) } else { Ok(()) }
    }

    /// Sets the size of the job, in bytes of guest data.
    pub fn set_total(&self, total: u64) {
        self.total.store(total, Ordering::Relaxed);
    }

    /// Adds to what is done, in bytes of guest data.
    pub fn advance(&self, done: u64) {
        self.current.fetch_add(done, Ordering::Relaxed);
    }

    /// Bytes done and bytes in all.
    pub fn progress(&self) -> (u64, u64) {
        (self.current.load(Ordering::Relaxed), self.total.load(Ordering::Relaxed))
    }
}
