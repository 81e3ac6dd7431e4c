//! An overlay under a running image.

use std::path::Path;
use std::sync::Arc;

use napi::bindgen_prelude::{Env, ToNapiValue};
use napi_derive::napi;
use qcow2_engine::create::create;
use qcow2_engine::storage::{Access, CacheMode, FileStorage};
use qcow2_engine::{Error, Image, Job, Layer, LayerExt, OpenOptions, Qcow2, Result, WriteOptions};

use crate::create::{Content, Target};
use crate::job::{Lane, Ticket};
use crate::open::{Lock, LockOptions, WritingOptions, absolute, cache_mode};
use crate::runtime::Runtime;
use crate::shape::Shape;
use crate::text::{Text, path_text};

/// How to make an overlay. Checked in TypeScript.
#[napi(object, object_to_js = false)]
pub struct OverlayOrder {
    /// The overlay's, with the name of its backing file.
    pub shape: Shape,
    /// Device and inode of the image's files.
    pub in_use: Vec<String>,
    /// How the image is written to.
    pub write: WritingOptions,
    /// How its files are locked; not at all without it.
    pub lock: Option<LockOptions>,
    /// Most bytes of L2 tables to cache.
    pub l2_cache_size: Option<f64>,
}

/// The new top.
#[napi(object, object_from_js = false)]
pub struct Overlaid {
    /// Its path.
    pub path: Text,
    /// The path that was given, from the root of the file system.
    pub absolute_path: Option<Text>,
    /// Bytes.
    pub cluster_size: f64,
    /// Device and inode.
    pub identity: Option<String>,
}

/// Makes a qcow2 image whose backing file is the top of an image that is open for writing, and goes on with it on top.
#[napi(catch_unwind)]
pub fn create_overlay(
    env: Env,
    request: u32,
    job: u32,
    image: u32,
    path: Text,
    order: OverlayOrder,
) -> napi::Result<()> {
    let runtime = Runtime::of(&env)?;
    let handle = runtime.image(image)?;
    let target = Target::new(path, false, &order.in_use)?;
    let cache = cache_mode(order.write.cache.as_deref())?;
    let lock = LockOptions::read(order.lock.as_ref())?;
    let l2_cache_bytes = order.l2_cache_size.map(|size| size as u64);
    let write = order.write.read()?;
    let absolute_path = absolute(&target.path);
    let overlay = Overlay { target, shape: order.shape, cache, lock, l2_cache_bytes, write };
    runtime.start_job_in(
        Lane::Brief,
        &env,
        Ticket { request, job },
        move |job| {
            handle.replace(|below| overlay.put_on(below, job))?;
            handle.run(|image| overlaid(image, absolute_path))
        },
        |_, env, overlaid| {
            // SAFETY: on the environment's thread, with its own env.
            unsafe { Overlaid::to_napi_value(env.raw(), overlaid) }
        },
    )
}

struct Overlay {
    target: Target,
    shape: Shape,
    cache: CacheMode,
    lock: Lock,
    l2_cache_bytes: Option<u64>,
    write: WriteOptions,
}

impl Overlay {
    fn put_on(&self, below: &Image, job: &Arc<Job>) -> Result<Image> {
        job.checkpoint()?;
        let options = self.shape.options(below.virtual_size());
        options.validate()?;
        let (file, _) = self.target.start_qcow2(&Content::of(&options, None, job), &self.shape)?;
        create(file.storage(), None, &options, job)?;
        let path = file.path().to_owned();
        let mut named = false;
        let put = below.put_overlay(|| {
            file.commit()?;
            named = true;
            self.open(&path, below)
        });
        if put.is_ok() {
            // Others may read the former top now. One that stays claimed for writing is only kept more to itself.
            let _claimed = self.claim_for_reading(below);
        } else if named {
            // Nobody goes on with it. The error that led here is the one to report.
            let _removed = std::fs::remove_file(&path);
        }
        put
    }

    fn open(&self, path: &Path, below: &Image) -> Result<Box<dyn Layer>> {
        let storage = FileStorage::open_cached(path, Access::ReadWrite, self.cache)?.into_storage();
        self.lock.for_writing(true).claim(&*storage, true)?;
        let cache = OpenOptions { l2_cache_bytes: self.l2_cache_bytes, ..OpenOptions::default() };
        let options = below.top_qcow2().map_or(cache, |top| top.open_options().for_another());
        let mut layer = Qcow2::open(storage, &options)?;
        layer.enable_writing(self.write)?;
        Ok(Box::new(layer))
    }

    /// Claims the files of the former top only for reading.
    fn claim_for_reading(&self, below: &Image) -> Result<()> {
        let Some(top) = below.layers().first() else { return Ok(()) };
        let lock = self.lock.for_writing(false);
        lock.claim(&**top.storage(), top.as_qcow2().is_some())?;
        match top.as_qcow2().and_then(Qcow2::data_file) {
            Some(data) => lock.claim(&**data, true),
            None => Ok(()),
        }
    }
}

fn overlaid(image: &Image, absolute_path: Option<Text>) -> Result<Overlaid> {
    let top = image.top_qcow2();
    let top = top.ok_or_else(Error::aborted)?;
    let storage = top.storage();
    Ok(Overlaid {
        path: path_text(storage.path()),
        absolute_path,
        cluster_size: top.geometry().cluster_size() as f64,
        identity: storage.traits().identity.map(|(device, inode)| format!("{device}:{inode}")),
    })
}
