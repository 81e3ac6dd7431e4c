//! Extents of an image, packed: there can be very many.

use std::sync::Arc;

use napi::bindgen_prelude::{Env, ToNapiValue};
use napi::sys;
use napi_derive::napi;
use qcow2_engine::{Extent, ExtentKind, GuestSource, Storage};

use crate::boundary::float64_array;
use crate::runtime::Runtime;
use crate::text::{Text, path_text};

/// Extents that one request lists, more or less: it ends early where there are more.
const MOST_EXTENTS: usize = 32 << 10;

/// Extents of at most `length` bytes from `start`: `{ numbers, files }`. Seven numbers each: start, length, depth, kind (0
/// data, 1 zero, 2 unallocated, 3 compressed), whether it reads as zeroes (0 or 1), host offset (-1 for none), and index of
/// its file in `files` (-1 for none).
#[napi(catch_unwind)]
pub fn extents(
    env: Env,
    request: u32,
    image: u32,
    start: f64,
    length: f64,
    watch: Option<u32>,
) -> napi::Result<()> {
    let runtime = Runtime::of(&env)?;
    let handle = runtime.image(image)?;
    let job = runtime.watched().begin(watch).unwrap_or_default();
    let work = move || {
        handle.run(|image| {
            let mut extents = Vec::new();
            let (start, length) = (start as u64, length as u64);
            job.during(|| image.extents_up_to(start, length, MOST_EXTENTS, &job, &mut extents))?;
            Ok(Packed::new(&extents))
        })
    };
    runtime.run(&env, request, work, |_, env, packed| packed.into_js(env))
}

struct Packed {
    numbers: Vec<f64>,
    files: Vec<Arc<dyn Storage>>,
}

impl Packed {
    fn new(extents: &[Extent]) -> Self {
        let mut files: Vec<Arc<dyn Storage>> = Vec::new();
        let mut numbers = Vec::with_capacity(extents.len() * 7);
        for extent in extents {
            let (host, file) = match &extent.host {
                None => (-1.0, -1.0),
                Some((storage, offset)) => {
                    // A chain has few files, and extents of one file come in runs.
                    let index = files.iter().position(|known| Arc::ptr_eq(known, storage));
                    let index = index.unwrap_or_else(|| {
                        files.push(Arc::clone(storage));
                        files.len() - 1
                    });
                    (*offset as f64, index as f64)
                }
            };
            let kind = match extent.kind {
                ExtentKind::Data => 0.0,
                ExtentKind::Zero => 1.0,
                ExtentKind::Unallocated => 2.0,
                ExtentKind::Compressed => 3.0,
            };
            let zero = f64::from(u8::from(extent.zero));
            let (start, length) = (extent.start as f64, extent.length as f64);
            numbers.extend([start, length, f64::from(extent.depth), kind, zero, host, file]);
        }
        Self { numbers, files }
    }

    fn into_js(self, env: &Env) -> napi::Result<sys::napi_value> {
        let numbers = float64_array(env, &self.numbers)?;
        let names: Vec<Text> = self.files.iter().map(|file| path_text(file.path())).collect();
        let mut result = napi::bindgen_prelude::Object::new(env)?;
        // SAFETY: the array was just made in this scope.
        let numbers = unsafe { napi::Unknown::from_raw_unchecked(env.raw(), numbers) };
        result.set("numbers", numbers)?;
        result.set("files", names)?;
        // SAFETY: on the environment's thread, with its own env.
        unsafe { napi::bindgen_prelude::Object::to_napi_value(env.raw(), result) }
    }
}
