//! The state of an image that is open for writing: its locks, what is allocated, and which requests are under way. What is done
//! with it is in [`crate::write`].

mod inflight;
#[cfg(test)]
mod inflight_tests;
mod options;
mod sync;

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::{Mutex, MutexGuard, RwLock};

use crate::alloc::{Allocator, MetadataMap};
use crate::tracker::Tracker;
use crate::{Error, ErrorKind, Result};
pub(crate) use inflight::{InFlight, Registration};
pub use options::WriteOptions;

/// Everything that writing needs beside the mapping. See [`crate::write`] for the order of the locks.
#[derive(Debug)]
pub(crate) struct Writer {
    /// Guest requests share it; maintenance has it alone.
    pub(crate) gate: RwLock<()>,
    /// One flush, or one change of the header, at a time.
    pub(crate) flushing: Mutex<()>,
    /// One new L2 table at a time.
    pub(crate) tables: Mutex<()>,
    pub(crate) alloc: Mutex<Allocator>,
    pub(crate) metadata: Mutex<MetadataMap>,
    pub(crate) inflight: InFlight,
    pub(crate) options: WriteOptions,
    pub(crate) bitmaps: Tracker,
    /// Where the active L1 table is: growing the disk moves it.
    l1_offset: AtomicU64,
    /// Set once the header is prepared for changes.
    pub(crate) begun: OnceLock<()>,
    poisoned: OnceLock<Poison>,
}

#[derive(Debug, Clone)]
struct Poison {
    kind: ErrorKind,
    message: String,
}

impl Writer {
    /// Nothing is under way.
    pub(crate) fn of(alloc: Allocator, metadata: MetadataMap, options: WriteOptions, l1_offset: u64) -> Self {
        Self {
            gate: RwLock::new(()),
            flushing: Mutex::new(()),
            tables: Mutex::new(()),
            alloc: Mutex::new(alloc),
            metadata: Mutex::new(metadata),
            inflight: InFlight::default(),
            options,
            bitmaps: Tracker::default(),
            l1_offset: AtomicU64::new(l1_offset),
            begun: OnceLock::new(),
            poisoned: OnceLock::new(),
        }
    }

    /// Refuses when a metadata write failed before.
    ///
    /// # Errors
    /// The kind of the first failure, saying that the image must be reopened.
    pub(crate) fn check(&self) -> Result<()> {
        match self.poisoned.get() {
            None => Ok(()),
            Some(poison) => Err(Error::new(
                poison.kind,
                format!("the image refuses writes since an earlier error, reopen it: {}", poison.message),
            )),
        }
    }

    /// Whether what ended all writing is an error of this kind.
    pub(crate) fn is_poisoned_by(&self, kind: ErrorKind) -> bool {
        self.poisoned.get().is_some_and(|poison| poison.kind == kind)
    }

    /// After a failed metadata write, memory and file differ in unknown ways: nothing more is written.
    pub(crate) fn poison(&self, error: Error) -> Error {
        self.poisoned.get_or_init(|| Poison { kind: error.kind(), message: error.to_string() });
        error
    }

    /// Host offset of the active L1 table.
    pub(crate) fn l1_offset(&self) -> u64 {
        self.l1_offset.load(Ordering::Acquire)
    }

    /// Records that the active L1 table moved; its header field is durable.
    pub(crate) fn set_l1_offset(&self, offset: u64) {
        self.l1_offset.store(offset, Ordering::Release);
    }

    /// Runs a change of the allocation. Errors of the system poison the image, but for a full file system.
    pub(crate) fn with_alloc<T>(
        &self,
        change: impl FnOnce(&mut Allocator, &mut MetadataMap) -> Result<T>,
    ) -> Result<T> {
        change(&mut self.alloc.lock(), &mut self.metadata.lock()).map_err(|e| self.poison_unless_full(e))
    }

    /// The allocation, for changes whose failure harms nothing.
    pub(crate) fn alloc(&self) -> MutexGuard<'_, Allocator> {
        self.alloc.lock()
    }

    /// Runs a change of a fork, whose failure harms nothing.
    pub(crate) fn with_fork<T>(
        &self,
        change: impl FnOnce(&mut Allocator, &MetadataMap) -> Result<T>,
    ) -> Result<T> {
        change(&mut self.alloc.lock(), &self.metadata.lock())
    }

    /// A full file system, or a number beyond a limit, harms nothing: the image goes on with what it has. A failure to
    /// read or write metadata poisons.
    pub(crate) fn poison_unless_full(&self, error: Error) -> Error {
        if error.is_no_room() { error } else { self.poison(error) }
    }

    /// Poisons the image as closed.
    pub(crate) fn close(&self) {
        self.poisoned
            .get_or_init(|| Poison { kind: ErrorKind::Closed, message: "the image is closed".to_owned() });
    }
}
