//! The kernel's copies between two files. Only where files are descriptors.
#![cfg(unix)]

use std::fs::File;
use std::io;
use std::os::fd::BorrowedFd;

#[cfg(target_os = "linux")]
pub(crate) use linux::{clone_range, copy_range};
#[cfg(not(target_os = "linux"))]
pub(crate) use other::{clone_range, copy_range};

#[cfg(target_os = "linux")]
mod linux {
    use std::os::fd::AsRawFd;

    use rustix::io::Errno;

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

    pub(crate) fn copy_range(
        file: &File,
        from: BorrowedFd<'_>,
        mut from_offset: u64,
        mut offset: u64,
        length: u64,
    ) -> io::Result<u64> {
        // One call moves at most 2 GiB; the caller loops over short copies anyway.
        let n = usize::try_from(length.min(1 << 30)).unwrap_or(1 << 30);
        loop {
            match rustix::fs::copy_file_range(from, Some(&mut from_offset), file, Some(&mut offset), n) {
                Err(Errno::INTR) => {}
                Ok(n) => return Ok(n as u64),
                Err(e) => return unsupported_if_so(Err(e.into())),
            }
        }
    }
}

#[cfg(not(target_os = "linux"))]
mod other {
    use super::*;

    pub(crate) fn clone_range(_: &File, _: BorrowedFd<'_>, _: u64, _: u64, _: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    pub(crate) fn copy_range(_: &File, _: BorrowedFd<'_>, _: u64, _: u64, _: u64) -> io::Result<u64> {
        Err(io::ErrorKind::Unsupported.into())
    }
}
