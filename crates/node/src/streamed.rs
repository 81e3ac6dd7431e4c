//! New images as streams: planned by a job, then read by whoever sends them on.

use std::num::NonZeroUsize;
use std::ptr::NonNull;
use std::sync::Arc;

use napi::bindgen_prelude::{Env, ToNapiValue, Unknown};
use napi_derive::napi;
use qcow2_engine::convert::{Compression, Window};
use qcow2_engine::format::Limits;
use qcow2_engine::front_to_back::{FrontToBack, Planning};
use qcow2_engine::splice::Splice;
use qcow2_engine::{GuestSource, Image, Job, MemMut, Result};

use crate::delivery::Outcome;
use crate::job::Ticket;
use crate::pool::Task;
use crate::read::bytes_of;
use crate::resource::{Handle, Resource};
use crate::runtime::Runtime;
use crate::shape::{Purpose, Shape};

/// What to make a stream of. Checked in TypeScript; what is absent has the engine's default.
#[napi(object, object_to_js = false)]
pub struct StreamOrder {
    /// The image's.
    pub shape: Shape,
    /// Compress.
    pub compress: bool,
    /// The codec's.
    pub level: Option<u32>,
    /// The 4 KiB window of QEMU's writer.
    pub small_window: bool,
    /// Threads of the planning.
    pub concurrency: Option<u32>,
    /// Bytes that the plan may take.
    pub max_memory: Option<f64>,
}

/// A stream that is ready to be read.
#[napi(object, object_from_js = false)]
pub struct PlannedStream {
    /// Number of the stream.
    pub stream: u32,
    /// Bytes of the file.
    pub byte_length: f64,
    /// Bytes of the disk.
    pub virtual_size: f64,
    /// The disk is read front to back: one request at a time.
    pub sequential: bool,
}

/// A planned image, and the disk that is in it.
pub(crate) struct Streamed {
    plan: Box<dyn FrontToBack>,
    images: Vec<Arc<Image>>,
    /// See [`Handle::waits`].
    waits: bool,
}

/// The images as one disk.
fn with_disk<T>(images: &[Arc<Image>], then: impl FnOnce(&dyn GuestSource) -> Result<T>) -> Result<T> {
    if let [image] = images {
        return then(&**image);
    }
    let disks: Vec<&dyn GuestSource> = images.iter().map(|image| &**image as &dyn GuestSource).collect();
    then(&Splice::concatenation(&disks)?)
}

impl StreamOrder {
    fn plan(&self, handles: &[Arc<Handle>], job: &Job) -> Result<(Streamed, u64, bool)> {
        let images = handles.iter().map(|handle| handle.image()).collect::<Result<Vec<_>>>()?;
        let max_memory = self.max_memory.map_or_else(|| Limits::default().max_memory, |bytes| bytes as u64);
        let concurrency = self.concurrency.and_then(|threads| NonZeroUsize::new(threads as usize));
        let window = if self.small_window { Window::Qemu4KiB } else { Window::Full };
        let compression = self.compress.then_some(Compression { level: self.level, window });
        let (plan, size, sequential) = with_disk(&images, |source| {
            let size = source.virtual_size();
            let disk = self.shape.new_disk(Purpose { size, path: None, encryption: None, job })?;
            let plan = disk.front_to_back(&Planning { source, compression, concurrency, max_memory, job })?;
            Ok((plan, size, source.is_sequential()))
        })?;
        let waits = handles.iter().any(|handle| handle.waits());
        Ok((Streamed { plan, images, waits }, size, sequential))
    }
}

/// Plans a stream of open images, one behind the other. They stay open for as long as the stream is held.
#[napi(catch_unwind)]
pub fn plan_stream(
    env: Env,
    request: u32,
    job: u32,
    images: Vec<u32>,
    order: StreamOrder,
) -> napi::Result<()> {
    let runtime = Runtime::of(&env)?;
    let handles = images.into_iter().map(|image| runtime.image(image)).collect::<napi::Result<Vec<_>>>()?;
    runtime.start_job(
        &env,
        Ticket { request, job },
        move |job| order.plan(&handles, job),
        |runtime, env, (streamed, virtual_size, sequential)| {
            let planned = PlannedStream {
                byte_length: streamed.plan.length() as f64,
                virtual_size: virtual_size as f64,
                sequential,
                stream: runtime.hold(Resource::Streamed(Arc::new(streamed))),
            };
            // SAFETY: on the environment's thread, with its own env.
            unsafe { PlannedStream::to_napi_value(env.raw(), planned) }
        },
    )
}

/// Where a caller's bytes are. JavaScript keeps the buffer reachable until it hears of the completion, and the cleanup hook waits for
/// requests before the environment frees its memory.
struct Target(NonNull<u8>, usize);

// SAFETY: the pointer is used by the one worker that fills it, through `MemMut`, whose accesses tolerate concurrent changes by JavaScript.
unsafe impl Send for Target {}

impl Target {
    fn fill(self, streamed: &Streamed, position: u64, job: &Job) -> Result<()> {
        // SAFETY: the range is that of a live `Uint8Array` (see `Target`), and no Rust reference to its bytes exists.
        let buffer = unsafe { MemMut::from_raw(self.0, self.1) };
        with_disk(&streamed.images, |source| streamed.plan.fill(source, position, buffer, job))
    }
}

/// Fills the `Uint8Array` with the bytes of a stream from `position` on, all of which it has.
#[napi(catch_unwind)]
pub fn read_stream(
    env: Env,
    request: u32,
    stream: u32,
    #[napi(ts_arg_type = "Uint8Array")] buffer: Unknown<'_>,
    position: f64,
    watch: Option<u32>,
) -> napi::Result<()> {
    let runtime = Runtime::of(&env)?;
    let streamed = runtime.streamed(stream)?;
    let (start, length) = bytes_of(&env, &buffer)?;
    let target = Target(start, length);
    let job = runtime.watched().begin(watch).unwrap_or_default();
    let waits = streamed.waits;
    let call = move || match target.fill(&streamed, position as u64, &job) {
        Ok(()) => Outcome::Done,
        Err(error) => Outcome::Failed(error),
    };
    runtime.submit_where(&env, request, Task::Call(Box::new(call)), waits)
}
