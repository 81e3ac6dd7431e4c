//! What a block device says about itself.

use std::fs::File;
use std::io;

#[cfg(target_vendor = "apple")]
pub(crate) use apple::{is_read_only, length};
#[cfg(target_os = "linux")]
pub(crate) use linux::{is_read_only, length};
#[cfg(not(any(target_os = "linux", target_vendor = "apple")))]
pub(crate) use other::{is_read_only, length};

/// Where a device ends, where that is said in no other way: `stat` says 0. The cursor is put back, others may share it.
fn end_by_seeking(mut file: &File) -> io::Result<u64> {
    use std::io::{Seek, SeekFrom};
    let cursor = file.stream_position()?;
    let end = file.seek(SeekFrom::End(0))?;
    file.seek(SeekFrom::Start(cursor))?;
    Ok(end)
}

#[cfg(target_os = "linux")]
mod linux {
    use std::os::fd::AsRawFd;

    use super::*;

    /// `_IO(0x12, 94)` of linux/fs.h: whether a block device is set read-only.
    const BLKROGET: libc::Ioctl = 0x125e;
    /// `_IOR(0x12, 114, size_t)` of linux/fs.h: the length of a block device in bytes.
    const BLKGETSIZE64: libc::Ioctl = rustix::ioctl::opcode::read::<usize>(0x12, 114) as libc::Ioctl;

    /// The length of a device as it is now, in bytes: it can be extended, and cut, while it is open.
    pub(crate) fn length(file: &File) -> io::Result<u64> {
        let mut length = 0u64;
        // SAFETY: BLKGETSIZE64 writes one u64 behind the pointer, whatever its name says, and keeps nothing.
        match unsafe { libc::ioctl(file.as_raw_fd(), BLKGETSIZE64, &raw mut length) } {
            0 => Ok(length),
            _ => end_by_seeking(file),
        }
    }

    /// Whether writes will be refused. The open for writing does not say so.
    pub(crate) fn is_read_only(file: &File) -> bool {
        let mut read_only: libc::c_int = 0;
        // SAFETY: BLKROGET writes one int behind the pointer and keeps nothing.
        let asked = unsafe { libc::ioctl(file.as_raw_fd(), BLKROGET, &raw mut read_only) };
        asked == 0 && read_only != 0
    }
}

#[cfg(target_vendor = "apple")]
mod apple {
    use std::os::fd::AsRawFd;

    use super::*;

    /// `_IOR('d', 24, uint32_t)` of sys/disk.h: bytes of a block.
    const DKIOCGETBLOCKSIZE: libc::c_ulong = 0x4004_6418;
    /// `_IOR('d', 25, uint64_t)` of sys/disk.h: blocks of a device.
    const DKIOCGETBLOCKCOUNT: libc::c_ulong = 0x4008_6419;
    /// `_IOR('d', 29, uint32_t)` of sys/disk.h: whether it can be written to.
    const DKIOCISWRITABLE: libc::c_ulong = 0x4004_641d;

    /// A seek to its end leads to 0.
    pub(crate) fn length(file: &File) -> io::Result<u64> {
        let (mut size, mut count) = (0u32, 0u64);
        // SAFETY: the first request writes one u32 behind its pointer, the second one u64; neither keeps anything.
        let asked = unsafe {
            libc::ioctl(file.as_raw_fd(), DKIOCGETBLOCKSIZE, &raw mut size) == 0
                && libc::ioctl(file.as_raw_fd(), DKIOCGETBLOCKCOUNT, &raw mut count) == 0
        };
        match u64::from(size).checked_mul(count).filter(|_| asked) {
            Some(length) => Ok(length),
            None => end_by_seeking(file),
        }
    }

    pub(crate) fn is_read_only(file: &File) -> bool {
        let mut writable = 1u32;
        // SAFETY: writes one u32 behind the pointer and keeps nothing.
        let asked = unsafe { libc::ioctl(file.as_raw_fd(), DKIOCISWRITABLE, &raw mut writable) };
        asked == 0 && writable == 0
    }
}

#[cfg(not(any(target_os = "linux", target_vendor = "apple")))]
mod other {
    use super::*;

    pub(crate) fn length(file: &File) -> io::Result<u64> {
        end_by_seeking(file)
    }

    pub(crate) fn is_read_only(_: &File) -> bool {
        false
    }
}
