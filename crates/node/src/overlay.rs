//! An overlay under a running image.

use napi::bindgen_prelude::{Env, ToNapiValue};
use napi_derive::napi;
use qcow2_engine::files::Overlay;
use qcow2_engine::{Error, Image, Result};

use crate::create::target;
use crate::job::{Lane, Ticket};
use crate::open::{LockOptions, WritingOptions, absolute, cache_mode};
use crate::runtime::Runtime;
use crate::shape::Shape;
use crate::text::{Text, path_text};

/// How to make an overlay. Checked in TypeScript.
#[napi(object, object_to_js = false)]
pub struct OverlayOrder {
    /// The overlay's, with the name of its backing file.
    pub shape: Shape,
    /// Identities of the image's files.
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
    /// As `OpenedFile` has it.
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
    mut order: OverlayOrder,
) -> napi::Result<()> {
    let runtime = Runtime::of(&env)?;
    let handle = runtime.image(image)?;
    let target = target(path, false, &order.in_use)?;
    let cache = cache_mode(order.write.cache.as_deref())?;
    let lock = LockOptions::read(order.lock.as_ref())?;
    let l2_cache_bytes = order.l2_cache_size.map(|size| size as u64);
    let write = order.write.read()?;
    let absolute_path = absolute(&target.path);
    let encryption = order.shape.take_encryption()?;
    runtime.start_job_in(
        Lane::Brief,
        &env,
        Ticket { request, job },
        move |job| {
            let create = order.shape.encrypted(0, encryption.as_ref(), job)?;
            let overlay = Overlay { target, create, cache, lock, l2_cache_bytes, write };
            handle.replace(|below| overlay.put_on(below, job))?;
            handle.run(|image| overlaid(image, absolute_path))
        },
        |_, env, overlaid| {
            // SAFETY: on the environment's thread, with its own env.
            unsafe { Overlaid::to_napi_value(env.raw(), overlaid) }
        },
    )
}

fn overlaid(image: &Image, absolute_path: Option<Text>) -> Result<Overlaid> {
    let top = image.top_qcow2();
    let top = top.ok_or_else(Error::aborted)?;
    let storage = top.storage();
    Ok(Overlaid {
        path: path_text(storage.path()),
        absolute_path,
        cluster_size: top.geometry().cluster_size() as f64,
        identity: storage.identity().map(|identity| identity.to_string()),
    })
}
