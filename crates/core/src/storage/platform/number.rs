//! The number of a system's error, as Node has it.

use std::io;

/// As the system reports it.
#[cfg(unix)]
pub(crate) fn number(error: &io::Error) -> Option<i32> {
    error.raw_os_error()
}

/// Node gives the errors of Windows the names of POSIX, and numbers of its own (those of libuv, without their sign): what it has for
/// this kind of error. An error that neither it nor std knows the kind of has none.
#[cfg(windows)]
pub(crate) fn number(error: &io::Error) -> Option<i32> {
    use io::ErrorKind as Kind;
    use windows_sys::Win32::Foundation::{
        ERROR_ACCESS_DENIED, ERROR_LOCK_VIOLATION, ERROR_SHARING_VIOLATION,
    };

    use super::windows::is;
    if is(error, ERROR_SHARING_VIOLATION) || is(error, ERROR_LOCK_VIOLATION) {
        return Some(4082); // EBUSY
    }
    if is(error, ERROR_ACCESS_DENIED) {
        return Some(4048); // EPERM
    }
    Some(match error.kind() {
        Kind::AddrInUse => 4091,                         // EADDRINUSE
        Kind::AddrNotAvailable => 4090,                  // EADDRNOTAVAIL
        Kind::AlreadyExists => 4075,                     // EEXIST
        Kind::BrokenPipe => 4047,                        // EPIPE
        Kind::ConnectionAborted => 4079,                 // ECONNABORTED
        Kind::ConnectionRefused => 4078,                 // ECONNREFUSED
        Kind::ConnectionReset => 4077,                   // ECONNRESET
        Kind::CrossesDevices => 4037,                    // EXDEV
        Kind::Deadlock | Kind::ResourceBusy => 4082,     // EBUSY
        Kind::DirectoryNotEmpty => 4051,                 // ENOTEMPTY
        Kind::FileTooLarge => 4036,                      // EFBIG
        Kind::HostUnreachable => 4073,                   // EHOSTUNREACH
        Kind::Interrupted => 4072,                       // EINTR
        Kind::InvalidFilename => 4058,                   // ENOENT
        Kind::InvalidInput => 4071,                      // EINVAL
        Kind::IsADirectory => 4068,                      // EISDIR
        Kind::NetworkUnreachable => 4062,                // ENETUNREACH
        Kind::NotADirectory => 4052,                     // ENOTDIR
        Kind::NotConnected => 4053,                      // ENOTCONN
        Kind::NotFound => 4058,                          // ENOENT
        Kind::NotSeekable => 4041,                       // ESPIPE
        Kind::OutOfMemory => 4057,                       // ENOMEM
        Kind::PermissionDenied => 4092,                  // EACCES
        Kind::QuotaExceeded | Kind::StorageFull => 4055, // ENOSPC
        Kind::ReadOnlyFilesystem => 4043,                // EROFS
        Kind::TimedOut => 4039,                          // ETIMEDOUT
        Kind::TooManyLinks => 4032,                      // EMLINK
        Kind::Unsupported => 4049,                       // ENOTSUP
        Kind::WouldBlock => 4088,                        // EAGAIN
        // EIO, for an error of the system's at all.
        _ => return error.raw_os_error().map(|_| 4070),
    })
}

#[cfg(all(test, windows))]
mod tests {
    use super::*;

    #[test]
    fn errors_of_the_system_have_the_numbers_of_node() {
        let of = |code| number(&io::Error::from_raw_os_error(code));
        // File not found, path not found, access denied, sharing violation, file exists, disk full, already exists, unknown.
        let found = [2, 3, 5, 32, 80, 112, 183, 99_999].map(of);
        assert_eq!(found, [4058, 4058, 4048, 4082, 4075, 4055, 4075, 4070].map(Some));
        assert_eq!(number(&super::super::no_space()), Some(4055));
        assert_eq!(number(&io::Error::other("no error of the system")), None);
    }
}
