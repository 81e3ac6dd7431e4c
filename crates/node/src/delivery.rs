//! What is done, on its way to JavaScript.
//!
//! Workers append to one queue. The first to append to an empty queue wakes the environment's thread, the others only
//! append: under load many completions share one call into JavaScript. A thread that watches the queue need not be woken.

use std::ptr;
use std::time::Instant;

use napi::sys;
use parking_lot::Mutex;
use qcow2_engine::Result;

use crate::runtime::Runtime;

/// Makes a JavaScript value of a result, on the environment's thread.
pub(crate) type IntoJs = Box<dyn FnOnce(&Runtime, &napi::Env) -> napi::Result<sys::napi_value> + Send>;

/// How a request ended.
pub(crate) enum Outcome {
    /// Done, nothing to say: the buffer is filled.
    Done,
    /// Done, with a value.
    Value(IntoJs),
    /// Failed.
    Failed(qcow2_engine::Error),
}

impl Outcome {
    /// The outcome of work whose value is made by `IntoJs`.
    pub(crate) fn from_result(result: Result<IntoJs>) -> Self {
        result.map_or_else(Self::Failed, Self::Value)
    }
}

/// A finished request: the number that JavaScript gave it, and how it ended.
pub(crate) struct Completion {
    pub(crate) request: u32,
    pub(crate) outcome: Outcome,
}

#[derive(Default)]
struct Queue {
    done: Vec<Completion>,
    /// A wake-up is on its way and will take everything in the queue, or the thread watches.
    woken: bool,
    watched: bool,
    /// When the thread was woken for what is here.
    since: Option<Instant>,
}

/// The queue, and the way to wake its environment.
pub(crate) struct Delivery {
    queue: Mutex<Queue>,
    wake: sys::napi_threadsafe_function,
}

// SAFETY: a thread-safe function may be called from any thread. It is alive for as long as any thread is: the
// cleanup hook joins all threads before the environment finalizes it.
unsafe impl Send for Delivery {}
// SAFETY: as above.
unsafe impl Sync for Delivery {}

impl Delivery {
    /// A queue that wakes its environment by calling `wake`.
    pub(crate) fn new(wake: sys::napi_threadsafe_function) -> Self {
        Self { queue: Mutex::default(), wake }
    }

    /// Appends a completion and sees to it that it is delivered.
    pub(crate) fn push(&self, completion: Completion) {
        let wake = {
            let mut queue = self.queue.lock();
            queue.done.push(completion);
            let wake = !std::mem::replace(&mut queue.woken, true);
            if wake {
                queue.since = Some(Instant::now());
            }
            wake
        };
        if wake {
            // SAFETY: the function is alive (see `Delivery`). The only failure is that the environment is
            // closing: then nobody waits for the completion any more.
            unsafe {
                sys::napi_call_threadsafe_function(
                    self.wake,
                    ptr::null_mut(),
                    sys::ThreadsafeFunctionCallMode::nonblocking,
                )
            };
        }
    }

    /// Takes everything that is done; `batch` is the empty vector that the queue goes on with. Also when the thread was woken for it, if it
    /// was.
    pub(crate) fn take(&self, batch: Vec<Completion>) -> (Vec<Completion>, Option<Instant>) {
        let mut queue = self.queue.lock();
        queue.woken = queue.watched;
        (std::mem::replace(&mut queue.done, batch), queue.since.take())
    }

    /// The environment's thread is going to look by itself, or not any more. Returns whether something is done.
    pub(crate) fn watch(&self, watched: bool) -> bool {
        let mut queue = self.queue.lock();
        queue.watched = watched;
        queue.woken = watched;
        !queue.done.is_empty()
    }

    /// Keeps the environment's event loop alive (or not) while requests are outstanding.
    pub(crate) fn hold(&self, env: sys::napi_env, hold: bool) {
        // SAFETY: called on the environment's thread with its own env, while the function is alive.
        unsafe {
            if hold {
                sys::napi_ref_threadsafe_function(env, self.wake);
            } else {
                sys::napi_unref_threadsafe_function(env, self.wake);
            }
        }
    }
}
