//! What differs between operating systems, by job: the only folder where it does, but for the descriptors that only
//! Unix has and that a file takes and hands out.
//!
//! Each call has a portable fallback, or answers `Unsupported` where its caller has one.

pub(super) mod alignment;
mod attributes;
pub(super) mod byte_lock;
mod copy;
pub(super) mod device;
mod file;
mod hints;
mod limits;
mod number;
mod security;
mod space;
mod sync;
mod transfer;
mod unnamed;
mod windows;

pub(super) use attributes::{copy_attributes, free_bytes, is_replaceable};
#[cfg(unix)]
pub(super) use copy::clone_range;
#[cfg(unix)]
pub(super) use file::is_direct;
pub use file::no_space;
pub(super) use file::{
    FileId, FileKind, already_exists, close_duplicate, identity, identity_at, is_a_directory, is_in_use,
    kind, may_be_open, not_permitted, open, too_many_links,
};
pub(super) use hints::{begin_sync, forget};
pub(super) use limits::{device_limits, page_size};
pub(crate) use number::number;
pub(super) use space::{
    allocate, allocate_ahead, allocated_bytes, discard, gains_by_allocating_ahead, run_in, set_len,
    write_zeroes,
};
pub(super) use sync::{sync_all, sync_data};
pub(super) use transfer::{read_at, write_at, write_vectored_at};
pub(super) use unnamed::{
    HIDES_NEW_FILES, create, create_vanishing, is_magic_link, link_unnamed, open_unnamed, rename_new,
    sync_folder,
};
