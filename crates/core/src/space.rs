//! The length and the space of a file that a disk is made in.

use std::ops::Range;

use crate::{Job, Mem, Result, Storage, StorageExt};

/// Bytes that are zeroed in one call.
const ZERO_STEP: u64 = 1 << 30;
/// Bytes of one write of zeroes.
const ZERO_WRITE: usize = 256 << 10;
/// Bytes whose space is reserved together.
const RESERVED: usize = 1 << 30;

/// How much of the image is allocated before anything is written to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Preallocation {
    /// Nothing.
    #[default]
    Off,
    /// Every guest cluster has its host cluster; the file is sparse.
    Metadata,
    /// The file's space is reserved too.
    Falloc,
    /// The file's space is written with zeroes.
    Full,
}

/// Makes a file at least `size` bytes long, and leaves what it holds.
///
/// # Errors
/// `Io`.
pub fn lengthen(storage: &dyn Storage, size: u64) -> Result<()> {
    if storage.size()? < size { storage.resize(size) } else { Ok(()) }
}

/// Empties a file that is not empty. A new file is left alone: some file systems take a cut to 0 as a sign to
/// write everything out on close.
///
/// # Errors
/// `Io`.
pub fn empty(storage: &dyn Storage) -> Result<()> {
    match storage.traits().block_device || storage.size()? == 0 {
        true => Ok(()),
        false => storage.resize(0),
    }
}

/// Gives a raw file its size and space; what it held is lost. With a preallocation it reads as zeroes, also on a device: an
/// image may map all of it.
///
/// # Errors
/// `Io`; `Aborted`.
pub fn size_raw(storage: &dyn Storage, size: u64, mode: Preallocation, job: &Job) -> Result<()> {
    empty(storage)?;
    storage.resize(size)?;
    match mode {
        Preallocation::Off => Ok(()),
        Preallocation::Metadata | Preallocation::Falloc if storage.traits().block_device => {
            zero_out(storage, 0..size, mode == Preallocation::Metadata, job)
        }
        Preallocation::Metadata => Ok(()),
        Preallocation::Falloc => storage.reserve(0, size),
        Preallocation::Full => write_zero_bytes(storage, 0, size, job),
    }
}

/// Makes a range read as zeroes, step by step.
///
/// # Errors
/// `Io`; `Aborted`.
pub fn zero_out(storage: &dyn Storage, range: Range<u64>, unmap: bool, job: &Job) -> Result<()> {
    let mut at = range.start;
    while at < range.end {
        job.checkpoint()?;
        let length = ZERO_STEP.min(range.end - at);
        storage.zero(at, length, unmap)?;
        at += length;
    }
    Ok(())
}

/// Writes zeroes as bytes, step by step: they take space.
///
/// # Errors
/// `Io`; `Aborted`.
pub fn write_zero_bytes(storage: &dyn Storage, start: u64, length: u64, job: &Job) -> Result<()> {
    // Not a constant: that would be as large in the binary.
    let zeroes = vec![0; usize::try_from(length).unwrap_or(usize::MAX).min(ZERO_WRITE)];
    let end = start.saturating_add(length);
    let mut at = start;
    while at < end {
        job.checkpoint()?;
        let n = usize::try_from(end - at).unwrap_or(usize::MAX).min(ZERO_WRITE);
        storage.write_all_at(Mem::from(zeroes.get(..n).unwrap_or(&zeroes)), at)?;
        at += n as u64;
    }
    Ok(())
}

/// Reserves space step by step: where the file system has to write for it, that takes long.
///
/// # Errors
/// `Io`; `Aborted`.
pub fn reserve(storage: &dyn Storage, range: Range<u64>, job: &Job) -> Result<()> {
    for start in range.clone().step_by(RESERVED) {
        job.checkpoint()?;
        storage.reserve(start, (RESERVED as u64).min(range.end - start))?;
    }
    Ok(())
}
