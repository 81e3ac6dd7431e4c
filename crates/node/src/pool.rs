//! The worker threads of one environment.
//!
//! Started one by one when there is work that no idle thread can take, at most as many as the machine has cores (8
//! at most). Closing drops what is queued, lets running requests finish, and joins.

use std::collections::VecDeque;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use parking_lot::{Condvar, Mutex};

use crate::delivery::{Completion, Delivery, Outcome};
use crate::read::Read;
use crate::write::Write;

/// Most threads of a pool, however many cores there are: more do not make one event loop faster.
const MAX_THREADS: usize = 8;

/// Work for a worker. Reads and writes, of which there are many, are not boxed.
pub(crate) enum Task {
    /// Fill a caller's buffer.
    Read(Read),
    /// Write a caller's buffer.
    Write(Write),
    /// Anything else.
    Call(Box<dyn FnOnce() -> Outcome + Send>),
}

struct Queue {
    tasks: VecDeque<(u32, Task)>,
    /// Threads that wait for work and were not yet woken for a task.
    idle: usize,
    threads: Vec<JoinHandle<()>>,
    closed: bool,
}

struct Shared {
    queue: Mutex<Queue>,
    work: Condvar,
    delivery: Arc<Delivery>,
}

/// The pool. Only its environment's thread submits and closes.
pub(crate) struct Pool {
    shared: Arc<Shared>,
    max_threads: usize,
}

/// How many threads a pool has at most.
pub(crate) fn default_threads() -> usize {
    thread::available_parallelism().map_or(1, usize::from).min(MAX_THREADS)
}

impl Pool {
    /// A pool without threads yet.
    pub(crate) fn new(delivery: Arc<Delivery>) -> Self {
        let queue = Queue { tasks: VecDeque::new(), idle: 0, threads: Vec::new(), closed: false };
        let shared = Shared { queue: Mutex::new(queue), work: Condvar::new(), delivery };
        Self { shared: Arc::new(shared), max_threads: default_threads() }
    }

    /// Queues a task for the request of that number.
    ///
    /// # Errors
    /// The system cannot start the first thread, or the pool is closed.
    pub(crate) fn submit(&self, request: u32, task: Task) -> std::io::Result<()> {
        let mut queue = self.shared.queue.lock();
        if queue.closed {
            return Err(std::io::Error::other("the environment is closing"));
        }
        if queue.idle == 0 && queue.threads.len() < self.max_threads {
            match self.start_thread(queue.threads.len()) {
                Ok(thread) => queue.threads.push(thread),
                // The threads that there are will get to it.
                Err(_) if !queue.threads.is_empty() => {}
                Err(error) => return Err(error),
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

    fn start_thread(&self, index: usize) -> std::io::Result<JoinHandle<()>> {
        let shared = Arc::clone(&self.shared);
        thread::Builder::new().name(format!("qcow2-{index}")).spawn(move || shared.work())
    }

    /// Drops queued tasks, waits for running ones, ends the threads.
    pub(crate) fn close(&self) {
        let (tasks, threads) = {
            let mut queue = self.shared.queue.lock();
            queue.closed = true;
            (std::mem::take(&mut queue.tasks), std::mem::take(&mut queue.threads))
        };
        self.shared.work.notify_all();
        drop(tasks);
        for thread in threads {
            // A worker catches panics of its tasks; there is nothing to hear from it.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn work(&self) {
        while let Some((request, task)) = self.next() {
            let outcome = match task {
                Task::Read(read) => read.run(),
                Task::Write(write) => write.run(),
                Task::Call(call) => call(),
            };
            self.delivery.push(Completion { request, outcome });
        }
    }

    /// The next task; waits for one. `None` when the pool closes.
    fn next(&self) -> Option<(u32, Task)> {
        let mut queue = self.queue.lock();
        loop {
            if queue.closed {
                return None;
            }
            if let Some(task) = queue.tasks.pop_front() {
                return Some(task);
            }
            queue.idle += 1;
            self.work.wait(&mut queue);
        }
    }
}
