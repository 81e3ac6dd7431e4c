//! Converting.

use std::num::NonZeroUsize;
use std::sync::Arc;

use napi::bindgen_prelude::{Env, ToNapiValue};
use napi_derive::napi;
use qcow2_engine::bitmap::CopyableBitmaps;
use qcow2_engine::convert::{
    Compression, ConvertOptions, ConvertResult, ConvertTarget, Delta, Window, convert,
};
use qcow2_engine::salvage::{Salvage, Unreadable};
use qcow2_engine::splice::Splice;
use qcow2_engine::storage::{Access, Claim, FileStorage, Locking, NewFile};
use qcow2_engine::{Error, ErrorKind, GuestSource, Image, Job, Result, Storage, StorageExt};

use crate::create::{Content, Target};
use crate::job::{Lane, Ticket};
use crate::resource::Handle;
use crate::runtime::Runtime;
use crate::shape::Shape;
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
    order: ConvertJob,
) -> napi::Result<()> {
    let runtime = Runtime::of(&env)?;
    let sources = images.into_iter().map(|image| runtime.image(image)).collect::<napi::Result<Vec<_>>>()?;
    let place = match order.target {
        Some(image) => Place::Image(runtime.image(image)?),
        None => Place::File(Target::new(path, order.overwrite, &order.in_use)?),
    };
    let lane = Lane::of_rate(order.rate);
    runtime.start_job_in(
        lane,
        &env,
        Ticket { request, job },
        move |job| order.run(&sources, &place, job),
        |_, env, converted| {
            // SAFETY: on the environment's thread, with its own env.
            unsafe { Converted::to_napi_value(env.raw(), converted) }
        },
    )
}

/// Where the disk goes.
enum Place {
    File(Target),
    Image(Arc<Handle>),
}

impl ConvertJob {
    fn run(&self, sources: &[Arc<Handle>], place: &Place, job: &Arc<Job>) -> Result<Converted> {
        job.set_rate(self.rate.map_or(0, |rate| rate as u64));
        let images = sources.iter().map(|source| source.image()).collect::<Result<Vec<_>>>()?;
        let Some(first) = images.first().map(|image| &**image) else {
            return Err(Error::new(ErrorKind::InvalidArgument, "a convert needs a source"));
        };
        let disks: Vec<&dyn GuestSource> = images.iter().map(|image| &**image as &dyn GuestSource).collect();
        let joined = if disks.len() > 1 { Some(Splice::concatenation(&disks)?) } else { None };
        let whole: &dyn GuestSource = joined.as_ref().map_or(first, |joined| joined);
        let window = self.start.is_some() || self.length.is_some();
        let window = window.then(|| self.window(whole)).transpose()?;
        let disk: &dyn GuestSource = window.as_ref().map_or(whole, |window| window);
        let bitmaps = self.bitmaps.as_deref();
        let bitmaps = bitmaps.map(|which| CopyableBitmaps::of(first, which == "consistent")).transpose()?;
        let (result, lost) = if self.salvage {
            let salvage = Salvage::new(disk);
            let result = self.convert(&salvage, place, bitmaps.as_ref(), job)?;
            (result, Some(salvage.into_lost()))
        } else {
            (self.convert(disk, place, bitmaps.as_ref(), job)?, None)
        };
        Ok(Converted {
            virtual_size: result.virtual_size as f64,
            bytes_read: result.bytes_read as f64,
            bytes_written: result.bytes_written as f64,
            skipped_bitmaps: bitmaps
                .map(|bitmaps| bitmaps.skipped.iter().map(|name| name.as_slice().into()).collect()),
            unreadable: lost.map(|lost| lost.into_iter().map(UnreadableRange::from).collect()),
        })
    }

    fn window<'a>(&self, whole: &'a dyn GuestSource) -> Result<Splice<'a>> {
        let start = self.start.map_or(0, |start| start as u64);
        let rest = whole.virtual_size().saturating_sub(start);
        Splice::window(whole, start, self.length.map_or(rest, |length| length as u64))
    }

    fn convert(
        &self,
        source: &dyn GuestSource,
        place: &Place,
        bitmaps: Option<&CopyableBitmaps<'_>>,
        job: &Arc<Job>,
    ) -> Result<ConvertResult> {
        let target = match place {
            Place::Image(handle) => {
                return handle.run(|image: &Image| {
                    bitmaps.map_or(Ok(()), |_| CopyableBitmaps::refuse_target(image))?;
                    let result = convert(source, ConvertTarget::Existing(image), &self.options(), job)?;
                    bitmaps.map_or(Ok(()), |bitmaps| bitmaps.add_to(image)).map(|()| result)
                });
            }
            Place::File(target) => target,
        };
        if self.existing {
            let storage = existing(target)?;
            let options = ConvertOptions { durable: self.durable, ..self.options() };
            let result = convert(source, self.raw(Arc::clone(&storage), true), &options, job)?;
            return storage.report_close().map(|()| result);
        }
        if self.shape.is_raw() {
            let (size, preallocation) = (source.virtual_size(), self.shape.preallocation());
            let content = Content { size, preallocation, cluster_size: 1, source: Some(source), job };
            let file = target.start_raw(&content)?;
            let keep = file.storage().traits().block_device;
            let result = convert(source, self.raw(file.storage(), keep), &self.options(), job)?;
            self.commit(file)?;
            return Ok(result);
        }
        let create = self.shape.options(source.virtual_size());
        create.validate()?;
        let content = Content::of(&create, Some(source), job);
        let (file, data) = target.start_qcow2(&content, &self.shape)?;
        let qcow2 = ConvertTarget::Qcow2 {
            storage: file.storage(),
            data_file: data.as_ref().map(NewFile::storage),
            create: Box::new(create),
        };
        // What others see becomes an image when all else is there.
        let options = ConvertOptions { durable: self.durable && file.is_visible(), ..self.options() };
        let result = convert(source, qcow2, &options, job)?;
        if let Some(bitmaps) = bitmaps {
            bitmaps.copy_to(file.storage(), data.as_ref().map(NewFile::storage), None)?;
        }
        // The image last: it is not there without its data.
        data.map(|data| self.commit(data)).transpose()?;
        self.commit(file)?;
        Ok(result)
    }

    fn commit(&self, file: NewFile) -> Result<()> {
        if self.durable { file.commit() } else { file.commit_unsynced() }
    }

    fn raw(&self, storage: Arc<dyn Storage>, keep: bool) -> ConvertTarget<'static> {
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
