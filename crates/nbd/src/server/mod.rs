//! A server of disks: a thread accepts clients, and each has threads of its own that do its requests, which block.
//!
//! What one client can hold is bounded: a time for its handshake, [`MAX_IN_FLIGHT`] requests, [`MAX_BYTES`] bytes of them. Nothing of a client
//! outlives its connection, and the server's threads end with [`Server::close`].

mod budget;
mod connection;
mod contexts;
mod export;
mod handshake;
mod listener;
mod replies;
mod requests;

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use qcow2_core::{Error, Result};

pub use connection::serve_connection;
pub use export::{Bitmap, DirtyRanges, Export};
use listener::{Listener, Next};

pub use crate::transport::{Encrypt, Socket, Transport};

/// Requests of one client that are under way at once: more wait in its socket.
pub const MAX_IN_FLIGHT: usize = 16;

/// Bytes of requests and replies that one client holds at once: more wait in its socket.
pub const MAX_BYTES: usize = 64 << 20;

/// How long a client may take to begin.
pub const HANDSHAKE_TIME: Duration = Duration::from_secs(10);

/// How long answers to requests that are under way may take to be read when the server ends.
const LAST_ANSWERS: Duration = Duration::from_secs(2);

/// Where a server listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// A socket of this name, which is made, and removed at the end.
    Unix(PathBuf),
    /// A port of the host's addresses, or of all there are; 0 for any that is free.
    Tcp {
        /// Name or address.
        host: Option<String>,
        /// Port.
        port: u16,
    },
}

/// How a server goes on.
#[derive(Debug, Clone, Copy)]
pub struct ServerOptions {
    /// Clients at once; others wait until one has gone.
    pub max_connections: usize,
    /// The server goes on when the last client has gone that had begun.
    pub persistent: bool,
    /// How long a client may take to begin.
    pub handshake_time: Duration,
}

/// Called once, when the server has ended.
pub type OnEnd = Box<dyn FnOnce() + Send>;

/// A server that runs.
pub struct Server {
    shared: Arc<Shared>,
    address: Address,
    acceptor: Mutex<Option<JoinHandle<()>>>,
}

struct Shared {
    exports: Arc<[Export]>,
    options: ServerOptions,
    /// What clients have to begin with, if that is TLS.
    tls: Option<Arc<dyn Encrypt>>,
    listener: Listener,
    /// The server ends: of all that looks at it, requests are the last.
    ending: Arc<AtomicBool>,
    clients: Mutex<Clients>,
    gone: Condvar,
}

#[derive(Default)]
struct Clients {
    last: u64,
    sockets: HashMap<u64, Arc<Socket>>,
    threads: Vec<JoinHandle<()>>,
}

impl Server {
    /// Listens, and serves from now on. `on_end` hears of the end, on a thread of the server's.
    ///
    /// # Errors
    /// `Io` of the socket, `EADDRINUSE` where somebody listens there; `InvalidArgument` for a path that is too long for a socket.
    pub fn start(
        address: &Address,
        exports: Vec<Export>,
        options: ServerOptions,
        on_end: OnEnd,
    ) -> Result<Self> {
        Self::start_over(None, address, exports, options, on_end)
    }

    /// As [`Server::start`], over TLS where that is given: clients are told nothing before it.
    ///
    /// # Errors
    /// Those of [`Server::start`].
    pub fn start_over(
        tls: Option<Arc<dyn Encrypt>>,
        address: &Address,
        exports: Vec<Export>,
        options: ServerOptions,
        on_end: OnEnd,
    ) -> Result<Self> {
        let (listener, address) = Listener::bind(address)?;
        let shared = Arc::new(Shared {
            exports: exports.into(),
            options,
            tls,
            listener,
            ending: Arc::default(),
            clients: Mutex::default(),
            gone: Condvar::new(),
        });
        let accepting = Arc::clone(&shared);
        let run = move || {
            accepting.accept();
            accepting.end();
            on_end();
        };
        let acceptor =
            thread::Builder::new().name("qcow2-nbd".to_owned()).spawn(run).map_err(Error::no_thread);
        let acceptor = acceptor.inspect_err(|_| shared.listener.close())?;
        Ok(Self { shared, address, acceptor: Mutex::new(Some(acceptor)) })
    }

    /// Where it listens, with the port that it got.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// Clients that are connected.
    pub fn connections(&self) -> usize {
        self.shared.clients.lock().sockets.len()
    }

    /// Takes no more clients and no more requests. `on_end` hears of it when all has ended.
    pub fn ask_to_end(&self) {
        self.shared.ask_to_end();
    }

    /// Takes no more clients and no more requests, answers those that are under way, and waits until all threads have ended.
    pub fn close(&self) {
        self.shared.ask_to_end();
        let acceptor = self.acceptor.lock().take();
        // It hears of no panic: there is none.
        let _ended = acceptor.map(JoinHandle::join);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.close();
    }
}

impl Shared {
    fn ask_to_end(&self) {
        self.ending.store(true, Ordering::Release);
        self.listener.wake();
    }

    fn accept(self: &Arc<Self>) {
        while !self.ending.load(Ordering::Acquire) {
            let full = self.clients.lock().sockets.len() >= self.options.max_connections;
            match self.listener.next(!full) {
                Next::Client(socket) => self.welcome(socket),
                Next::Woken => {}
            }
        }
    }

    /// Gives a client its thread. Where there is none, it finds its connection closed.
    fn welcome(self: &Arc<Self>, socket: Socket) {
        let socket = Arc::new(socket);
        let mut clients = self.clients.lock();
        let (ended, going_on) =
            std::mem::take(&mut clients.threads).into_iter().partition(JoinHandle::is_finished);
        clients.threads = going_on;
        clients.last += 1;
        let number = clients.last;
        let shared = Arc::clone(self);
        let own = Arc::clone(&socket);
        let run = move || shared.serve(number, &own);
        if let Ok(thread) = thread::Builder::new().name("qcow2-nbd".to_owned()).spawn(run) {
            clients.sockets.insert(number, socket);
            clients.threads.push(thread);
        }
        drop(clients);
        join(ended);
    }

    fn serve(&self, number: u64, socket: &Socket) {
        let deadline = Instant::now() + self.options.handshake_time;
        let limits = connection::Limits { deadline: Some(deadline), threads: MAX_IN_FLIGHT };
        let several = self.options.max_connections > 1;
        let start_tls = || self.secure(number, socket);
        let start_tls = self.tls.as_ref().map(|_| &start_tls as connection::StartTls<'_>);
        let had_begun = connection::serve(socket, &self.exports, several, &limits, &self.ending, start_tls);
        let mut clients = self.clients.lock();
        clients.sockets.remove(&number);
        let last = clients.sockets.is_empty();
        drop(clients);
        self.gone.notify_all();
        if last && had_begun && !self.options.persistent {
            self.ending.store(true, Ordering::Release);
        }
        // There is room for another one.
        self.listener.wake();
    }

    /// Begins with TLS on a client's connection, which is another one to us from then on.
    fn secure(&self, number: u64, plain: &Socket) -> io::Result<Arc<Socket>> {
        let tls = self.tls.as_ref().ok_or(io::ErrorKind::Unsupported)?;
        let secured = Arc::new(tls.encrypt(plain)?);
        let mut clients = self.clients.lock();
        // Those that end with the server were told so already.
        if self.ending.load(Ordering::Acquire) {
            return Err(io::ErrorKind::ConnectionAborted.into());
        }
        clients.sockets.insert(number, Arc::clone(&secured));
        Ok(secured)
    }

    fn end(&self) {
        self.listener.close();
        let mut clients = self.clients.lock();
        clients.sockets.values().for_each(|socket| socket.end_reading());
        let end = Instant::now() + LAST_ANSWERS;
        while !clients.sockets.is_empty() {
            if self.gone.wait_until(&mut clients, end).timed_out() {
                break;
            }
        }
        clients.sockets.values().for_each(|socket| socket.shutdown());
        let threads = std::mem::take(&mut clients.threads);
        drop(clients);
        join(threads);
    }
}

fn join(threads: Vec<JoinHandle<()>>) {
    for thread in threads {
        let _ended = thread.join();
    }
}

impl Address {
    /// The path of a unix socket.
    pub fn path(&self) -> Option<&Path> {
        match self {
            Self::Unix(path) => Some(path),
            Self::Tcp { .. } => None,
        }
    }
}
