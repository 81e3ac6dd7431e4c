//! A long-running job's control block: cancellation and progress, shared with the caller's thread.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use crate::{Error, Result};

/// Cancel flag and progress counters of one job. The job writes, its owner reads at leisure: progress is
/// polled, so a slow reader never slows the job.
#[derive(Debug, Default)]
pub struct Job {
    cancelled: Arc<AtomicBool>,
    current: AtomicU64,
    total: AtomicU64,
    /// Bytes a second; 0 for as fast as it goes.
    rate: AtomicU64,
    /// Bytes since the first that was paced.
    paced: AtomicU64,
    begin: OnceLock<Instant>,
}

/// A job that is held back looks this often whether it is cancelled.
const LOOK: Duration = Duration::from_millis(50);

impl Job {
    /// A fresh job at 0 of 0.
    pub fn new() -> Self {
        Self::default()
    }

    /// A job that is cancelled with this one and keeps its progress to itself: for a part whose units are others.
    pub fn silent(&self) -> Self {
        Self { cancelled: Arc::clone(&self.cancelled), ..Self::default() }
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

    /// Moves no more than this many bytes of guest data a second; 0 for as fast as it goes. Set before the job begins.
    pub fn set_rate(&self, bytes: u64) {
        self.rate.store(bytes, Ordering::Relaxed);
    }

    /// Waits until `bytes` more may be moved.
    ///
    /// # Errors
    /// `Aborted` once cancelled.
    pub fn pace(&self, bytes: u64) -> Result<()> {
        let rate = self.rate.load(Ordering::Relaxed);
        if rate == 0 {
            return Ok(());
        }
        let before = self.paced.fetch_add(bytes, Ordering::Relaxed);
        let due = Duration::from_secs_f64(before as f64 / rate as f64);
        let begin = *self.begin.get_or_init(Instant::now);
        loop {
            self.checkpoint()?;
            match due.checked_sub(begin.elapsed()) {
                None | Some(Duration::ZERO) => return Ok(()),
                Some(rest) => std::thread::sleep(rest.min(LOOK)),
            }
        }
    }

    /// Bytes done and bytes in all.
    pub fn progress(&self) -> (u64, u64) {
        (self.current.load(Ordering::Relaxed), self.total.load(Ordering::Relaxed))
    }
}
