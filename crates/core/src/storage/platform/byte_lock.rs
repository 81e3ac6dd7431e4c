//! Locks on single bytes of a file that belong to its open file description.

use std::fs::File;
use std::io;

#[cfg(target_os = "linux")]
pub(crate) use linux::{are_missing, available, is_locked, lock, unlock};
#[cfg(not(target_os = "linux"))]
pub(crate) use other::{are_missing, available, is_locked, lock, unlock};

#[cfg(target_os = "linux")]
mod linux {
    use std::os::fd::AsRawFd;
    use std::sync::OnceLock;

    use super::*;

    /// Kernels before 3.15 know no such locks.
    pub(crate) fn available() -> bool {
        static KNOWN: OnceLock<bool> = OnceLock::new();
        *KNOWN.get_or_init(|| {
            let probe = File::open("/dev/null").and_then(|file| is_locked(&file, 0));
            !probe.is_err_and(|e| e.raw_os_error() == Some(libc::EINVAL))
        })
    }

    /// Whether the error says that the file system, or its server, has no locks.
    pub(crate) fn are_missing(error: &io::Error) -> bool {
        matches!(error.raw_os_error(), Some(libc::ENOLCK | libc::EOPNOTSUPP | libc::ENOSYS))
    }

    fn call(file: &File, command: libc::c_int, kind: libc::c_int, byte: i64) -> io::Result<libc::flock> {
        // SAFETY: flock is plain integers, for which zeroes are valid.
        let mut lock: libc::flock = unsafe { std::mem::zeroed() };
        // The constants are at most 2 and 0, the bytes at most 203: all fit.
        lock.l_type = kind as libc::c_short;
        lock.l_whence = libc::SEEK_SET as libc::c_short;
        lock.l_start = byte as libc::off_t;
        lock.l_len = 1;
        loop {
            // SAFETY: the three commands read, and F_OFD_GETLK writes, one flock behind the pointer.
            if unsafe { libc::fcntl(file.as_raw_fd(), command, &raw mut lock) } == 0 {
                return Ok(lock);
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
    }

    /// Shares a lock on the byte; false where somebody has it exclusively.
    pub(crate) fn lock(file: &File, byte: i64) -> io::Result<bool> {
        match call(file, libc::F_OFD_SETLK, libc::F_RDLCK, byte) {
            Ok(_) => Ok(true),
            Err(e) if matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => Ok(false),
            Err(e) => Err(e),
        }
    }

    pub(crate) fn unlock(file: &File, byte: i64) -> io::Result<()> {
        call(file, libc::F_OFD_SETLK, libc::F_UNLCK, byte).map(drop)
    }

    /// Whether another file description holds a lock on the byte.
    pub(crate) fn is_locked(file: &File, byte: i64) -> io::Result<bool> {
        let lock = call(file, libc::F_OFD_GETLK, libc::F_WRLCK, byte)?;
        Ok(libc::c_int::from(lock.l_type) != libc::F_UNLCK)
    }
}

#[cfg(not(target_os = "linux"))]
mod other {
    use super::*;

    pub(crate) fn available() -> bool {
        false
    }

    pub(crate) fn are_missing(_: &io::Error) -> bool {
        false
    }

    pub(crate) fn lock(_: &File, _: i64) -> io::Result<bool> {
        Ok(true)
    }

    pub(crate) fn unlock(_: &File, _: i64) -> io::Result<()> {
        Ok(())
    }

    pub(crate) fn is_locked(_: &File, _: i64) -> io::Result<bool> {
        Ok(false)
    }
}
