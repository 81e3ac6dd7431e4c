//! LUKS version 1: the header, opening it, making it, and its key slots.

mod create;
mod header;
mod keys;
mod unlock;

pub use create::{FormatOptions, Formatted, format};
pub use header::{HEADER_BYTES, KeySlot, Luks1Header, SLOTS};
pub use keys::{Plan, Write, add_key, change_key, erase_slot, replace_key};
pub use unlock::{unlock, unlock_all};

use qcow2_core::{Error, ErrorKind, Result};

/// Fills `bytes` from the system's source of randomness.
///
/// # Errors
/// `Io` where the system has none.
pub(crate) fn random(bytes: &mut [u8]) -> Result<()> {
    getrandom::fill(bytes).map_err(|e| {
        let io = e.raw_os_error().map(std::io::Error::from_raw_os_error);
        match io {
            Some(io) => Error::io(io, "getrandom"),
            None => Error::new(ErrorKind::Io, format!("the system gives no randomness: {e}")),
        }
    })
}
