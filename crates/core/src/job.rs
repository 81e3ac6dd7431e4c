//! A long-running job's control block: cancellation and progress, shared with the caller's thread.

use std::cell::RefCell;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::{Error, Result};

/// Cancel flag and progress counters of one job. The job writes, its owner reads at leisure: progress is
/// polled, so a slow reader never slows the job.
#[derive(Debug, Default)]
pub struct Job {
    cancelled: Arc<AtomicBool>,
    progress: Mutex<Progress>,
    /// Bytes a second; 0 for as fast as it goes.
    rate: AtomicU64,
    /// Bytes since the first that was paced.
    paced: AtomicU64,
    begin: OnceLock<Instant>,
}

#[derive(Debug, Default)]
struct Progress {
    current: u64,
    total: u64,
    /// See [`Job::take_steps`].
    steps: Vec<u64>,
}

impl Progress {
    /// How many hundredths of the job are passed at `current`.
    fn hundredths(&self, current: u64) -> u128 {
        (u128::from(current.min(self.total)) * 100).checked_div(self.total.into()).unwrap_or(0)
    }
}

/// A job that is held back looks this often whether it is cancelled.
const LOOK: Duration = Duration::from_millis(50);

thread_local! {
    /// The cancel flag of the job that this thread works for.
    static CURRENT: RefCell<Option<Arc<AtomicBool>>> = const { RefCell::new(None) };
}

/// The job that a thread works for, on its way to another thread that helps.
#[derive(Debug, Clone, Default)]
pub struct WorksFor(Option<Arc<AtomicBool>>);

impl WorksFor {
    /// The job of this thread.
    pub fn current() -> Self {
        Self(CURRENT.with_borrow(Clone::clone))
    }

    /// Whether the job of this thread was cancelled: what waits for somebody else in the depth of a storage looks here.
    pub fn is_cancelled() -> bool {
        CURRENT.with_borrow(|flag| flag.as_ref().is_some_and(|flag| flag.load(Ordering::Acquire)))
    }

    /// Runs `work` on this thread, for that job.
    pub fn during<T>(&self, work: impl FnOnce() -> T) -> T {
        /// Sets back what was there, whatever becomes of the work.
        struct Before(Option<Arc<AtomicBool>>);
        impl Drop for Before {
            fn drop(&mut self) {
                CURRENT.set(self.0.take());
            }
        }
        let _before = Before(CURRENT.replace(self.0.clone()));
        work()
    }
}

impl Job {
    /// Runs `work` on this thread: what waits in it looks whether this job is cancelled ([`WorksFor::is_cancelled`]).
    pub fn during<T>(&self, work: impl FnOnce() -> T) -> T {
        WorksFor(Some(Arc::clone(&self.cancelled))).during(work)
    }

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
        self.progress.lock().total = total;
    }

    /// Adds to what is done, in bytes of guest data.
    pub fn advance(&self, done: u64) {
        let mut progress = self.progress.lock();
        let before = progress.current;
        progress.current = before.saturating_add(done);
        if progress.hundredths(before) < progress.hundredths(progress.current) {
            let step = progress.current.min(progress.total);
            progress.steps.push(step);
        }
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
        let progress = self.progress.lock();
        (progress.current, progress.total)
    }

    /// What was done each time that another hundredth of the job was passed, since this was asked last: a job that ends before anybody
    /// looks tells how it went all the same, and no job tells more than some hundred steps.
    pub fn take_steps(&self) -> Vec<u64> {
        std::mem::take(&mut self.progress.lock().steps)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    #[test]
    fn steps_are_the_hundredths_that_were_passed_whatever_the_chunks() {
        let job = Job::new();
        job.set_total(400);
        for done in [1, 2, 2, 395] {
            job.advance(done);
        }
        assert_eq!(job.take_steps(), [5, 400]);
        assert_eq!(job.take_steps(), []);
        job.advance(1);
        assert_eq!((job.progress(), job.take_steps()), ((401, 400), vec![]));
    }

    #[test]
    fn steps_of_many_small_chunks_are_a_hundred_at_most_and_end_at_the_total() {
        for total in [1, 99, 100, 101, 12_345, u64::MAX] {
            let job = Job::new();
            job.set_total(total);
            let chunk = (total / 1000).max(1);
            let mut done = 0;
            while done < total {
                job.advance(chunk.min(total - done));
                done += chunk.min(total - done);
            }
            let steps = job.take_steps();
            assert!(steps.len() <= 100, "{total}: {} steps", steps.len());
            assert_eq!(steps.last(), Some(&total));
            assert!(steps.is_sorted_by(|a, b| a < b));
        }
    }

    #[test]
    fn a_thread_and_those_that_help_it_know_that_their_job_is_cancelled() {
        let (outer, inner) = (Job::new(), Job::new());
        outer.during(|| {
            assert!(!WorksFor::is_cancelled());
            inner.cancel();
            inner.during(|| assert!(WorksFor::is_cancelled()));
            assert!(!WorksFor::is_cancelled());
            outer.cancel();
            let helped = std::thread::scope(|scope| {
                let helper = crate::workers::help(scope, "help".to_owned(), WorksFor::is_cancelled);
                helper.map(|helper| helper.join().unwrap())
            });
            assert_ne!(helped, Some(false));
        });
        assert!(!WorksFor::is_cancelled());
    }

    #[test]
    fn a_job_without_a_total_has_no_steps() {
        let job = Job::new();
        job.advance(5);
        assert_eq!(job.take_steps(), []);
    }
}
