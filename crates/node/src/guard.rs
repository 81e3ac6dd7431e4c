//! A panic is a bug of ours. It ends the request, never the process.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};

use qcow2_engine::{Error, ErrorKind, Result};

/// Runs `work`; a panic becomes `Internal`. What the work left half done must not be used again: callers poison it.
pub(crate) fn guarded<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|payload| Err(internal(&*payload)))
}

fn internal(payload: &(dyn Any + Send)) -> Error {
    let what = payload
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| payload.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message");
    Error::new(ErrorKind::Internal, format!("a bug in this library: {what}"))
}
