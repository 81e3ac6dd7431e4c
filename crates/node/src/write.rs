//! Writes from a caller's buffer, and the requests that change an image without one.

use std::ptr::NonNull;
use std::sync::Arc;

use napi::bindgen_prelude::{Env, ToNapiValue, Unknown};
use napi_derive::napi;
use qcow2_engine::{Image, Job, Mem, ResizeOptions, Result};

use crate::delivery::Outcome;
use crate::job::{Lane, Ticket};
use crate::open::nothing;
use crate::pool::Task;
use crate::read::{bytes_of, range_of};
use crate::resource::Handle;
use crate::runtime::Runtime;
use crate::shape::to_preallocation;
use crate::watched::during;

/// A write that is under way. JavaScript keeps the buffer reachable until it hears of the completion, and the
/// cleanup hook waits for running writes before the environment frees its memory.
pub(crate) struct Write {
    handle: Arc<Handle>,
    start: NonNull<u8>,
    length: usize,
    position: u64,
    compressed: bool,
    /// Cancels it.
    job: Option<Arc<Job>>,
}

// SAFETY: the pointer is used by the one worker that runs the write, through `Mem`, whose accesses tolerate
// concurrent changes by JavaScript.
unsafe impl Send for Write {}

impl Write {
    /// Writes the buffer.
    pub(crate) fn run(self) -> Outcome {
        self.with(|image, buffer, write| match (&write.job, write.compressed) {
            (Some(job), compressed) => image.write_as(job, buffer, write.position, compressed),
            (None, true) => image.write_compressed_at(buffer, write.position),
            (None, false) => image.write_at(buffer, write.position),
        })
    }

    fn with(self, write: impl FnOnce(&Image, Mem<'_>, &Self) -> Result<()>) -> Outcome {
        // SAFETY: the range was checked against the buffer when the request was made; the buffer is alive (see
        // `Write`).
        let buffer = unsafe { Mem::from_raw(self.start, self.length) };
        match during(self.job.as_deref(), || self.handle.run(|image| write(image, buffer, &self))) {
            Ok(()) => Outcome::Done,
            Err(error) => Outcome::Failed(error),
        }
    }
}

/// Writes `length` bytes of the `Uint8Array` from `offset` to the guest bytes at `position`. Returns whether to begin to
/// `look` for completions.
#[napi(catch_unwind)]
#[allow(
    clippy::too_many_arguments,
    reason = "one call for each of very many requests: no object is made for it"
)]
pub fn write(
    env: Env,
    request: u32,
    image: u32,
    #[napi(ts_arg_type = "Uint8Array")] buffer: Unknown<'_>,
    offset: f64,
    length: f64,
    position: f64,
    compressed: bool,
    watch: Option<u32>,
) -> napi::Result<bool> {
    let runtime = Runtime::of(&env)?;
    let handle = runtime.image(image)?;
    let (start, length) = range_of(&env, &buffer, offset, length)?;
    let job = runtime.watched().begin(watch);
    let waits = handle.waits();
    let write = Write { handle, start, length, position: position as u64, compressed, job };
    runtime.submit_soon(&env, request, Task::Write(write), waits)
}

/// Writes the `Uint8Array` to the state of a virtual machine, from its byte `position` on.
#[napi(catch_unwind)]
pub fn write_vm_state(
    env: Env,
    request: u32,
    image: u32,
    #[napi(ts_arg_type = "Uint8Array")] buffer: Unknown<'_>,
    position: f64,
) -> napi::Result<()> {
    let runtime = Runtime::of(&env)?;
    let handle = runtime.image(image)?;
    let (start, length) = bytes_of(&env, &buffer)?;
    let write = Write { handle, start, length, position: position as u64, compressed: false, job: None };
    let call = move || write.with(|image, buffer, write| image.write_vm_state(buffer, write.position));
    runtime.submit(&env, request, Task::Call(Box::new(call)))
}

/// Runs a change of an image that has no buffer.
pub(crate) fn change(
    env: &Env,
    request: u32,
    image: u32,
    change: impl FnOnce(&Image) -> Result<()> + Send + 'static,
) -> napi::Result<()> {
    let runtime = Runtime::of(env)?;
    let handle = runtime.image(image)?;
    runtime.run(env, request, move || handle.run(change), nothing)
}

/// Makes guest bytes read as zeroes; `unmap` gives their clusters up.
#[napi(catch_unwind)]
pub fn write_zeroes(
    env: Env,
    request: u32,
    image: u32,
    position: f64,
    length: f64,
    unmap: bool,
    watch: Option<u32>,
) -> napi::Result<()> {
    let job = Runtime::of(&env)?.watched().begin(watch);
    let (position, length) = (position as u64, length as u64);
    change(&env, request, image, move |image| match &job {
        Some(job) => job.during(|| image.write_zeroes_as(job, position, length, unmap)),
        None => image.write_zeroes(position, length, unmap),
    })
}

/// Gives the contents of guest bytes up.
#[napi(catch_unwind)]
pub fn discard(
    env: Env,
    request: u32,
    image: u32,
    position: f64,
    length: f64,
    watch: Option<u32>,
) -> napi::Result<()> {
    let job = Runtime::of(&env)?.watched().begin(watch);
    let (position, length) = (position as u64, length as u64);
    change(&env, request, image, move |image| match &job {
        Some(job) => job.during(|| image.discard_as(job, position, length)),
        None => image.discard(position, length),
    })
}

/// Makes durable what was written before.
#[napi(catch_unwind)]
pub fn flush(env: Env, request: u32, image: u32) -> napi::Result<()> {
    change(&env, request, image, Image::flush)
}

/// Resizes the disk; tells its size when that is heard of. `shrink` allows a smaller one.
#[napi(catch_unwind)]
pub fn resize(
    env: Env,
    request: u32,
    job: u32,
    image: u32,
    size: f64,
    shrink: bool,
    preallocation: Option<String>,
) -> napi::Result<()> {
    let options = ResizeOptions { shrink, preallocation: to_preallocation(preallocation.as_deref()) };
    let runtime = Runtime::of(&env)?;
    let handle = runtime.image(image)?;
    let work = move |job: &Arc<Job>| {
        let resize =
            |image: &Image| image.resize_as(job, size as u64, options).map(|()| image.virtual_size());
        Ok((handle.run(resize)?, handle))
    };
    let ticket = Ticket { request, job };
    runtime.start_job_in(Lane::Brief, &env, ticket, work, |_, env, (resized, handle)| {
        // Two requests may cross: the size is the one that the disk has now. This thread must not wait for it.
        let now = handle.current_size().unwrap_or(resized);
        // SAFETY: on the environment's thread, with its own env.
        unsafe { f64::to_napi_value(env.raw(), now as f64) }
    })
}
