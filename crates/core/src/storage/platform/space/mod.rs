//! The space of a file: holes, zeroes, reservations.

use std::fs::File;
use std::io;
use std::ops::Range;

use super::super::Run;
use super::transfer::write_zero_bytes;

#[cfg(target_vendor = "apple")]
mod apple;
#[cfg(target_os = "linux")]
mod linux;
#[cfg(not(any(target_os = "linux", target_vendor = "apple", windows)))]
mod other;
#[cfg(windows)]
mod windows;

#[cfg(target_vendor = "apple")]
use apple as system;
#[cfg(target_os = "linux")]
use linux as system;
#[cfg(not(any(target_os = "linux", target_vendor = "apple", windows)))]
use other as system;
#[cfg(windows)]
use windows as system;

#[cfg(target_os = "linux")]
pub(crate) use linux::{allocate_ahead, gains_by_allocating_ahead};
pub(crate) use system::{allocate, discard, run_in, write_zeroes};
#[cfg(windows)]
pub(crate) use windows::{allocated_bytes, set_len};

/// Bytes of space that a file takes.
#[cfg(unix)]
pub(crate) fn allocated_bytes(file: &File) -> io::Result<u64> {
    Ok(std::os::unix::fs::MetadataExt::blocks(&file.metadata()?).saturating_mul(512))
}

/// Cuts or extends a file, with a hole.
#[cfg(unix)]
pub(crate) fn set_len(file: &File, len: u64) -> io::Result<()> {
    file.set_len(len)
}

/// Whether a file that grows is written faster into space that it has already: known of Linux alone.
#[cfg(not(target_os = "linux"))]
pub(crate) fn gains_by_allocating_ahead(_: &File) -> bool {
    false
}

#[cfg(not(target_os = "linux"))]
pub(crate) fn allocate_ahead(_: &File, _: u64, _: u64) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

/// End of `offset..offset + length`, where it can exist.
fn end_of(offset: u64, length: u64) -> io::Result<u64> {
    offset.checked_add(length).ok_or_else(|| io::ErrorKind::InvalidInput.into())
}

/// Extends the file with a hole up to `end`, never cuts it.
fn extend_to(file: &File, end: u64) -> io::Result<()> {
    if file.metadata()?.len() < end { set_len(file, end) } else { Ok(()) }
}

/// Everything from `offset` on is data, or behind the end.
fn all_data(offset: u64, len: u64) -> Run {
    if offset < len { Run::new(len, true) } else { Run::new(u64::MAX, false) }
}

/// Space for a range without changing its bytes, where the system has no call for it: zeroes over the holes
/// and behind the end.
fn allocate_by_writing(file: &File, offset: u64, length: u64) -> io::Result<()> {
    let end = end_of(offset, length)?;
    let len = file.metadata()?.len();
    let mut at = offset;
    while at < end {
        let run = run_in(file, at..end, len)?;
        let stop = run.end.min(end);
        if !run.data {
            write_zero_bytes(file, at, stop - at)?;
        }
        at = stop;
    }
    Ok(())
}
