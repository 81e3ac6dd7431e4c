//! Files without a name, and giving them one.

use std::fs::File;
use std::io;
use std::path::Path;

#[cfg(target_os = "linux")]
pub(crate) use linux::{link_unnamed, open_unnamed, replace_by_link};
#[cfg(not(target_os = "linux"))]
pub(crate) use other::{link_unnamed, open_unnamed, replace_by_link};

#[cfg(target_os = "linux")]
mod linux {
    use std::fs::OpenOptions;
    use std::os::fd::AsRawFd;
    use std::os::unix::ffi::OsStrExt;
    use std::os::unix::fs::OpenOptionsExt;

    use rustix::fs::{AtFlags, CWD};

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

    /// Gives an unnamed file the name of an existing one, in one step for every observer.
    pub(crate) fn replace_by_link(file: &File, sibling: &Path, path: &Path) -> io::Result<()> {
        link_unnamed(file, sibling)?;
        std::fs::rename(sibling, path).inspect_err(|_| {
            // The first error is the one to report; the sibling is ours to take away.
            let _removed = std::fs::remove_file(sibling);
        })
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

    pub(crate) fn replace_by_link(_: &File, _: &Path, _: &Path) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}
