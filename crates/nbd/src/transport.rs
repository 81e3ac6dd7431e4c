//! A connection.

use std::io::{self, IoSlice, Read, Write};
use std::net::{Shutdown, TcpStream};
#[cfg(unix)]
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// What bytes come from and go to. Used by several threads at once.
pub trait Transport: Send + Sync {
    /// Waits for bytes, until the deadline at most; 0 where there will be none.
    ///
    /// # Errors
    /// Of the connection; `TimedOut`.
    fn read(&self, to: &mut [u8], deadline: Option<Instant>) -> io::Result<usize>;

    /// Sends some of the bytes, waiting until the deadline at most.
    ///
    /// # Errors
    /// As [`Transport::read`].
    fn write(&self, parts: &[IoSlice<'_>], deadline: Option<Instant>) -> io::Result<usize>;

    /// From now on calls without a deadline wait as long as it takes.
    ///
    /// # Errors
    /// Of the connection.
    fn forget_deadlines(&self) -> io::Result<()>;

    /// From now on what is sent without a deadline waits so long at most before a part of it is taken.
    ///
    /// # Errors
    /// Of the connection.
    fn limit_sending(&self, time: Duration) -> io::Result<()> {
        let _ = time;
        Ok(())
    }

    /// Ends it for both sides: who reads or writes hears of it.
    fn shutdown(&self);
}

/// TLS, which this crate does not have: it knows only when it begins.
pub trait Encrypt: Send + Sync {
    /// Begins with TLS on a connection, on which nothing else is read or written here from now on. What is returned takes its place: at
    /// once, before TLS has agreed on anything, and it ends where TLS does.
    ///
    /// # Errors
    /// Of the system.
    fn encrypt(&self, plain: &Socket) -> io::Result<Socket>;
}

/// Sends all of the parts, one behind the other.
pub(crate) fn write_all(
    transport: &dyn Transport,
    parts: &[&[u8]],
    deadline: Option<Instant>,
) -> io::Result<()> {
    let mut slices: Vec<IoSlice<'_>> = parts.iter().map(|part| IoSlice::new(part)).collect();
    let mut rest = &mut slices[..];
    // What is empty in front would look like the end.
    IoSlice::advance_slices(&mut rest, 0);
    while !rest.is_empty() {
        match transport.write(rest, deadline) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(sent) => IoSlice::advance_slices(&mut rest, sent),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// A socket.
#[derive(Debug)]
pub enum Socket {
    /// TCP.
    Tcp(TcpStream),
    /// A unix socket.
    #[cfg(unix)]
    Unix(UnixStream),
}

macro_rules! each {
    ($socket:expr, $stream:ident => $call:expr) => {
        match $socket {
            Socket::Tcp($stream) => $call,
            #[cfg(unix)]
            Socket::Unix($stream) => $call,
        }
    };
}

impl Socket {
    /// Another descriptor of the same socket.
    ///
    /// # Errors
    /// Of the system, as where it has no descriptor left.
    #[cfg(unix)]
    pub fn duplicate(&self) -> io::Result<std::os::fd::OwnedFd> {
        each!(self, stream => stream.try_clone().map(Into::into))
    }

    /// Nothing more is read from the other side; what is under way is still answered.
    pub(crate) fn end_reading(&self) {
        let _gone = each!(self, stream => stream.shutdown(Shutdown::Read));
    }
}

/// The time until the deadline; a timeout of 0 would be none at all.
fn rest(deadline: Option<Instant>) -> io::Result<Option<Duration>> {
    let Some(deadline) = deadline else { return Ok(None) };
    match deadline.saturating_duration_since(Instant::now()) {
        Duration::ZERO => Err(io::ErrorKind::TimedOut.into()),
        rest => Ok(Some(rest)),
    }
}

impl Transport for Socket {
    fn read(&self, to: &mut [u8], deadline: Option<Instant>) -> io::Result<usize> {
        if let Some(rest) = rest(deadline)? {
            each!(self, stream => stream.set_read_timeout(Some(rest)))?;
        }
        each!(self, stream => { let mut stream = stream; stream.read(to) })
    }

    fn write(&self, parts: &[IoSlice<'_>], deadline: Option<Instant>) -> io::Result<usize> {
        if let Some(rest) = rest(deadline)? {
            each!(self, stream => stream.set_write_timeout(Some(rest)))?;
        }
        each!(self, stream => { let mut stream = stream; stream.write_vectored(parts) })
    }

    fn forget_deadlines(&self) -> io::Result<()> {
        each!(self, stream => stream.set_read_timeout(None).and_then(|()| stream.set_write_timeout(None)))
    }

    fn limit_sending(&self, time: Duration) -> io::Result<()> {
        each!(self, stream => stream.set_write_timeout(Some(time)))
    }

    fn shutdown(&self) {
        let _gone = each!(self, stream => stream.shutdown(Shutdown::Both));
    }
}
