//! Threads of one job: tasks that one thread finds and several threads do, or several threads that all do the same. The job's
//! own thread is one of them, and does everything alone where there are no others.

use std::cell::RefCell;
use std::num::NonZeroUsize;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::{self, Scope, ScopedJoinHandle};

use crossbeam_channel::{Sender, TrySendError, bounded};
use parking_lot::Mutex;

use crate::job::WorksFor;
use crate::{Error, Job, Result};

/// Most workers that are started by default.
const MAX_DEFAULT_WORKERS: usize = 8;
/// Most workers at all.
const MAX_WORKERS: usize = 256;
/// Helpers that there may always be: as many as one job can ask for.
const MIN_HELPERS: usize = 64;

/// Tasks that wait for each worker. A helper that finds none sleeps, and on a busy machine comes back late: then the finder does nearly all by
/// itself.
const WAITING: usize = 8;

/// Helpers of all jobs of the process.
static HELPERS: AtomicUsize = AtomicUsize::new(0);

/// Asking the system takes longer than it takes to start a thread.
fn cores() -> usize {
    static CORES: OnceLock<usize> = OnceLock::new();
    *CORES.get_or_init(|| thread::available_parallelism().map_or(1, NonZeroUsize::get))
}

/// How many threads a job gets: as many as are asked for, within reason, else the cores, at most 8.
pub fn count(concurrency: Option<NonZeroUsize>) -> usize {
    concurrency.map_or_else(|| cores().min(MAX_DEFAULT_WORKERS), NonZeroUsize::get).min(MAX_WORKERS)
}

/// Leave to run one helper. All jobs together have so many: a hundred that run at once do not make eight hundred threads.
struct Permit;

impl Permit {
    fn take() -> Option<Self> {
        let most = MIN_HELPERS.max(2 * cores());
        let more = |helpers| (helpers < most).then_some(helpers + 1);
        HELPERS.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).ok().map(|_| Self)
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        HELPERS.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Runs `work` on another thread, which helps the calling one; `None` where there are enough of them in this process, or the system
/// has no more: the caller then does the work itself.
pub fn help<'scope, T: Send + 'scope>(
    scope: &'scope Scope<'scope, '_>,
    name: String,
    work: impl FnOnce() -> T + Send + 'scope,
) -> Option<ScopedJoinHandle<'scope, T>> {
    let permit = Permit::take()?;
    let job = WorksFor::current();
    let work = move || {
        let _permit = permit;
        job.during(work)
    };
    thread::Builder::new().name(name).spawn_scoped(scope, work).ok()
}

/// Runs `work` on this thread and `workers - 1` others, named `name-1` and so on; on fewer where there are no more
/// threads. Returns whether another thread panicked.
pub fn run_all(workers: usize, name: &str, work: impl Fn() + Sync) -> bool {
    thread::scope(|scope| {
        let helpers: Vec<_> = (1..workers).map_while(|n| help(scope, format!("{name}-{n}"), &work)).collect();
        work();
        // All are waited for, whatever became of the first.
        helpers.into_iter().filter_map(|thread| thread.join().err()).count() > 0
    })
}

/// Hands tasks to the workers.
pub struct Tasks<'a, T> {
    sender: Sender<T>,
    /// Does a task on this thread.
    own: &'a dyn Fn(T),
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

    fn stopped(&self) -> bool {
        self.stopped.load(Ordering::Acquire)
    }
}

impl<T> Tasks<'_, T> {
    /// Hands out a task; does it here while enough of them wait already, or where there is nobody else.
    ///
    /// # Errors
    /// `Aborted` once the job is cancelled or a task failed.
    pub fn hand_out(&self, task: T) -> Result<()> {
        self.job.checkpoint()?;
        if self.outcome.stopped() {
            return Err(Error::aborted());
        }
        if let Err(TrySendError::Full(task) | TrySendError::Disconnected(task)) = self.sender.try_send(task) {
            (self.own)(task);
        }
        Ok(())
    }
}

/// Runs `find` on this thread and `work` on the tasks that it hands out, on this and `workers - 1` other threads, or on as many
/// as there are. Each thread keeps one `C`.
///
/// # Errors
/// The first error of a task, else that of `find`. No task is begun after one.
pub fn share<T: Send, C: Default, R>(
    workers: usize,
    job: &Job,
    find: impl FnOnce(&Tasks<'_, T>) -> Result<R>,
    work: impl Fn(&mut C, T) -> Result<()> + Sync,
) -> Result<R> {
    let outcome = Outcome::default();
    let each = |context: &mut C, task: T| {
        // Tasks behind a failed one are drained.
        if !outcome.stopped()
            && let Err(error) = job.checkpoint().and_then(|()| work(context, task))
        {
            outcome.fail(error);
        }
    };
    let found = thread::scope(|scope| {
        let helpers = workers.saturating_sub(1);
        let (sender, receiver) = bounded(helpers * WAITING);
        for n in 1..=helpers {
            let (receiver, each) = (receiver.clone(), &each);
            let work = move || {
                let mut context = C::default();
                receiver.into_iter().for_each(|task| each(&mut context, task));
            };
            if help(scope, format!("qcow2-work-{n}"), work).is_none() {
                break;
            }
        }
        let context = RefCell::new(C::default());
        let own = |task: T| each(&mut context.borrow_mut(), task);
        // The end of the tasks, the sender's, is there when this returns.
        let found = find(&Tasks { sender, own: &own, outcome: &outcome, job });
        // Those that wait then are for all, and for this thread alone where it has no helpers.
        receiver.into_iter().for_each(own);
        found
    });
    match outcome.error.into_inner() {
        Some(error) => Err(error),
        None => found,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
    use std::thread;
    use std::time::{Duration, Instant};

    use super::{HELPERS, MIN_HELPERS, Permit, WAITING, cores, run_all, share};
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
    fn what_waits_at_the_end_is_for_all() {
        let others = AtomicUsize::new(0);
        let find = |tasks: &super::Tasks<'_, usize>| (0..WAITING).try_for_each(|n| tasks.hand_out(n));
        let work = |_: &mut (), n| {
            let began = Instant::now();
            // Whoever has the first one is not there for the rest.
            while n == 0 && others.load(Ordering::SeqCst) < WAITING - 1 {
                assert!(began.elapsed() < Duration::from_secs(20), "nobody does the rest");
                thread::yield_now();
            }
            others.fetch_add(usize::from(n > 0), Ordering::SeqCst);
            Ok(())
        };
        share(2, &Job::new(), find, work).unwrap();
        assert_eq!(others.into_inner(), WAITING - 1);
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

    #[test]
    fn jobs_at_once_share_the_helpers_and_all_end() {
        let most = MIN_HELPERS.max(2 * cores());
        let (running, peak) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let work = |sum: &AtomicU64, n| {
            peak.fetch_max(running.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
            sum.fetch_add(n, Ordering::Relaxed);
            thread::sleep(std::time::Duration::from_micros(200));
            running.fetch_sub(1, Ordering::SeqCst);
        };
        let jobs = most + 8;
        run_jobs(jobs, || {
            let sum = AtomicU64::new(0);
            let find = |tasks: &super::Tasks<'_, u64>| (1..=100).try_for_each(|n| tasks.hand_out(n));
            let each = |_: &mut (), n| {
                work(&sum, n);
                Ok(())
            };
            share(8, &Job::new(), find, each).unwrap();
            assert_eq!(sum.into_inner(), 5050);
        });
        assert!(peak.into_inner() <= jobs + most);
    }

    /// As many jobs as are asked for, whatever the helpers are.
    fn run_jobs(jobs: usize, job: impl Fn() + Sync) {
        thread::scope(|scope| {
            for _ in 0..jobs {
                thread::Builder::new().spawn_scoped(scope, &job).unwrap();
            }
        });
    }

    #[test]
    fn a_job_without_helpers_does_all_of_its_work() {
        // What other tests hold comes back to them.
        let permits: Vec<_> = std::iter::from_fn(Permit::take).collect();
        assert!(HELPERS.load(Ordering::Relaxed) >= permits.len());
        let done = AtomicU64::new(0);
        let find = |tasks: &super::Tasks<'_, u64>| (1..=1000).try_for_each(|n| tasks.hand_out(n));
        let work = |_: &mut (), n| {
            done.fetch_add(n, Ordering::Relaxed);
            Ok(())
        };
        share(4, &Job::new(), find, work).unwrap();
        assert_eq!(done.load(Ordering::Relaxed), 500_500);
        assert!(!run_all(4, "test", || {
            done.store(1, Ordering::Relaxed);
        }));
        assert_eq!(done.into_inner(), 1);
        drop(permits);
    }
}
