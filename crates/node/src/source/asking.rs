//! Questions to an object of JavaScript's, and who waits for the answers.
//!
//! Any thread asks; the environment's thread takes the questions in batches, hands them to the object and brings the answers. Nobody holds
//! a lock while he waits, and whoever waits looks whether he was given up: so an object that never answers holds up nobody but those who
//! asked it, and these until they are cancelled.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use qcow2_engine::Mem;
use qcow2_engine::error::GivenUp;
use qcow2_engine::job::WorksFor;

use crate::delivery::{Completion, Delivery, Outcome};
use crate::pool::{lent, relieve};

use super::questions_into_js;

/// Who waits looks this often whether he was given up.
const LOOK: Duration = Duration::from_millis(20);

/// What is closed waits so long for an object that says nothing.
const GRACE: Duration = Duration::from_secs(5);

/// What can be asked of an object.
pub(crate) enum Ask {
    /// The bytes of a range.
    Read(Range<u64>),
    /// To write bytes.
    Write(u64, Vec<u8>),
    /// To make durable what was written.
    Sync,
    /// To have another size.
    Truncate(u64),
    /// What of a range is zero.
    Extents(Range<u64>),
    /// Not to go on with that question.
    Forget,
}

/// A run of bytes as an object tells of it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Known {
    pub(crate) end: u64,
    pub(crate) zero: bool,
}

/// An answer.
pub(crate) enum Answer<'a> {
    /// All bytes of the range.
    Bytes(Mem<'a>),
    /// It is done.
    Done,
    /// Runs from the beginning of the range on.
    Extents(Vec<Known>),
}

/// Who hears the answer.
pub(crate) type Hears = Box<dyn for<'a> FnOnce(io::Result<Answer<'a>>) + Send>;

/// A question on its way to JavaScript.
pub(crate) struct Question {
    pub(crate) id: u32,
    pub(crate) ask: Ask,
}

/// Something that an object threw: JavaScript has it under a number.
#[derive(Debug, Clone)]
pub(crate) struct Thrown {
    /// Its message.
    pub(crate) message: String,
    /// Its number.
    pub(crate) number: u32,
    /// Whether the same request may succeed when it is made again.
    pub(crate) transient: bool,
}

impl fmt::Display for Thrown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Thrown {}

struct Pending {
    hears: Hears,
    /// JavaScript has it.
    handed: bool,
}

#[derive(Clone, Copy)]
enum Mode {
    Open,
    /// Being closed, since then.
    Closing(Instant),
    /// Given up by the caller.
    Cancelled,
    /// Nothing more is asked.
    Ended,
}

struct State {
    queue: VecDeque<Question>,
    pending: HashMap<u32, Pending>,
    /// Questions that JavaScript has.
    handed: usize,
    last: u32,
    /// The request that waits for questions.
    waits: Option<u32>,
    mode: Mode,
    /// When there was an answer.
    heard: Instant,
}

/// The questions to one object.
pub(crate) struct Asking {
    delivery: Arc<Delivery>,
    /// Questions at once.
    most: usize,
    state: Mutex<State>,
}

impl Asking {
    /// None yet; at most so many at once.
    pub(super) fn new(delivery: Arc<Delivery>, most: usize) -> Arc<Self> {
        let state = State {
            queue: VecDeque::new(),
            pending: HashMap::new(),
            handed: 0,
            last: 0,
            waits: None,
            mode: Mode::Open,
            heard: Instant::now(),
        };
        Arc::new(Self { delivery, most: most.max(1), state: Mutex::new(state) })
    }

    /// Asks; returns the question's number. `hears` is called once, unless the question is forgotten before.
    pub(crate) fn ask(&self, ask: Ask, hears: Hears) -> u32 {
        let mut state = self.state.lock();
        if let Some(error) = state.ended() {
            drop(state);
            hears(Err(error));
            return 0;
        }
        let id = state.next_id();
        state.pending.insert(id, Pending { hears, handed: false });
        state.queue.push_back(Question { id, ask });
        self.tell(&mut state);
        id
    }

    /// Asks, and waits for the answer.
    pub(crate) fn wait<T: Send + 'static>(
        &self,
        ask: Ask,
        own: impl for<'a> FnOnce(Answer<'a>) -> T + Send + 'static,
    ) -> io::Result<T> {
        let slot = Arc::new((Mutex::new(None), Condvar::new()));
        let told = Arc::clone(&slot);
        let hears = move |answer: io::Result<Answer<'_>>| {
            *told.0.lock() = Some(answer.map(own));
            told.1.notify_all();
        };
        let id = self.ask(ask, Box::new(hears));
        lent(|| {
            let mut answer = slot.0.lock();
            loop {
                if let Some(answer) = answer.take() {
                    return answer;
                }
                slot.1.wait_for(&mut answer, LOOK);
                if answer.is_none()
                    && let Some(error) = self.given_up()
                {
                    drop(answer);
                    self.forget(id);
                    return Err(error);
                }
            }
        })
    }

    /// Nobody waits for that answer any more.
    pub(crate) fn forget(&self, id: u32) {
        let mut state = self.state.lock();
        let Some(Pending { handed, hears }) = state.pending.remove(&id) else { return };
        if handed {
            // An object that never answers must not keep its place.
            state.handed -= 1;
            state.queue.push_front(Question { id, ask: Ask::Forget });
        } else {
            state.queue.retain(|question| question.id != id);
        }
        self.tell(&mut state);
        drop(state);
        drop(hears);
    }

    /// What ends the waiting of this thread.
    pub(crate) fn given_up(&self) -> Option<io::Error> {
        relieve();
        if WorksFor::is_cancelled() {
            return Some(GivenUp.into());
        }
        let state = self.state.lock();
        match state.mode {
            Mode::Closing(since) if state.heard.max(since).elapsed() > GRACE => {
                let message = "the source has not answered for 5 seconds while it was closed";
                Some(io::Error::new(io::ErrorKind::TimedOut, message))
            }
            _ => state.ended(),
        }
    }

    /// Brings an answer.
    pub(super) fn answer(&self, id: u32, answer: io::Result<Answer<'_>>) {
        let mut state = self.state.lock();
        // Forgotten ones are answered, too.
        let Some(Pending { hears, .. }) = state.pending.remove(&id) else { return };
        state.handed -= 1;
        state.heard = Instant::now();
        self.tell(&mut state);
        drop(state);
        hears(answer);
    }

    /// That request waits for questions.
    pub(super) fn take(&self, request: u32) {
        let mut state = self.state.lock();
        state.waits = Some(request);
        self.tell(&mut state);
    }

    /// Whoever closes what stands on it waits no longer than for a while.
    pub(crate) fn close(&self) {
        let mut state = self.state.lock();
        if matches!(state.mode, Mode::Open) {
            state.mode = Mode::Closing(Instant::now());
        }
    }

    /// Gives up all who wait.
    pub(crate) fn cancel(&self) {
        self.end_in(Mode::Cancelled);
    }

    /// Nothing more is asked.
    pub(crate) fn end(&self) {
        self.end_in(Mode::Ended);
    }

    fn end_in(&self, mode: Mode) {
        let mut state = self.state.lock();
        if state.ended().is_none() {
            state.mode = mode;
        }
        let given_up: Vec<_> = state.pending.drain().collect();
        state.queue.clear();
        state.handed = 0;
        self.tell(&mut state);
        drop(state);
        for (_, pending) in given_up {
            (pending.hears)(Err(GivenUp.into()));
        }
    }

    /// Hands questions to JavaScript, where it waits for some: those that may be under way at once, or word of the end.
    fn tell(&self, state: &mut State) {
        let Some(request) = state.waits else { return };
        let mut batch = Vec::new();
        while let Some(question) = state.queue.front() {
            let forgets = matches!(question.ask, Ask::Forget);
            if !forgets && state.handed >= self.most {
                break;
            }
            let Some(question) = state.queue.pop_front() else { break };
            if !forgets {
                state.handed += 1;
                if let Some(pending) = state.pending.get_mut(&question.id) {
                    pending.handed = true;
                }
            }
            batch.push(question);
        }
        let outcome = match batch.is_empty() {
            false => Outcome::Value(questions_into_js(batch)),
            true if state.ended().is_some() => Outcome::Done,
            true => return,
        };
        state.waits = None;
        self.delivery.push(Completion { request, outcome });
    }
}

impl State {
    /// What a question fails with where none is taken any more.
    fn ended(&self) -> Option<io::Error> {
        match self.mode {
            Mode::Open | Mode::Closing(_) => None,
            Mode::Cancelled => Some(GivenUp.into()),
            Mode::Ended => Some(io::Error::new(io::ErrorKind::NotConnected, "the source is closed")),
        }
    }

    fn next_id(&mut self) -> u32 {
        loop {
            self.last = self.last.wrapping_add(1);
            if self.last != 0 && !self.pending.contains_key(&self.last) {
                return self.last;
            }
        }
    }
}
