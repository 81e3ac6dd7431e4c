//! Creating images.

use std::path::PathBuf;
use std::sync::Arc;

use napi::bindgen_prelude::Env;
use napi_derive::napi;
use qcow2_engine::convert::data_bytes;
use qcow2_engine::create::{CreateOptions, Preallocation, create, create_raw};
use qcow2_engine::storage::{Identity, NewFile, Overwrite, Room};
use qcow2_engine::{Error, ErrorKind, GuestSource, Job, Result};

use crate::job::{Lane, Ticket};
use crate::open::nothing;
use crate::runtime::Runtime;
use crate::shape::Shape;
use crate::text::Text;

/// Where a new file goes.
pub(crate) struct Target {
    pub(crate) path: PathBuf,
    pub(crate) overwrite: Overwrite,
    /// Files that the job reads: the target must be none of them.
    pub(crate) in_use: Vec<Identity>,
}

impl Target {
    /// `in_use` are identities as `OpenedFile` has them.
    pub(crate) fn new(path: Text, overwrite: bool, in_use: &[String]) -> napi::Result<Self> {
        Ok(Self {
            path: path.into_path()?,
            overwrite: if overwrite { Overwrite::Replace } else { Overwrite::Refuse },
            in_use: in_use.iter().map(|text| Identity::from_text(text)).collect(),
        })
    }

    /// Starts the file of a raw disk.
    pub(crate) fn start_raw(&self, content: &Content<'_>) -> Result<NewFile> {
        content.with_room(|room| self.start(room))
    }

    /// Starts the file of an image, and that of its external data file if it has one.
    pub(crate) fn start_qcow2(
        &self,
        content: &Content<'_>,
        shape: &Shape,
    ) -> Result<(NewFile, Option<NewFile>)> {
        let Some(path) = shape.data_path() else {
            return Ok((content.with_room(|room| self.start(room))?, None));
        };
        let image = self.start(&Room::LITTLE)?;
        let overwrite = if shape.keep_data_file == Some(true) { Overwrite::Keep } else { self.overwrite };
        let data =
            content.with_room(|room| NewFile::create_with_room(&path, overwrite, &self.in_use, room))?;
        if data.is_where(&image) {
            let message = "the external data file cannot be the image itself";
            let error = Error::new(ErrorKind::InvalidArgument, message);
            return Err(error.with_field("data_file").with_path(data.path()));
        }
        Ok((image, Some(data)))
    }

    fn start(&self, room: &Room<'_>) -> Result<NewFile> {
        NewFile::create_with_room(&self.path, self.overwrite, &self.in_use, room)
    }
}

/// What a new file will hold, as far as its space goes.
pub(crate) struct Content<'a> {
    /// Size of the disk in bytes.
    pub(crate) size: u64,
    pub(crate) preallocation: Preallocation,
    /// Bytes of a cluster; 1 for a raw disk.
    pub(crate) cluster_size: u64,
    /// The disk that is copied.
    pub(crate) source: Option<&'a dyn GuestSource>,
    pub(crate) job: &'a Job,
}

impl<'a> Content<'a> {
    pub(crate) fn of(options: &CreateOptions, source: Option<&'a dyn GuestSource>, job: &'a Job) -> Self {
        let CreateOptions { size, preallocation, cluster_size, .. } = *options;
        Self { size, preallocation, cluster_size, source, job }
    }

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

/// Creates an image of `size` bytes.
#[napi(catch_unwind)]
#[allow(clippy::too_many_arguments, reason = "the arguments are JavaScript's")]
pub fn create_image(
    env: Env,
    request: u32,
    job: u32,
    path: Text,
    size: f64,
    shape: Shape,
    overwrite: bool,
    in_use: Vec<String>,
) -> napi::Result<()> {
    let runtime = Runtime::of(&env)?;
    let target = Target::new(path, overwrite, &in_use)?;
    runtime.start_job_in(
        Lane::Brief,
        &env,
        Ticket { request, job },
        move |job| run(&target, size as u64, &shape, job),
        nothing,
    )
}

fn run(target: &Target, size: u64, shape: &Shape, job: &Arc<Job>) -> Result<()> {
    if shape.is_raw() {
        let preallocation = shape.preallocation();
        let content = Content { size, preallocation, cluster_size: 1, source: None, job };
        let file = target.start_raw(&content)?;
        create_raw(&*file.storage(), size, preallocation, job)?;
        return file.commit();
    }
    let options = shape.options(size);
    options.validate()?;
    let content = Content::of(&options, None, job);
    let (file, data) = target.start_qcow2(&content, shape)?;
    create(file.storage(), data.as_ref().map(NewFile::storage), &options, job)?;
    // The image last: it is not there without its data.
    data.map(NewFile::commit).transpose()?;
    file.commit()
}
