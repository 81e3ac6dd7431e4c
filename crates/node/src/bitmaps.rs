//! Persistent bitmaps of an image that is open for writing, and the dirty ranges of any.

use napi::bindgen_prelude::Env;
use napi_derive::napi;
use qcow2_engine::Result;

use crate::boundary::float64_array;
use crate::runtime::Runtime;
use crate::text::Text;
use crate::write::change;

/// A bitmap of an open image.
#[napi(object, object_to_js = false)]
pub struct BitmapSource {
    /// The image.
    pub image: u32,
    /// The bitmap's name.
    pub name: Text,
}

/// Adds a bitmap; `granularity` is a power of two in bytes, 0 for the default.
#[napi(catch_unwind)]
pub fn add_bitmap(
    env: Env,
    request: u32,
    image: u32,
    name: Text,
    granularity: f64,
    enabled: bool,
) -> napi::Result<()> {
    let bits = (granularity > 0.0).then(|| (granularity as u64).trailing_zeros() as u8);
    change(&env, request, image, move |image| image.add_bitmap(name.as_bytes(), bits, enabled))
}

/// Removes a bitmap.
#[napi(catch_unwind)]
pub fn remove_bitmap(env: Env, request: u32, image: u32, name: Text) -> napi::Result<()> {
    change(&env, request, image, move |image| image.remove_bitmap(name.as_bytes()))
}

/// Removes all bitmaps.
#[napi(catch_unwind)]
pub fn remove_all_bitmaps(env: Env, request: u32, image: u32) -> napi::Result<()> {
    change(&env, request, image, |image| image.remove_all_bitmaps())
}

/// Clears a bitmap.
#[napi(catch_unwind)]
pub fn clear_bitmap(env: Env, request: u32, image: u32, name: Text) -> napi::Result<()> {
    change(&env, request, image, move |image| image.clear_bitmap(name.as_bytes()))
}

/// Starts or stops recording in a bitmap.
#[napi(catch_unwind)]
pub fn enable_bitmap(env: Env, request: u32, image: u32, name: Text, enabled: bool) -> napi::Result<()> {
    change(&env, request, image, move |image| image.enable_bitmap(name.as_bytes(), enabled))
}

/// Merges bitmaps, of this or other images, into one of this image.
#[napi(catch_unwind)]
pub fn merge_bitmaps(
    env: Env,
    request: u32,
    image: u32,
    target: Text,
    sources: Vec<BitmapSource>,
    watch: Option<u32>,
) -> napi::Result<()> {
    let runtime = Runtime::of(&env)?;
    let sources = sources
        .into_iter()
        .map(|source| Ok((runtime.image(source.image)?, source.name)))
        .collect::<napi::Result<Vec<_>>>()?;
    let job = runtime.watched().begin(watch).unwrap_or_default();
    change(&env, request, image, move |image| {
        let bits = sources.iter().map(|(from, name)| {
            job.checkpoint()?;
            from.image()?.bitmap_bits(name.as_bytes())
        });
        image.merge_bitmaps_as(&job, target.as_bytes(), &bits.collect::<Result<Vec<_>>>()?)
    })
}

/// The dirty ranges of a bitmap as start and length in turn.
#[napi(catch_unwind)]
pub fn bitmap_extents(env: Env, request: u32, image: u32, name: Text) -> napi::Result<()> {
    let runtime = Runtime::of(&env)?;
    let handle = runtime.image(image)?;
    let work = move || {
        handle.run(|image| {
            let bits = image.bitmap_bits(name.as_bytes())?;
            let numbers =
                bits.extents().flat_map(|range| [range.start as f64, (range.end - range.start) as f64]);
            Ok(numbers.collect::<Vec<f64>>())
        })
    };
    runtime.run(&env, request, work, |_, env, numbers: Vec<f64>| float64_array(env, &numbers))
}
