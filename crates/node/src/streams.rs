//! Compressed files, which hold raw disks and are read front to back.

use napi::bindgen_prelude::{BufferSlice, Env, ToNapiValue};
use napi_derive::napi;
use qcow2_compressed::{Codec, Compressed, OpenOptions};
use qcow2_engine::format::Limits;
use qcow2_engine::{Layer, Result};

use crate::inspect::{Inspected, Seen};
use crate::job::{Lane, Ticket};
use crate::open::{LayerOptions, LimitOptions, LockOptions};
use crate::resource::Resource;
use crate::runtime::Runtime;

/// A compressed file as a layer.
#[napi(object, object_from_js = false)]
pub struct OpenedStream<'env> {
    /// Number of the layer.
    pub layer: u32,
    /// Size of its disk in bytes.
    pub virtual_size: f64,
    /// The first bytes of its disk, 1024 at most.
    pub head: BufferSlice<'env>,
}

/// The facade checks names; one that it lets through is a bug.
fn codec(name: &str) -> napi::Result<Codec> {
    Codec::from_name(name).ok_or_else(|| napi::Error::from_reason(format!("unknown compression '{name}'")))
}

fn options(limits: &Limits, size: Option<f64>) -> OpenOptions {
    OpenOptions {
        max_virtual_size: limits.max_virtual_size,
        max_window: limits.max_metadata_bytes,
        size: size.map(|size| size as u64),
    }
}

/// Opens the layer that a file is which is compressed in a way, by the name of its tool; where the file does not say how much it holds,
/// it is decoded once, which is the job's progress. The file's number stays valid.
#[napi(catch_unwind)]
pub fn open_stream(
    env: Env,
    request: u32,
    job: u32,
    file: u32,
    format: String,
    given: LayerOptions,
) -> napi::Result<()> {
    let runtime = Runtime::of(&env)?;
    let storage = runtime.storage(file)?;
    let codec = codec(&format)?;
    let lane = if storage.arriving().is_some() { Lane::Arriving } else { Lane::Usual };
    let lock = LockOptions::read(given.lock.as_ref())?;
    let options = options(&LimitOptions::read(given.limits.as_ref()), given.size);
    runtime.start_job_in(
        lane,
        &env,
        Ticket { request, job },
        move |job| -> Result<Compressed> {
            // Before anything of the file is believed.
            lock.claim(&*storage, true)?;
            Compressed::open(storage, codec, &options, job)
        },
        |runtime, env, layer| {
            let opened = OpenedStream {
                virtual_size: layer.virtual_size() as f64,
                head: BufferSlice::copy_from(env, layer.head())?,
                layer: runtime.hold(Resource::Layer(Box::new(layer))),
            };
            // SAFETY: on the environment's thread, with its own env.
            unsafe { OpenedStream::to_napi_value(env.raw(), opened) }
        },
    )
}

/// Inspects an open file as one that is compressed in a way.
#[napi(catch_unwind)]
pub fn inspect_stream(
    env: Env,
    request: u32,
    file: u32,
    format: String,
    limits: Option<LimitOptions>,
) -> napi::Result<()> {
    let runtime = Runtime::of(&env)?;
    let codec = codec(&format)?;
    let storage = runtime.storage(file)?;
    let options = options(&LimitOptions::read(limits.as_ref()), None);
    let work = move || {
        let found = qcow2_compressed::inspect(&storage, codec, &options)?;
        let seen = Seen { virtual_size: found.virtual_size.unwrap_or_default(), ..Seen::default() };
        Ok(Inspected::of_other(Some(seen), None, &found.findings))
    };
    // SAFETY: on the environment's thread, with its own env.
    runtime.run(&env, request, work, |_, env, found| unsafe { Inspected::to_napi_value(env.raw(), found) })
}
