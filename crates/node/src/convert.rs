//! Converting.

use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::Arc;

use napi::bindgen_prelude::{Env, ToNapiValue};
use napi_derive::napi;
use qcow2_engine::convert::{Compression, ConvertOptions, Delta, Window};
use qcow2_engine::encryption::Encryption;
use qcow2_engine::files::{self, Destination, NewDisk, Target};
use qcow2_engine::salvage::Unreadable;
use qcow2_engine::{Image, Job, Result, Storage};

use crate::create::target;
use crate::job::{Lane, Ticket};
use crate::resource::Handle;
use crate::runtime::Runtime;
use crate::shape::{Purpose, Shape};
use crate::text::Text;

/// How to convert. Checked in TypeScript; what is absent has the engine's default.
#[napi(object, object_to_js = false)]
pub struct ConvertJob {
    /// The target's.
    pub shape: Shape,
    /// Compress.
    pub compress: bool,
    /// The codec's.
    pub level: Option<u32>,
    /// The 4 KiB window of QEMU's writer.
    pub small_window: bool,
    /// Bytes.
    pub sparse_size: Option<u32>,
    /// Threads.
    pub concurrency: Option<u32>,
    /// Layers of the source above the base.
    pub delta_layers: Option<u32>,
    /// Virtual size of the base in bytes.
    pub base_size: Option<f64>,
    /// Write into the raw target that exists.
    pub existing: bool,
    /// The image to write into, which is open for writing.
    pub target: Option<u32>,
    /// The file to make the target in, which is open for writing.
    pub target_file: Option<u32>,
    /// First byte of the source to copy.
    pub start: Option<f64>,
    /// Bytes of the source to copy.
    pub length: Option<f64>,
    /// What cannot be read becomes zeroes.
    pub salvage: bool,
    /// Bytes a second.
    pub rate: Option<f64>,
    /// The target reads as zeroes.
    pub target_is_zero: bool,
    /// Replace.
    pub overwrite: bool,
    /// Return only when the target is on stable storage.
    pub durable: bool,
    /// The progress is that of what is copied.
    pub count_data: bool,
    /// Copy the persistent bitmaps: `"all"`, or those that are consistent: `"consistent"`.
    pub bitmaps: Option<String>,
    /// Identities of what the job reads.
    pub in_use: Vec<String>,
}

/// What a convert did.
#[napi(object, object_from_js = false)]
pub struct Converted {
    /// Bytes.
    pub virtual_size: f64,
    /// Bytes.
    pub bytes_read: f64,
    /// Bytes.
    pub bytes_written: f64,
    /// Names of the bitmaps that were left out.
    pub skipped_bitmaps: Option<Vec<Text>>,
    /// What could not be read.
    pub unreadable: Option<Vec<UnreadableRange>>,
}

/// A range that could not be read.
#[napi(object, object_from_js = false)]
pub struct UnreadableRange {
    /// First byte.
    pub start: f64,
    /// Bytes.
    pub length: f64,
    /// Why.
    pub message: String,
}

impl From<Unreadable> for UnreadableRange {
    fn from(lost: Unreadable) -> Self {
        Self { start: lost.start as f64, length: lost.length as f64, message: lost.error.to_string() }
    }
}

/// Converts open images, one behind the other.
#[napi(catch_unwind)]
pub fn convert_image(
    env: Env,
    request: u32,
    job: u32,
    images: Vec<u32>,
    path: Text,
    mut order: ConvertJob,
) -> napi::Result<()> {
    let runtime = Runtime::of(&env)?;
    let sources = images.into_iter().map(|image| runtime.image(image)).collect::<napi::Result<Vec<_>>>()?;
    let place = match (order.target, order.target_file) {
        (Some(image), _) => Place::Image(runtime.image(image)?),
        (None, Some(file)) => Place::Storage(runtime.storage(file)?),
        (None, None) => Place::File(target(path, order.overwrite, &order.in_use)?),
    };
    let encryption = order.shape.take_encryption()?;
    let arrives = sources.iter().any(|source| source.arrives());
    let lane = if arrives { Lane::Arriving } else { Lane::of_rate(order.rate) };
    runtime.start_job_in(
        lane,
        &env,
        Ticket { request, job },
        move |job| order.run(&sources, &place, encryption.as_ref(), job),
        |_, env, converted| {
            // SAFETY: on the environment's thread, with its own env.
            unsafe { Converted::to_napi_value(env.raw(), converted) }
        },
    )
}

/// Where the disk goes.
enum Place {
    File(Target),
    Storage(Arc<dyn Storage>),
    Image(Arc<Handle>),
}

impl ConvertJob {
    fn run(
        &self,
        sources: &[Arc<Handle>],
        place: &Place,
        encryption: Option<&Encryption>,
        job: &Arc<Job>,
    ) -> Result<Converted> {
        job.set_rate(self.rate.map_or(0, |rate| rate as u64));
        let images = sources.iter().map(|source| source.image()).collect::<Result<Vec<_>>>()?;
        let images: Vec<&Image> = images.iter().map(|image| &**image).collect();
        let order = files::ConvertJob {
            sources: &images,
            start: self.start.map(|start| start as u64),
            length: self.length.map(|length| length as u64),
            salvage: self.salvage,
            bitmaps: self.bitmaps.as_deref().map(|which| which == "consistent"),
            options: self.options(),
        };
        let done = match place {
            Place::Image(handle) => handle.run(|image| order.run(Destination::Image(image), job))?,
            Place::Storage(storage) => {
                let disk = self.new_disk(&order, None, encryption, job)?;
                order.run(Destination::Storage(storage, disk), job)?
            }
            Place::File(target) if self.existing => {
                order.run(Destination::Over(target, self.shape.preallocation()), job)?
            }
            Place::File(target) => {
                let disk = self.new_disk(&order, Some(&target.path), encryption, job)?;
                order.run(Destination::New(target, disk), job)?
            }
        };
        Ok(Converted {
            virtual_size: done.result.virtual_size as f64,
            bytes_read: done.result.bytes_read as f64,
            bytes_written: done.result.bytes_written as f64,
            skipped_bitmaps: done
                .skipped_bitmaps
                .map(|names| names.iter().map(|name| name.as_slice().into()).collect()),
            unreadable: done.unreadable.map(|lost| lost.into_iter().map(UnreadableRange::from).collect()),
        })
    }

    fn new_disk(
        &self,
        order: &files::ConvertJob<'_>,
        path: Option<&Path>,
        encryption: Option<&Encryption>,
        job: &Job,
    ) -> Result<NewDisk> {
        self.shape.new_disk(Purpose { size: order.virtual_size()?, path, encryption, job })
    }

    fn options(&self) -> ConvertOptions {
        let defaults = ConvertOptions::default();
        let window = if self.small_window { Window::Qemu4KiB } else { Window::Full };
        ConvertOptions {
            concurrency: self.concurrency.and_then(|threads| NonZeroUsize::new(threads as usize)),
            sparse_size: self.sparse_size.map_or(defaults.sparse_size, u64::from),
            compression: self.compress.then_some(Compression { level: self.level, window }),
            target_is_zero: self.target_is_zero,
            delta: self
                .delta_layers
                .map(|layers| Delta { layers, base_size: self.base_size.map_or(0, |size| size as u64) }),
            durable: self.durable,
            count_data: self.count_data,
        }
    }
}
