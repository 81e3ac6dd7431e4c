//! The space of files and block devices on Linux.

use std::os::fd::AsRawFd;

use rustix::fs::{FallocateFlags, SeekFrom};
use rustix::io::Errno;

use super::super::file::is_unsupported;
use super::super::transfer::retry;
use super::*;

/// `_IO(0x12, 119)` of linux/fs.h: discard a range of a block device.
const BLKDISCARD: libc::Ioctl = 0x1277;
/// `_IO(0x12, 127)` of linux/fs.h: zero a range of a block device.
const BLKZEROOUT: libc::Ioctl = 0x127f;
/// `EXT4_SUPER_MAGIC` of linux/magic.h.
const EXT4_MAGIC: rustix::fs::FsWord = 0xef53;
/// Block devices take zeroing and discarding in whole blocks; this is a multiple of every common size.
const DEVICE_BLOCK: u64 = 4096;

fn fallocate(file: &File, flags: FallocateFlags, offset: u64, length: u64) -> io::Result<()> {
    loop {
        match rustix::fs::fallocate(file, flags, offset, length) {
            Err(Errno::INTR) => {}
            result => return Ok(result?),
        }
    }
}

fn device_ioctl(file: &File, request: libc::Ioctl, offset: u64, length: u64) -> io::Result<()> {
    let range = [offset, length];
    // SAFETY: both requests read two u64 (start and length) from the pointer and keep nothing.
    retry(|| unsafe { libc::ioctl(file.as_raw_fd(), request, range.as_ptr()) as isize }).map(drop)
}

/// The whole blocks inside a range of a block device: `(start, length)`.
fn whole_blocks(offset: u64, end: u64) -> Option<(u64, u64)> {
    let start = offset.checked_next_multiple_of(DEVICE_BLOCK)?;
    let stop = end - end % DEVICE_BLOCK;
    (start < stop).then(|| (start, stop - start))
}

pub(crate) fn write_zeroes(
    file: &File,
    offset: u64,
    length: u64,
    unmap: bool,
    block_device: bool,
) -> io::Result<()> {
    let end = end_of(offset, length)?;
    if length == 0 {
        return Ok(());
    }
    if block_device {
        return zero_device(file, offset, end, unmap);
    }
    let done = if unmap {
        punch(file, offset, length).and_then(|()| extend_to(file, end))
    } else {
        fallocate(file, FallocateFlags::ZERO_RANGE, offset, length)
    };
    match done {
        Err(e) if is_unsupported(&e) => write_zero_bytes(file, offset, length),
        result => result,
    }
}

fn punch(file: &File, offset: u64, length: u64) -> io::Result<()> {
    fallocate(file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, length)
}

fn zero_device(file: &File, offset: u64, end: u64, unmap: bool) -> io::Result<()> {
    let Some((start, length)) = whole_blocks(offset, end) else {
        return write_zero_bytes(file, offset, end - offset);
    };
    write_zero_bytes(file, offset, start - offset)?;
    write_zero_bytes(file, start + length, end - start - length)?;
    let flags = if unmap { FallocateFlags::PUNCH_HOLE } else { FallocateFlags::ZERO_RANGE };
    let done = fallocate(file, flags | FallocateFlags::KEEP_SIZE, start, length)
        .or_else(|_| device_ioctl(file, BLKZEROOUT, start, length));
    match done {
        Err(e) if is_unsupported(&e) => write_zero_bytes(file, start, length),
        result => result,
    }
}

pub(crate) fn discard(file: &File, offset: u64, length: u64, block_device: bool) -> io::Result<()> {
    let done = match (block_device, length) {
        (_, 0) => Ok(()),
        (false, _) => punch(file, offset, length),
        (true, _) => match whole_blocks(offset, end_of(offset, length)?) {
            Some((start, length)) => device_ioctl(file, BLKDISCARD, start, length),
            None => Ok(()),
        },
    };
    match done {
        Err(e) if is_unsupported(&e) => Ok(()),
        result => result,
    }
}

pub(crate) fn allocate(file: &File, offset: u64, length: u64, block_device: bool) -> io::Result<()> {
    if block_device || length == 0 {
        return Ok(());
    }
    match fallocate(file, FallocateFlags::empty(), offset, length) {
        Err(e) if is_unsupported(&e) => allocate_by_writing(file, offset, length),
        result => result,
    }
}

/// Of ext4 this is known by measurement: its delayed allocation looks at every block of a write on its own,
/// while the inode is locked.
pub(crate) fn gains_by_allocating_ahead(file: &File) -> bool {
    rustix::fs::fstatfs(file).is_ok_and(|fs| fs.f_type == EXT4_MAGIC)
}

pub(crate) fn allocate_ahead(file: &File, offset: u64, length: u64) -> io::Result<()> {
    fallocate(file, FallocateFlags::empty(), offset, length)
}

pub(crate) fn run_in(file: &File, range: Range<u64>, len: u64) -> io::Result<Run> {
    let offset = range.start;
    if offset >= len {
        return Ok(Run::new(u64::MAX, false));
    }
    match rustix::fs::seek(file, SeekFrom::Data(offset)) {
        Ok(data) if data > offset => Ok(Run::new(data, false)),
        Ok(_) => match rustix::fs::seek(file, SeekFrom::Hole(offset)) {
            Ok(hole) if hole > offset => Ok(Run::new(hole, true)),
            _ => Ok(all_data(offset, len)),
        },
        Err(Errno::NXIO) => Ok(Run::new(len, false)),
        Err(Errno::INVAL | Errno::OPNOTSUPP | Errno::NOSYS | Errno::SPIPE) => Ok(all_data(offset, len)),
        Err(e) => Err(e.into()),
    }
}
