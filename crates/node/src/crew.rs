//! The threads that run the jobs of one lane, and the line in which jobs wait for them: first come, first served.
//!
//! There are no threads before the first job, and never more than asked for. A thread that takes a job first sees to it
//! that another one waits for the next, so the environment's thread starts the first thread alone. Threads stay until the
//! end, or until fewer are asked for.

use std::collections::VecDeque;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use parking_lot::{Condvar, Mutex, MutexGuard};
use qcow2_engine::{Error, ErrorKind, Job, Result};

use crate::delivery::{Completion, Delivery, IntoJs, Outcome};
use crate::guard::guarded;

/// What a job does.
pub(crate) type Work = Box<dyn FnOnce(&Arc<Job>) -> Result<IntoJs> + Send>;

/// A job in line, or running.
pub(crate) struct Entry {
    /// The request that it answers.
    pub(crate) request: u32,
    /// Its control block.
    pub(crate) job: Arc<Job>,
    /// Gone once somebody took it: a thread of the crew, or who withdraws it.
    work: Mutex<Option<Work>>,
}

impl Entry {
    /// A job that waits.
    pub(crate) fn new(request: u32, work: Work) -> Self {
        Self { request, job: Arc::new(Job::new()), work: Mutex::new(Some(work)) }
    }

    /// Takes the work out, if it has not begun: who gets it answers the request.
    pub(crate) fn withdraw(&self) -> Option<Work> {
        self.work.lock().take()
    }

    fn run(&self, delivery: &Delivery) {
        let Some(work) = self.withdraw() else { return };
        let outcome = Outcome::from_result(guarded(|| self.job.during(|| work(&self.job))));
        delivery.push(Completion { request: self.request, outcome });
    }
}

struct Line {
    waiting: VecDeque<Arc<Entry>>,
    /// Threads there are, the one that is starting included.
    threads: usize,
    /// Most threads that there may be.
    most: usize,
    /// Threads that wait for a job.
    idle: usize,
    /// A thread is starting, and will wait.
    starting: bool,
    handles: Vec<JoinHandle<()>>,
    closed: bool,
}

struct Shared {
    name: &'static str,
    line: Mutex<Line>,
    work: Condvar,
    delivery: Arc<Delivery>,
}

/// The crew. Only its environment's thread submits and closes.
pub(crate) struct Crew {
    shared: Arc<Shared>,
}

impl Crew {
    /// A crew of `most` threads at most, and none yet. Their names begin with `name`.
    pub(crate) fn new(name: &'static str, most: usize, delivery: Arc<Delivery>) -> Self {
        let line = Line {
            waiting: VecDeque::new(),
            threads: 0,
            most,
            idle: 0,
            starting: false,
            handles: Vec::new(),
            closed: false,
        };
        let shared = Shared { name, line: Mutex::new(line), work: Condvar::new(), delivery };
        Self { shared: Arc::new(shared) }
    }

    /// Puts a job at the end of the line; in front of all others where it is the second half of one that has begun.
    ///
    /// # Errors
    /// `Io` where the system starts not even one thread; `Closed`.
    pub(crate) fn submit(&self, entry: Arc<Entry>, second_half: bool) -> Result<()> {
        let mut line = self.shared.line.lock();
        if line.closed {
            return Err(ending());
        }
        match self.shared.reinforce(&mut line) {
            // The threads that there are will get to it.
            Err(error) if line.threads == 0 => return Err(Error::no_thread(error)),
            Ok(()) | Err(_) => {}
        }
        if second_half {
            line.waiting.push_front(entry);
        } else {
            line.waiting.push_back(entry);
        }
        drop(line);
        self.shared.work.notify_one();
        Ok(())
    }

    /// Changes how many threads there may be. Jobs that run go on.
    pub(crate) fn set_most(&self, most: usize) {
        let mut line = self.shared.line.lock();
        line.most = most;
        if !line.waiting.is_empty() {
            // The threads that there are will get to them.
            let _ = self.shared.reinforce(&mut line);
        }
        drop(line);
        self.shared.work.notify_all();
    }

    /// Takes no more jobs, and begins none that waits. What is returned waits for those that run.
    pub(crate) fn close(&self) -> impl FnOnce() + Send + use<> {
        let handles = {
            let mut line = self.shared.line.lock();
            line.closed = true;
            line.waiting.clear();
            std::mem::take(&mut line.handles)
        };
        self.shared.work.notify_all();
        move || join(handles)
    }
}

/// The error of what is asked for, or has not begun, when the environment ends.
pub(crate) fn ending() -> Error {
    Error::new(ErrorKind::Closed, "the environment is ending")
}

fn join(handles: Vec<JoinHandle<()>>) {
    for handle in handles {
        // Panics are caught inside; there is nothing to hear from it.
        let _ = handle.join();
    }
}

impl Shared {
    /// Starts a thread unless one waits, or there are enough.
    fn reinforce(self: &Arc<Self>, line: &mut Line) -> std::io::Result<()> {
        if line.closed || line.starting || line.idle > 0 || line.threads >= line.most {
            return Ok(());
        }
        // Those that were too many have ended.
        let (ended, handles) =
            std::mem::take(&mut line.handles).into_iter().partition(JoinHandle::is_finished);
        line.handles = handles;
        join(ended);
        let shared = Arc::clone(self);
        let handle = thread::Builder::new().name(self.name.to_owned()).spawn(move || shared.work())?;
        line.handles.push(handle);
        line.threads += 1;
        line.starting = true;
        Ok(())
    }

    fn work(self: Arc<Self>) {
        let mut line = self.line.lock();
        line.starting = false;
        while let Some(entry) = self.next(&mut line) {
            MutexGuard::unlocked(&mut line, || entry.run(&self.delivery));
        }
    }

    /// The next job; waits for one. `None` for a thread that is to end.
    fn next(self: &Arc<Self>, line: &mut MutexGuard<'_, Line>) -> Option<Arc<Entry>> {
        loop {
            if line.closed {
                return None;
            }
            if line.threads > line.most {
                line.threads -= 1;
                return None;
            }
            if let Some(entry) = line.waiting.pop_front() {
                // Where the system starts no more threads, this one comes back for the next job.
                let _ = self.reinforce(line);
                return Some(entry);
            }
            line.idle += 1;
            self.work.wait(line);
            line.idle -= 1;
        }
    }
}
