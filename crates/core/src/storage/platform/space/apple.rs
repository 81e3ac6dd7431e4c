//! The space of files on macOS.
//!
//! APFS was seen to say that there is a hole where data had been written and was still in memory. So a hole is read before it is
//! believed: that costs no more than what is read when all is taken for data.

use std::os::fd::AsRawFd;

use qcow2_transform::zero;
use rustix::fs::SeekFrom;
use rustix::io::Errno;

use super::super::file::is_unsupported;
use super::super::transfer::{read_at, retry};
use super::*;

/// Bytes of a hole that are read for one answer, and in one request.
const LOOK: u64 = 64 << 20;
const PIECE: usize = 1 << 20;

fn off(offset: u64) -> io::Result<libc::off_t> {
    libc::off_t::try_from(offset).map_err(|_| io::Error::from_raw_os_error(libc::EFBIG))
}

/// Frees whole blocks inside a range, which ends in the file; what they are. The file system takes no others.
fn punch(file: &File, range: &Range<u64>) -> io::Result<Range<u64>> {
    let block = rustix::fs::fstatfs(file)?.f_bsize;
    let block = u64::from(block.clamp(512, 1 << 30).next_power_of_two());
    let start = range.start.checked_next_multiple_of(block).unwrap_or(range.end).min(range.end);
    let whole = start..(range.end - range.end % block).max(start);
    if whole.is_empty() {
        return Ok(whole);
    }
    let hole = libc::fpunchhole_t {
        fp_flags: 0,
        reserved: 0,
        fp_offset: off(whole.start)?,
        fp_length: off(whole.end - whole.start)?,
    };
    // SAFETY: F_PUNCHHOLE reads one fpunchhole_t from the pointer and keeps nothing.
    retry(|| unsafe { libc::fcntl(file.as_raw_fd(), libc::F_PUNCHHOLE, &raw const hole) as isize })?;
    Ok(whole)
}

pub(crate) fn write_zeroes(
    file: &File,
    offset: u64,
    length: u64,
    unmap: bool,
    block_device: bool,
) -> io::Result<()> {
    let end = end_of(offset, length)?;
    if !unmap || block_device {
        return write_zero_bytes(file, offset, length);
    }
    let inside = offset..end.min(file.metadata()?.len());
    if !inside.is_empty() {
        let whole = match punch(file, &inside) {
            Err(e) if is_unsupported(&e) => inside.start..inside.start,
            whole => whole?,
        };
        write_zero_bytes(file, inside.start, whole.start - inside.start)?;
        write_zero_bytes(file, whole.end, inside.end - whole.end)?;
    }
    if length == 0 { Ok(()) } else { extend_to(file, end) }
}

pub(crate) fn discard(file: &File, offset: u64, length: u64, block_device: bool) -> io::Result<()> {
    if block_device || length == 0 {
        return Ok(());
    }
    let inside = offset..end_of(offset, length)?.min(file.metadata()?.len());
    if inside.is_empty() {
        return Ok(());
    }
    match punch(file, &inside) {
        Err(e) if is_unsupported(&e) => Ok(()),
        result => result.map(drop),
    }
}

/// The system has a call for space behind the end alone. Where it turns out to have given less, and in holes, zeroes are written.
pub(crate) fn allocate(file: &File, offset: u64, length: u64, block_device: bool) -> io::Result<()> {
    let end = end_of(offset, length)?;
    if block_device || length == 0 {
        return Ok(());
    }
    let len = file.metadata()?.len();
    if offset < len {
        allocate_by_writing(file, offset, end.min(len) - offset)?;
    }
    if end <= len {
        return Ok(());
    }
    let before = allocated_bytes(file)?;
    match preallocate(file, end - len) {
        Err(e) if is_unsupported(&e) => {}
        result => result?,
    }
    file.set_len(end)?;
    if allocated_bytes(file)?.saturating_sub(before) >= end - len {
        return Ok(());
    }
    let start = offset.max(len);
    write_zero_bytes(file, start, end - start)
}

/// All of so many bytes behind the end, or nothing; the length stays.
fn preallocate(file: &File, length: u64) -> io::Result<()> {
    let mut space = libc::fstore_t {
        fst_flags: libc::F_ALLOCATEALL,
        fst_posmode: libc::F_PEOFPOSMODE,
        fst_offset: 0,
        fst_length: off(length)?,
        fst_bytesalloc: 0,
    };
    // SAFETY: F_PREALLOCATE reads and writes one fstore_t behind the pointer and keeps nothing.
    retry(|| unsafe { libc::fcntl(file.as_raw_fd(), libc::F_PREALLOCATE, &raw mut space) as isize }).map(drop)
}

pub(crate) fn run_in(file: &File, range: Range<u64>, len: u64) -> io::Result<Run> {
    let offset = range.start;
    if offset >= len {
        return Ok(Run::new(u64::MAX, false));
    }
    match rustix::fs::seek(file, SeekFrom::Data(offset)) {
        Ok(data) if data > offset => believed(file, offset..data.min(len), range.end),
        Ok(_) => match rustix::fs::seek(file, SeekFrom::Hole(offset)) {
            Ok(hole) if hole > offset => Ok(Run::new(hole, true)),
            _ => Ok(all_data(offset, len)),
        },
        Err(Errno::NXIO) => believed(file, offset..len, range.end),
        Err(Errno::INVAL | Errno::OPNOTSUPP | Errno::NOTSUP | Errno::NOTTY | Errno::NOSYS | Errno::SPIPE) => {
            Ok(all_data(offset, len))
        }
        Err(e) => Err(e.into()),
    }
}

/// As much of a hole as reads as zeroes and matters; else data.
fn believed(file: &File, hole: Range<u64>, wanted: u64) -> io::Result<Run> {
    let stop = hole.end.min(wanted.max(hole.start + 1)).min(hole.start.saturating_add(LOOK));
    let mut buffer = vec![0; PIECE];
    let mut at = hole.start;
    while at < stop {
        let length = usize::try_from(hole.end - at).unwrap_or(usize::MAX).min(PIECE);
        let piece = buffer.get_mut(..length).unwrap_or_default();
        match read_at(file, (&mut *piece).into(), at)? {
            // Somebody cut the file.
            0 => return Ok(Run::new(hole.end, false)),
            got if zero::is_zero(piece.get(..got).unwrap_or_default()) => at += got as u64,
            _ if at > hole.start => break,
            got => return Ok(Run::new(at + got as u64, true)),
        }
    }
    Ok(Run::new(at, false))
}
