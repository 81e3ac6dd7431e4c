//! Errors on their way to JavaScript: plain fields, of which the facade makes its error with the caller's stack.

use napi::bindgen_prelude::ToNapiValue;
use napi::{Env, sys};
use napi_derive::napi;
use qcow2_engine::Error;

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
    /// The system call.
    pub syscall: Option<String>,
}

impl From<&Error> for Failure {
    fn from(error: &Error) -> Self {
        Self {
            code: error.kind().code().to_owned(),
            message: error.message().to_owned(),
            path: error.path().map(Text::from),
            offset: error.offset().map(|offset| offset as f64),
            field: error.field().map(str::to_owned),
            errno: error.errno(),
            syscall: error.syscall().map(str::to_owned),
        }
    }
}

/// The error as a JavaScript object.
pub(crate) fn to_js(env: &Env, error: &Error) -> napi::Result<sys::napi_value> {
    // SAFETY: called on the environment's thread with its own env.
    unsafe { Failure::to_napi_value(env.raw(), Failure::from(error)) }
}
