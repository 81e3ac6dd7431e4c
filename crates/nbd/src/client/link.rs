//! The connection that there is, and another one where it is lost.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::RwLock;
use qcow2_core::error::GivenUp;
use qcow2_core::{Error, ErrorKind, Job, Result};

use super::connection::{Connection, Times, Way};
use super::uri::Location;

/// Between two attempts to connect again.
const PAUSE: Duration = Duration::from_millis(50);

/// How a connection is made again.
pub(super) struct Again {
    pub(super) location: Location,
    pub(super) way: Way,
    pub(super) job: Arc<Job>,
    /// It was tried for long enough, or the export is another one.
    pub(super) gone: AtomicBool,
}

/// The connection to an export, whichever it is just now.
pub(super) struct Link {
    current: RwLock<Arc<Connection>>,
    again: Option<Again>,
}

impl Link {
    pub(super) fn new(connection: Connection, again: Option<Again>) -> Self {
        Self { current: RwLock::new(Arc::new(connection)), again }
    }

    /// The connection; who asks while another one is made waits for it.
    pub(super) fn current(&self) -> Arc<Connection> {
        Arc::clone(&self.current.read())
    }

    /// Whether what failed on this connection is worth another attempt.
    pub(super) fn comes_back(&self, connection: &Connection) -> bool {
        self.again.is_some() && connection.is_lost()
    }

    /// Does what has the same effect where it is done twice: again, from the beginning, on another connection where this one is lost.
    pub(super) fn run<T>(&self, work: impl Fn(&Connection) -> io::Result<T>) -> io::Result<T> {
        let mut until = None;
        loop {
            let connection = self.current();
            let (error, again) = match (work(&connection), &self.again) {
                (Err(error), Some(again)) if connection.is_lost() => (error, again),
                (done, _) => return done,
            };
            let now = Instant::now();
            let until = *until.get_or_insert_with(|| now + again.way.reconnect);
            // A server that takes clients only to lose them again has no more time than one that takes none.
            if now >= until {
                return Err(error);
            }
            self.replace(&connection, error, again, until)?;
        }
    }

    /// Goes on with another connection than the lost one; `error` is what that one ended with.
    fn replace(
        &self,
        lost: &Arc<Connection>,
        error: io::Error,
        again: &Again,
        until: Instant,
    ) -> io::Result<()> {
        let mut current = self.current.write();
        if !Arc::ptr_eq(&current, lost) {
            return Ok(());
        }
        if again.gone.load(Ordering::Acquire) {
            return Err(error);
        }
        match again.connect(lost, until) {
            Ok(connection) => {
                *current = Arc::new(connection);
                Ok(())
            }
            Err(why) if why.kind() == ErrorKind::Aborted => Err(GivenUp.into()),
            Err(why) => {
                again.gone.store(true, Ordering::Release);
                Err(io::Error::new(
                    error.kind(),
                    format!("{error}, and another one failed: {}", why.message()),
                ))
            }
        }
    }
}

impl Again {
    fn connect(&self, lost: &Connection, until: Instant) -> Result<Connection> {
        loop {
            let rest = until.saturating_duration_since(Instant::now());
            let times = Times { connect: self.way.times.connect.min(rest), ..self.way.times };
            match Connection::open(&self.location, &Way { times, ..self.way.clone() }, &self.job) {
                Ok(connection) if connection.is_like(lost) => return Ok(connection),
                Ok(connection) => return Err(changed(lost, &connection)),
                Err(error) if error.kind() == ErrorKind::Aborted || Instant::now() + PAUSE >= until => {
                    return Err(error);
                }
                Err(_) => thread::sleep(PAUSE),
            }
        }
    }
}

fn changed(lost: &Connection, now: &Connection) -> Error {
    let message = if lost.size() == now.size() {
        "the export is not what it was: it can do other things, or takes other requests".to_owned()
    } else {
        format!("the export is not what it was: it had {} bytes and has {}", lost.size(), now.size())
    };
    Error::new(ErrorKind::Io, message)
}
