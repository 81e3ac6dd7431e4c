//! The socket that clients come to. Waiting for one can be ended from another thread.

use std::io;
use std::net::{TcpListener, ToSocketAddrs};

use qcow2_core::{Error, ErrorKind, Result};

use super::Address;
use crate::transport::Socket;

/// What became of waiting.
pub(super) enum Next {
    /// A client.
    Client(Socket),
    /// Somebody called, or there was nothing after all.
    Woken,
}

/// All addresses of the machine, where none is said: those of both kinds, or those that there are.
const ANY: [&str; 2] = ["::", "0.0.0.0"];

/// Binds to the first address of the host that can be had.
fn bind_tcp(host: Option<&str>, port: u16) -> Result<TcpListener> {
    let hosts = host.map_or(ANY.to_vec(), |host| vec![host]);
    let mut failure = None;
    for host in hosts {
        let found = (host, port).to_socket_addrs().map_err(|error| resolving(error, host));
        match found.and_then(|addresses| {
            let addresses: Vec<_> = addresses.collect();
            TcpListener::bind(&addresses[..]).map_err(|error| Error::io(error, "bind"))
        }) {
            Ok(listener) => return Ok(listener),
            Err(error) => failure = failure.or(Some(error)),
        }
    }
    Err(failure.unwrap_or_else(|| Error::new(ErrorKind::InvalidArgument, "the host has no address")))
}

fn resolving(error: io::Error, host: &str) -> Error {
    Error::new(ErrorKind::InvalidArgument, format!("the host '{host}' has no address: {error}"))
        .with_field("host")
}

/// The address that a listener got.
fn address_of(listener: &TcpListener) -> Result<Address> {
    let address = listener.local_addr().map_err(|error| Error::io(error, "getsockname"))?;
    Ok(Address::Tcp { host: Some(address.ip().to_string()), port: address.port() })
}

/// A client's socket, as it is used: no small reply waits for another one, and who vanished is noticed some day.
fn adopt(stream: std::net::TcpStream) -> Socket {
    let _slower = stream.set_nodelay(true);
    #[cfg(unix)]
    let _unnoticed = rustix::net::sockopt::set_socket_keepalive(&stream, true);
    Socket::Tcp(stream)
}

#[cfg(unix)]
pub(super) use unix::Listener;

#[cfg(unix)]
mod unix {
    use std::fs;
    use std::io::{ErrorKind as Io, Read, Write};
    use std::os::fd::AsFd;
    use std::os::unix::fs::{FileTypeExt, MetadataExt};
    use std::os::unix::net::{UnixListener, UnixStream};
    use std::path::{Path, PathBuf};

    use parking_lot::Mutex;
    use rustix::event::{PollFd, PollFlags, Timespec, poll};

    use super::{
        Address, Error, ErrorKind, Next, Result, Socket, TcpListener, address_of, adopt, bind_tcp, io,
    };

    /// How long to wait where the system has no descriptor left for a client, and after its other errors.
    const PAUSE: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };

    enum Kind {
        Tcp(TcpListener),
        /// The name goes first: one without a listener is what a dead server left behind.
        Unix {
            _name: Name,
            listener: UnixListener,
        },
    }

    /// The name of a socket, which is ours as long as it is this file, and goes when nobody listens any more.
    struct Name {
        path: PathBuf,
        identity: (u64, u64),
    }

    impl Drop for Name {
        fn drop(&mut self) {
            if identity(&self.path).is_ok_and(|now| now == self.identity) {
                // Nobody is left to hear of an error.
                let _gone = fs::remove_file(&self.path);
            }
        }
    }

    /// The socket, until it is closed, and how to wake who waits for it.
    pub(in crate::server) struct Listener {
        kind: Mutex<Option<Kind>>,
        wakes: UnixStream,
        woken: UnixStream,
    }

    impl Listener {
        /// Listens; tells where.
        pub(in crate::server) fn bind(address: &Address) -> Result<(Self, Address)> {
            let (kind, address) = match address {
                Address::Unix(path) => (bind_unix(path)?, address.clone()),
                Address::Tcp { host, port } => {
                    let listener = bind_tcp(host.as_deref(), *port)?;
                    let address = address_of(&listener)?;
                    (Kind::Tcp(listener), address)
                }
            };
            // Who waited may be gone when it is accepted: that must not block.
            match &kind {
                Kind::Tcp(listener) => listener.set_nonblocking(true),
                Kind::Unix { listener, .. } => listener.set_nonblocking(true),
            }
            .map_err(|error| Error::io(error, "ioctl"))?;
            let (wakes, woken) = UnixStream::pair().map_err(|error| Error::io(error, "socketpair"))?;
            for end in [&wakes, &woken] {
                end.set_nonblocking(true).map_err(|error| Error::io(error, "ioctl"))?;
            }
            Ok((Self { kind: Mutex::new(Some(kind)), wakes, woken }, address))
        }

        /// Waits for a client, where `open`, or a call.
        pub(in crate::server) fn next(&self, open: bool) -> Next {
            let kind = self.kind.lock();
            let Some(kind) = kind.as_ref() else { return Next::Woken };
            let calls = PollFd::new(&self.woken, PollFlags::IN);
            let mut watched = vec![calls];
            if open {
                let socket = match kind {
                    Kind::Tcp(listener) => listener.as_fd(),
                    Kind::Unix { listener, .. } => listener.as_fd(),
                };
                watched.push(PollFd::from_borrowed_fd(socket, PollFlags::IN));
            }
            let Ok(_) = poll(&mut watched, None) else {
                return Next::Woken;
            };
            let mut calls = [0; 64];
            while matches!((&self.woken).read(&mut calls), Ok(length) if length > 0) {}
            if watched.get(1).is_none_or(|socket| socket.revents().is_empty()) {
                return Next::Woken;
            }
            match accept(kind) {
                Ok(socket) => Next::Client(socket),
                Err(error) => {
                    if !matches!(error.kind(), Io::WouldBlock | Io::Interrupted | Io::ConnectionAborted) {
                        // No descriptor, no memory: others use them, for a while.
                        let _woken = poll(&mut [PollFd::new(&self.woken, PollFlags::IN)], Some(&PAUSE));
                    }
                    Next::Woken
                }
            }
        }

        /// Ends a wait.
        pub(in crate::server) fn wake(&self) {
            // Full of calls: it will wake.
            let _called = (&self.wakes).write(&[0]);
        }

        /// Listens no more, and takes the name away. For who waits, or where nobody does.
        pub(in crate::server) fn close(&self) {
            drop(self.kind.lock().take());
        }
    }

    fn accept(kind: &Kind) -> io::Result<Socket> {
        // Some systems hand on that nothing blocks.
        match kind {
            Kind::Tcp(listener) => {
                let (stream, _) = listener.accept()?;
                stream.set_nonblocking(false)?;
                Ok(adopt(stream))
            }
            Kind::Unix { listener, .. } => {
                let (stream, _) = listener.accept()?;
                stream.set_nonblocking(false)?;
                Ok(Socket::Unix(stream))
            }
        }
    }

    fn identity(path: &Path) -> io::Result<(u64, u64)> {
        fs::symlink_metadata(path).map(|found| (found.dev(), found.ino()))
    }

    /// A name that a server left behind which is no more is taken over; any other is in use.
    fn bind_unix(path: &Path) -> Result<Kind> {
        let failed = |error: io::Error| match error.raw_os_error() {
            Some(_) => Error::io(error, "bind").with_path(path),
            None => Error::new(
                ErrorKind::InvalidArgument,
                format!("'{}' cannot be the path of a socket: {error}", path.display()),
            )
            .with_field("path"),
        };
        let bound = match UnixListener::bind(path) {
            Err(error) if error.kind() == Io::AddrInUse && is_left_behind(path) => {
                fs::remove_file(path).map_err(|error| Error::io(error, "unlink").with_path(path))?;
                UnixListener::bind(path)
            }
            bound => bound,
        };
        let listener = bound.map_err(failed)?;
        let identity = identity(path).map_err(|error| Error::io(error, "lstat").with_path(path))?;
        Ok(Kind::Unix { _name: Name { path: path.to_owned(), identity }, listener })
    }

    fn is_left_behind(path: &Path) -> bool {
        let is_socket = fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket());
        is_socket && UnixStream::connect(path).is_err_and(|error| error.kind() == Io::ConnectionRefused)
    }
}

#[cfg(not(unix))]
pub(super) use other::Listener;

#[cfg(not(unix))]
mod other {
    use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
    use std::time::Duration;

    use parking_lot::{Condvar, Mutex};

    use super::{Address, Error, ErrorKind, Next, Result, TcpListener, address_of, adopt, bind_tcp};

    const PAUSE: Duration = Duration::from_millis(100);

    /// The socket. A connection of its own wakes who waits for one.
    pub(in crate::server) struct Listener {
        listener: Mutex<Option<TcpListener>>,
        own: SocketAddr,
        called: Mutex<bool>,
        call: Condvar,
    }

    impl Listener {
        pub(in crate::server) fn bind(address: &Address) -> Result<(Self, Address)> {
            let Address::Tcp { host, port } = address else {
                let message = "unix sockets are not supported on this system: give a port";
                return Err(Error::new(ErrorKind::UnsupportedFeature, message));
            };
            let listener = bind_tcp(host.as_deref(), *port)?;
            let address = address_of(&listener)?;
            let mut own = listener.local_addr().map_err(|error| Error::io(error, "getsockname"))?;
            if own.ip().is_unspecified() {
                own.set_ip(if own.is_ipv4() {
                    IpAddr::V4(Ipv4Addr::LOCALHOST)
                } else {
                    IpAddr::V6(Ipv6Addr::LOCALHOST)
                });
            }
            let listener = Mutex::new(Some(listener));
            Ok((Self { listener, own, called: Mutex::new(false), call: Condvar::new() }, address))
        }

        pub(in crate::server) fn next(&self, open: bool) -> Next {
            let listener = self.listener.lock();
            let Some(listener) = listener.as_ref() else { return Next::Woken };
            if !open {
                let mut called = self.called.lock();
                if !*called {
                    self.call.wait(&mut called);
                }
                *called = false;
                return Next::Woken;
            }
            let accepted = listener.accept();
            let called = std::mem::take(&mut *self.called.lock());
            match accepted {
                Ok((_, from)) if called && from.ip() == self.own.ip() => Next::Woken,
                Ok((stream, _)) => Next::Client(adopt(stream)),
                Err(_) => {
                    std::thread::sleep(PAUSE);
                    Next::Woken
                }
            }
        }

        pub(in crate::server) fn wake(&self) {
            *self.called.lock() = true;
            self.call.notify_all();
            let _called = TcpStream::connect_timeout(&self.own, PAUSE);
        }

        pub(in crate::server) fn close(&self) {
            self.listener.lock().take();
        }
    }
}
