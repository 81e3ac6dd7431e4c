//! Looking for completions instead of sleeping until they wake the environment's thread, which takes several times as long as
//! a request that the page cache serves: a caller that awaits each request before the next one pays for it every time.
//! QEMU's event loops poll for the same reason.
//!
//! Watching lasts a moment, and only where the last completion came within such a moment of the last request: slow
//! storage and busy machines are slept through as ever. The pool's threads do the same on their side.

use std::cell::Cell;
use std::time::{Duration, Instant};

/// How long is watched: some times what a wake-up takes.
pub(crate) const MOMENT: Duration = Duration::from_micros(50);

/// Whether the environment's thread should watch, or does. Used on that thread only; it looks between two rounds of its event
/// loop.
pub(crate) struct Watch {
    /// Watching takes a core that the workers need: not the only one.
    possible: bool,
    requested: Cell<Instant>,
    /// The last completion came soon.
    soon: Cell<bool>,
    watching: Cell<bool>,
}

impl Watch {
    /// On a machine with that many cores.
    pub(crate) fn new(cores: usize) -> Self {
        Self {
            possible: cores > 1,
            requested: Cell::new(Instant::now()),
            soon: Cell::new(false),
            watching: Cell::new(false),
        }
    }

    /// A request was made. Returns whether to begin to watch.
    pub(crate) fn requested(&self) -> bool {
        if !self.possible {
            return false;
        }
        self.requested.set(Instant::now());
        self.soon.get() && !self.watching.replace(true)
    }

    /// Completions are delivered, for which the thread was woken at a time, or which it found itself. What waking takes does not count: where
    /// that is about as long as a moment, nobody would ever begin to watch.
    pub(crate) fn delivered(&self, woken: Option<Instant>) {
        let took = woken.unwrap_or_else(Instant::now).saturating_duration_since(self.requested.get());
        self.soon.set(self.possible && took < MOMENT);
    }

    /// Whether to look once more after this time.
    pub(crate) fn goes_on(&self) -> bool {
        let goes_on = self.requested.get().elapsed() < MOMENT;
        if !goes_on {
            self.soon.set(false);
        }
        self.watching.set(goes_on);
        goes_on
    }
}
