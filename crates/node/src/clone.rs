//! Live clones of open images.

use std::num::NonZeroUsize;
use std::sync::Arc;

use napi::bindgen_prelude::{Env, ToNapiValue};
use napi_derive::napi;
use qcow2_engine::clone::CloneResult;
use qcow2_engine::convert::{Compression, Window};
use qcow2_engine::files::FileClone;

use crate::create::target;
use crate::job::{Lane, Ticket};
use crate::resource::{Handle, Resource};
use crate::runtime::Runtime;
use crate::shape::{Purpose, Shape};
use crate::text::Text;

/// How to clone. Checked in TypeScript.
#[napi(object, object_to_js = false)]
pub struct CloneOrder {
    /// The target's.
    pub shape: Shape,
    /// Compress.
    pub compress: bool,
    /// The codec's.
    pub level: Option<u32>,
    /// The 4 KiB window of QEMU's writer.
    pub small_window: bool,
    /// Replace.
    pub overwrite: bool,
    /// Identities of the image's files.
    pub in_use: Vec<String>,
    /// Number of the open file that the copy is made in, if that is not a new one.
    pub target_file: Option<u32>,
}

/// What a clone did.
#[napi(object, object_from_js = false)]
pub struct Cloned {
    /// Bytes.
    pub virtual_size: f64,
    /// Bytes.
    pub bytes_read: f64,
    /// Bytes.
    pub bytes_written: f64,
}

/// A clone between its point in time and its end. Dropped, it ends, and its files never were.
pub(crate) struct Begun {
    handle: Arc<Handle>,
    clone: FileClone,
}

/// Makes the target and takes the point in time; tells the clone's number.
#[napi(catch_unwind)]
pub fn begin_clone(
    env: Env,
    request: u32,
    job: u32,
    image: u32,
    path: Text,
    mut order: CloneOrder,
) -> napi::Result<()> {
    let runtime = Runtime::of(&env)?;
    let handle = runtime.image(image)?;
    let open = order.target_file.map(|file| runtime.storage(file)).transpose()?;
    let target = target(path, order.overwrite, &order.in_use)?;
    let encryption = order.shape.take_encryption()?;
    runtime.start_job_in(
        Lane::Brief,
        &env,
        Ticket { request, job },
        move |job| {
            let clone = handle.run(|image| {
                let path = Some(&*target.path).filter(|_| open.is_none());
                let size = image.virtual_size();
                let purpose = Purpose { size, path, encryption: encryption.as_ref(), job };
                let disk = order.shape.new_disk(purpose)?;
                match open {
                    Some(open) => FileClone::begin_onto(image, open, disk, order.compression(), job),
                    None => FileClone::begin(image, &target, disk, order.compression(), job),
                }
            })?;
            Ok(Box::new(Begun { handle, clone }))
        },
        |runtime, env, begun| {
            let number = runtime.hold(Resource::Clone(begun));
            // SAFETY: on the environment's thread, with its own env.
            unsafe { u32::to_napi_value(env.raw(), number) }
        },
    )
}

/// Copies the rest. The clone's number is gone, however it ends.
#[napi(catch_unwind)]
pub fn run_clone(env: Env, request: u32, job: u32, clone: u32, concurrency: Option<u32>) -> napi::Result<()> {
    let runtime = Runtime::of(&env)?;
    let Some(Resource::Clone(begun)) = runtime.release(clone) else {
        return Err(napi::Error::from_reason("no such clone"));
    };
    let concurrency = concurrency.and_then(|threads| NonZeroUsize::new(threads as usize));
    runtime.start_job_in(
        Lane::Continued,
        &env,
        Ticket { request, job },
        move |job| {
            let Begun { handle, clone } = *begun;
            // The clone is of what the disk was: an overlay does not matter to it.
            handle.run_apart(|image| clone.run(image, concurrency, job))
        },
        |_, env, result: CloneResult| {
            let cloned = Cloned {
                virtual_size: result.virtual_size as f64,
                bytes_read: result.bytes_read as f64,
                bytes_written: result.bytes_written as f64,
            };
            // SAFETY: on the environment's thread, with its own env.
            unsafe { Cloned::to_napi_value(env.raw(), cloned) }
        },
    )
}

impl CloneOrder {
    fn compression(&self) -> Option<Compression> {
        let window = if self.small_window { Window::Qemu4KiB } else { Window::Full };
        self.compress.then_some(Compression { level: self.level, window })
    }
}
