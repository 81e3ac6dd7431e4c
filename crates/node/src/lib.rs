//! The Node addon.

use napi_derive::napi;

/// The version of the addon, which must be the package's own.
#[napi]
pub fn engine_version() -> &'static str {
    env!("CARGO_PKG_VERSION")
}
