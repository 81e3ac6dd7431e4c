//! The files of a new disk.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use qcow2_core::NewImage;
use qcow2_core::new_image::Hosts;

use super::Target;
use crate::convert::data_bytes;
use crate::create::{self, CreateOptions, NewTarget, Preallocation, create_raw};
use crate::storage::{NewFile, Overwrite, Room};
use crate::{Error, ErrorKind, GuestSource, Job, Result, Storage, StorageExt};

/// What a new disk is made as.
#[derive(Debug, Clone)]
pub enum NewDisk {
    /// A raw file.
    Raw {
        /// Size of the disk in bytes.
        size: u64,
        /// Space to take.
        preallocation: Preallocation,
    },
    /// A qcow2 image.
    Qcow2 {
        /// Its options.
        create: Box<CreateOptions>,
        /// Where its external data file goes, if the options name one.
        data_path: Option<PathBuf>,
    },
    /// An image of any other format.
    Format(Arc<dyn NewImage>),
}

impl NewDisk {
    /// Starts the disk's files at `target`. `source` is the disk that is copied to it.
    ///
    /// # Errors
    /// Those of [`NewFile::create_with_room`]; `InvalidArgument` or `Limit` for options that contradict each other, and for another file
    /// of the disk that is the image itself.
    pub fn start(&self, target: &Target, source: Option<&dyn GuestSource>, job: &Job) -> Result<NewFiles> {
        let content = self.content(source, job);
        let create = |path: &Path, overwrite, room: &Room<'_>| {
            NewFile::create_with_room(path, overwrite, &target.in_use, room)
        };
        let (others, field, overwrite) = match self {
            Self::Raw { .. } => (&[][..], "", target.overwrite),
            Self::Format(image) => (image.other_files(), "subformat", target.overwrite),
            Self::Qcow2 { create, data_path } => {
                create.validate()?;
                let overwrite = if create.keep_data_file { Overwrite::Keep } else { target.overwrite };
                (data_path.as_slice(), "data_file", overwrite)
            }
        };
        // The guest's data goes into the others, where there are any.
        let Some((last, but_last)) = others.split_last() else {
            let disk = content.with_room(|room| create(&target.path, target.overwrite, room))?;
            return Ok(NewFiles { disk, others: Vec::new() });
        };
        let disk = create(&target.path, target.overwrite, &Room::LITTLE)?;
        let mut made = Vec::new();
        for path in but_last {
            made.push(create(path, overwrite, &Room::LITTLE)?);
        }
        made.push(content.with_room(|room| create(last, overwrite, room))?);
        if let Some(same) = made.iter().find(|file| file.is_where(&disk)) {
            let message = match field {
                "data_file" => "the external data file cannot be the image itself",
                _ => "a file of the image's data cannot be the image itself",
            };
            let error = Error::new(ErrorKind::InvalidArgument, message);
            return Err(error.with_field(field).with_path(same.path()));
        }
        Ok(NewFiles { disk, others: made })
    }

    /// The disk, made in files that are open.
    pub(super) fn onto(self, own: Arc<dyn Storage>, others: Vec<Arc<dyn Storage>>) -> NewTarget {
        match self {
            Self::Raw { preallocation, .. } => {
                let keep = own.traits().block_device;
                NewTarget::Raw { storage: own, preallocation, keep }
            }
            Self::Qcow2 { create, .. } => {
                NewTarget::Qcow2 { storage: own, data_file: others.into_iter().next(), create }
            }
            Self::Format(image) => NewTarget::Format { image, hosts: Hosts { own, others } },
        }
    }

    /// The disk, made in what is open and no new file: an export, a caller's object. What can have another size has none then.
    ///
    /// # Errors
    /// `InvalidArgument` for a disk that has other files; those of the options' rules and of the file.
    pub(super) fn onto_open(self, storage: &Arc<dyn Storage>) -> Result<NewTarget> {
        match &self {
            Self::Qcow2 { data_path: Some(_), .. } => {
                let message = "a disk that is made in an open file has no external data file";
                return Err(Error::new(ErrorKind::InvalidArgument, message).with_field("data_file"));
            }
            Self::Format(image) if !image.other_files().is_empty() => {
                let message = "an image that is made in an open file has no other files";
                return Err(Error::new(ErrorKind::InvalidArgument, message).with_field("subformat"));
            }
            Self::Qcow2 { create, .. } => create.validate()?,
            Self::Raw { .. } | Self::Format(_) => {}
        }
        if !storage.traits().block_device {
            storage.resize(0)?;
        }
        Ok(self.onto(Arc::clone(storage), Vec::new()))
    }

    fn content<'a>(&'a self, source: Option<&'a dyn GuestSource>, job: &'a Job) -> Content<'a> {
        let (size, preallocation) = match self {
            Self::Raw { size, preallocation } => (*size, *preallocation),
            // What is copied to it takes all of its space.
            Self::Format(image) if source.is_some() && !image.is_sparse() => {
                (image.size(), Preallocation::Full)
            }
            Self::Format(image) => (image.size(), image.preallocation()),
            Self::Qcow2 { create, .. } => (create.size, create.preallocation),
        };
        Content { disk: self, size, preallocation, source, job }
    }

    /// Bytes at which guest data takes space.
    fn unit(&self) -> u64 {
        match self {
            Self::Raw { .. } => 1,
            Self::Qcow2 { create, .. } => create.cluster_size,
            Self::Format(image) => image.unit(),
        }
    }

    /// Bytes of the files with `data` bytes of guest data.
    fn length(&self, data: u64) -> u64 {
        match self {
            Self::Raw { .. } => data,
            // Metadata is a small part, and some.
            Self::Qcow2 { create, .. } => {
                data.saturating_add(data / 256).saturating_add(create.cluster_size.saturating_mul(8))
            }
            Self::Format(image) => image.length(data),
        }
    }
}

/// What a new file will hold, as far as its space goes.
struct Content<'a> {
    disk: &'a NewDisk,
    /// Size of the disk in bytes.
    size: u64,
    preallocation: Preallocation,
    /// The disk that is copied.
    source: Option<&'a dyn GuestSource>,
    job: &'a Job,
}

impl Content<'_> {
    fn with_room<T>(&self, start: impl FnOnce(&Room<'_>) -> Result<T>) -> Result<T> {
        let most = self.disk.length(self.size);
        let full = matches!(self.preallocation, Preallocation::Falloc | Preallocation::Full);
        match self.source {
            _ if full => start(&Room { most, closer: &|| Ok(most) }),
            None => start(&Room::LITTLE),
            Some(source) => {
                let data = || data_bytes(source, self.disk.unit(), self.job);
                start(&Room { most, closer: &|| data().map(|data| self.disk.length(data)) })
            }
        }
    }
}

/// The files of a disk that is being made: dropped, they never were.
#[derive(Debug)]
pub struct NewFiles {
    disk: NewFile,
    others: Vec<NewFile>,
}

impl NewFiles {
    /// The disk's own file.
    pub fn disk(&self) -> &NewFile {
        &self.disk
    }

    /// Where the disk's own file is written.
    pub fn storage(&self) -> Arc<dyn Storage> {
        self.disk.storage()
    }

    /// Where the external data file is written.
    pub fn data_file(&self) -> Option<Arc<dyn Storage>> {
        self.others.first().map(NewFile::storage)
    }

    /// What is made in them: the disk that they were started for.
    pub(super) fn target(&self, disk: NewDisk) -> NewTarget {
        disk.onto(self.storage(), self.others.iter().map(NewFile::storage).collect())
    }

    /// Gives the files their names; `durable`: on stable storage. The image last: it is not there without its data.
    ///
    /// # Errors
    /// Those of [`NewFile::commit`].
    pub fn commit(self, durable: bool) -> Result<()> {
        let commit = |file: NewFile| if durable { file.commit() } else { file.commit_unsynced() };
        self.others.into_iter().try_for_each(commit)?;
        commit(self.disk)
    }
}

/// Creates an empty disk at `target`.
///
/// # Errors
/// Those of [`NewDisk::start`], of creating and of [`NewFiles::commit`].
pub fn create(target: &Target, disk: &NewDisk, job: &Job) -> Result<()> {
    let files = disk.start(target, None, job)?;
    match disk {
        NewDisk::Raw { size, preallocation } => create_raw(&*files.storage(), *size, *preallocation, job)?,
        NewDisk::Format(image) => {
            job.set_total(image.size());
            let others = files.others.iter().map(NewFile::storage).collect();
            image.create(&Hosts { own: files.storage(), others }, job)?;
        }
        NewDisk::Qcow2 { create, .. } => create::create(files.storage(), files.data_file(), create, job)?,
    }
    files.commit(true)
}
