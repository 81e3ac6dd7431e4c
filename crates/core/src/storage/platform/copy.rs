//! Sharing space between two files. Only where files are descriptors.
#![cfg(unix)]

use std::fs::File;
use std::io;
use std::os::fd::BorrowedFd;

#[cfg(target_os = "linux")]
pub(crate) use linux::clone_range;
#[cfg(not(target_os = "linux"))]
pub(crate) use other::clone_range;

#[cfg(target_os = "linux")]
mod linux {
    use std::os::fd::AsRawFd;

    use super::super::file::unsupported_if_so;
    use super::super::transfer::retry;
    use super::*;

    pub(crate) fn clone_range(
        file: &File,
        from: BorrowedFd<'_>,
        from_offset: u64,
        offset: u64,
        length: u64,
    ) -> io::Result<()> {
        let range = libc::file_clone_range {
            src_fd: from.as_raw_fd().into(),
            src_offset: from_offset,
            src_length: length,
            dest_offset: offset,
        };
        // SAFETY: FICLONERANGE reads one file_clone_range from the pointer and keeps nothing; both
        // descriptors are open for the whole call.
        let done = retry(|| unsafe { libc::ioctl(file.as_raw_fd(), libc::FICLONERANGE, &range) as isize });
        unsupported_if_so(done.map(drop))
    }
}

/// macOS clones whole files to new names, and no ranges.
#[cfg(not(target_os = "linux"))]
mod other {
    use super::*;

    pub(crate) fn clone_range(_: &File, _: BorrowedFd<'_>, _: u64, _: u64, _: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}
