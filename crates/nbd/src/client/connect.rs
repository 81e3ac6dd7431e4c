//! A socket to a server, within a time, unless the caller gives up before.

use std::io::{self, IoSlice};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};

use qcow2_core::{Error, ErrorKind, Job, Result};

use super::uri::Place;
use crate::transport::{Socket, Transport};

/// How often who waits looks whether the caller gave up.
const LOOK: Duration = Duration::from_millis(50);

/// The first attempts to reach an address end this soon, and are made again: each twice as long, since a slow network is one, too.
const FIRST_ATTEMPT: Duration = Duration::from_secs(1);

/// What is waited for while a connection begins.
pub(super) struct Patience<'a> {
    /// Until when.
    pub(super) deadline: Instant,
    /// Ends it before.
    pub(super) job: &'a Job,
}

/// Connects.
///
/// # Errors
/// `Io` with the system's error, `TimedOut`; `InvalidArgument` for a host or a path that is none; `Aborted`.
pub(super) fn connect(place: &Place, patience: &Patience<'_>) -> Result<Socket> {
    match place {
        Place::Tcp { host, port } => tcp(host, *port, patience).map(Socket::Tcp),
        Place::Unix(path) => unix(path, patience),
    }
}

/// The error of a time that has passed.
fn too_late() -> io::Error {
    #[cfg(unix)]
    return rustix::io::Errno::TIMEDOUT.into();
    #[cfg(not(unix))]
    io::ErrorKind::TimedOut.into()
}

fn tcp(host: &str, port: u16, patience: &Patience<'_>) -> Result<TcpStream> {
    let found = (host, port).to_socket_addrs().map_err(|error| {
        let message = format!("the host '{host}' has no address: {error}");
        Error::io(io::Error::new(error.kind(), message), "getaddrinfo")
    })?;
    let addresses: Vec<SocketAddr> = found.collect();
    let mut failure = None;
    for (index, address) in addresses.iter().enumerate() {
        // Each has its part of the time: the first one may lead nowhere.
        let rest = patience.deadline.saturating_duration_since(Instant::now());
        let left = u32::try_from(addresses.len() - index).unwrap_or(u32::MAX);
        match reach(address, Instant::now() + rest / left, patience.job)? {
            Ok(stream) => {
                let _slower = stream.set_nodelay(true);
                #[cfg(unix)]
                let _unnoticed = rustix::net::sockopt::set_socket_keepalive(&stream, true);
                return Ok(stream);
            }
            Err(error) => failure = failure.or(Some(error)),
        }
    }
    Err(Error::io(failure.unwrap_or_else(too_late), "connect"))
}

/// Tries one address. Connecting cannot be ended from outside, so it is tried in short turns.
fn reach(address: &SocketAddr, deadline: Instant, job: &Job) -> Result<io::Result<TcpStream>> {
    let mut turn = FIRST_ATTEMPT;
    loop {
        job.checkpoint()?;
        let rest = deadline.saturating_duration_since(Instant::now());
        if rest.is_zero() {
            return Ok(Err(too_late()));
        }
        match TcpStream::connect_timeout(address, turn.min(rest)) {
            Err(error) if error.kind() == io::ErrorKind::TimedOut => turn = turn.saturating_mul(2),
            ended => return Ok(ended),
        }
    }
}

#[cfg(unix)]
fn unix(path: &std::path::Path, patience: &Patience<'_>) -> Result<Socket> {
    use rustix::io::Errno;
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketType, connect, socket};
    let failed = |call| move |error: Errno| Error::io(error.into(), call);
    let address = SocketAddrUnix::new(path).map_err(|error| {
        let message = format!("'{}' cannot be the path of a socket: {error}", path.display());
        Error::new(ErrorKind::InvalidArgument, message).with_field("uri")
    })?;
    let made = socket(AddressFamily::UNIX, SocketType::STREAM, None).map_err(failed("socket"))?;
    rustix::io::fcntl_setfd(&made, rustix::io::FdFlags::CLOEXEC).map_err(failed("fcntl"))?;
    rustix::io::ioctl_fionbio(&made, true).map_err(failed("ioctl"))?;
    loop {
        patience.job.checkpoint()?;
        match connect(&made, &address) {
            Ok(()) => break,
            // Others wait to be accepted, as many as the server allows.
            Err(Errno::AGAIN) if Instant::now() < patience.deadline => std::thread::sleep(LOOK / 2),
            Err(Errno::AGAIN) => return Err(Error::io(too_late(), "connect")),
            Err(Errno::INTR) => {}
            Err(error) => return Err(Error::io(error.into(), "connect")),
        }
    }
    rustix::io::ioctl_fionbio(&made, false).map_err(failed("ioctl"))?;
    Ok(Socket::Unix(made.into()))
}

#[cfg(not(unix))]
fn unix(_: &std::path::Path, _: &Patience<'_>) -> Result<Socket> {
    let message = "unix sockets are not supported on this system: nbd://HOST:PORT is";
    Err(Error::new(ErrorKind::UnsupportedFeature, message))
}

/// A transport that is given up when its job is cancelled, while a connection begins.
pub(super) struct Watched<'a> {
    pub(super) transport: &'a dyn Transport,
    pub(super) patience: &'a Patience<'a>,
}

impl Watched<'_> {
    fn turns(&self, mut turn: impl FnMut(Option<Instant>) -> io::Result<usize>) -> io::Result<usize> {
        loop {
            if self.patience.job.is_cancelled() {
                return Err(io::ErrorKind::ConnectionAborted.into());
            }
            let now = Instant::now();
            if now >= self.patience.deadline {
                return Err(too_late());
            }
            match turn(Some(self.patience.deadline.min(now + LOOK))) {
                Err(error) if is_late(&error) => {}
                done => return done,
            }
        }
    }
}

/// Whether a wait ended by itself: systems call it by either name.
pub(super) fn is_late(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
}

impl Transport for Watched<'_> {
    fn read(&self, to: &mut [u8], _: Option<Instant>) -> io::Result<usize> {
        self.turns(|until| self.transport.read(to, until))
    }

    fn write(&self, parts: &[IoSlice<'_>], _: Option<Instant>) -> io::Result<usize> {
        self.turns(|until| self.transport.write(parts, until))
    }

    fn forget_deadlines(&self) -> io::Result<()> {
        self.transport.forget_deadlines()
    }

    fn limit_sending(&self, time: Duration) -> io::Result<()> {
        self.transport.limit_sending(time)
    }

    fn shutdown(&self) {
        self.transport.shutdown();
    }
}
