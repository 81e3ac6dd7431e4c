//! Creating images.

use std::path::PathBuf;
use std::sync::Arc;

use napi::bindgen_prelude::{BufferSlice, Either, Env};
use napi_derive::napi;
use qcow2_engine::create::{create, create_raw};
use qcow2_engine::storage::{NewFile, Overwrite};
use qcow2_engine::{Error, ErrorKind, Job, Result};

use crate::job::Ticket;
use crate::open::{nothing, to_path};
use crate::runtime::Runtime;
use crate::shape::Shape;

/// Where a new file goes.
pub(crate) struct Target {
    pub(crate) path: PathBuf,
    pub(crate) overwrite: Overwrite,
    /// Device and inode of files that the job reads: the target must be none of them.
    pub(crate) in_use: Vec<(u64, u64)>,
}

impl Target {
    /// `in_use` are identities as `OpenedFile` has them.
    pub(crate) fn new(
        path: Either<String, BufferSlice<'_>>,
        overwrite: bool,
        in_use: &[String],
    ) -> napi::Result<Self> {
        let identity = |text: &String| {
            let (device, inode) = text.split_once(':')?;
            Some((device.parse().ok()?, inode.parse().ok()?))
        };
        Ok(Self {
            path: to_path(path)?,
            overwrite: if overwrite { Overwrite::Replace } else { Overwrite::Refuse },
            in_use: in_use.iter().filter_map(identity).collect(),
        })
    }

    /// Starts the file.
    pub(crate) fn start(&self) -> Result<NewFile> {
        NewFile::create(&self.path, self.overwrite, &self.in_use)
    }

    /// Starts the external data file that a shape names, as the process sees the name.
    pub(crate) fn start_data_file(&self, image: &NewFile, shape: &Shape) -> Result<Option<NewFile>> {
        let Some(name) = &shape.data_file else { return Ok(None) };
        let overwrite = if shape.keep_data_file == Some(true) { Overwrite::Keep } else { self.overwrite };
        let file = NewFile::create(name, overwrite, &self.in_use)?;
        if file.path() == image.path() {
            let message = "the external data file cannot be the image itself";
            let error = Error::new(ErrorKind::InvalidArgument, message);
            return Err(error.with_field("data_file").with_path(file.path()));
        }
        Ok(Some(file))
    }
}

/// Creates an image of `size` bytes.
#[napi(catch_unwind)]
#[allow(clippy::too_many_arguments, reason = "the arguments are JavaScript's")]
pub fn create_image(
    env: Env,
    request: u32,
    job: u32,
    path: Either<String, BufferSlice<'_>>,
    size: f64,
    shape: Shape,
    overwrite: bool,
    in_use: Vec<String>,
) -> napi::Result<()> {
    let runtime = Runtime::of(&env)?;
    let target = Target::new(path, overwrite, &in_use)?;
    runtime.start_job(
        &env,
        Ticket { request, job },
        move |job| run(&target, size as u64, &shape, job),
        nothing,
    )
}

fn run(target: &Target, size: u64, shape: &Shape, job: &Arc<Job>) -> Result<()> {
    if shape.is_raw() {
        let file = target.start()?;
        create_raw(&*file.storage(), size, shape.preallocation(), job)?;
        return file.commit();
    }
    let options = shape.options(size);
    options.validate()?;
    let file = target.start()?;
    let data = target.start_data_file(&file, shape)?;
    create(file.storage(), data.as_ref().map(NewFile::storage), &options, job)?;
    // The image last: it is not there without its data.
    data.map(NewFile::commit).transpose()?;
    file.commit()
}
