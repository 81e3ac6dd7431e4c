//! Connections that JavaScript encrypts: Node has TLS, the engine has none.
//!
//! A connection on which TLS begins is handed to JavaScript as descriptors, and JavaScript passes bytes between them: the socket to the other
//! side, which has TLS on it, and one end of a pair of sockets, whose other end the engine goes on with. That end has two descriptors, one
//! for each direction: where the engine reads no more, what it says is still to be passed on.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use napi::bindgen_prelude::Env;
use napi_derive::napi;
use parking_lot::Mutex;
use qcow2_nbd::{Encrypt, Socket};

use crate::delivery::{Completion, Delivery, IntoJs, Outcome};
use crate::resource::Resource;
use crate::runtime::Runtime;

#[cfg(unix)]
type Descriptor = std::os::fd::OwnedFd;
#[cfg(not(unix))]
type Descriptor = std::convert::Infallible;

/// A connection to encrypt. The descriptors are JavaScript's to close.
#[napi(object, object_from_js = false)]
pub struct TlsConnection {
    /// The other side's.
    pub outer: i32,
    /// To write to the engine.
    pub input: i32,
    /// To read from the engine.
    pub output: i32,
}

#[cfg_attr(not(unix), allow(dead_code, reason = "where descriptors are not handed on, there is none"))]
struct Plain {
    outer: Descriptor,
    input: Descriptor,
    output: Descriptor,
}

/// Connections on their way to JavaScript.
pub(crate) struct Encrypting {
    delivery: Arc<Delivery>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    plain: VecDeque<Plain>,
    /// The request that waits for one.
    waits: Option<u32>,
    ended: bool,
}

impl Encrypting {
    fn new(delivery: Arc<Delivery>) -> Arc<Self> {
        Arc::new(Self { delivery, state: Mutex::default() })
    }

    fn wait(&self, request: u32) {
        let mut state = self.state.lock();
        state.waits = Some(request);
        self.tell(&mut state);
    }

    /// No more come; those that nobody took are closed.
    pub(crate) fn end(&self) {
        let mut state = self.state.lock();
        state.ended = true;
        state.plain.clear();
        self.tell(&mut state);
    }

    fn tell(&self, state: &mut State) {
        let Some(request) = state.waits else { return };
        let outcome = match state.plain.pop_front() {
            Some(plain) => Outcome::Value(into_js(plain)),
            None if state.ended => Outcome::Done,
            None => return,
        };
        state.waits = None;
        self.delivery.push(Completion { request, outcome });
    }
}

#[cfg(unix)]
fn into_js(Plain { outer, input, output }: Plain) -> IntoJs {
    use std::os::fd::IntoRawFd;

    use napi::bindgen_prelude::ToNapiValue;
    Box::new(move |_, env| {
        let [outer, input, output] = [outer, input, output].map(IntoRawFd::into_raw_fd);
        let connection = TlsConnection { outer, input, output };
        // SAFETY: on the environment's thread, with its own env.
        unsafe { TlsConnection::to_napi_value(env.raw(), connection) }
    })
}

#[cfg(not(unix))]
fn into_js(plain: Plain) -> IntoJs {
    match plain.outer {}
}

impl Encrypt for Encrypting {
    #[cfg(unix)]
    fn encrypt(&self, plain: &Socket) -> io::Result<Socket> {
        let outer = plain.duplicate()?;
        let (ours, theirs) = std::os::unix::net::UnixStream::pair()?;
        let (input, output) = (theirs.try_clone()?.into(), theirs.into());
        let mut state = self.state.lock();
        if state.ended {
            return Err(io::ErrorKind::ConnectionAborted.into());
        }
        state.plain.push_back(Plain { outer, input, output });
        self.tell(&mut state);
        Ok(Socket::Unix(ours))
    }

    #[cfg(not(unix))]
    fn encrypt(&self, _: &Socket) -> io::Result<Socket> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// A place to which connections come that are to be encrypted; its number.
#[napi(catch_unwind)]
pub fn start_tls(env: Env) -> napi::Result<u32> {
    let runtime = Runtime::of(&env)?;
    Ok(runtime.hold(Resource::Encrypting(Encrypting::new(runtime.completions()))))
}

/// Waits for a connection: a `TlsConnection`, or nothing where no more come.
#[napi(catch_unwind)]
pub fn next_tls(env: Env, request: u32, number: u32) -> napi::Result<()> {
    let runtime = Runtime::of(&env)?;
    let encrypting = runtime.encrypting(number)?;
    runtime.expect(&env, request, Ok(()));
    encrypting.wait(request);
    Ok(())
}
