//! Operations on files by name: what stands in front of [`create`](crate::create), [`convert`](crate::convert) and
//! [`clone`](crate::clone), which know open storages alone. The order of files is decided here once: the image last, it is not
//! there without its data.

mod clone;
mod convert;
mod front_to_back;
mod new_disk;
mod overlay;

use std::path::PathBuf;

pub use clone::FileClone;
pub use convert::{ConvertJob, Converted, Destination};
pub use new_disk::{NewDisk, NewFiles, create};
pub use overlay::Overlay;

use crate::storage::{Claim, Identity, Locking, Overwrite};
use crate::{Result, Storage};

/// A file that is written to.
#[derive(Debug, Clone)]
pub struct Target {
    /// Its name.
    pub path: PathBuf,
    /// What becomes of one that exists.
    pub overwrite: Overwrite,
    /// Files that the job reads: the target must be none of them.
    pub in_use: Vec<Identity>,
}

/// How the files of an image are claimed against other processes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lock {
    /// Whether, and how strictly.
    pub locking: Locking,
    /// Also while another process writes.
    pub force_share: bool,
    /// To write to it.
    pub writable: bool,
}

impl Lock {
    /// None.
    pub const NONE: Self = Self { locking: Locking::Off, force_share: false, writable: false };

    /// The same, to write or not.
    #[must_use]
    pub fn for_writing(self, writable: bool) -> Self {
        Self { writable, ..self }
    }

    /// Claims the file. `image`: its bytes mean nothing without its metadata, so nobody may change it meanwhile; raw files are shared
    /// with a writer, as QEMU's tools share them.
    ///
    /// # Errors
    /// `Locked`.
    pub fn claim(self, storage: &dyn Storage, image: bool) -> Result<()> {
        let claim = match (self.writable, image && !self.force_share) {
            (true, _) => Claim::WRITER,
            (false, true) => Claim::READER,
            (false, false) => Claim::SHARING_READER,
        };
        storage.lock(claim, self.locking)
    }
}
