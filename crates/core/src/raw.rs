//! A raw layer: the file is the disk.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::disk::{DetectZeroes, Discard, DiskOptions};
use crate::layer::{Below, Holes, Layer, Place, Segment, SegmentKind};
use crate::{Error, ErrorKind, MemMut, Result, Storage, StorageExt};

/// Sector size: a raw disk's size is rounded up to it, as QEMU does.
pub const SECTOR: u64 = 512;

/// A raw disk image.
#[derive(Debug)]
pub struct Raw {
    storage: Arc<dyn Storage>,
    size: AtomicU64,
    options: DiskOptions,
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
        Ok(Self { storage, size: AtomicU64::new(size), options: DiskOptions::default() })
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
    pub fn with_write_options(mut self, options: impl Into<DiskOptions>) -> Self {
        self.options = options.into();
        self
    }

    /// Makes the disk writable.
    ///
    /// # Errors
    /// `ReadOnly` for a file that is open for reading only.
    pub fn enable_writing(&mut self, options: DiskOptions) -> Result<()> {
        if !self.is_writable() {
            let error = Error::new(ErrorKind::ReadOnly, "the file is open for reading only");
            return Err(self.storage.located(error));
        }
        self.options = options;
        Ok(())
    }

    /// Whether the file is open for writing.
    pub fn is_writable(&self) -> bool {
        self.storage.traits().writable
    }
    /// What a guest's discard does.
    pub fn discard(&self) -> Discard {
        self.options.discard
    }
    /// What a write of nothing but zeroes becomes.
    pub fn detect_zeroes(&self) -> DetectZeroes {
        self.options.detect_zeroes
    }
    /// Whether every request is flushed.
    pub fn flush_each(&self) -> bool {
        self.options.flush_each
    }

    /// Changes the length of the file, and so of the disk.
    ///
    /// # Errors
    /// `Io`.
    pub fn resize(&self, size: u64) -> Result<()> {
        self.storage.resize(size)?;
        self.size.store(size, Ordering::Release);
        Ok(())
    }
}

impl Layer for Raw {
    fn format(&self) -> &'static str {
        "raw"
    }

    fn virtual_size(&self) -> u64 {
        self.virtual_size()
    }

    fn unit(&self) -> Option<u64> {
        None
    }

    fn takes_backing(&self) -> bool {
        false
    }

    fn storage(&self) -> &Arc<dyn Storage> {
        &self.storage
    }

    fn file(&self, index: u32) -> Option<&Arc<dyn Storage>> {
        (index == 0).then_some(&self.storage)
    }

    fn plan(&self, range: Range<u64>, segments: &mut Vec<Segment>) -> Result<()> {
        let kind = SegmentKind::Data(Place { file: 0, host: range.start });
        segments.push(Segment { start: range.start, length: range.end - range.start, kind });
        Ok(())
    }

    fn read_segment(&self, segment: &Segment, buf: MemMut<'_>) -> Result<()> {
        self.storage.read_padded_at(buf, segment.start)
    }

    fn read<'a>(&self, buf: MemMut<'a>, offset: u64, _: &mut Vec<Segment>, _: &mut Below<'a>) -> Result<()> {
        self.storage.read_padded_at(buf, offset)
    }

    fn reopen(&self) -> Result<Box<dyn Layer>> {
        Ok(Box::new(Self::new(Arc::clone(&self.storage))?.with_write_options(self.options)))
    }

    fn holes(&self) -> Result<Holes> {
        Ok(Holes::Zero)
    }
}
