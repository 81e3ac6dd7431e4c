//! Names and paths on their way to JavaScript and back. They are bytes, mostly but not always UTF-8.
//!
//! A string of JavaScript's is UTF-16, and may hold lone surrogates, which no text has: a byte that is not part of UTF-8 crosses as
//! one of them, U+DC80 to U+DCFF. So every name is a string, different names are different strings, and each comes back as the bytes
//! that it was. `src/text.ts` says what users see of it.

use std::path::{Path, PathBuf};
use std::ptr;

use napi::bindgen_prelude::{FromNapiValue, ToNapiValue, TypeName, ValidateNapiValue};
use napi::{Error, Result, ValueType, sys};

/// First of the surrogates that stand for a byte, at byte 0.
const ESCAPE: u16 = 0xdc00;

/// A name or path: its bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Text(Vec<u8>);

impl Text {
    /// The bytes.
    pub(crate) fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// The text, if it is UTF-8.
    pub(crate) fn as_utf8(&self) -> Option<&str> {
        std::str::from_utf8(&self.0).ok()
    }

    /// The bytes.
    pub(crate) fn into_bytes(self) -> Vec<u8> {
        self.0
    }

    fn to_utf16(&self) -> Vec<u16> {
        let mut units = Vec::with_capacity(self.0.len());
        for chunk in self.0.utf8_chunks() {
            units.extend(chunk.valid().encode_utf16());
            units.extend(chunk.invalid().iter().map(|byte| ESCAPE | u16::from(*byte)));
        }
        units
    }

    fn from_utf16(units: &[u16]) -> Self {
        let mut bytes = Vec::with_capacity(units.len());
        for unit in char::decode_utf16(units.iter().copied()) {
            // Any other lone surrogate is no text and no byte.
            let escaped = unit.as_ref().err().map(|e| e.unpaired_surrogate() ^ ESCAPE);
            match escaped.and_then(|byte| u8::try_from(byte).ok()).filter(|byte| *byte >= 0x80) {
                Some(byte) => bytes.push(byte),
                None => {
                    let text = unit.unwrap_or(char::REPLACEMENT_CHARACTER);
                    bytes.extend_from_slice(text.encode_utf8(&mut [0; 4]).as_bytes());
                }
            }
        }
        Self(bytes)
    }
}

impl From<&[u8]> for Text {
    fn from(bytes: &[u8]) -> Self {
        Self(bytes.to_vec())
    }
}

#[cfg(unix)]
mod path {
    use std::ffi::{OsStr, OsString};
    use std::os::unix::ffi::{OsStrExt, OsStringExt};

    use super::{Path, PathBuf, Result, Text};

    impl From<&Path> for Text {
        fn from(path: &Path) -> Self {
            Self::from(OsStr::as_bytes(path.as_os_str()))
        }
    }

    impl Text {
        /// The file of this name.
        pub(crate) fn into_path(self) -> Result<PathBuf> {
            Ok(PathBuf::from(OsString::from_vec(self.0)))
        }
    }
}

#[cfg(not(unix))]
mod path {
    use super::{Error, Path, PathBuf, Result, Text};

    impl From<&Path> for Text {
        fn from(path: &Path) -> Self {
            Self(path.to_string_lossy().into_owned().into_bytes())
        }
    }

    impl Text {
        /// The file of this name.
        pub(crate) fn into_path(self) -> Result<PathBuf> {
            let text = String::from_utf8(self.0);
            text.map(PathBuf::from).map_err(|_| Error::from_reason("the path is not UTF-8"))
        }
    }
}

/// The path of a file as JavaScript knows it; empty where there is none.
pub(crate) fn path_text(path: Option<&Path>) -> Text {
    path.map_or(Text(Vec::new()), Text::from)
}

impl TypeName for Text {
    fn type_name() -> &'static str {
        "String"
    }

    fn value_type() -> ValueType {
        ValueType::String
    }
}

impl ValidateNapiValue for Text {}

impl FromNapiValue for Text {
    unsafe fn from_napi_value(env: sys::napi_env, value: sys::napi_value) -> Result<Self> {
        let mut length = 0;
        // SAFETY: the caller's contract: the value belongs to the running call. Without a buffer the length is told.
        check(unsafe { sys::napi_get_value_string_utf16(env, value, ptr::null_mut(), 0, &mut length) })?;
        // The call ends what it writes with a zero.
        let mut units = vec![0u16; length + 1];
        let room = units.len();
        let mut written = 0;
        // SAFETY: as above, and the buffer has the room that is said.
        check(unsafe {
            sys::napi_get_value_string_utf16(env, value, units.as_mut_ptr().cast(), room, &mut written)
        })?;
        units.truncate(written);
        Ok(Self::from_utf16(&units))
    }
}

impl ToNapiValue for Text {
    unsafe fn to_napi_value(env: sys::napi_env, text: Self) -> Result<sys::napi_value> {
        let units = text.to_utf16();
        let mut value = ptr::null_mut();
        // SAFETY: the caller's contract: on the environment's thread. The units are read before the call returns.
        check(unsafe {
            sys::napi_create_string_utf16(env, units.as_ptr().cast(), units.len() as isize, &mut value)
        })?;
        Ok(value)
    }
}

fn check(status: sys::napi_status) -> Result<()> {
    match status {
        sys::Status::napi_ok => Ok(()),
        status => Err(Error::from_reason(format!("a string could not be read or made: {status}"))),
    }
}
