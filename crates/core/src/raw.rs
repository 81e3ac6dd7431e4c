//! A raw layer: the file is the disk.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::disk::{DiskOptions, WriteLayer};
use crate::layer::{Below, Holes, Layer, Segment};
use crate::space::{Preallocation, reserve, write_zero_bytes, zero_out};
use crate::{Error, ErrorKind, Job, Mem, MemMut, Result, Storage, StorageExt};

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

    /// Refuses a size that a device does not have: nobody resizes one by way of its contents.
    fn judge_device(&self, size: u64) -> Result<()> {
        let length = self.storage.size()?;
        if size == length {
            return Ok(());
        }
        let message = format!(
            "a device cannot be resized to {size} bytes, it has {length}: change the device itself (a logical volume with \
             lvextend or lvreduce, say), then resize the disk to the length that it has"
        );
        Err(self.storage.located(Error::new(ErrorKind::InvalidArgument, message).with_field("size")))
    }

    /// Gives the new part of the disk what it has from the start.
    fn prepare(&self, new: Range<u64>, preallocation: Preallocation, job: &Job) -> Result<()> {
        let storage = &*self.storage;
        match preallocation {
            Preallocation::Metadata => {
                let message = "a raw image has no metadata to preallocate: falloc and full are possible";
                Err(Error::new(ErrorKind::InvalidArgument, message).with_field("preallocation"))
            }
            _ if new.is_empty() => Ok(()),
            // What was behind the former end of a device that was extended is not the disk's.
            Preallocation::Off | Preallocation::Falloc if storage.traits().block_device => {
                zero_out(storage, new, preallocation == Preallocation::Off, job)
            }
            Preallocation::Falloc => reserve(storage, new, job),
            Preallocation::Full => write_zero_bytes(storage, new.start, new.end - new.start, job),
            Preallocation::Off => Ok(()),
        }
    }
}

impl WriteLayer for Raw {
    fn is_writable(&self) -> bool {
        self.storage.traits().writable
    }

    fn disk_options(&self) -> DiskOptions {
        self.options
    }

    fn write_at(&self, buf: Mem<'_>, offset: u64) -> Result<()> {
        self.storage.write_all_at(buf, offset)
    }

    fn write_zeroes(&self, offset: u64, length: u64, unmap: bool) -> Result<()> {
        self.storage.zero(offset, length, unmap)
    }

    fn discard(&self, offset: u64, length: u64) -> Result<()> {
        if length > 0 { self.storage.free(offset, length) } else { Ok(()) }
    }

    fn flush(&self) -> Result<()> {
        self.storage.flush()
    }

    fn resize(&self, size: u64, preallocation: Preallocation, job: &Job) -> Result<()> {
        let old = self.virtual_size();
        if self.storage.traits().block_device {
            self.judge_device(size)?;
        }
        if let Err(error) = self.prepare(old..size, preallocation, job) {
            // The length of the file is the size of the disk, and that stays.
            self.storage.resize(old)?;
            return Err(error);
        }
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
        segments.push(Segment::in_place(range));
        Ok(())
    }

    fn read_segment(&self, segment: &Segment, buf: MemMut<'_>) -> Result<()> {
        self.storage.read_padded_at(buf, segment.start)
    }

    fn read<'a>(&self, buf: MemMut<'a>, offset: u64, _: &mut Vec<Segment>, _: &mut Below<'a>) -> Result<()> {
        self.storage.read_padded_at(buf, offset)
    }

    fn as_writable(&self) -> Option<&dyn WriteLayer> {
        Some(self)
    }

    fn make_writable(&mut self, options: DiskOptions) -> Result<()> {
        if !self.is_writable() {
            let error = Error::new(ErrorKind::ReadOnly, "the file is open for reading only");
            return Err(self.storage.located(error));
        }
        self.options = options;
        Ok(())
    }

    fn reopen(&self) -> Result<Box<dyn Layer>> {
        Ok(Box::new(Self::new(Arc::clone(&self.storage))?.with_write_options(self.options)))
    }

    fn holes(&self) -> Result<Holes> {
        Ok(Holes::Zero)
    }
}
