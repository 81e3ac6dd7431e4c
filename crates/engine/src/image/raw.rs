//! A raw layer: the file is the disk.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::write::{DetectZeroes, Discard, WriteOptions};
use crate::{Result, Storage, StorageExt};

/// Sector size: a raw disk's size is rounded up to it, as QEMU does.
pub(crate) const SECTOR: u64 = 512;

/// A raw disk image.
#[derive(Debug)]
pub struct Raw {
    storage: Arc<dyn Storage>,
    size: AtomicU64,
    discard: Discard,
    detect_zeroes: DetectZeroes,
    flush_each: bool,
}

impl Raw {
    /// The disk in `storage`. Its size is the file's, rounded up to a sector of 512 bytes; the bytes behind the end
    /// of the file read as zeroes.
    ///
    /// # Errors
    /// `Io` when the length cannot be had.
    pub fn new(storage: Arc<dyn Storage>) -> Result<Self> {
        let size = storage.size()?;
        let size = size.checked_next_multiple_of(SECTOR).unwrap_or(size);
        Ok(Self {
            storage,
            size: AtomicU64::new(size),
            discard: Discard::default(),
            detect_zeroes: DetectZeroes::default(),
            flush_each: false,
        })
    }

    /// The file.
    pub fn storage(&self) -> &Arc<dyn Storage> {
        &self.storage
    }
    /// Size of the disk in bytes.
    pub fn virtual_size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    /// Sets how the disk is written to.
    #[must_use]
    pub fn with_write_options(mut self, options: &WriteOptions) -> Self {
        self.set_write_options(options);
        self
    }

    pub(super) fn set_write_options(&mut self, options: &WriteOptions) {
        self.discard = options.discard;
        self.detect_zeroes = options.detect_zeroes;
        self.flush_each = options.flush_each;
    }

    pub(crate) fn discard(&self) -> Discard {
        self.discard
    }
    pub(crate) fn detect_zeroes(&self) -> DetectZeroes {
        self.detect_zeroes
    }
    pub(crate) fn flush_each(&self) -> bool {
        self.flush_each
    }

    /// Grows the file.
    pub(crate) fn resize(&self, size: u64) -> Result<()> {
        self.storage.resize(size)?;
        self.size.store(size, Ordering::Release);
        Ok(())
    }
}
