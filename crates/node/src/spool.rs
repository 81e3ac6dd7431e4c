//! Streams on their way in: JavaScript hands their bytes over, and what is opened on the spool reads them.

use std::ptr::NonNull;
use std::sync::Arc;

use napi::bindgen_prelude::{Env, ToNapiValue, Unknown};
use napi_derive::napi;
use qcow2_engine::storage::{Expected, Part, ReadOnly, Spool};
use qcow2_engine::{Job, Mem, MemMut, Result, Storage, StorageExt};

use crate::delivery::Outcome;
use crate::job::{Lane, Ticket};
use crate::pool::Task;
use crate::read::{bytes_of, range_of};
use crate::resource::Resource;
use crate::runtime::Runtime;
use crate::text::Text;

/// What is known of a stream before it comes.
#[napi(object, object_to_js = false)]
pub struct SpoolOptions {
    /// Bytes.
    pub length: Option<f64>,
    /// Bytes of a cluster of the image in it, where it has them.
    pub unit: Option<f64>,
    /// All of it is kept.
    pub keep: bool,
}

/// Opens a spool in a folder; tells its number. Cancelling the job, at any time, ends whatever waits for its bytes.
#[napi(catch_unwind)]
pub fn open_spool(env: Env, request: u32, job: u32, folder: Text, options: SpoolOptions) -> napi::Result<()> {
    let folder = folder.into_path()?;
    let expected = Expected {
        length: options.length.map(|length| length as u64),
        unit: options.unit.map(|unit| unit as u64),
        keep: options.keep,
    };
    let work = move |job: &Arc<Job>| Spool::new(&folder, expected, Arc::clone(job)).map(Arc::new);
    let ticket = Ticket { request, job };
    Runtime::of(&env)?.start_job_in(Lane::Brief, &env, ticket, work, |runtime, env, spool| {
        let number = runtime.hold(Resource::Spool(spool));
        // SAFETY: on the environment's thread, with its own env.
        unsafe { u32::to_napi_value(env.raw(), number) }
    })
}

/// The file that a stream makes, or a part of it, as a new one each time: its number.
#[napi(catch_unwind)]
pub fn spooled_file(env: Env, spool: u32, offset: Option<f64>, length: Option<f64>) -> napi::Result<u32> {
    let runtime = Runtime::of(&env)?;
    let storage: Arc<dyn Storage> = runtime.spool(spool)?;
    let storage: Arc<dyn Storage> = match offset {
        Some(offset) => {
            let length = length.map_or(u64::MAX, |length| length as u64);
            Arc::new(ReadOnly(Part::new(storage, offset as u64, length)))
        }
        None => storage,
    };
    Ok(runtime.hold(Resource::Storage(storage)))
}

/// A transfer between a buffer and a spool. JavaScript keeps the buffer reachable until it hears of the completion, and the cleanup hook waits
/// for what runs before the environment frees its memory.
struct Transfer {
    spool: Arc<Spool>,
    start: NonNull<u8>,
    length: usize,
}

// SAFETY: the pointer is used by the one worker that runs this, through `Mem` and `MemMut`, whose accesses tolerate concurrent changes by
// JavaScript.
unsafe impl Send for Transfer {}

impl Transfer {
    fn append(&self) -> Result<()> {
        // SAFETY: the range was checked against the buffer when the request was made; the buffer is alive (see `Transfer`).
        self.spool.append(unsafe { Mem::from_raw(self.start, self.length) })
    }

    fn read(&self, position: u64) -> Result<()> {
        // SAFETY: as above.
        self.spool.read_exact_at(unsafe { MemMut::from_raw(self.start, self.length) }, position)
    }
}

fn outcome(done: Result<()>) -> Outcome {
    match done {
        Ok(()) => Outcome::Done,
        Err(error) => Outcome::Failed(error),
    }
}

/// Fills the `Uint8Array` with bytes of the stream that have come.
#[napi(catch_unwind)]
pub fn read_spool(
    env: Env,
    request: u32,
    spool: u32,
    #[napi(ts_arg_type = "Uint8Array")] buffer: Unknown<'_>,
    position: f64,
) -> napi::Result<()> {
    let runtime = Runtime::of(&env)?;
    let spool = runtime.spool(spool)?;
    let (start, length) = bytes_of(&env, &buffer)?;
    let transfer = Transfer { spool, start, length };
    let read = move || outcome(transfer.read(position as u64));
    runtime.submit(&env, request, Task::Call(Box::new(read)))
}

/// Hands over the next `length` bytes of the stream, those of the `Uint8Array` from `offset` on. One such request at a time.
#[napi(catch_unwind)]
pub fn feed_spool(
    env: Env,
    request: u32,
    spool: u32,
    #[napi(ts_arg_type = "Uint8Array")] buffer: Unknown<'_>,
    offset: f64,
    length: f64,
) -> napi::Result<()> {
    let runtime = Runtime::of(&env)?;
    let spool = runtime.spool(spool)?;
    let (start, length) = range_of(&env, &buffer, offset, length)?;
    let transfer = Transfer { spool, start, length };
    runtime.submit(&env, request, Task::Call(Box::new(move || outcome(transfer.append()))))
}

/// The stream has ended, with all of its bytes.
#[napi(catch_unwind)]
pub fn end_spool(env: Env, spool: u32) -> napi::Result<()> {
    Runtime::of(&env)?.spool(spool)?.end();
    Ok(())
}

/// Bytes of the stream that came, that are stored now, and that were stored at once at most; 1 behind them where somebody waits for what did
/// not come.
#[napi(catch_unwind, ts_return_type = "[came: number, stored: number, peak: number, wanted: number]")]
pub fn spool_progress(env: Env, spool: u32) -> napi::Result<Vec<f64>> {
    let progress = Runtime::of(&env)?.spool(spool)?.progress();
    let wanted = u64::from(progress.wanted);
    Ok([progress.came, progress.stored, progress.peak, wanted].map(|bytes| bytes as f64).to_vec())
}
