//! A connection to an export: requests of any number of threads, several under way at once. One thread reads all replies.
//!
//! What a request holds is bounded: as many bytes as it asked for, and [`MAX_IN_FLIGHT`] requests. A server that says nothing for as
//! long as it may be silent, that breaks the protocol or goes away ends the connection: whoever waits hears of it, and whoever comes
//! later, at once.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard};
use qcow2_core::error::GivenUp;
use qcow2_core::{Error, Job, Mem, Result};

use super::connect::{Patience, Watched, connect, is_late};
use super::handshake::{Agreed, Handshake, Listed};
use super::replies::{Answer, Asked, Question, Wrong, read_reply};
use super::uri::Location;
use crate::incoming::Incoming;
use crate::protocol::answers::BlockSizes;
use crate::protocol::command_flags;
use crate::protocol::transmission::{Command, Request};
use crate::transport::{Encrypt, Transport, write_all};

/// Requests that are under way at once; more wait.
pub const MAX_IN_FLIGHT: usize = 16;

/// Bytes that are copied at once to be sent.
const PIECE: usize = 256 << 10;

/// How often who waits looks whether there is still a reason to.
const LOOK: Duration = Duration::from_millis(100);

/// How long a server may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Times {
    /// To be reached, and to begin.
    pub connect: Duration,
    /// To say nothing while requests wait.
    pub silence: Duration,
}

impl Default for Times {
    fn default() -> Self {
        Self { connect: Duration::from_secs(30), silence: Duration::from_secs(60) }
    }
}

/// How a server is reached.
#[derive(Clone, Default)]
pub struct Way {
    /// How long it may take.
    pub times: Times,
    /// What encrypts the connection, if it is to be.
    pub tls: Option<Arc<dyn Encrypt>>,
    /// For how long a connection that was lost is made again; requests wait meanwhile.
    pub reconnect: Duration,
}

impl From<Times> for Way {
    fn from(times: Times) -> Self {
        Self { times, ..Self::default() }
    }
}

/// A connection to an export. It ends when it is dropped.
pub struct Connection {
    shared: Arc<Shared>,
    reader: Option<JoinHandle<()>>,
}

struct Shared {
    transport: Box<dyn Transport>,
    agreed: Agreed,
    silence: Duration,
    /// Cancelled, it ends the connection.
    job: Arc<Job>,
    /// Taken to send a request: those of several threads do not mix. What is sent is copied here.
    sending: Mutex<Vec<u8>>,
    state: Mutex<State>,
    /// A request was answered: there is room for another one.
    room: Condvar,
    /// How often the server was heard.
    heard: AtomicU64,
}

#[derive(Default)]
struct State {
    /// Requests that are not answered, by their cookies, and who waits for them. The reader has the question for a while.
    waiting: HashMap<u64, (Option<Question>, Arc<Slot>)>,
    last: u64,
    /// Why the connection has ended.
    ended: Option<End>,
}

/// Where the answer to a request comes.
#[derive(Default)]
struct Slot {
    answer: Mutex<Option<io::Result<Answer>>>,
    came: Condvar,
}

/// A request that was sent.
pub(super) struct Ticket(Arc<Slot>);

/// Connects to a server for `then`, which has the time that is left.
fn greet<T>(
    location: &Location,
    way: &Way,
    job: &Job,
    then: impl FnOnce(Handshake<'_>) -> Result<T>,
) -> Result<(Box<dyn Transport>, Incoming, T)> {
    let patience = Patience { deadline: Instant::now() + way.times.connect, job };
    let plain = connect(&location.place, &patience)?;
    let mut incoming = Incoming::new();
    let watched = Watched { transport: &plain, patience: &patience };
    let handshake = Handshake::begin(&watched, &mut incoming)?;
    let Some(tls) = &way.tls else {
        let value = then(handshake)?;
        return Ok((Box::new(plain), incoming, value));
    };
    let no_zeroes = handshake.start_tls()?;
    let secured = tls.encrypt(&plain).map_err(|error| Error::io(error, "NBD_OPT_STARTTLS"))?;
    let watched = Watched { transport: &secured, patience: &patience };
    let value = then(Handshake::go_on(&watched, &mut incoming, no_zeroes))?;
    Ok((Box::new(secured), incoming, value))
}

/// The exports of a server, whichever one `location` names.
///
/// # Errors
/// Those of [`Connection::open`]; `Io` where the server tells of none.
pub fn list(location: &Location, way: impl Into<Way>, job: &Job) -> Result<Vec<Listed>> {
    let listed = greet(location, &way.into(), job, |handshake| handshake.list());
    listed.map(|(.., exports)| exports).map_err(|error| error.with_path(location.to_string()))
}

impl Connection {
    /// Connects to an export. Cancelling the job ends the attempt, and what waits for an answer later.
    ///
    /// # Errors
    /// `Io` with the system's error or what the server refuses, says wrongly or does not say in time; `UnsupportedFeature` for a server that is too
    /// old; `Aborted` where the job is cancelled.
    pub fn open(location: &Location, way: &Way, job: &Arc<Job>) -> Result<Self> {
        let greeted = greet(location, way, job, |handshake| handshake.go(&location.export));
        let opened = greeted.and_then(|(transport, incoming, agreed)| {
            Self::over(transport, incoming, agreed, way.times.silence, job)
        });
        opened.map_err(|error| error.with_path(location.to_string()))
    }

    /// Begins with the default export of a server behind a transport of the caller's, whose calls end by themselves.
    ///
    /// # Errors
    /// As [`Connection::open`].
    pub fn begin(transport: Box<dyn Transport>, times: Times) -> Result<Self> {
        let job = Arc::new(Job::new());
        let patience = Patience { deadline: Instant::now() + times.connect, job: &job };
        let mut incoming = Incoming::new();
        let watched = Watched { transport: &*transport, patience: &patience };
        let agreed = Handshake::begin(&watched, &mut incoming)?.go(b"")?;
        Self::over(transport, incoming, agreed, times.silence, &job)
    }

    fn over(
        transport: Box<dyn Transport>,
        mut incoming: Incoming,
        agreed: Agreed,
        silence: Duration,
        job: &Arc<Job>,
    ) -> Result<Self> {
        let ready = transport.forget_deadlines().and_then(|()| transport.limit_sending(silence));
        ready.map_err(|error| Error::io(error, "setsockopt"))?;
        let shared = Arc::new(Shared {
            transport,
            agreed,
            silence,
            job: Arc::clone(job),
            sending: Mutex::default(),
            state: Mutex::default(),
            room: Condvar::new(),
            heard: AtomicU64::new(0),
        });
        let reads = Arc::clone(&shared);
        let builder = thread::Builder::new().name("qcow2-nbd".to_owned());
        let reader = builder.spawn(move || reads.read_all(&mut incoming)).map_err(Error::no_thread)?;
        Ok(Self { shared, reader: Some(reader) })
    }

    /// Size of the export in bytes.
    pub fn size(&self) -> u64 {
        self.shared.agreed.size
    }

    /// What the export can do: transmission flags.
    pub fn flags(&self) -> u16 {
        self.shared.agreed.flags
    }

    /// What requests should look like.
    pub fn block_sizes(&self) -> BlockSizes {
        self.shared.agreed.blocks
    }

    /// Whether lengths can have 64 bits.
    pub(super) fn takes_long(&self) -> bool {
        self.shared.agreed.extended
    }

    /// Whether the server tells of holes and zeroes.
    pub fn tells_status(&self) -> bool {
        self.shared.agreed.allocation.is_some()
    }

    /// It failed: the server went away, broke the protocol, or said nothing for too long. Nobody gave it up.
    pub(super) fn is_lost(&self) -> bool {
        matches!(self.shared.state.lock().ended, Some(End::Failed(..)))
    }

    /// Whether another connection leads to the same, as far as requests can tell.
    pub(super) fn is_like(&self, other: &Self) -> bool {
        let export = |it: &Self| (it.size(), it.flags(), it.block_sizes());
        export(self) == export(other)
    }

    /// Ends it, now: whoever waits hears that it was given up ([`ErrorKind::Aborted`](qcow2_core::ErrorKind::Aborted)).
    pub fn close(&self) {
        self.shared.give_up();
    }

    /// Sends a request, with what it writes, when there is room for one more. Lengths are those that the server takes.
    pub(super) fn send(
        &self,
        flags: u16,
        command: Command,
        offset: u64,
        length: u64,
        payload: &[Mem<'_>],
    ) -> io::Result<Ticket> {
        let shared = &*self.shared;
        let slot = Arc::new(Slot::default());
        let mut state = shared.wait_for_room()?;
        state.last += 1;
        let cookie = state.last;
        state.waiting.insert(cookie, (Some(Question::new(command, offset, length)), Arc::clone(&slot)));
        drop(state);
        let writes = shared.agreed.extended && command == Command::Write;
        let flags = if writes { flags | command_flags::PAYLOAD_LEN } else { flags };
        let request = Request { flags, command, cookie, offset, length };
        if let Err(error) = shared.send(&request, payload) {
            shared.fail(error);
        }
        Ok(Ticket(slot))
    }

    /// Waits for the answer to a request.
    pub(super) fn wait(&self, ticket: Ticket) -> io::Result<Answer> {
        let Ticket(slot) = ticket;
        let mut answer = slot.answer.lock();
        let mut quiet = Quiet::new(&self.shared);
        loop {
            if let Some(answer) = answer.take() {
                return answer;
            }
            if slot.came.wait_for(&mut answer, quiet.turn()).timed_out() {
                MutexGuard::unlocked(&mut answer, || quiet.look(&self.shared));
            }
        }
    }
}

/// How long the server has been silent while a request waits.
struct Quiet {
    heard: u64,
    since: Instant,
    turn: Duration,
}

impl Quiet {
    fn new(shared: &Shared) -> Self {
        let turn = shared.silence.min(LOOK);
        Self { heard: shared.heard.load(Ordering::Acquire), since: Instant::now(), turn }
    }

    /// How long to wait before the next look.
    fn turn(&self) -> Duration {
        self.turn
    }

    /// Ends the connection where it is time to.
    fn look(&mut self, shared: &Shared) {
        let heard = shared.heard.load(Ordering::Acquire);
        if shared.job.is_cancelled() {
            shared.give_up();
        } else if heard != self.heard {
            (self.heard, self.since) = (heard, Instant::now());
        } else if self.since.elapsed() >= shared.silence {
            shared.fall_silent();
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        // The server may be gone already.
        let farewell = Request { flags: 0, command: Command::Disc, cookie: 0, offset: 0, length: 0 };
        if self.shared.state.lock().ended.is_none() {
            let _gone = self.shared.send(&farewell, &[]);
        }
        self.close();
        let _ended = self.reader.take().map(JoinHandle::join);
    }
}

impl Shared {
    fn wait_for_room(&self) -> io::Result<MutexGuard<'_, State>> {
        let mut state = self.state.lock();
        let mut quiet = Quiet::new(self);
        loop {
            if let Some(ended) = &state.ended {
                return Err(ended.error());
            }
            if state.waiting.len() < MAX_IN_FLIGHT {
                return Ok(state);
            }
            if self.room.wait_for(&mut state, quiet.turn()).timed_out() {
                MutexGuard::unlocked(&mut state, || quiet.look(self));
            }
        }
    }

    fn send(&self, request: &Request, payload: &[Mem<'_>]) -> io::Result<()> {
        let mut copied = self.sending.lock();
        copied.clear();
        copied.extend(request.to_bytes(self.agreed.extended));
        for mem in payload {
            let mut rest = *mem;
            while !rest.is_empty() {
                let start = copied.len();
                let (piece, behind) = rest.split_at(PIECE.saturating_sub(start).max(1));
                // What JavaScript can change meanwhile is copied, never lent.
                copied.resize(start + piece.len(), 0);
                piece.copy_to(copied.get_mut(start..).unwrap_or_default());
                rest = behind;
                if copied.len() >= PIECE {
                    write_all(&*self.transport, &[&copied], None)?;
                    copied.clear();
                }
            }
        }
        write_all(&*self.transport, &[&copied], None)
    }

    fn read_all(&self, incoming: &mut Incoming) {
        loop {
            match read_reply(incoming, &*self.transport, &self.agreed, self) {
                Ok(()) => {}
                Err(Wrong::Failed(error)) => return self.fail(error),
                Err(Wrong::Broken(why)) => {
                    let message = format!("the server broke the NBD protocol: {}", why.0);
                    return self.end(End::Failed(io::ErrorKind::InvalidData, message));
                }
            }
        }
    }

    fn fail(&self, error: io::Error) {
        if is_late(&error) {
            return self.fall_silent();
        }
        let message = match error.kind() {
            io::ErrorKind::UnexpectedEof => "the server closed the connection".to_owned(),
            _ => format!("the connection to the server failed: {error}"),
        };
        self.end(End::Failed(error.kind(), message));
    }

    fn fall_silent(&self) {
        let message = format!("the server has not answered for {} seconds", self.silence.as_secs_f64());
        self.end(End::Failed(io::ErrorKind::TimedOut, message));
    }

    fn give_up(&self) {
        self.end(End::GivenUp);
    }

    /// Ends the connection, for the first reason that there is; all who wait hear of it.
    fn end(&self, end: End) {
        let mut state = self.state.lock();
        let waiting = std::mem::take(&mut state.waiting);
        let ended = state.ended.get_or_insert(end);
        for (_, slot) in waiting.into_values() {
            slot.put(Err(ended.error()));
        }
        drop(state);
        self.room.notify_all();
        self.transport.shutdown();
    }
}

/// Why nothing goes any more.
enum End {
    GivenUp,
    Failed(io::ErrorKind, String),
}

impl End {
    fn error(&self) -> io::Error {
        match self {
            Self::GivenUp => GivenUp.into(),
            Self::Failed(kind, message) => io::Error::new(*kind, message.clone()),
        }
    }
}

impl Slot {
    fn put(&self, answer: io::Result<Answer>) {
        *self.answer.lock() = Some(answer);
        self.came.notify_all();
    }
}

impl Asked for Shared {
    fn take(&self, cookie: u64) -> Option<Question> {
        self.state.lock().waiting.get_mut(&cookie).and_then(|(question, _)| question.take())
    }

    fn give_back(&self, cookie: u64, question: Question) {
        if let Some((place, _)) = self.state.lock().waiting.get_mut(&cookie) {
            *place = Some(question);
        }
    }

    fn answer(&self, cookie: u64, answer: io::Result<Answer>) {
        if let Some((_, slot)) = self.state.lock().waiting.remove(&cookie) {
            slot.put(answer);
        }
        self.room.notify_one();
    }

    fn heard(&self) {
        self.heard.fetch_add(1, Ordering::AcqRel);
    }
}
