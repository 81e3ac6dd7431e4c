//! What a file is, opening it, and what the system's errors mean.

use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::path::Path;

/// What a path or descriptor turned out to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FileKind {
    Regular,
    #[cfg_attr(not(unix), allow(dead_code, reason = "only Unix tells them from files"))]
    BlockDevice,
    Directory,
    /// Anything that is not a disk, by its name in the manual.
    Other(&'static str),
}

/// Opens without ever waiting: a FIFO or a device without medium answers at once, and is refused later by its
/// kind. The descriptor is closed on exec (std's default). `direct` bypasses the page cache; `Unsupported` where
/// the system or the file system cannot.
pub(crate) fn open(path: &Path, writable: bool, direct: bool) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(writable);
    #[cfg(unix)]
    {
        let direct = if direct { DIRECT } else { 0 };
        let flags = libc::O_NONBLOCK | libc::O_NOCTTY | direct;
        std::os::unix::fs::OpenOptionsExt::custom_flags(&mut options, flags);
    }
    let file = options.open(path).map_err(|e| {
        // The open of a file system that has no direct I/O fails like this, and no other open does.
        #[cfg(unix)]
        if direct && e.raw_os_error() == Some(libc::EINVAL) {
            return io::ErrorKind::Unsupported.into();
        }
        e
    })?;
    #[cfg(unix)]
    blocking(&file)?;
    if direct {
        bypass_cache(&file)?;
    }
    Ok(file)
}

#[cfg(target_os = "linux")]
const DIRECT: libc::c_int = libc::O_DIRECT;
#[cfg(all(unix, not(target_os = "linux")))]
const DIRECT: libc::c_int = 0;

/// What is left to do after the open, where the flag is not one of the open.
#[cfg(target_os = "linux")]
fn bypass_cache(_: &File) -> io::Result<()> {
    Ok(())
}

#[cfg(target_os = "macos")]
fn bypass_cache(file: &File) -> io::Result<()> {
    use std::os::fd::AsRawFd;
    // SAFETY: F_NOCACHE takes an int and touches no memory of ours.
    super::transfer::retry(|| unsafe { libc::fcntl(file.as_raw_fd(), libc::F_NOCACHE, 1) as isize }).map(drop)
}

#[cfg(not(any(target_os = "linux", target_os = "macos")))]
fn bypass_cache(_: &File) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

/// Clears `O_NONBLOCK`, which was for the open alone.
#[cfg(unix)]
fn blocking(file: &File) -> io::Result<()> {
    use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
    let flags = fcntl_getfl(file)?;
    Ok(fcntl_setfl(file, flags - OFlags::NONBLOCK)?)
}

/// Whether the descriptor bypasses the page cache, so that it takes aligned requests only.
#[cfg(unix)]
pub(crate) fn is_direct(file: &File) -> io::Result<bool> {
    Ok(DIRECT != 0 && rustix::fs::fcntl_getfl(file)?.bits().cast_signed() & DIRECT != 0)
}

/// Closes a duplicate of the descriptor, for the error: file systems that keep writes back (NFS, FUSE) write them whenever a
/// descriptor of the file is closed, and say only then that it failed.
#[cfg(unix)]
pub(crate) fn close_duplicate(file: &File) -> io::Result<()> {
    use std::os::fd::IntoRawFd;
    // Where there is no descriptor left, a sync tells the same.
    let Ok(duplicate) = file.try_clone() else { return file.sync_all() };
    // SAFETY: the descriptor is ours and used by nobody else; after the call it is gone, whatever it returns.
    match unsafe { libc::close(duplicate.into_raw_fd()) } {
        0 => Ok(()),
        _ => match io::Error::last_os_error() {
            e if e.kind() == io::ErrorKind::Interrupted => Ok(()),
            e => Err(e),
        },
    }
}

#[cfg(not(unix))]
pub(crate) fn close_duplicate(_: &File) -> io::Result<()> {
    Ok(())
}

/// The kind of file behind `metadata`.
pub(crate) fn kind(metadata: &Metadata) -> FileKind {
    let kind = metadata.file_type();
    if kind.is_file() {
        return FileKind::Regular;
    }
    if kind.is_dir() {
        return FileKind::Directory;
    }
    #[cfg(unix)]
    {
        use std::os::unix::fs::FileTypeExt;
        if kind.is_block_device() {
            return FileKind::BlockDevice;
        }
        if kind.is_fifo() {
            return FileKind::Other("a FIFO");
        }
        if kind.is_socket() {
            return FileKind::Other("a socket");
        }
        if kind.is_char_device() {
            return FileKind::Other("a character device");
        }
    }
    FileKind::Other("not a regular file")
}

/// The system's "is a directory" error.
pub(crate) fn is_a_directory() -> io::Error {
    #[cfg(unix)]
    return io::Error::from_raw_os_error(libc::EISDIR);
    #[cfg(not(unix))]
    io::ErrorKind::IsADirectory.into()
}

/// Whether the error says that the call or the file system does not offer this, so that a fallback applies.
#[cfg(target_os = "linux")]
pub(crate) fn is_unsupported(error: &io::Error) -> bool {
    match error.raw_os_error() {
        Some(errno) => matches!(
            errno,
            libc::EOPNOTSUPP
                | libc::ENOSYS
                | libc::EINVAL
                | libc::ENOTTY
                | libc::EXDEV
                | libc::EPERM
                | libc::ENODEV
                | libc::ETXTBSY
                | libc::EISDIR
        ),
        None => error.kind() == io::ErrorKind::Unsupported,
    }
}

/// The system's "exists already" error.
pub(crate) fn already_exists() -> io::Error {
    #[cfg(unix)]
    return io::Error::from_raw_os_error(libc::EEXIST);
    #[cfg(not(unix))]
    io::ErrorKind::AlreadyExists.into()
}

/// The system's "no space left" error.
pub fn no_space() -> io::Error {
    #[cfg(unix)]
    return io::Error::from_raw_os_error(libc::ENOSPC);
    #[cfg(not(unix))]
    io::ErrorKind::StorageFull.into()
}

/// The system's "permission denied" error.
pub(crate) fn not_permitted() -> io::Error {
    #[cfg(unix)]
    return io::Error::from_raw_os_error(libc::EACCES);
    #[cfg(not(unix))]
    io::ErrorKind::PermissionDenied.into()
}

/// The system's "too many symbolic links" error.
pub(crate) fn too_many_links() -> io::Error {
    #[cfg(unix)]
    return io::Error::from_raw_os_error(libc::ELOOP);
    #[cfg(not(unix))]
    io::ErrorKind::InvalidInput.into()
}

/// Device and inode, where there are such.
#[cfg(unix)]
pub(crate) fn identity(metadata: &Metadata) -> Option<(u64, u64)> {
    use std::os::unix::fs::MetadataExt;
    Some((metadata.dev(), metadata.ino()))
}

#[cfg(not(unix))]
pub(crate) fn identity(_: &Metadata) -> Option<(u64, u64)> {
    None
}

/// One kind for "not here": the caller falls back on it.
#[cfg(target_os = "linux")]
pub(crate) fn unsupported_if_so<T>(result: io::Result<T>) -> io::Result<T> {
    result.map_err(|e| if is_unsupported(&e) { io::ErrorKind::Unsupported.into() } else { e })
}
