//! Live clones into files.

use std::num::NonZeroUsize;

use super::{NewDisk, NewFiles, Target};
use crate::clone::{CloneResult, CloneTarget, LiveClone};
use crate::convert::Compression;
use crate::{Image, Job, Result};

/// A clone whose point in time has passed. Dropped before it is complete, it ends, and its files never were.
#[derive(Debug)]
pub struct FileClone {
    clone: LiveClone,
    files: NewFiles,
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
        Ok(Self { clone: image.begin_clone(target, job)?, files })
    }

    /// Copies the rest of `image`, which the clone was begun on, and gives the files their names, durably.
    ///
    /// # Errors
    /// Those of [`LiveClone::run`] and [`NewFiles::commit`].
    pub fn run(self, image: &Image, concurrency: Option<NonZeroUsize>, job: &Job) -> Result<CloneResult> {
        let result = self.clone.run(image, concurrency, job)?;
        self.files.commit(true)?;
        Ok(result)
    }
}
