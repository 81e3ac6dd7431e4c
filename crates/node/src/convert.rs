//! Converting.

use std::num::NonZeroUsize;
use std::sync::Arc;

use napi::bindgen_prelude::{BufferSlice, Either, Env, ToNapiValue};
use napi_derive::napi;
use qcow2_engine::bitmap::CopyableBitmaps;
use qcow2_engine::convert::{
    Compression, ConvertOptions, ConvertResult, ConvertTarget, Delta, Window, convert,
};
use qcow2_engine::storage::{Access, Claim, FileStorage, Locking, NewFile};
use qcow2_engine::{Error, ErrorKind, Image, Job, Result, Storage};

use crate::create::Target;
use crate::job::Ticket;
use crate::runtime::Runtime;
use crate::shape::Shape;

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
    /// The target reads as zeroes.
    pub target_is_zero: bool,
    /// Replace.
    pub overwrite: bool,
    /// Copy the persistent bitmaps: `"all"`, or those that are consistent: `"consistent"`.
    pub bitmaps: Option<String>,
    /// Device and inode of what the job reads.
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
    pub skipped_bitmaps: Option<Vec<String>>,
}

/// Converts an open image.
#[napi]
pub fn convert_image(
    env: Env,
    request: u32,
    job: u32,
    image: u32,
    path: Either<String, BufferSlice<'_>>,
    order: ConvertJob,
) -> napi::Result<()> {
    let runtime = Runtime::of(&env)?;
    let handle = runtime.image(image)?;
    let target = Target::new(path, order.overwrite, &order.in_use)?;
    runtime.start_job(
        &env,
        Ticket { request, job },
        move |job| handle.run(|image| order.run(image, &target, job)),
        |_, env, (result, skipped): (ConvertResult, Option<Vec<String>>)| {
            let converted = Converted {
                virtual_size: result.virtual_size as f64,
                bytes_read: result.bytes_read as f64,
                bytes_written: result.bytes_written as f64,
                skipped_bitmaps: skipped,
            };
            // SAFETY: on the environment's thread, with its own env.
            unsafe { Converted::to_napi_value(env.raw(), converted) }
        },
    )
}

impl ConvertJob {
    fn run(
        &self,
        image: &Image,
        target: &Target,
        job: &Arc<Job>,
    ) -> Result<(ConvertResult, Option<Vec<String>>)> {
        let bitmaps = self.bitmaps.as_deref();
        let bitmaps = bitmaps.map(|which| CopyableBitmaps::of(image, which == "consistent")).transpose()?;
        let result = self.convert(image, target, bitmaps.as_ref(), job)?;
        let name = |name: &Vec<u8>| String::from_utf8_lossy(name).into_owned();
        Ok((result, bitmaps.map(|bitmaps| bitmaps.skipped.iter().map(name).collect())))
    }

    fn convert(
        &self,
        image: &Image,
        target: &Target,
        bitmaps: Option<&CopyableBitmaps<'_>>,
        job: &Arc<Job>,
    ) -> Result<ConvertResult> {
        if self.existing {
            return convert(image, self.raw(existing(target)?, true), &self.options(), job);
        }
        if self.shape.is_raw() {
            let file = target.start()?;
            let keep = file.storage().traits().block_device;
            let result = convert(image, self.raw(file.storage(), keep), &self.options(), job)?;
            file.commit()?;
            return Ok(result);
        }
        let create = self.shape.options(image.virtual_size());
        create.validate()?;
        let file = target.start()?;
        let data = self.shape.data_file.as_deref();
        let data = data.map(|name| target.start_data_file(&file, name)).transpose()?;
        let qcow2 = ConvertTarget::Qcow2 {
            storage: file.storage(),
            data_file: data.as_ref().map(NewFile::storage),
            create: Box::new(create),
        };
        let result = convert(image, qcow2, &self.options(), job)?;
        if let Some(bitmaps) = bitmaps {
            bitmaps.copy_to(file.storage(), data.as_ref().map(NewFile::storage))?;
        }
        // The image last: it is not there without its data.
        data.map(NewFile::commit).transpose()?;
        file.commit()?;
        Ok(result)
    }

    fn raw(&self, storage: Arc<dyn Storage>, keep: bool) -> ConvertTarget {
        ConvertTarget::Raw { storage, preallocation: self.shape.preallocation(), keep }
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
            ..defaults
        }
    }
}

/// The raw target that exists, for writing.
fn existing(target: &Target) -> Result<Arc<dyn Storage>> {
    let storage = FileStorage::open(&target.path, Access::ReadWrite)?;
    if storage.traits().identity.is_some_and(|identity| target.in_use.contains(&identity)) {
        let message = "the target is also a source of this operation";
        return Err(Error::new(ErrorKind::InvalidArgument, message).with_path(&target.path));
    }
    storage.lock(Claim::WRITER, Locking::Auto)?;
    Ok(Arc::new(storage))
}
