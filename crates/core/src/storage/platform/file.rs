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
    #[cfg(windows)]
    {
        use std::os::windows::fs::OpenOptionsExt;
        use windows_sys::Win32::Storage::FileSystem::{FILE_FLAG_NO_BUFFERING, SECURITY_IDENTIFICATION};
        // A path of others can be that of a pipe, whose server may then know who we are, and not act as we.
        options.custom_flags(if direct { FILE_FLAG_NO_BUFFERING } else { 0 });
        options.security_qos_flags(SECURITY_IDENTIFICATION);
    }
    #[cfg(unix)]
    {
        let direct = if direct { DIRECT } else { 0 };
        let flags = libc::O_NONBLOCK | libc::O_NOCTTY | direct;
        std::os::unix::fs::OpenOptionsExt::custom_flags(&mut options, flags);
    }
    let opened = options.open(path);
    // The open of a file system that has no direct I/O fails like this, and no other open does.
    #[cfg(unix)]
    let opened = opened.map_err(|e| match e.raw_os_error() {
        Some(libc::EINVAL) if direct => io::ErrorKind::Unsupported.into(),
        _ => e,
    });
    // It says that the access is denied, to a folder too.
    #[cfg(windows)]
    let opened = opened.map_err(|e| match e.kind() {
        io::ErrorKind::PermissionDenied if path.is_dir() => is_a_directory(),
        _ => e,
    });
    let file = opened?;
    #[cfg(unix)]
    blocking(&file)?;
    #[cfg(windows)]
    refuse_pipe(&file)?;
    if direct {
        bypass_cache(&file)?;
    }
    Ok(file)
}

#[cfg(target_os = "linux")]
const DIRECT: libc::c_int = libc::O_DIRECT;
#[cfg(all(unix, not(target_os = "linux")))]
const DIRECT: libc::c_int = 0;

/// Whether it is a disk's: the system tells little of the others by way of their metadata.
#[cfg(windows)]
fn refuse_pipe(file: &File) -> io::Result<()> {
    use windows_sys::Win32::Storage::FileSystem::{FILE_TYPE_DISK, GetFileType};
    // SAFETY: takes a handle, which is open, and touches no memory.
    match unsafe { GetFileType(super::windows::handle(file)) } {
        FILE_TYPE_DISK => Ok(()),
        _ => {
            Err(io::Error::new(io::ErrorKind::InvalidInput, "a pipe or a character device is no disk image"))
        }
    }
}

/// What is left to do after the open, where the flag is not one of the open.
#[cfg(any(target_os = "linux", windows))]
fn bypass_cache(_: &File) -> io::Result<()> {
    Ok(())
}

#[cfg(target_os = "macos")]
fn bypass_cache(file: &File) -> io::Result<()> {
    use std::os::fd::AsRawFd;
    // SAFETY: F_NOCACHE takes an int and touches no memory of ours.
    super::transfer::retry(|| unsafe { libc::fcntl(file.as_raw_fd(), libc::F_NOCACHE, 1) as isize }).map(drop)
}

#[cfg(not(any(target_os = "linux", target_os = "macos", windows)))]
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
#[cfg(target_os = "linux")]
pub(crate) fn is_direct(file: &File) -> io::Result<bool> {
    Ok(rustix::fs::fcntl_getfl(file)?.bits().cast_signed() & DIRECT != 0)
}

/// Nobody can tell, and there is no such rule.
#[cfg(all(unix, not(target_os = "linux")))]
pub(crate) fn is_direct(_: &File) -> io::Result<bool> {
    Ok(false)
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

/// Whether the error says that somebody has the file open and does not share it.
pub(crate) fn is_in_use(error: &io::Error) -> bool {
    #[cfg(windows)]
    return super::windows::is(error, windows_sys::Win32::Foundation::ERROR_SHARING_VIOLATION);
    #[cfg(not(windows))]
    {
        let _ = error;
        false
    }
}

/// Whether the error of a rename can mean that the file with that name is open, be it by us: Windows then replaces it on its newest
/// file systems alone.
pub(crate) fn may_be_open(error: &io::Error) -> bool {
    cfg!(windows) && error.kind() == io::ErrorKind::PermissionDenied
}

/// The system's "is a directory" error.
pub(crate) fn is_a_directory() -> io::Error {
    #[cfg(unix)]
    return io::Error::from_raw_os_error(libc::EISDIR);
    #[cfg(not(unix))]
    io::ErrorKind::IsADirectory.into()
}

/// Whether the error says that the call or the file system does not offer this, so that a fallback applies.
#[cfg(unix)]
pub(crate) fn is_unsupported(error: &io::Error) -> bool {
    match error.raw_os_error() {
        Some(libc::ENOTSUP) => true,
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

/// What tells a file apart from all others: device and inode.
#[cfg(unix)]
pub(crate) type FileId = (u64, u64);
/// What tells a file apart from all others: volume and file id.
#[cfg(windows)]
pub(crate) type FileId = (u64, u128);

/// That of an open file with its metadata; `None` where there is none.
#[cfg(unix)]
pub(crate) fn identity(_: &File, metadata: &Metadata) -> Option<FileId> {
    identity_at(Path::new(""), metadata)
}

/// That of the file at `path` with its metadata.
#[cfg(unix)]
pub(crate) fn identity_at(_: &Path, metadata: &Metadata) -> Option<FileId> {
    use std::os::unix::fs::MetadataExt;
    Some((metadata.dev(), metadata.ino()))
}

#[cfg(windows)]
pub(crate) fn identity(file: &File, _: &Metadata) -> Option<FileId> {
    use windows_sys::Win32::Storage::FileSystem::{FILE_ID_INFO, FileIdInfo};
    // Numbers of 64 bits are not unique on ReFS.
    if let Ok(id) = super::windows::information::<FILE_ID_INFO>(file, FileIdInfo) {
        return Some((id.VolumeSerialNumber, u128::from_le_bytes(id.FileId.Identifier)));
    }
    let old = super::windows::by_handle(file).ok()?;
    let index = u64::from(old.nFileIndexHigh) << 32 | u64::from(old.nFileIndexLow);
    (index != 0 && index != u64::MAX).then(|| (old.dwVolumeSerialNumber.into(), index.into()))
}

#[cfg(windows)]
pub(crate) fn identity_at(path: &Path, metadata: &Metadata) -> Option<FileId> {
    use std::os::windows::fs::OpenOptionsExt;
    use windows_sys::Win32::Storage::FileSystem::FILE_FLAG_BACKUP_SEMANTICS;
    // Without access, and so that it opens folders, too.
    let mut options = OpenOptions::new();
    let file = options.access_mode(0).custom_flags(FILE_FLAG_BACKUP_SEMANTICS).open(path).ok()?;
    identity(&file, metadata)
}

/// One kind for "not here": the caller falls back on it.
#[cfg(target_os = "linux")]
pub(crate) fn unsupported_if_so<T>(result: io::Result<T>) -> io::Result<T> {
    result.map_err(|e| if is_unsupported(&e) { io::ErrorKind::Unsupported.into() } else { e })
}
