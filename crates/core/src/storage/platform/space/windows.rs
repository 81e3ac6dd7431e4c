//! The space of files on Windows.
//!
//! Only a sparse file has holes, and it is one from the first hole on that is worth it: hypervisors of Microsoft's attach no VHD or
//! VHDX file that is sparse, so one without holes had better stay as it is.

use std::os::windows::fs::MetadataExt;

use windows_sys::Win32::Storage::FileSystem::{
    FILE_ATTRIBUTE_SPARSE_FILE, FILE_COMPRESSION_INFO, FILE_STANDARD_INFO, FileCompressionInfo,
    FileStandardInfo,
};
use windows_sys::Win32::System::Ioctl::{
    FILE_ALLOCATED_RANGE_BUFFER, FILE_SET_SPARSE_BUFFER, FILE_ZERO_DATA_INFORMATION,
    FSCTL_QUERY_ALLOCATED_RANGES, FSCTL_SET_SPARSE, FSCTL_SET_ZERO_DATA,
};

use super::super::windows::{control, information, is_unsupported};
use super::*;

/// A hole of fewer bytes at the end does not make a file sparse: NTFS frees 64 KiB at a time, and what is written next fills it.
const WORTH_A_HOLE: u64 = 1 << 20;

fn is_sparse(file: &File) -> io::Result<bool> {
    Ok(file.metadata()?.file_attributes() & FILE_ATTRIBUTE_SPARSE_FILE != 0)
}

/// `Unsupported` on a file system without holes.
fn make_sparse(file: &File) -> io::Result<()> {
    if is_sparse(file)? {
        return Ok(());
    }
    control(file, FSCTL_SET_SPARSE, &FILE_SET_SPARSE_BUFFER { SetSparse: true }, &mut ())?;
    Ok(())
}

/// The numbers of a range as Windows takes them, which has no file as long as these allow.
fn signed(range: &Range<u64>) -> io::Result<(i64, i64)> {
    let number = |n| i64::try_from(n).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput));
    Ok((number(range.start)?, number(range.end)?))
}

/// Frees what a range of a file holds. Behind the end it does nothing.
fn punch(file: &File, range: &Range<u64>) -> io::Result<()> {
    let (start, end) = signed(range)?;
    make_sparse(file)?;
    let range = FILE_ZERO_DATA_INFORMATION { FileOffset: start, BeyondFinalZero: end };
    control(file, FSCTL_SET_ZERO_DATA, &range, &mut ()).map(drop)
}

pub(crate) fn write_zeroes(file: &File, offset: u64, length: u64, unmap: bool, _: bool) -> io::Result<()> {
    let end = end_of(offset, length)?;
    // In a sparse file the system would free the space, whatever is asked for.
    if !unmap {
        return write_zero_bytes(file, offset, length);
    }
    let inside = offset..end.min(file.metadata()?.len());
    if inside.start < inside.end {
        match punch(file, &inside) {
            Err(e) if is_unsupported(&e) => write_zero_bytes(file, offset, inside.end - offset)?,
            result => result?,
        }
    }
    if length == 0 { Ok(()) } else { extend_to(file, end) }
}

pub(crate) fn discard(file: &File, offset: u64, length: u64, _: bool) -> io::Result<()> {
    if length == 0 {
        return Ok(());
    }
    match punch(file, &(offset..end_of(offset, length)?)) {
        Err(e) if is_unsupported(&e) => Ok(()),
        result => result,
    }
}

pub(crate) fn set_len(file: &File, len: u64) -> io::Result<()> {
    if len.saturating_sub(file.metadata()?.len()) >= WORTH_A_HOLE {
        match make_sparse(file) {
            Err(e) if is_unsupported(&e) => {}
            result => result?,
        }
    }
    file.set_len(len)
}

/// A file that is not sparse has space for all of its length, and the system gives it when the file becomes longer: where it says that
/// it did not, and in holes, zeroes are written.
pub(crate) fn allocate(file: &File, offset: u64, length: u64, _: bool) -> io::Result<()> {
    let end = end_of(offset, length)?;
    if length == 0 {
        return Ok(());
    }
    if is_sparse(file)? {
        return allocate_by_writing(file, offset, length);
    }
    let len = file.metadata()?.len();
    if end <= len {
        return Ok(());
    }
    file.set_len(end)?;
    if allocated_bytes(file)? >= end {
        return Ok(());
    }
    let start = offset.max(len);
    write_zero_bytes(file, start, end - start)
}

/// The system says which ranges have space: of a file that is not sparse, all.
pub(crate) fn run_in(file: &File, range: Range<u64>, len: u64) -> io::Result<Run> {
    let offset = range.start;
    if offset >= len {
        return Ok(Run::new(u64::MAX, false));
    }
    let (from, to) = signed(&(offset..len))?;
    let query = FILE_ALLOCATED_RANGE_BUFFER { FileOffset: from, Length: to - from };
    let mut first = FILE_ALLOCATED_RANGE_BUFFER::default();
    match control(file, FSCTL_QUERY_ALLOCATED_RANGES, &query, &mut first) {
        Err(e) if is_unsupported(&e) => Ok(all_data(offset, len)),
        Err(e) => Err(e),
        Ok(0) => Ok(Run::new(len, false)),
        // The range of what has space can begin in front of what was asked for.
        Ok(_) if first.FileOffset > from => Ok(Run::new(first.FileOffset.min(to).cast_unsigned(), false)),
        Ok(_) => match first.FileOffset.saturating_add(first.Length).min(to) {
            end if end > from => Ok(Run::new(end.cast_unsigned(), true)),
            _ => Ok(all_data(offset, len)),
        },
    }
}

/// Bytes of space that a file takes.
pub(crate) fn allocated_bytes(file: &File) -> io::Result<u64> {
    // Of sparse and compressed files the usual number counts holes.
    let bytes = match information::<FILE_COMPRESSION_INFO>(file, FileCompressionInfo) {
        Ok(found) => found.CompressedFileSize,
        Err(_) => information::<FILE_STANDARD_INFO>(file, FileStandardInfo)?.AllocationSize,
    };
    Ok(bytes.max(0).cast_unsigned())
}
