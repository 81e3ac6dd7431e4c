//! Errors on their way to JavaScript: plain fields, of which the facade makes its error with the caller's stack.

use napi::bindgen_prelude::ToNapiValue;
use napi::{Env, sys};
use napi_derive::napi;
use qcow2_engine::Error;
use qcow2_engine::storage::carried;

use crate::bytes::is_exact;
use crate::source::Thrown;
use crate::text::Text;

/// An engine error, field by field.
#[napi(object, object_from_js = false)]
pub struct Failure {
    /// The stable code of the kind.
    pub code: String,
    /// The message, without place.
    pub message: String,
    /// The file.
    pub path: Option<Text>,
    /// Byte offset in the file.
    pub offset: Option<f64>,
    /// Field of the format.
    pub field: Option<String>,
    /// The system's error number, positive.
    pub errno: Option<i32>,
    /// The system call, or what else the storage calls it.
    pub syscall: Option<String>,
    /// The same request may succeed when it is made again.
    pub transient: bool,
    /// What caused it, and what caused that; nothing that only repeats the message.
    pub causes: Vec<String>,
    /// The number of what an object of JavaScript's threw.
    pub thrown: Option<u32>,
}

impl From<&Error> for Failure {
    fn from(error: &Error) -> Self {
        Self {
            code: error.kind().code().to_owned(),
            message: error.message().to_owned(),
            path: error.path().map(Text::from),
            offset: error.offset().filter(|offset| is_exact(*offset)).map(|offset| offset as f64),
            field: error.field().map(str::to_owned),
            errno: error.errno(),
            syscall: error.syscall().map(str::to_owned),
            transient: error.is_transient(),
            causes: causes(error),
            thrown: thrown(error),
        }
    }
}

fn thrown(error: &Error) -> Option<u32> {
    let mut next = std::error::Error::source(error);
    while let Some(cause) = next {
        let thrown = cause.downcast_ref().and_then(carried::<Thrown>);
        if let Some(thrown) = thrown {
            return Some(thrown.number);
        }
        next = cause.source();
    }
    None
}

fn causes(error: &Error) -> Vec<String> {
    let mut texts = vec![error.message().to_owned()];
    let mut next = std::error::Error::source(error);
    while let Some(cause) = next {
        let text = cause.to_string();
        // The system's error is the message already.
        if texts.last().is_none_or(|last| !last.contains(&text)) {
            texts.push(text);
        }
        next = cause.source();
    }
    texts.split_off(1)
}

/// The error as a JavaScript object.
pub(crate) fn to_js(env: &Env, error: &Error) -> napi::Result<sys::napi_value> {
    // SAFETY: called on the environment's thread with its own env.
    unsafe { Failure::to_napi_value(env.raw(), Failure::from(error)) }
}
