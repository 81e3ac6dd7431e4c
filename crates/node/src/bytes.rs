//! Numbers of bytes on their way to JavaScript, where a number is exact up to 2^53 - 1 only.

use std::ptr;

use napi::bindgen_prelude::{ToNapiValue, TypeName};
use napi::{Error, Result, ValueType, sys};

/// The largest number that JavaScript says exactly, and every one below it.
const MAX_SAFE_INTEGER: u64 = (1 << 53) - 1;

/// A size or offset that a file claims, whatever it is: a number where that is exact, else a bigint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bytes(pub u64);

/// Whether JavaScript has `size` as a number that is exactly that, be it beyond [`MAX_SAFE_INTEGER`]: of a disk of whole sectors it has.
pub(crate) fn is_exact(size: u64) -> bool {
    size <= MAX_SAFE_INTEGER || (size <= i64::MAX as u64 && size as f64 as u64 == size)
}

impl TypeName for Bytes {
    fn type_name() -> &'static str {
        "number | bigint"
    }

    fn value_type() -> ValueType {
        ValueType::Number
    }
}

impl ToNapiValue for Bytes {
    unsafe fn to_napi_value(env: sys::napi_env, Self(bytes): Self) -> Result<sys::napi_value> {
        let mut value = ptr::null_mut();
        // SAFETY: the caller's contract: on the environment's thread.
        let status = unsafe {
            if bytes <= MAX_SAFE_INTEGER {
                sys::napi_create_double(env, bytes as f64, &mut value)
            } else {
                sys::napi_create_bigint_uint64(env, bytes, &mut value)
            }
        };
        match status {
            sys::Status::napi_ok => Ok(value),
            status => Err(Error::from_reason(format!("a number could not be made: {status}"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_sectors_are_exact_far_beyond_what_is_safe() {
        let safe = MAX_SAFE_INTEGER;
        for (size, exact) in [
            (0, true),
            (safe, true),
            (safe + 1, true),
            (safe + 2, false),
            ((1 << 61) + 512, true),
            ((1 << 61) + 1, false),
            (i64::MAX as u64, false),
            (1 << 63, false),
            (u64::MAX, false),
        ] {
            assert_eq!(is_exact(size), exact, "{size}");
        }
    }
}
