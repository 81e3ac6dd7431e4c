//! Threads of one job: tasks that one thread finds and several threads do, or several threads that all do the same.

use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use crossbeam_channel::{Receiver, Sender, bounded};
use parking_lot::Mutex;

use crate::{Error, Job, Result};

/// Most workers that are started by default.
const MAX_DEFAULT_WORKERS: usize = 8;
/// Most workers at all.
const MAX_WORKERS: usize = 256;

/// How many threads a job gets: as many as are asked for, within reason, else the cores, at most 8.
pub fn count(concurrency: Option<NonZeroUsize>) -> usize {
    let cores = || thread::available_parallelism().map_or(1, NonZeroUsize::get).min(MAX_DEFAULT_WORKERS);
    concurrency.map_or_else(cores, NonZeroUsize::get).min(MAX_WORKERS)
}

/// Runs `work` on this thread and `workers - 1` others, named `name-1` and so on; on fewer where the system has no more
/// threads. Returns whether another thread panicked.
pub fn run_all(workers: usize, name: &str, work: impl Fn() + Sync) -> bool {
    thread::scope(|scope| {
        let spawned: Vec<_> = (1..workers)
            .map_while(|n| thread::Builder::new().name(format!("{name}-{n}")).spawn_scoped(scope, &work).ok())
            .collect();
        work();
        // All are waited for, whatever became of the first.
        spawned.into_iter().filter_map(|thread| thread.join().err()).count() > 0
    })
}

/// Hands tasks to the workers.
pub struct Tasks<'a, T> {
    sender: Sender<T>,
    outcome: &'a Outcome,
    job: &'a Job,
}

#[derive(Default)]
struct Outcome {
    stopped: AtomicBool,
    error: Mutex<Option<Error>>,
}

impl Outcome {
    /// The first error is the one to report; everyone stops.
    fn fail(&self, error: Error) {
        self.error.lock().get_or_insert(error);
        self.stopped.store(true, Ordering::Release);
    }
}

impl<T> Tasks<'_, T> {
    /// Hands out a task; waits while enough of them wait already.
    ///
    /// # Errors
    /// `Aborted` once the job is cancelled or a task failed.
    pub fn hand_out(&self, task: T) -> Result<()> {
        self.job.checkpoint()?;
        if self.outcome.stopped.load(Ordering::Acquire) || self.sender.send(task).is_err() {
            return Err(Error::aborted());
        }
        Ok(())
    }
}

/// Runs `find` on this thread and `work` on the tasks that it hands out, on `workers` other threads (at least one). Each
/// worker keeps one `C`.
///
/// # Errors
/// The first error of a task, else that of `find`. No task is begun after one.
pub fn share<T: Send, C: Default>(
    workers: usize,
    job: &Job,
    find: impl FnOnce(&Tasks<'_, T>) -> Result<()>,
    work: impl Fn(&mut C, T) -> Result<()> + Sync,
) -> Result<()> {
    let outcome = Outcome::default();
    let workers = workers.max(1);
    let found = thread::scope(|scope| {
        let (sender, receiver) = bounded(workers);
        for _ in 0..workers {
            let (receiver, outcome, work): (Receiver<T>, _, _) = (receiver.clone(), &outcome, &work);
            scope.spawn(move || {
                let mut context = C::default();
                for task in receiver {
                    // Tasks behind a failed one are drained, so that nobody is left waiting.
                    if !outcome.stopped.load(Ordering::Acquire)
                        && let Err(error) = job.checkpoint().and_then(|()| work(&mut context, task))
                    {
                        outcome.fail(error);
                    }
                }
            });
        }
        drop(receiver);
        find(&Tasks { sender, outcome: &outcome, job })
    });
    match outcome.error.into_inner() {
        Some(error) => Err(error),
        None => found,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use std::sync::atomic::{AtomicU64, Ordering};

    use super::share;
    use crate::{Error, ErrorKind, Job};

    #[test]
    fn every_task_is_done_once() {
        let sum = AtomicU64::new(0);
        let find = |tasks: &super::Tasks<'_, u64>| (1..=1000).try_for_each(|n| tasks.hand_out(n));
        let work = |_: &mut (), n| {
            sum.fetch_add(n, Ordering::Relaxed);
            Ok(())
        };
        share(3, &Job::new(), find, work).unwrap();
        assert_eq!(sum.into_inner(), 500_500);
    }

    #[test]
    fn the_first_error_ends_it() {
        let find = |tasks: &super::Tasks<'_, u64>| (1..).try_for_each(|n| tasks.hand_out(n));
        let work = |_: &mut (), n| match n {
            5 => Err(Error::new(ErrorKind::Corrupt, "five")),
            _ => Ok(()),
        };
        assert_eq!(share(2, &Job::new(), find, work).unwrap_err().kind(), ErrorKind::Corrupt);
    }

    #[test]
    fn a_cancelled_job_ends_it() {
        let job = Job::new();
        let find = |tasks: &super::Tasks<'_, u64>| (1..).try_for_each(|n| tasks.hand_out(n));
        let work = |_: &mut (), n| {
            if n == 10 {
                job.cancel();
            }
            Ok(())
        };
        assert_eq!(share(2, &job, find, work).unwrap_err().kind(), ErrorKind::Aborted);
    }
}
