//! A client that has begun: threads that take turns to read a request, do it, and answer.
//!
//! One of them waits for the next request. When it has one, another takes its place, which is started if none is free and there are not
//! too many. So a client that asks one thing after the other has two threads, and one that has many requests under way
//! gets answers in the order in which they are ready.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::{self, Scope};
use std::time::Instant;

use parking_lot::Mutex;

use super::MAX_BYTES;
use super::budget::{Budget, Held};
use super::export::Export;
use super::handshake::{Agreed, Handshake};
use super::requests::{Refused, check};
use crate::incoming::Incoming;
use crate::protocol::transmission::{Command, EXTENDED_REQUEST_HEAD, REQUEST_HEAD, Request};
use crate::protocol::{MAX_PAYLOAD, Malformed, command_flags};
use crate::transport::{Socket, Transport};

/// A thread keeps as many bytes from one request to the next: a larger buffer is made for each that needs it.
const KEPT: usize = 2 << 20;

/// Bytes that are counted for a request without any of its own: what its answer is made of.
const OVERHEAD: usize = 64 << 10;

/// Bytes that are counted for each context of a `BLOCK_STATUS`.
const STATUS: usize = 1 << 20;

/// What one client may take.
pub(super) struct Limits {
    /// For the handshake.
    pub(super) deadline: Option<Instant>,
    /// Requests at once.
    pub(super) threads: usize,
}

/// A client that has begun.
pub(super) struct Connection<'a> {
    pub(super) transport: &'a dyn Transport,
    pub(super) agreed: Agreed<'a>,
    /// The server ends.
    pub(super) ending: &'a AtomicBool,
    incoming: Mutex<Incoming>,
    /// Taken to send an answer: those of several requests do not mix.
    pub(super) sending: Mutex<()>,
    budget: Budget,
    /// No more requests are read.
    ended: AtomicBool,
    threads: AtomicUsize,
    /// Threads that wait for a request, or soon will.
    free: AtomicUsize,
    most: usize,
}

/// A request that has arrived as a whole.
pub(super) struct Order<'a> {
    pub(super) request: Request,
    /// Why it is not done.
    pub(super) refused: Option<Refused>,
    _held: Held<'a>,
}

/// What begins with TLS on the connection of a client.
pub(super) type StartTls<'a> = &'a dyn Fn() -> io::Result<Arc<Socket>>;

/// Serves one client to its end, over TLS where that is given. Tells whether it had begun.
pub(super) fn serve(
    plain: &dyn Transport,
    exports: &[Export],
    several: bool,
    limits: &Limits,
    ending: &AtomicBool,
    start_tls: Option<StartTls<'_>>,
) -> bool {
    let mut incoming = Incoming::new();
    let mut handshake = Handshake {
        transport: plain,
        incoming: &mut incoming,
        exports,
        several,
        deadline: limits.deadline,
        encrypted: start_tls.is_some(),
        structured: false,
        extended: false,
        contexts: None,
    };
    // A client that vanishes, or says what no client says, has nothing to hear.
    let greeted = handshake.greet().ok().flatten();
    let greeted = greeted
        .filter(|greeted| start_tls.is_none() || handshake.until_tls(*greeted).is_ok_and(|asked| asked));
    let secured = start_tls.filter(|_| greeted.is_some()).map(|start_tls| start_tls());
    let transport: &dyn Transport = match &secured {
        None => plain,
        Some(Ok(secured)) => &**secured,
        Some(Err(_)) => {
            plain.shutdown();
            return false;
        }
    };
    handshake.transport = transport;
    let agreed = greeted.and_then(|greeted| handshake.run(greeted).ok().flatten());
    let begun = agreed.filter(|_| transport.forget_deadlines().is_ok());
    let had_begun = begun.is_some();
    if let Some(agreed) = begun {
        Connection {
            transport,
            agreed,
            ending,
            incoming: Mutex::new(incoming),
            sending: Mutex::new(()),
            budget: Budget::new(MAX_BYTES),
            ended: AtomicBool::new(false),
            threads: AtomicUsize::new(1),
            free: AtomicUsize::new(0),
            most: limits.threads,
        }
        .run();
    }
    transport.shutdown();
    had_begun
}

/// Serves one client on the calling thread alone, one request after the other, without a limit on time. Tells whether it had begun.
pub fn serve_connection(transport: &dyn Transport, exports: &[Export]) -> bool {
    let limits = Limits { deadline: None, threads: 1 };
    serve(transport, exports, false, &limits, &AtomicBool::new(false), None)
}

impl Connection<'_> {
    fn run(&self) {
        thread::scope(|scope| self.work(scope));
    }

    fn work<'scope>(&'scope self, scope: &'scope Scope<'scope, '_>) {
        let mut buffer = Vec::new();
        self.free.fetch_add(1, Ordering::AcqRel);
        while let Some(order) = self.next(&mut buffer) {
            self.reinforce(scope);
            if self.execute(&order, &mut buffer).is_err() {
                self.ended.store(true, Ordering::Release);
                self.transport.shutdown();
            }
            if buffer.capacity() > KEPT {
                buffer = Vec::new();
            }
        }
        self.free.fetch_sub(1, Ordering::AcqRel);
    }

    /// Sees to it that somebody waits for the next request.
    fn reinforce<'scope>(&'scope self, scope: &'scope Scope<'scope, '_>) {
        let free = self.free.fetch_sub(1, Ordering::AcqRel) > 1;
        let more = |threads: usize| (threads < self.most).then_some(threads + 1);
        if free || self.threads.fetch_update(Ordering::AcqRel, Ordering::Acquire, more).is_err() {
            return;
        }
        let builder = thread::Builder::new().name("qcow2-nbd".to_owned());
        if builder.spawn_scoped(scope, || self.work(scope)).is_err() {
            // Those there are will get to it.
            self.threads.fetch_sub(1, Ordering::AcqRel);
        }
    }

    /// The thread is about to answer: then it is free for the next request.
    pub(super) fn soon_free(&self) {
        self.free.fetch_add(1, Ordering::AcqRel);
    }

    /// Waits for the next request, and reads what it writes into `buffer`. Nothing where there will be none.
    fn next(&self, buffer: &mut Vec<u8>) -> Option<Order<'_>> {
        let mut incoming = self.incoming.lock();
        if self.ended.load(Ordering::Acquire) {
            return None;
        }
        let order = self.receive(&mut incoming, buffer).ok().flatten();
        if order.is_none() {
            self.ended.store(true, Ordering::Release);
        }
        order
    }

    /// The next request, in the form that was agreed on.
    fn request(&self, incoming: &mut Incoming) -> io::Result<Result<Request, Malformed>> {
        if self.agreed.extended {
            let mut head = [0; EXTENDED_REQUEST_HEAD];
            incoming.read_exact(self.transport, &mut head, None)?;
            return Ok(Request::parse_extended(&head));
        }
        let mut head = [0; REQUEST_HEAD];
        incoming.read_exact(self.transport, &mut head, None)?;
        Ok(Request::parse(&head))
    }

    fn receive(&self, incoming: &mut Incoming, buffer: &mut Vec<u8>) -> io::Result<Option<Order<'_>>> {
        let Ok(request) = self.request(incoming)? else { return Ok(None) };
        if request.command == Command::Disc {
            return Ok(None);
        }
        let refused = check(&request, &self.agreed);
        let writes = request.command == Command::Write;
        // A write has its bytes behind it whether it says so, as it should, or not: QEMU's do not.
        let follows = writes || self.agreed.extended && request.has(command_flags::PAYLOAD_LEN);
        // What follows is not read to the end only to be refused: it can be any length.
        if follows && request.length > MAX_PAYLOAD.into() {
            return Ok(None);
        }
        let bytes = match request.command {
            _ if refused.is_some() => 0,
            Command::Read | Command::Write => request.length as usize,
            Command::BlockStatus => STATUS.saturating_mul(self.agreed.contexts.len()),
            _ => 0,
        };
        let held = self.budget.take(bytes.saturating_add(OVERHEAD));
        if follows && refused.is_some() {
            incoming.skip(self.transport, request.length)?;
        } else if follows {
            buffer.resize(buffer.len().max(bytes), 0);
            incoming.read_exact(self.transport, buffer.get_mut(..bytes).unwrap_or_default(), None)?;
        }
        Ok(Some(Order { request, refused, _held: held }))
    }
}
