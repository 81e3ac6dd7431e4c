//! Places that are taken in guest order, whatever worker comes first. Lock: the one inside, alone.

use parking_lot::{Condvar, Mutex};

use crate::{Error, Result};

/// Something that the workers of a convert use one after the other, in the order of their chunks.
#[derive(Debug)]
pub struct Turns<T> {
    turn: Mutex<Turn<T>>,
    moved: Condvar,
}

#[derive(Debug)]
struct Turn<T> {
    /// Number of the chunk whose turn it is.
    ticket: u64,
    stopped: bool,
    state: T,
}

impl<T> Turns<T> {
    /// The first chunk begins.
    pub fn new(state: T) -> Self {
        Self { turn: Mutex::new(Turn { ticket: 0, stopped: false, state }), moved: Condvar::new() }
    }

    /// Waits until all chunks before this one had their turn, and runs `then`. Where that fails nobody else gets one: the convert stops.
    ///
    /// # Errors
    /// Those of `then`; `Aborted` when the convert stopped.
    pub fn take<R>(&self, ticket: u64, then: impl FnOnce(&mut T) -> Result<R>) -> Result<R> {
        let mut turn = self.turn.lock();
        while !turn.stopped && turn.ticket != ticket {
            self.moved.wait(&mut turn);
        }
        if turn.stopped {
            return Err(Error::aborted());
        }
        let result = then(&mut turn.state)?;
        turn.ticket += 1;
        drop(turn);
        self.moved.notify_all();
        Ok(result)
    }

    /// Nothing more comes: who waits gives up.
    pub fn stop(&self) {
        self.turn.lock().stopped = true;
        self.moved.notify_all();
    }

    /// All chunks had their turn.
    pub fn into_inner(self) -> T {
        self.turn.into_inner().state
    }
}
