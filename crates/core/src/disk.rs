//! The seams of writing: a layer that takes requests ([`WriteLayer`]), and a disk that does ([`Disk`]).

use crate::layer::Layer;
use crate::source::GuestSource;
use crate::space::Preallocation;
use crate::{Error, ErrorKind, Job, Mem, MemMut, Result};

/// What a guest's discard does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Discard {
    /// Nothing.
    #[default]
    Ignore,
    /// Frees the clusters, and their space in the file system.
    Unmap,
}

/// What a write of nothing but zeroes becomes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DetectZeroes {
    /// A write of data.
    #[default]
    Off,
    /// A write of zeroes that keeps clusters allocated.
    On,
    /// A write of zeroes that gives clusters up.
    Unmap,
}

/// How a disk of any format is written to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DiskOptions {
    /// What a guest's discard does.
    pub discard: Discard,
    /// What a write of nothing but zeroes becomes.
    pub detect_zeroes: DetectZeroes,
    /// Flush after every request: cache modes `writethrough` and `directsync`.
    pub flush_each: bool,
}

/// When a request is on stable storage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Durability {
    /// With the next flush.
    #[default]
    AtFlush,
    /// When it returns (FUA).
    Now,
}

/// A disk that is written to as well. All methods can be called from many threads at once; requests that overlap and run at the same
/// time leave the bytes of one of them, sector by sector.
pub trait Disk: GuestSource {
    /// Writes `buf` to the guest bytes at `offset`.
    ///
    /// # Errors
    /// `InvalidArgument` beyond the end of the disk; `ReadOnly`; `Closed`; `Io`, `ENOSPC` among them; `Corrupt`.
    fn write_at(&self, buf: Mem<'_>, offset: u64, durability: Durability) -> Result<()>;

    /// Makes the guest bytes read as zeroes; `unmap` gives up their space.
    ///
    /// # Errors
    /// As [`Disk::write_at`].
    fn write_zeroes(&self, offset: u64, length: u64, unmap: bool, durability: Durability) -> Result<()>;

    /// Gives up the contents of the guest bytes, as far as the disk's [`Discard`] says.
    ///
    /// # Errors
    /// As [`Disk::write_at`].
    fn discard(&self, offset: u64, length: u64, durability: Durability) -> Result<()>;

    /// Makes everything durable that was written before.
    ///
    /// # Errors
    /// `Io`.
    fn flush(&self) -> Result<()>;

    /// Grows the disk to `size` bytes; the new part reads as zeroes.
    ///
    /// # Errors
    /// As [`Disk::write_at`]; `Limit` where the format ends.
    fn grow(&self, size: u64) -> Result<()>;

    /// Writes whole units compressed.
    ///
    /// # Errors
    /// As [`Disk::write_at`]; `UnsupportedFeature` where the format has none.
    fn write_compressed_at(&self, buf: Mem<'_>, offset: u64) -> Result<()> {
        let _ = (buf, offset);
        Err(Error::new(ErrorKind::UnsupportedFeature, "the format has no compressed clusters"))
    }
}

/// Reads the disk as it is before a request: the layer, and what shows through it.
pub type OldBytes<'a> = &'a dyn Fn(MemMut<'_>, u64) -> Result<()>;

/// A layer that takes a guest's requests, as the top of a chain. What shows through it from below stays as it was around a request:
/// [`WriteLayer::write_over`]. Who calls it checked that
/// the range lies inside the disk, and that nobody resizes it meanwhile.
pub trait WriteLayer: Layer {
    /// Whether it takes requests: it was made writable, and its file is.
    fn is_writable(&self) -> bool;

    /// How it is written to.
    fn disk_options(&self) -> DiskOptions;

    /// Writes `buf` to the guest bytes at `offset`.
    ///
    /// # Errors
    /// `Io`, `Corrupt`.
    fn write_at(&self, buf: Mem<'_>, offset: u64) -> Result<()>;

    /// Makes the guest bytes read as zeroes; `unmap` gives up their space.
    ///
    /// # Errors
    /// `Io`, `Corrupt`.
    fn write_zeroes(&self, offset: u64, length: u64, unmap: bool) -> Result<()>;

    /// As [`WriteLayer::write_at`], where `old` is what the disk holds: for a layer that writes units as a whole, and has another
    /// below it.
    ///
    /// # Errors
    /// `Io`, `Corrupt`; those of `old`.
    fn write_over(&self, buf: Mem<'_>, offset: u64, old: OldBytes<'_>) -> Result<()> {
        let _ = old;
        self.write_at(buf, offset)
    }

    /// As [`WriteLayer::write_zeroes`], where `old` is what the disk holds.
    ///
    /// # Errors
    /// As [`WriteLayer::write_over`].
    fn zero_over(&self, offset: u64, length: u64, unmap: bool, old: OldBytes<'_>) -> Result<()> {
        let _ = old;
        self.write_zeroes(offset, length, unmap)
    }

    /// Gives up the contents of the guest bytes, which are unspecified then.
    ///
    /// # Errors
    /// `Io`, `Corrupt`.
    fn discard(&self, offset: u64, length: u64) -> Result<()>;

    /// Makes everything durable that was written before.
    ///
    /// # Errors
    /// `Io`.
    fn flush(&self) -> Result<()>;

    /// Makes everything durable, and ends writing: no request comes any more.
    ///
    /// # Errors
    /// `Io`.
    fn close(&self) -> Result<()> {
        self.flush()
    }

    /// Gives the disk `size` bytes; a new part reads as zeroes, and has what `preallocation` says. The disk has its old size after an
    /// error.
    ///
    /// # Errors
    /// `InvalidArgument` for a preallocation that the format does not have, and a device that is not as long; `Io`; `Aborted`.
    fn resize(&self, size: u64, preallocation: Preallocation, job: &Job) -> Result<()>;
}
