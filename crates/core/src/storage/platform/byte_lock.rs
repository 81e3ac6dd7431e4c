//! Locks on single bytes of a file that belong to its open file description.
//!
//! Each opener holds shared locks alone, and asks whether another one holds one. Two systems answer that by a call of their own. The
//! third one has to try an exclusive lock, for which its own must be gone for a moment: it lets one opener at a time
//! do that, whoever holds [`Alone`].

use std::fs::File;
use std::io;

#[cfg(not(any(target_os = "linux", target_vendor = "apple", windows)))]
pub(crate) use other::{CALL, alone, are_missing, available, is_locked, lock, unlock};
#[cfg(any(target_os = "linux", target_vendor = "apple"))]
pub(crate) use unix::{CALL, alone, are_missing, available, is_locked, lock, unlock};
#[cfg(windows)]
pub(crate) use windows::{CALL, alone, are_missing, available, is_locked, lock, unlock};

/// Whether an opener that others must be kept from is refused where the file system has no locks. Elsewhere than on Linux
/// too many have none (SMB on macOS).
pub(crate) const REQUIRED: bool = cfg!(target_os = "linux");

#[cfg(any(target_os = "linux", target_vendor = "apple"))]
mod unix {
    use std::os::fd::AsRawFd;
    use std::sync::OnceLock;

    use super::*;

    pub(crate) const CALL: &str = "fcntl";

    /// Kernels of Linux before 3.15 know no such locks.
    pub(crate) fn available() -> bool {
        static KNOWN: OnceLock<bool> = OnceLock::new();
        *KNOWN.get_or_init(|| {
            let probe = File::open("/dev/null").and_then(|file| is_locked(&file, 0, false));
            !probe.is_err_and(|e| e.raw_os_error() == Some(libc::EINVAL))
        })
    }

    /// Whether the error says that the file system, or its server, has no locks.
    pub(crate) fn are_missing(error: &io::Error) -> bool {
        let number = error.raw_os_error();
        matches!(number, Some(libc::ENOLCK | libc::EOPNOTSUPP | libc::ENOSYS))
            || number == Some(libc::ENOTSUP)
    }

    /// Nothing to keep others from: each call is complete in itself.
    pub(crate) struct Alone;

    pub(crate) fn alone(_: &File) -> io::Result<Alone> {
        Ok(Alone)
    }

    // At most 3.
    const SHARED: libc::c_short = libc::F_RDLCK as libc::c_short;
    const EXCLUSIVE: libc::c_short = libc::F_WRLCK as libc::c_short;
    const NONE: libc::c_short = libc::F_UNLCK as libc::c_short;

    fn call(file: &File, command: libc::c_int, kind: libc::c_short, byte: i64) -> io::Result<libc::flock> {
        // SAFETY: flock is plain integers, for which zeroes are valid.
        let mut lock: libc::flock = unsafe { std::mem::zeroed() };
        // The constant is 0, the bytes at most 203: all fit.
        lock.l_type = kind;
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
        match call(file, libc::F_OFD_SETLK, SHARED, byte) {
            Ok(_) => Ok(true),
            Err(e) if matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => Ok(false),
            Err(e) => Err(e),
        }
    }

    pub(crate) fn unlock(file: &File, byte: i64) -> io::Result<()> {
        call(file, libc::F_OFD_SETLK, NONE, byte).map(drop)
    }

    /// Whether another file description holds a lock on the byte; `own` says whether this one does.
    pub(crate) fn is_locked(file: &File, byte: i64, _own: bool) -> io::Result<bool> {
        let lock = call(file, libc::F_OFD_GETLK, EXCLUSIVE, byte)?;
        Ok(lock.l_type != NONE)
    }
}

#[cfg(windows)]
mod windows {
    use std::time::Duration;

    use windows_sys::Win32::Foundation::{ERROR_LOCK_VIOLATION, ERROR_NOT_LOCKED};
    use windows_sys::Win32::Storage::FileSystem::{
        LOCKFILE_EXCLUSIVE_LOCK, LOCKFILE_FAIL_IMMEDIATELY, LockFileEx, UnlockFileEx,
    };

    use super::super::windows::{finish, handle, is, is_unsupported, place};
    use super::*;

    pub(crate) const CALL: &str = "LockFileEx";

    /// Where the bytes are: whoever locks a byte keeps others from reading and writing it, so they lie behind every file.
    const BASE: u64 = 1 << 62;
    /// Byte of whoever is alone.
    const ALONE: i64 = 0;
    /// How often, and how long apart, it is looked whether somebody still is: what they do takes less than a millisecond.
    const TRIES: u32 = 500;
    const PAUSE: Duration = Duration::from_millis(2);

    pub(crate) fn available() -> bool {
        true
    }

    pub(crate) fn are_missing(error: &io::Error) -> bool {
        is_unsupported(error)
    }

    /// While it lives, no other opener changes its locks, or looks at those of others.
    pub(crate) struct Alone<'a>(&'a File);

    pub(crate) fn alone(file: &File) -> io::Result<Alone<'_>> {
        for _ in 0..TRIES {
            if take(file, ALONE, LOCKFILE_EXCLUSIVE_LOCK)? {
                return Ok(Alone(file));
            }
            std::thread::sleep(PAUSE);
        }
        Err(io::Error::new(io::ErrorKind::TimedOut, "another process does not finish to lock the file"))
    }

    impl Drop for Alone<'_> {
        fn drop(&mut self) {
            // Nothing can be done about a failure: it goes with the file.
            let _given_back = unlock(self.0, ALONE);
        }
    }

    fn take(file: &File, byte: i64, flags: u32) -> io::Result<bool> {
        let (mut place, mut done) = (place(BASE + byte.cast_unsigned())?, 0);
        // SAFETY: the handle is open; the place is valid, also for writes, until the request is complete.
        let answer =
            unsafe { LockFileEx(handle(file), flags | LOCKFILE_FAIL_IMMEDIATELY, 0, 1, 0, &raw mut place) };
        match finish(file, answer, &mut place, &mut done) {
            Ok(()) => Ok(true),
            Err(e) if is(&e, ERROR_LOCK_VIOLATION) => Ok(false),
            Err(e) => Err(e),
        }
    }

    pub(crate) fn lock(file: &File, byte: i64) -> io::Result<bool> {
        take(file, byte, 0)
    }

    pub(crate) fn unlock(file: &File, byte: i64) -> io::Result<()> {
        let (mut place, mut done) = (place(BASE + byte.cast_unsigned())?, 0);
        // SAFETY: as for the lock.
        let answer = unsafe { UnlockFileEx(handle(file), 0, 1, 0, &raw mut place) };
        match finish(file, answer, &mut place, &mut done) {
            Err(e) if is(&e, ERROR_NOT_LOCKED) => Ok(()),
            result => result,
        }
    }

    /// Whether another file description holds a lock on the byte; `own` says whether this one does. To be asked alone.
    pub(crate) fn is_locked(file: &File, byte: i64, own: bool) -> io::Result<bool> {
        if own {
            unlock(file, byte)?;
        }
        let free = take(file, byte, LOCKFILE_EXCLUSIVE_LOCK);
        if matches!(free, Ok(true)) {
            unlock(file, byte)?;
        }
        // Nobody took it meanwhile: they would have to be alone.
        match own && !lock(file, byte)? {
            true => Err(io::Error::other("a lock of this process was taken away")),
            false => free.map(|free| !free),
        }
    }
}

#[cfg(not(any(target_os = "linux", target_vendor = "apple", windows)))]
mod other {
    use super::*;

    pub(crate) const CALL: &str = "fcntl";

    pub(crate) fn available() -> bool {
        false
    }

    pub(crate) fn are_missing(_: &io::Error) -> bool {
        false
    }

    pub(crate) struct Alone;

    pub(crate) fn alone(_: &File) -> io::Result<Alone> {
        Ok(Alone)
    }

    pub(crate) fn lock(_: &File, _: i64) -> io::Result<bool> {
        Ok(true)
    }

    pub(crate) fn unlock(_: &File, _: i64) -> io::Result<()> {
        Ok(())
    }

    pub(crate) fn is_locked(_: &File, _: i64, _own: bool) -> io::Result<bool> {
        Ok(false)
    }
}
