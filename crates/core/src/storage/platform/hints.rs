//! What the system is told about a file and need not do.

use std::fs::File;
use std::ops::Range;

#[cfg(target_os = "linux")]
pub(crate) use linux::{begin_sync, forget};
#[cfg(not(target_os = "linux"))]
pub(crate) use other::{begin_sync, forget};

#[cfg(target_os = "linux")]
mod linux {
    use std::num::NonZeroU64;
    use std::os::fd::AsRawFd;

    use rustix::fs::Advice;

    use super::*;

    pub(crate) fn begin_sync(file: &File) {
        // SAFETY: takes numbers alone. What fails here fails in the sync as well, which tells it.
        let _ = unsafe { libc::sync_file_range(file.as_raw_fd(), 0, 0, libc::SYNC_FILE_RANGE_WRITE) };
    }

    pub(crate) fn forget(file: &File, range: Range<u64>) {
        // A length of 0 would be all of the file.
        if let Some(length) = NonZeroU64::new(range.end.saturating_sub(range.start)) {
            let _ = rustix::fs::fadvise(file, range.start, Some(length), Advice::DontNeed);
        }
    }
}

#[cfg(not(target_os = "linux"))]
mod other {
    use super::*;

    pub(crate) fn begin_sync(_: &File) {}

    pub(crate) fn forget(_: &File, _: Range<u64>) {}
}
