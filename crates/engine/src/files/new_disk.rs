//! The files of a new disk.

use std::path::PathBuf;
use std::sync::Arc;

use qcow2_luks::NewLuks;

use super::Target;
use crate::convert::data_bytes;
use crate::create::{self, CreateOptions, NewTarget, Preallocation, create_luks, create_raw};
use crate::storage::{NewFile, Overwrite, Room};
use crate::{Error, ErrorKind, GuestSource, Job, Result, Storage};

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
    /// A LUKS file.
    Luks {
        /// Size of the disk in bytes.
        size: u64,
        /// Its header and its cipher.
        luks: NewLuks,
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
}

impl NewDisk {
    /// Starts the disk's files at `target`. `source` is the disk that is copied to it.
    ///
    /// # Errors
    /// Those of [`NewFile::create_with_room`]; `InvalidArgument` or `Limit` for options that contradict each other, and for a data file
    /// that is the image itself.
    pub fn start(&self, target: &Target, source: Option<&dyn GuestSource>, job: &Job) -> Result<NewFiles> {
        let content = self.content(source, job);
        let start =
            |room: &Room<'_>| NewFile::create_with_room(&target.path, target.overwrite, &target.in_use, room);
        let (create, data_path) = match self {
            Self::Qcow2 { create, data_path } => (create, data_path),
            Self::Raw { .. } | Self::Luks { .. } => {
                return Ok(NewFiles { disk: content.with_room(start)?, data: None });
            }
        };
        create.validate()?;
        let Some(path) = data_path else {
            return Ok(NewFiles { disk: content.with_room(start)?, data: None });
        };
        let disk = start(&Room::LITTLE)?;
        let overwrite = if create.keep_data_file { Overwrite::Keep } else { target.overwrite };
        let data =
            content.with_room(|room| NewFile::create_with_room(path, overwrite, &target.in_use, room))?;
        if data.is_where(&disk) {
            let message = "the external data file cannot be the image itself";
            let error = Error::new(ErrorKind::InvalidArgument, message);
            return Err(error.with_field("data_file").with_path(data.path()));
        }
        Ok(NewFiles { disk, data: Some(data) })
    }

    /// The disk, made in files that are open.
    pub(super) fn onto(self, storage: Arc<dyn Storage>, data_file: Option<Arc<dyn Storage>>) -> NewTarget {
        match self {
            Self::Raw { preallocation, .. } => {
                let keep = storage.traits().block_device;
                NewTarget::Raw { storage, preallocation, keep }
            }
            Self::Luks { luks, preallocation, .. } => NewTarget::Luks { storage, luks, preallocation },
            Self::Qcow2 { create, .. } => NewTarget::Qcow2 { storage, data_file, create },
        }
    }

    fn content<'a>(&self, source: Option<&'a dyn GuestSource>, job: &'a Job) -> Content<'a> {
        let (size, preallocation, cluster_size) = match self {
            Self::Raw { size, preallocation } => (*size, *preallocation, 1),
            // What is copied to it takes all of its space: zeroes are written, too.
            Self::Luks { size, luks, preallocation } => {
                let space = if source.is_some() { Preallocation::Full } else { *preallocation };
                (size.saturating_add(luks.header_length()), space, 1)
            }
            Self::Qcow2 { create, .. } => (create.size, create.preallocation, create.cluster_size),
        };
        Content { size, preallocation, cluster_size, source, job }
    }
}

/// What a new file will hold, as far as its space goes.
struct Content<'a> {
    /// Size of the disk in bytes.
    size: u64,
    preallocation: Preallocation,
    /// Bytes of a cluster; 1 for a raw disk.
    cluster_size: u64,
    /// The disk that is copied.
    source: Option<&'a dyn GuestSource>,
    job: &'a Job,
}

impl Content<'_> {
    fn with_room<T>(&self, start: impl FnOnce(&Room<'_>) -> Result<T>) -> Result<T> {
        // Metadata is a small part, and some.
        let with_metadata = |data: u64| match self.cluster_size {
            1 => data,
            cluster => data.saturating_add(data / 256).saturating_add(cluster.saturating_mul(8)),
        };
        let most = with_metadata(self.size);
        let full = matches!(self.preallocation, Preallocation::Falloc | Preallocation::Full);
        match self.source {
            _ if full => start(&Room { most, closer: &|| Ok(most) }),
            None => start(&Room::LITTLE),
            Some(source) => {
                let closer = || data_bytes(source, self.cluster_size, self.job).map(with_metadata);
                start(&Room { most, closer: &closer })
            }
        }
    }
}

/// The files of a disk that is being made: dropped, they never were.
#[derive(Debug)]
pub struct NewFiles {
    disk: NewFile,
    data: Option<NewFile>,
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
        self.data.as_ref().map(NewFile::storage)
    }

    /// What is made in them: the disk that they were started for.
    pub(super) fn target(&self, disk: NewDisk) -> NewTarget {
        disk.onto(self.storage(), self.data_file())
    }

    /// Gives the files their names; `durable`: on stable storage. The image last: it is not there without its data.
    ///
    /// # Errors
    /// Those of [`NewFile::commit`].
    pub fn commit(self, durable: bool) -> Result<()> {
        let commit = |file: NewFile| if durable { file.commit() } else { file.commit_unsynced() };
        self.data.map(commit).transpose()?;
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
        NewDisk::Luks { size, luks, preallocation } => {
            create_luks(&files.storage(), luks, *size, *preallocation, job)?;
        }
        NewDisk::Qcow2 { create, .. } => create::create(files.storage(), files.data_file(), create, job)?,
    }
    files.commit(true)
}
