//! Creating images.

use napi::bindgen_prelude::Env;
use napi_derive::napi;
use qcow2_engine::files::{Target, create};
use qcow2_engine::storage::{Identity, Overwrite};

use crate::job::{Lane, Ticket};
use crate::open::nothing;
use crate::runtime::Runtime;
use crate::shape::{Purpose, Shape};
use crate::text::Text;

/// A file that is written to; `in_use` are identities as `OpenedFile` has them.
pub(crate) fn target(path: Text, overwrite: bool, in_use: &[String]) -> napi::Result<Target> {
    Ok(Target {
        path: path.into_path()?,
        overwrite: if overwrite { Overwrite::Replace } else { Overwrite::Refuse },
        in_use: in_use.iter().map(|text| Identity::from_text(text)).collect(),
    })
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
    mut shape: Shape,
    overwrite: bool,
    in_use: Vec<String>,
) -> napi::Result<()> {
    let runtime = Runtime::of(&env)?;
    let target = target(path, overwrite, &in_use)?;
    let encryption = shape.take_encryption()?;
    runtime.start_job_in(
        Lane::Brief,
        &env,
        Ticket { request, job },
        move |job| {
            let (path, encryption) = (Some(&*target.path), encryption.as_ref());
            let disk = shape.new_disk(Purpose { size: size as u64, path, encryption, job })?;
            create(&target, &disk, job)
        },
        nothing,
    )
}
