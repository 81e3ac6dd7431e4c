//! Live clones into files, and into what is open and no file.

use std::num::NonZeroUsize;
use std::sync::Arc;

use super::{NewDisk, NewFiles, Target};
use crate::clone::{CloneResult, CloneTarget, LiveClone};
use crate::convert::Compression;
use crate::{Image, Job, Result, Storage, StorageExt};

/// A clone whose point in time has passed. Dropped before it is complete, it ends, and its files never were.
#[derive(Debug)]
pub struct FileClone {
    clone: LiveClone,
    place: Place,
}

/// What is there when a clone is complete.
#[derive(Debug)]
enum Place {
    Files(NewFiles),
    Open(Arc<dyn Storage>),
}

impl FileClone {
    /// Starts the files of a clone of `image` and takes its point in time, see [`Image::begin_clone`].
    ///
    /// # Errors
    /// Those of [`NewDisk::start`] and [`Image::begin_clone`].
    pub fn begin(
        image: &Image,
        target: &Target,
        disk: NewDisk,
        compression: Option<Compression>,
        job: &Job,
    ) -> Result<Self> {
        let files = disk.start(target, Some(image), job)?;
        let target = CloneTarget { disk: files.target(disk), compression };
        Ok(Self { clone: image.begin_clone(target, job)?, place: Place::Files(files) })
    }

    /// The same, into what is open: no image before its first bytes, which come last.
    ///
    /// # Errors
    /// Those of [`Image::begin_clone`], and for a disk that has other files.
    pub fn begin_onto(
        image: &Image,
        storage: Arc<dyn Storage>,
        disk: NewDisk,
        compression: Option<Compression>,
        job: &Job,
    ) -> Result<Self> {
        let target = CloneTarget { disk: disk.onto_open(&storage)?, compression };
        Ok(Self { clone: image.begin_clone(target, job)?, place: Place::Open(storage) })
    }

    /// Copies the rest of `image`, which the clone was begun on, and gives the files their names, durably.
    ///
    /// # Errors
    /// Those of [`LiveClone::run`] and [`NewFiles::commit`].
    pub fn run(self, image: &Image, concurrency: Option<NonZeroUsize>, job: &Job) -> Result<CloneResult> {
        let result = self.clone.run(image, concurrency, job)?;
        match self.place {
            Place::Files(files) => files.commit(true)?,
            Place::Open(storage) => {
                storage.flush()?;
                storage.report_close()?;
            }
        }
        Ok(result)
    }
}
