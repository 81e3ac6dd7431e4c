//! Comparing and measuring.

use napi::bindgen_prelude::{Env, ToNapiValue};
use napi_derive::napi;
use qcow2_engine::compare::{CompareOptions, Comparison, Difference, compare};
use qcow2_engine::measure::{Measurement, measure, measure_size};

use crate::bytes::Bytes;
use crate::job::Ticket;
use crate::pool::threads;
use crate::runtime::Runtime;
use crate::shape::{Purpose, Shape};

/// What a comparison found.
#[napi(object, object_from_js = false)]
pub struct Compared {
    /// `size`, `allocation` or `content`; absent for identical disks.
    pub reason: Option<String>,
    /// Guest offset.
    #[napi(ts_type = "number | bigint")]
    pub offset: Option<Bytes>,
    /// Whether the virtual sizes differ.
    pub sizes_differ: bool,
}

/// Compares what two images read as.
#[napi(catch_unwind)]
pub fn compare_images(
    env: Env,
    request: u32,
    job: u32,
    a: u32,
    b: u32,
    strict: bool,
    workers: Option<u32>,
) -> napi::Result<()> {
    let runtime = Runtime::of(&env)?;
    let (a, b) = (runtime.image(a)?, runtime.image(b)?);
    let options = CompareOptions { strict, workers: threads(workers) };
    runtime.start_job(
        &env,
        Ticket { request, job },
        move |job| a.run(|a| b.run(|b| compare(a, b, &options, job))),
        |_, env, compared| {
            // SAFETY: on the environment's thread, with its own env.
            unsafe { Compared::to_napi_value(env.raw(), Compared::from(compared)) }
        },
    )
}

impl From<Comparison> for Compared {
    fn from(Comparison { difference, sizes_differ }: Comparison) -> Self {
        let (reason, offset) = match difference {
            None => (None, None),
            Some(Difference::Size) => (Some("size"), None),
            Some(Difference::Allocation(offset)) => (Some("allocation"), Some(offset)),
            Some(Difference::Content(offset)) => (Some("content"), Some(offset)),
        };
        Self { reason: reason.map(str::to_owned), offset: offset.map(Bytes), sizes_differ }
    }
}

/// Bytes of a planned image.
#[napi(object, object_from_js = false)]
pub struct Measured {
    /// For the source's data.
    pub required: f64,
    /// For a full disk.
    pub fully_allocated: f64,
    /// For the source's bitmaps.
    pub bitmaps: Option<f64>,
}

impl From<Measurement> for Measured {
    fn from(measurement: Measurement) -> Self {
        Self {
            required: measurement.required as f64,
            fully_allocated: measurement.fully_allocated as f64,
            bitmaps: measurement.bitmaps.map(|bytes| bytes as f64),
        }
    }
}

/// Measures an open image, or an empty disk of `size` bytes.
#[napi(catch_unwind)]
pub fn measure_image(
    env: Env,
    request: u32,
    job: u32,
    image: Option<u32>,
    size: f64,
    mut shape: Shape,
) -> napi::Result<()> {
    let runtime = Runtime::of(&env)?;
    let image = image.map(|image| runtime.image(image)).transpose()?;
    let encryption = shape.take_encryption()?;
    runtime.start_job(
        &env,
        Ticket { request, job },
        move |job| {
            let purpose = |size| Purpose { size, path: None, encryption: encryption.as_ref(), job };
            match image {
                Some(image) => image
                    .run(|image| measure(image, &shape.measure_target(purpose(image.virtual_size()))?, job)),
                None => measure_size(size as u64, &shape.measure_target(purpose(size as u64))?),
            }
        },
        |_, env, measured| {
            // SAFETY: on the environment's thread, with its own env.
            unsafe { Measured::to_napi_value(env.raw(), Measured::from(measured)) }
        },
    )
}
