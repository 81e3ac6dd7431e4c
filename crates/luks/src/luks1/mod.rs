//! LUKS version 1: the header, opening it, making it, and its key slots.

mod create;
mod header;
mod keys;
mod unlock;

pub use create::{FormatOptions, Formatted, format};
pub use header::{HEADER_BYTES, KeySlot, Luks1Header, SLOTS};
pub use keys::{Plan, Write, add_key, change_key, erase_slot, replace_key};
pub use unlock::{unlock, unlock_all};
