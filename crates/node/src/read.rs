//! Reads into a caller's buffer: the hot path.

use std::ptr::NonNull;
use std::sync::Arc;

use napi::bindgen_prelude::{Env, Unknown};
use napi::sys;
use napi_derive::napi;
use qcow2_engine::{Image, Job, MemMut, Result};

use crate::boundary::typed_array;
use crate::delivery::Outcome;
use crate::pool::Task;
use crate::resource::Handle;
use crate::runtime::Runtime;
use crate::watched::during;

/// A read that is under way. JavaScript keeps the buffer reachable until it hears of the completion, and the
/// cleanup hook waits for running reads before the environment frees its memory.
pub(crate) struct Read {
    handle: Arc<Handle>,
    start: NonNull<u8>,
    length: usize,
    position: u64,
    /// Cancels it.
    job: Option<Arc<Job>>,
}

// SAFETY: the pointer is used by the one worker that runs the read, through `MemMut`, whose accesses tolerate
// concurrent changes by JavaScript.
unsafe impl Send for Read {}

impl Read {
    /// Fills the buffer.
    pub(crate) fn run(self) -> Outcome {
        self.with(|image, buffer, position, job| match job {
            Some(job) => image.read_as(job, buffer, position),
            None => image.read_at(buffer, position),
        })
    }

    fn with(self, read: impl FnOnce(&Image, MemMut<'_>, u64, Option<&Job>) -> Result<()>) -> Outcome {
        // SAFETY: the range was checked against the buffer when the request was made; the buffer is alive (see
        // `Read`), and no Rust reference to its bytes exists.
        let buffer = unsafe { MemMut::from_raw(self.start, self.length) };
        let job = self.job.as_deref();
        let read = || self.handle.run(|image| read(image, buffer, self.position, job));
        match during(job, read) {
            Ok(()) => Outcome::Done,
            Err(error) => Outcome::Failed(error),
        }
    }
}

/// Most bytes that are copied on the environment's thread.
const AT_HAND: usize = 16 << 10;

/// Fills `length` bytes of the `Uint8Array` from `offset` with the guest bytes at `position`. The caller has
/// clamped the range to the disk. Returns whether to begin to `look` for completions; nothing where the buffer is filled already, and
/// the request is none any more.
#[napi(catch_unwind)]
#[allow(
    clippy::too_many_arguments,
    reason = "one call for each of very many requests: no object is made for it"
)]
pub fn read(
    env: Env,
    request: u32,
    image: u32,
    #[napi(ts_arg_type = "Uint8Array")] buffer: Unknown<'_>,
    offset: f64,
    length: f64,
    position: f64,
    watch: Option<u32>,
) -> napi::Result<Option<bool>> {
    let runtime = Runtime::of(&env)?;
    let handle = runtime.image(image)?;
    let (start, length) = range_of(&env, &buffer, offset, length)?;
    if watch.is_none() && length <= AT_HAND && runtime.may_answer() {
        // SAFETY: as in `Read::with`; and JavaScript does not run meanwhile.
        let buffer = unsafe { MemMut::from_raw(start, length) };
        if handle.read_at_hand(buffer, position as u64) {
            runtime.answered();
            return Ok(None);
        }
    }
    let job = runtime.watched().begin(watch);
    let waits = handle.waits();
    let read = Read { handle, start, length, position: position as u64, job };
    runtime.submit_soon(&env, request, Task::Read(read), waits).map(Some)
}

/// Fills the `Uint8Array` with the state of a virtual machine from its byte `position` on.
#[napi(catch_unwind)]
pub fn read_vm_state(
    env: Env,
    request: u32,
    image: u32,
    #[napi(ts_arg_type = "Uint8Array")] buffer: Unknown<'_>,
    position: f64,
) -> napi::Result<()> {
    let runtime = Runtime::of(&env)?;
    let handle = runtime.image(image)?;
    let (start, length) = bytes_of(&env, &buffer)?;
    let read = Read { handle, start, length, position: position as u64, job: None };
    let call = move || read.with(|image, buffer, position, _| image.read_vm_state(buffer, position));
    runtime.submit(&env, request, Task::Call(Box::new(call)))
}

/// Where `length` bytes of a `Uint8Array` from `offset` on are, and how many.
pub(crate) fn range_of(
    env: &Env,
    buffer: &Unknown<'_>,
    offset: f64,
    length: f64,
) -> napi::Result<(NonNull<u8>, usize)> {
    let (start, size) = bytes_of(env, buffer)?;
    let (offset, length) = (offset as usize, length as usize);
    if offset.checked_add(length).is_none_or(|end| end > size) {
        return Err(napi::Error::from_reason("the range is not inside the buffer"));
    }
    // SAFETY: offset <= size, so the sum stays inside (or one past) the buffer.
    Ok((unsafe { start.add(offset) }, length))
}

/// Where the bytes of a `Uint8Array` are, and how many.
pub(crate) fn bytes_of(env: &Env, array: &Unknown<'_>) -> napi::Result<(NonNull<u8>, usize)> {
    let (kind, start, length) = typed_array(env, array)?;
    if kind != sys::TypedarrayType::uint8_array {
        return Err(napi::Error::from_reason("the buffer is not a Uint8Array"));
    }
    match NonNull::new(start.cast()) {
        Some(start) => Ok((start, length)),
        // An empty array has no address.
        None if length == 0 => Ok((NonNull::dangling(), 0)),
        None => Err(napi::Error::from_reason("the buffer has no memory: it is detached")),
    }
}
