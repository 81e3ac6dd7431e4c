//! The worker threads of one environment.
//!
//! Started one by one when there is work that no idle thread can take, at most as many as the machine has cores (8
//! at most). What waits for a device or another machine has a pool of its own with more threads: they are the depth that a device
//! sees, and take no core while they wait. Closing drops what is queued, lets running requests finish, and joins.
//!
//! One thread watches the queue for a moment before it sleeps, where the last task came within such a moment: see `watch`.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard};
use qcow2_engine::{Error, Result};

use crate::crew::ending;
use crate::delivery::{Completion, Delivery, Outcome};
use crate::guard::guarded;
use crate::read::Read;
use crate::watch::MOMENT;
use crate::write::Write;

/// Most threads of a pool, however many cores there are: more do not make one event loop faster.
const MAX_THREADS: usize = 8;

/// Threads of a pool for what waits. 4 KiB reads past the page cache at depth 32 are twice as many with it as with two threads;
/// from about 20 on, changing from one to the next takes more than they give.
const WAITING_THREADS: usize = 12;

/// Threads beyond these of a pool, at most, for those that wait for JavaScript.
const MOST_LENT: usize = 64;

/// So long no task was taken, and some are queued: then nothing goes on by itself.
const STANDSTILL: Duration = Duration::from_millis(20);

/// Looks at the queue between two offers of the core to others: about a microsecond.
const SPINS: usize = 50;

/// Work for a worker. Reads and writes, of which there are many, are not boxed.
pub(crate) enum Task {
    /// Fill a caller's buffer.
    Read(Read),
    /// Write a caller's buffer.
    Write(Write),
    /// Anything else.
    Call(Box<dyn FnOnce() -> Outcome + Send>),
}

impl Task {
    /// A request is guarded where its image is used. It gives that up here, and may be the last to do so: without an outcome
    /// its caller would wait for ever.
    fn run(self) -> Outcome {
        let run = || {
            Ok(match self {
                Self::Read(read) => read.run(),
                Self::Write(write) => write.run(),
                Self::Call(call) => call(),
            })
        };
        guarded(run).unwrap_or_else(Outcome::Failed)
    }
}

struct Queue {
    tasks: VecDeque<(u32, Task)>,
    /// Threads that wait for work and were not yet woken for a task.
    idle: usize,
    /// A thread watches the queue and takes the first task that comes.
    watched: bool,
    threads: Vec<JoinHandle<()>>,
    /// Threads that wait for JavaScript: see [`lent`].
    lent: usize,
    /// Tasks that came, and those that were taken.
    added: u64,
    taken: u64,
    /// What [`relieve`] saw when it looked last.
    seen: Seen,
    closed: bool,
}

/// How things were a while ago.
struct Seen {
    at: Instant,
    taken: u64,
    /// The last task that came before there was relief.
    relieved: u64,
}

thread_local! {
    /// The pool that this thread is one of.
    static OWN: RefCell<Option<Arc<Shared>>> = const { RefCell::new(None) };
}

/// Runs `wait`, which waits for JavaScript. An answer of JavaScript's may take a request of its own, to the same pool: meanwhile
/// another thread does what this one would.
pub(crate) fn lent<T>(wait: impl FnOnce() -> T) -> T {
    let pool = OWN.with_borrow(Clone::clone);
    if let Some(pool) = &pool {
        let mut queue = pool.queue.lock();
        queue.lent += 1;
        if !queue.tasks.is_empty() && queue.idle == 0 {
            // Where the system starts none, those that there are come back some time.
            let _ = pool.reinforce(&mut queue);
        }
    }
    let done = wait();
    if let Some(pool) = pool {
        pool.queue.lock().lent -= 1;
    }
    done
}

/// Looked at again and again by a thread that is lent. What it waits for may have been asked for by a task that is queued, while all
/// other threads wait for this one: then there is one more thread.
pub(crate) fn relieve() {
    let Some(pool) = OWN.with_borrow(Clone::clone) else { return };
    let mut queue = pool.queue.lock();
    if queue.seen.at.elapsed() < STANDSTILL {
        return;
    }
    let stands = queue.seen.taken == queue.taken && queue.idle == 0 && !queue.tasks.is_empty();
    queue.seen.at = Instant::now();
    queue.seen.taken = queue.taken;
    // One thread for each task that came: those that are there already have not helped.
    if stands && queue.seen.relieved != queue.added {
        queue.seen.relieved = queue.added;
        // Where the system starts none, who closes waits for seconds only.
        let _ = pool.start(&mut queue, MOST_LENT);
    }
}

struct Shared {
    max_threads: usize,
    queue: Mutex<Queue>,
    work: Condvar,
    /// For the thread that watches: there is a task, or the end.
    called: AtomicBool,
    /// Watching takes a core that somebody else could use: not the only one.
    watches: bool,
    delivery: Arc<Delivery>,
}

/// The pool. Only its environment's thread submits and closes.
pub(crate) struct Pool {
    shared: Arc<Shared>,
}

/// How many threads a pool has at most.
pub(crate) fn default_threads() -> usize {
    thread::available_parallelism().map_or(1, usize::from).min(MAX_THREADS)
}

/// The threads that a job was given, or as many as a pool has.
pub(crate) fn threads(given: Option<u32>) -> usize {
    given.map_or_else(default_threads, |threads| threads as usize)
}

impl Pool {
    /// A pool without threads yet.
    pub(crate) fn new(delivery: Arc<Delivery>) -> Self {
        Self::of(default_threads(), delivery)
    }

    /// One for requests that wait for a device or for another machine (`Traits::waits`).
    pub(crate) fn waiting(delivery: Arc<Delivery>) -> Self {
        Self::of(WAITING_THREADS, delivery)
    }

    fn of(max_threads: usize, delivery: Arc<Delivery>) -> Self {
        let queue = Queue {
            tasks: VecDeque::new(),
            idle: 0,
            watched: false,
            threads: Vec::new(),
            lent: 0,
            added: 0,
            taken: 0,
            seen: Seen { at: Instant::now(), taken: 0, relieved: 0 },
            closed: false,
        };
        let shared = Shared {
            max_threads,
            queue: Mutex::new(queue),
            work: Condvar::new(),
            called: AtomicBool::new(false),
            watches: default_threads() > 1,
            delivery,
        };
        Self { shared: Arc::new(shared) }
    }

    /// Queues a task for the request of that number.
    ///
    /// # Errors
    /// `Io` where the system starts not even one thread; `Closed`.
    pub(crate) fn submit(&self, request: u32, task: Task) -> Result<()> {
        let mut queue = self.shared.queue.lock();
        if queue.closed {
            return Err(ending());
        }
        queue.added += 1;
        if queue.watched && queue.tasks.is_empty() {
            queue.tasks.push_back((request, task));
            self.shared.called.store(true, Ordering::Release);
            return Ok(());
        }
        if queue.idle == 0 {
            match self.shared.reinforce(&mut queue) {
                // The threads that there are will get to it.
                Err(error) if queue.threads.is_empty() => return Err(Error::no_thread(error)),
                Ok(()) | Err(_) => {}
            }
        }
        queue.tasks.push_back((request, task));
        if queue.idle > 0 {
            queue.idle -= 1;
            drop(queue);
            self.shared.work.notify_one();
        }
        Ok(())
    }

    /// Takes no more tasks. What is returned drops those that are queued, and waits for those that run.
    pub(crate) fn close(&self) -> impl FnOnce() + Send + use<> {
        let (tasks, threads) = {
            let mut queue = self.shared.queue.lock();
            queue.closed = true;
            (std::mem::take(&mut queue.tasks), std::mem::take(&mut queue.threads))
        };
        self.shared.called.store(true, Ordering::Release);
        self.shared.work.notify_all();
        move || {
            // What they hold may be the last use of an image.
            let _dropped = guarded(|| {
                drop(tasks);
                Ok(())
            });
            for thread in threads {
                // A worker catches panics of its tasks; there is nothing to hear from it.
                let _ = thread.join();
            }
        }
    }
}

impl Shared {
    /// Starts a thread, unless there are enough.
    fn reinforce(self: &Arc<Self>, queue: &mut Queue) -> std::io::Result<()> {
        self.start(queue, queue.lent.min(MOST_LENT))
    }

    /// As `reinforce`, with so many threads more than the pool has otherwise.
    fn start(self: &Arc<Self>, queue: &mut Queue, more: usize) -> std::io::Result<()> {
        let index = queue.threads.len();
        if queue.closed || index >= self.max_threads + more {
            return Ok(());
        }
        let shared = Arc::clone(self);
        let name = format!("qcow2-{index}");
        // One that is there because others wait takes first what came last: they may wait for that.
        let newest = index >= self.max_threads;
        let work = move || {
            OWN.set(Some(Arc::clone(&shared)));
            shared.work(newest);
            OWN.set(None);
        };
        queue.threads.push(thread::Builder::new().name(name).spawn(work)?);
        Ok(())
    }

    fn work(&self, newest: bool) {
        let mut soon = false;
        while let Some((request, task)) = self.next(newest, &mut soon) {
            self.delivery.push(Completion { request, outcome: task.run() });
        }
    }

    /// The next task; waits for one. `None` when the pool closes. `soon` says whether this thread's last wait was short.
    fn next(&self, newest: bool, soon: &mut bool) -> Option<(u32, Task)> {
        let mut began: Option<Instant> = None;
        let mut queue = self.queue.lock();
        loop {
            if queue.closed {
                return None;
            }
            let task = if newest { queue.tasks.pop_back() } else { queue.tasks.pop_front() };
            if let Some(task) = task {
                queue.taken += 1;
                if let Some(began) = began {
                    *soon = began.elapsed() < MOMENT;
                }
                return Some(task);
            }
            if began.is_none() {
                began = Some(Instant::now());
                if *soon && self.watches && !queue.watched {
                    queue.watched = true;
                    self.called.store(false, Ordering::Relaxed);
                    MutexGuard::unlocked(&mut queue, || self.watch());
                    queue.watched = false;
                    continue;
                }
            }
            queue.idle += 1;
            self.work.wait(&mut queue);
        }
    }

    /// Waits a moment for a call.
    fn watch(&self) {
        let began = Instant::now();
        while began.elapsed() < MOMENT {
            for _ in 0..SPINS {
                if self.called.load(Ordering::Acquire) {
                    return;
                }
                std::hint::spin_loop();
            }
            // To the environment's thread, where the system has put it on this thread's core.
            thread::yield_now();
        }
    }
}
