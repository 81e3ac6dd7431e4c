//! Converts of open images into files, or into an open image.

use std::sync::Arc;

use super::{NewDisk, Target};
use crate::bitmap::CopyableBitmaps;
use crate::convert::{ConvertOptions, ConvertResult, ConvertTarget, convert};
use crate::create::{NewTarget, Preallocation};
use crate::salvage::{Salvage, Unreadable};
use crate::splice::Splice;
use crate::storage::{Access, Claim, FileStorage, Locking};
use crate::{Error, ErrorKind, GuestSource, Image, Job, ReadStorage, Result, Storage, StorageExt};

/// Where a convert goes.
pub enum Destination<'a> {
    /// A new file.
    New(&'a Target, NewDisk),
    /// A raw file that exists, and keeps its length; with `Full`, zeroes are written, too.
    Over(&'a Target, Preallocation),
    /// A new disk in a file that is open for writing, and holds anything.
    Storage(&'a Arc<dyn Storage>, NewDisk),
    /// An image that is open for writing.
    Image(&'a Image),
}

/// What is converted, and how.
pub struct ConvertJob<'a> {
    /// The disks, one behind the other.
    pub sources: &'a [&'a Image],
    /// First byte of them to copy; 0 without it.
    pub start: Option<u64>,
    /// Bytes to copy; all without it.
    pub length: Option<u64>,
    /// What cannot be read becomes zeroes.
    pub salvage: bool,
    /// Copy the bitmaps of the first source; true: leave inconsistent ones out.
    pub bitmaps: Option<bool>,
    /// How it is copied.
    pub options: ConvertOptions,
}

/// What a convert did.
#[derive(Debug)]
pub struct Converted {
    /// What was copied.
    pub result: ConvertResult,
    /// Names of the bitmaps that were left out, where bitmaps were copied.
    pub skipped_bitmaps: Option<Vec<Vec<u8>>>,
    /// What could not be read, where that was to become zeroes.
    pub unreadable: Option<Vec<Unreadable>>,
}

impl ConvertJob<'_> {
    /// The disk that is copied, as `then` sees it.
    fn with_disk<T>(&self, then: impl FnOnce(&dyn GuestSource, &Image) -> Result<T>) -> Result<T> {
        let Some(&first) = self.sources.first() else {
            return Err(Error::new(ErrorKind::InvalidArgument, "a convert needs a source"));
        };
        let disks: Vec<&dyn GuestSource> =
            self.sources.iter().map(|&image| image as &dyn GuestSource).collect();
        let joined = if disks.len() > 1 { Some(Splice::concatenation(&disks)?) } else { None };
        let whole: &dyn GuestSource = joined.as_ref().map_or(first, |joined| joined);
        if self.start.is_none() && self.length.is_none() {
            return then(whole, first);
        }
        let start = self.start.unwrap_or(0);
        let rest = whole.virtual_size().saturating_sub(start);
        then(&Splice::window(whole, start, self.length.unwrap_or(rest))?, first)
    }

    /// Size of what is copied, in bytes: a new disk has it.
    ///
    /// # Errors
    /// `InvalidArgument` without sources, and for a range that is not in them.
    pub fn virtual_size(&self) -> Result<u64> {
        self.with_disk(|disk, _| Ok(disk.virtual_size()))
    }

    /// Converts.
    ///
    /// # Errors
    /// Those of [`convert`](fn@convert), of copying bitmaps, and of the target's files. A new file is then not there.
    pub fn run(&self, destination: Destination<'_>, job: &Job) -> Result<Converted> {
        self.with_disk(|disk, first| {
            let bitmaps = self.bitmaps.map(|skip| CopyableBitmaps::of(first, skip)).transpose()?;
            let (result, unreadable) = if self.salvage {
                let salvage = Salvage::new(disk);
                let result = self.copy(&salvage, destination, bitmaps.as_ref(), job)?;
                (result, Some(salvage.into_lost()))
            } else {
                (self.copy(disk, destination, bitmaps.as_ref(), job)?, None)
            };
            let skipped_bitmaps = bitmaps.map(|bitmaps| bitmaps.skipped);
            Ok(Converted { result, skipped_bitmaps, unreadable })
        })
    }

    fn copy(
        &self,
        source: &dyn GuestSource,
        destination: Destination<'_>,
        bitmaps: Option<&CopyableBitmaps<'_>>,
        job: &Job,
    ) -> Result<ConvertResult> {
        match destination {
            Destination::New(target, disk) => self.copy_to_new(source, target, disk, bitmaps, job),
            Destination::Over(target, preallocation) => self.copy_over(source, target, preallocation, job),
            Destination::Storage(storage, disk) => self.copy_into(source, storage, disk, bitmaps, job),
            Destination::Image(image) => {
                bitmaps.map_or(Ok(()), |_| CopyableBitmaps::refuse_target(image))?;
                // The image is flushed when it is closed.
                let options = ConvertOptions { durable: false, ..self.options.clone() };
                let result = convert(source, ConvertTarget::Existing(image), &options, job)?;
                bitmaps.map_or(Ok(()), |bitmaps| bitmaps.add_to(image)).map(|()| result)
            }
        }
    }

    fn copy_to_new(
        &self,
        source: &dyn GuestSource,
        target: &Target,
        disk: NewDisk,
        bitmaps: Option<&CopyableBitmaps<'_>>,
        job: &Job,
    ) -> Result<ConvertResult> {
        let files = disk.start(target, Some(source), job)?;
        let (door, durable) = match &disk {
            // Synced with its name.
            NewDisk::Raw { .. } => (None, false),
            // What others see becomes an image when all else is there.
            NewDisk::Format(_) => (None, self.options.durable && files.disk().is_visible()),
            NewDisk::Qcow2 { create, .. } => {
                (create.data_door.clone(), self.options.durable && files.disk().is_visible())
            }
        };
        let target = ConvertTarget::New(files.target(disk));
        let options = ConvertOptions { durable, ..self.options.clone() };
        let result = convert(source, target, &options, job)?;
        if let Some(bitmaps) = bitmaps {
            bitmaps.copy_to(files.storage(), files.data_file(), door)?;
        }
        files.commit(self.options.durable)?;
        Ok(result)
    }

    fn copy_into(
        &self,
        source: &dyn GuestSource,
        storage: &Arc<dyn Storage>,
        disk: NewDisk,
        bitmaps: Option<&CopyableBitmaps<'_>>,
        job: &Job,
    ) -> Result<ConvertResult> {
        let door = match &disk {
            NewDisk::Qcow2 { create, .. } => create.data_door.clone(),
            NewDisk::Raw { .. } | NewDisk::Format(_) => None,
        };
        let target = ConvertTarget::New(disk.onto_open(storage)?);
        let result = convert(source, target, &self.options, job)?;
        if let Some(bitmaps) = bitmaps {
            bitmaps.copy_to(Arc::clone(storage), None, door)?;
        }
        if self.options.durable {
            storage.flush()?;
        }
        storage.report_close().map(|()| result)
    }

    fn copy_over(
        &self,
        source: &dyn GuestSource,
        target: &Target,
        preallocation: Preallocation,
        job: &Job,
    ) -> Result<ConvertResult> {
        let storage = FileStorage::open(&target.path, Access::ReadWrite)?;
        if storage.identity().is_some_and(|identity| target.in_use.contains(&identity)) {
            let message = "the target is also a source of this operation";
            return Err(Error::new(ErrorKind::InvalidArgument, message).with_path(&target.path));
        }
        storage.lock(Claim::WRITER, Locking::Auto)?;
        let storage = Arc::new(storage);
        let raw = ConvertTarget::New(NewTarget::Raw { storage: storage.clone(), preallocation, keep: true });
        let result = convert(source, raw, &self.options, job)?;
        storage.report_close().map(|()| result)
    }
}
