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

    #[cfg(target_os = "linux")]
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

    /// `pwritev` is missing on older systems of this family: one buffer at a time.
    #[cfg(not(target_os = "linux"))]
    pub(crate) fn write_vectored_at(file: &File, bufs: &[Mem<'_>], offset: u64) -> io::Result<usize> {
        match bufs.iter().find(|b| !b.is_empty()).filter(|_| IOV_MAX > 0) {
            Some(first) => write_at(file, *first, offset),
            None => Ok(0),
        }
    }
}

#[cfg(windows)]
mod windows {
    use std::os::windows::fs::FileExt;

    use super::*;

    /// Memory that JavaScript can reach is never lent as a slice: it goes through this much of our own.
    const BOUNCE: usize = 256 << 10;

    pub(crate) fn read_at(file: &File, mut buf: MemMut<'_>, offset: u64) -> io::Result<usize> {
        if let Some(slice) = buf.exclusive() {
            return file.seek_read(slice, offset);
        }
        let mut bounce = vec![0; buf.len().min(BOUNCE)];
        let n = file.seek_read(&mut bounce, offset)?;
        Ok(buf.copy_from(bounce.get(..n).unwrap_or_default()))
    }

    pub(crate) fn write_at(file: &File, buf: Mem<'_>, offset: u64) -> io::Result<usize> {
        let mut bounce = vec![0; buf.len().min(BOUNCE)];
        let n = buf.copy_to(&mut bounce);
        file.seek_write(bounce.get(..n).unwrap_or_default(), offset)
    }

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
