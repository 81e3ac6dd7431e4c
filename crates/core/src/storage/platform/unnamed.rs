//! Files without a name, giving them one, and names that lead to open files.

use std::fs::{File, OpenOptions};
use std::io;
use std::path::Path;

#[cfg(unix)]
use super::sync::sync_all;

#[cfg(target_os = "linux")]
pub(crate) use linux::{is_magic_link, link_unnamed, open_unnamed};
#[cfg(not(target_os = "linux"))]
pub(crate) use other::{is_magic_link, link_unnamed, open_unnamed};

#[cfg(target_os = "linux")]
mod linux {
    use std::os::fd::AsRawFd;
    use std::os::unix::ffi::OsStrExt;
    use std::os::unix::fs::OpenOptionsExt;

    use rustix::fs::{AtFlags, CWD, Mode, OFlags};

    use super::super::file::unsupported_if_so;
    use super::*;

    /// A file without a name in `directory`: it vanishes with its last descriptor, however the process ends.
    /// `Unsupported` where the file system has none, or where it could not be named later.
    pub(crate) fn open_unnamed(directory: &Path) -> io::Result<File> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).custom_flags(libc::O_TMPFILE);
        let file = unsupported_if_so(options.open(directory))?;
        std::fs::symlink_metadata(proc_path(&file)).map_err(|_| io::ErrorKind::Unsupported)?;
        Ok(file)
    }

    fn proc_path(file: &File) -> String {
        format!("/proc/self/fd/{}", file.as_raw_fd())
    }

    /// Gives an unnamed file its name; `AlreadyExists` if something has it.
    pub(crate) fn link_unnamed(file: &File, path: &Path) -> io::Result<()> {
        Ok(rustix::fs::linkat(
            CWD,
            proc_path(file).as_str(),
            CWD,
            path.as_os_str().as_bytes(),
            AtFlags::SYMLINK_FOLLOW,
        )?)
    }

    /// Whether the symbolic link `path` is one of those that lead to an open file, whatever its text says: those of procfs.
    pub(crate) fn is_magic_link(path: &Path) -> io::Result<bool> {
        /// `PROC_SUPER_MAGIC` of linux/magic.h.
        const PROCFS: rustix::fs::FsWord = 0x9fa0;
        let link = rustix::fs::open(path, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
        Ok(rustix::fs::fstatfs(link)?.f_type == PROCFS)
    }
}

#[cfg(not(target_os = "linux"))]
mod other {
    use super::*;

    pub(crate) fn open_unnamed(_: &Path) -> io::Result<File> {
        Err(io::ErrorKind::Unsupported.into())
    }

    pub(crate) fn link_unnamed(_: &File, _: &Path) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    pub(crate) fn is_magic_link(_: &Path) -> io::Result<bool> {
        Ok(false)
    }
}

/// Whether a new file has a hidden name until it is complete, where it cannot be without one. (On Linux most file systems can.)
pub(crate) const HIDES_NEW_FILES: bool = cfg!(not(target_os = "linux"));

/// A new file for reading and writing; `AlreadyExists` if something has the name. On Windows with the right to change who may do
/// what with it, where the server of a share gives that.
pub(crate) fn create(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create_new(true);
    #[cfg(windows)]
    {
        use std::os::windows::fs::OpenOptionsExt;
        use windows_sys::Win32::Foundation::{GENERIC_READ, GENERIC_WRITE};
        use windows_sys::Win32::Storage::FileSystem::WRITE_DAC;
        let mut all = options.clone();
        match all.access_mode(GENERIC_READ | GENERIC_WRITE | WRITE_DAC).open(path) {
            Err(e) if e.kind() == io::ErrorKind::PermissionDenied => {}
            opened => return opened,
        }
    }
    options.open(path)
}

/// Gives the file at `from` the name `to`; `AlreadyExists` if something has it.
pub(crate) fn rename_new(from: &Path, to: &Path) -> io::Result<()> {
    #[cfg(target_vendor = "apple")]
    {
        use super::file::is_unsupported;
        use rustix::fs::{CWD, RenameFlags, renameat_with};
        match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE).map_err(io::Error::from) {
            Err(e) if is_unsupported(&e) => {}
            result => return result,
        }
    }
    // An empty file of our own holds the name, and is replaced.
    create(to)?;
    std::fs::rename(from, to).inspect_err(|_| {
        // The error that led here is the one to report.
        let _removed = std::fs::remove_file(to);
    })
}

/// A new file that goes when it is closed, however the process ends; its name goes at once where the system allows that.
#[cfg(windows)]
pub(crate) fn create_vanishing(path: &Path) -> io::Result<File> {
    use std::os::windows::fs::OpenOptionsExt;
    use windows_sys::Win32::Storage::FileSystem::{FILE_ATTRIBUTE_TEMPORARY, FILE_FLAG_DELETE_ON_CLOSE};
    let mut options = OpenOptions::new();
    options.read(true).write(true).create_new(true);
    options.custom_flags(FILE_FLAG_DELETE_ON_CLOSE).attributes(FILE_ATTRIBUTE_TEMPORARY).open(path)
}

/// A new file that goes when it is closed; nobody but who looks in between sees its name.
#[cfg(not(windows))]
pub(crate) fn create_vanishing(path: &Path) -> io::Result<File> {
    let file = create(path)?;
    std::fs::remove_file(path)?;
    Ok(file)
}

/// Makes the names in `folder` durable, of which `file` has one.
#[cfg(unix)]
pub(crate) fn sync_folder(folder: &Path, file: &File) -> io::Result<()> {
    match File::open(folder) {
        Ok(folder) => match sync_all(&folder) {
            // File systems that have no such call for folders keep names in another way.
            Err(e) if matches!(e.raw_os_error(), Some(libc::EINVAL | libc::EOPNOTSUPP | libc::ENOSYS)) => {
                Ok(())
            }
            result => result,
        },
        // A folder to write into and not to read.
        #[cfg(target_os = "linux")]
        Err(e) if e.kind() == io::ErrorKind::PermissionDenied => Ok(rustix::fs::syncfs(file)?),
        #[cfg(not(target_os = "linux"))]
        Err(e) if e.kind() == io::ErrorKind::PermissionDenied => sync_all(file),
        Err(e) => Err(e),
    }
}

/// There is no such call: the file system writes its journal when it sees fit.
#[cfg(not(unix))]
pub(crate) fn sync_folder(_: &Path, _: &File) -> io::Result<()> {
    Ok(())
}
