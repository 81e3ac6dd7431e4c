//! Positioned reads and writes on memory that others may change meanwhile.

use std::fs::File;
use std::io;

use crate::{Mem, MemMut};

#[cfg(unix)]
pub(crate) use unix::retry;
#[cfg(unix)]
pub(crate) use unix::{read_at, write_at, write_vectored_at};
#[cfg(windows)]
pub(crate) use windows::{read_at, write_at, write_vectored_at};

#[cfg(unix)]
mod unix {
    use std::os::fd::AsRawFd;

    use super::*;

    /// The most buffers that one `pwritev` takes on every system we know.
    #[cfg(any(target_os = "linux", all(target_vendor = "apple", target_arch = "aarch64")))]
    const IOV_MAX: usize = 1024;

    fn off(offset: u64) -> io::Result<libc::off_t> {
        libc::off_t::try_from(offset).map_err(|_| io::Error::from_raw_os_error(libc::EFBIG))
    }

    /// Repeats a call that a signal interrupted.
    pub(crate) fn retry(mut call: impl FnMut() -> isize) -> io::Result<usize> {
        loop {
            if let Ok(n) = usize::try_from(call()) {
                return Ok(n);
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
    }

    pub(crate) fn read_at(file: &File, mut buf: MemMut<'_>, offset: u64) -> io::Result<usize> {
        let (fd, offset) = (file.as_raw_fd(), off(offset)?);
        // SAFETY: the view is valid for writes of its length for the whole call.
        retry(|| unsafe { libc::pread(fd, buf.as_mut_ptr().cast(), buf.len(), offset) })
    }

    pub(crate) fn write_at(file: &File, buf: Mem<'_>, offset: u64) -> io::Result<usize> {
        let (fd, offset) = (file.as_raw_fd(), off(offset)?);
        // SAFETY: the view is valid for reads of its length for the whole call.
        retry(|| unsafe { libc::pwrite(fd, buf.as_ptr().cast(), buf.len(), offset) })
    }

    #[cfg(any(target_os = "linux", all(target_vendor = "apple", target_arch = "aarch64")))]
    pub(crate) fn write_vectored_at(file: &File, bufs: &[Mem<'_>], offset: u64) -> io::Result<usize> {
        let (fd, offset) = (file.as_raw_fd(), off(offset)?);
        let iov: Vec<libc::iovec> = bufs
            .iter()
            .filter(|b| !b.is_empty())
            .take(IOV_MAX)
            .map(|b| libc::iovec { iov_base: b.as_ptr().cast_mut().cast(), iov_len: b.len() })
            .collect();
        // At most IOV_MAX elements: the count fits.
        let count = libc::c_int::try_from(iov.len()).unwrap_or(libc::c_int::MAX);
        // SAFETY: every element describes a view that is valid for reads for the whole call; pwritev never
        // writes through iov_base.
        retry(|| unsafe { libc::pwritev(fd, iov.as_ptr(), count, offset) })
    }

    /// macOS has no `pwritev` before 11, where it first runs on arm64: one buffer at a time.
    #[cfg(not(any(target_os = "linux", all(target_vendor = "apple", target_arch = "aarch64"))))]
    pub(crate) fn write_vectored_at(file: &File, bufs: &[Mem<'_>], offset: u64) -> io::Result<usize> {
        match bufs.iter().find(|b| !b.is_empty()) {
            Some(first) => write_at(file, *first, offset),
            None => Ok(0),
        }
    }
}

#[cfg(windows)]
mod windows {
    use windows_sys::Win32::Foundation::ERROR_HANDLE_EOF;
    use windows_sys::Win32::Storage::FileSystem::{ReadFile, WriteFile};

    use super::super::windows::{finish, handle, is, place};
    use super::*;

    /// Most bytes of a request: a multiple of every alignment.
    const MOST: usize = 1 << 30;

    fn length(bytes: usize) -> u32 {
        bytes.min(MOST) as u32
    }

    /// The cursor of the file is where the last request ended: nothing here looks at it.
    pub(crate) fn read_at(file: &File, mut buf: MemMut<'_>, offset: u64) -> io::Result<usize> {
        let (mut place, mut done) = (place(offset)?, 0);
        // SAFETY: the view is valid for writes of its length, and the other two live, until the request is complete.
        let answer = unsafe {
            let (into, length) = (buf.as_mut_ptr(), length(buf.len()));
            ReadFile(handle(file), into, length, &raw mut done, &raw mut place)
        };
        match finish(file, answer, &mut place, &mut done) {
            Err(e) if is(&e, ERROR_HANDLE_EOF) => Ok(0),
            result => result.map(|()| done as usize),
        }
    }

    pub(crate) fn write_at(file: &File, buf: Mem<'_>, offset: u64) -> io::Result<usize> {
        let (mut place, mut done) = (place(offset)?, 0);
        // SAFETY: the view is valid for reads of its length, and the other two live, until the request is complete.
        let answer = unsafe {
            WriteFile(handle(file), buf.as_ptr(), length(buf.len()), &raw mut done, &raw mut place)
        };
        finish(file, answer, &mut place, &mut done).map(|()| done as usize)
    }

    /// The system has such a call for whole pages alone: one buffer at a time.
    pub(crate) fn write_vectored_at(file: &File, bufs: &[Mem<'_>], offset: u64) -> io::Result<usize> {
        match bufs.iter().find(|b| !b.is_empty()) {
            Some(first) => write_at(file, *first, offset),
            None => Ok(0),
        }
    }
}

/// Zeroes by writing them: the last resort of every platform.
pub(crate) fn write_zero_bytes(file: &File, mut offset: u64, mut length: u64) -> io::Result<()> {
    /// Aligned as direct I/O wants it.
    #[repr(align(4096))]
    struct Zeroes([u8; 256 << 10]);
    static ZEROES: Zeroes = Zeroes([0; 256 << 10]);
    while length > 0 {
        let n = usize::try_from(length).unwrap_or(usize::MAX).min(ZEROES.0.len());
        let done = write_at(file, Mem::from(ZEROES.0.get(..n).unwrap_or(&ZEROES.0)), offset)?;
        if done == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        offset += done as u64;
        length -= done as u64;
    }
    Ok(())
}
