//! Objects of JavaScript's as files: `src/random-access.ts` says what they are.

mod asking;
mod storage;

use std::io;
use std::sync::Arc;

use napi::bindgen_prelude::{BufferSlice, Env, Float64Array, ToNapiValue, Unknown};
use napi_derive::napi;
use qcow2_engine::storage::{BlockCache, BlockCacheShape};
use qcow2_engine::{Mem, Storage};

use asking::{Answer, Ask, Known, Question};
pub(crate) use asking::{Asking, Thrown};
use storage::{Abilities, AskedStorage};

use crate::delivery::IntoJs;
use crate::open::Looked;
use crate::read::bytes_of;
use crate::resource::Resource;
use crate::runtime::Runtime;
use crate::text::Text;

/// What an object is, as JavaScript has found it. Sizes are bytes.
#[napi(object, object_to_js = false)]
pub struct SourceOptions {
    /// For messages.
    pub name: Text,
    /// What tells it apart.
    pub identity: String,
    /// Bytes.
    pub size: f64,
    /// It is written to.
    pub writable: bool,
    /// It can have another size.
    pub resizes: bool,
    /// It knows `sync`.
    pub syncs: bool,
    /// It tells what is zero.
    pub tells: bool,
    /// How what was read is kept; not at all without it.
    pub cache: Option<SourceCache>,
}

/// How what was read is kept, in bytes.
#[napi(object, object_to_js = false)]
pub struct SourceCache {
    /// Of a block.
    pub block_size: f64,
    /// Of all blocks.
    pub size: f64,
    /// Read ahead, at most.
    pub read_ahead: f64,
}

/// What is asked of an object.
#[napi(object, object_from_js = false)]
pub struct SourceQuestion<'env> {
    /// Number of the question.
    pub id: u32,
    /// `read`, `write`, `sync`, `truncate`, `extents`, or `forget` of an earlier one.
    pub operation: &'static str,
    /// Bytes in front of the range; the new size to truncate to.
    pub position: f64,
    /// Bytes of the range.
    pub length: f64,
    /// What is written.
    pub data: Option<BufferSlice<'env>>,
}

/// What an object threw.
#[napi(object, object_to_js = false)]
pub struct SourceFailure {
    /// Its message.
    pub message: Text,
    /// The name of a system's error.
    pub code: Option<String>,
    /// The number that JavaScript has it under.
    pub number: u32,
    /// The same request may succeed when it is made again.
    pub transient: bool,
}

/// A place where questions to one object come, as many as `concurrency` at once; its number.
#[napi(catch_unwind)]
pub fn start_source(env: Env, concurrency: u32) -> napi::Result<u32> {
    let runtime = Runtime::of(&env)?;
    let asking = Asking::new(runtime.completions(), concurrency as usize);
    Ok(runtime.hold(Resource::Source(asking)))
}

/// Opens what is asked there as a file.
#[napi(catch_unwind)]
pub fn open_source(env: Env, request: u32, number: u32, options: SourceOptions) -> napi::Result<()> {
    let runtime = Runtime::of(&env)?;
    let asking = runtime.source(number)?;
    let abilities = Abilities {
        name: options.name.into_path()?,
        identity: options.identity,
        size: options.size as u64,
        writable: options.writable,
        resizes: options.resizes,
        syncs: options.syncs,
        tells: options.tells,
    };
    let cache = options.cache.map(|cache| BlockCacheShape {
        block: cache.block_size as u64,
        size: cache.size as u64,
        ahead: cache.read_ahead as u64,
    });
    let work = move || {
        let storage = Arc::new(AskedStorage::new(asking, abilities));
        let storage: Arc<dyn Storage> = match cache {
            Some(shape) => Arc::new(BlockCache::new(storage, shape)),
            None => storage,
        };
        Looked::at(storage)
    };
    runtime.run(&env, request, work, Looked::hold)
}

/// Waits for questions: an array of them, or nothing where no more come.
#[napi(catch_unwind)]
pub fn next_questions(env: Env, request: u32, number: u32) -> napi::Result<()> {
    let runtime = Runtime::of(&env)?;
    let asking = runtime.source(number)?;
    runtime.expect(&env, request, Ok(()));
    asking.take(request);
    Ok(())
}

fn questions_into_js(questions: Vec<Question>) -> IntoJs {
    Box::new(move |_, env| {
        let questions = questions.into_iter().map(|question| into_js(env, question));
        let questions = questions.collect::<napi::Result<Vec<_>>>()?;
        // SAFETY: on the environment's thread, with its own env.
        unsafe { Vec::to_napi_value(env.raw(), questions) }
    })
}

fn into_js<'env>(env: &'env Env, Question { id, ask }: Question) -> napi::Result<SourceQuestion<'env>> {
    let (operation, position, length, data) = match ask {
        Ask::Read(range) => ("read", range.start, range.end - range.start, None),
        Ask::Write(position, data) => ("write", position, data.len() as u64, Some(data)),
        Ask::Sync => ("sync", 0, 0, None),
        Ask::Truncate(size) => ("truncate", size, 0, None),
        Ask::Extents(range) => ("extents", range.start, range.end - range.start, None),
        Ask::Forget => ("forget", 0, 0, None),
    };
    let data = data.map(|data| BufferSlice::copy_from(env, data)).transpose()?;
    Ok(SourceQuestion { id, operation, position: position as f64, length: length as f64, data })
}

/// The answer to `read`: all bytes of the range.
#[napi(catch_unwind)]
pub fn answer_bytes(
    env: Env,
    number: u32,
    id: u32,
    #[napi(ts_arg_type = "Uint8Array")] bytes: Unknown<'_>,
) -> napi::Result<()> {
    let asking = Runtime::of(&env)?.source(number)?;
    let (start, length) = bytes_of(&env, &bytes)?;
    // SAFETY: the array is alive during this call, which copies from it.
    let bytes = unsafe { Mem::from_raw(start, length) };
    asking.answer(id, Ok(Answer::Bytes(bytes)));
    Ok(())
}

/// The answer to `write`, `sync` and `truncate`.
#[napi(catch_unwind)]
pub fn answer_done(env: Env, number: u32, id: u32) -> napi::Result<()> {
    Runtime::of(&env)?.source(number)?.answer(id, Ok(Answer::Done));
    Ok(())
}

/// The answer to `extents`: of each run where it ends, and whether it is zero (0 or 1).
#[napi(catch_unwind)]
pub fn answer_extents(env: Env, number: u32, id: u32, runs: Float64Array) -> napi::Result<()> {
    let asking = Runtime::of(&env)?.source(number)?;
    let known = |run: &[f64]| match run {
        [end, zero] => Some(Known { end: *end as u64, zero: *zero != 0.0 }),
        _ => None,
    };
    let runs = runs.chunks(2).filter_map(known).collect();
    asking.answer(id, Ok(Answer::Extents(runs)));
    Ok(())
}

/// That a question could not be answered.
#[napi(catch_unwind)]
pub fn answer_failed(env: Env, number: u32, id: u32, failure: SourceFailure) -> napi::Result<()> {
    let asking = Runtime::of(&env)?.source(number)?;
    let SourceFailure { message, code, number, transient } = failure;
    let kind = match code.as_deref() {
        Some("ENOSPC") => io::ErrorKind::StorageFull,
        Some("EDQUOT") => io::ErrorKind::QuotaExceeded,
        _ => io::ErrorKind::Other,
    };
    let message = String::from_utf8_lossy(message.as_bytes()).into_owned();
    asking.answer(id, Err(io::Error::new(kind, Thrown { message, number, transient })));
    Ok(())
}

/// What stands on it is being closed: nobody waits for an object for ever.
#[napi(catch_unwind)]
pub fn close_source(env: Env, number: u32) -> napi::Result<()> {
    Runtime::of(&env)?.source(number)?.close();
    Ok(())
}

/// Gives up all who wait for the object.
#[napi(catch_unwind)]
pub fn cancel_source(env: Env, number: u32) -> napi::Result<()> {
    Runtime::of(&env)?.source(number)?.cancel();
    Ok(())
}
