//! Making what was written durable.

use std::fs::File;
use std::io;

#[cfg(target_vendor = "apple")]
pub(crate) use apple::{sync_all, sync_data};
#[cfg(not(any(target_vendor = "apple", windows)))]
pub(crate) use other::{sync_all, sync_data};
#[cfg(windows)]
pub(crate) use windows::{sync_all, sync_data};

#[cfg(not(any(target_vendor = "apple", windows)))]
mod other {
    use super::*;

    pub(crate) fn sync_data(file: &File) -> io::Result<()> {
        file.sync_data()
    }

    pub(crate) fn sync_all(file: &File) -> io::Result<()> {
        file.sync_all()
    }
}

/// `fsync` leaves data in the cache of the drive. `F_FULLFSYNC`, which std calls for both of its syncs, does not.
#[cfg(target_vendor = "apple")]
mod apple {
    use std::os::fd::AsRawFd;

    use super::super::file::is_unsupported;
    use super::super::transfer::retry;
    use super::*;

    pub(crate) fn sync_data(file: &File) -> io::Result<()> {
        sync_all(file)
    }

    /// Where the file system, or its server, knows no such call (SMB, FAT), `fsync` does all that there is.
    pub(crate) fn sync_all(file: &File) -> io::Result<()> {
        match file.sync_all() {
            Err(e) if is_unsupported(&e) => plain(file),
            result => result,
        }
    }

    fn plain(file: &File) -> io::Result<()> {
        // SAFETY: takes a descriptor, which is open, and touches no memory.
        retry(|| unsafe { libc::fsync(file.as_raw_fd()) as isize }).map(drop)
    }
}

/// std calls `FlushFileBuffers`, which also tells the drive, for both.
#[cfg(windows)]
mod windows {
    use super::*;

    pub(crate) fn sync_data(file: &File) -> io::Result<()> {
        sync_all(file)
    }

    /// The system refuses it for a file that is open for reading: nothing was written by way of that.
    pub(crate) fn sync_all(file: &File) -> io::Result<()> {
        match file.sync_all() {
            Err(e) if e.kind() == io::ErrorKind::PermissionDenied => Ok(()),
            result => result,
        }
    }
}
