//! The image engine: storage, backing chains, mapping, reading, checking and converting qcow2 images.
//!
//! Layering (imports point down only): `node -> engine -> core -> transform`, and `engine -> format`. Nothing here knows of
//! JavaScript; nothing below here does I/O. Inside, imports between modules and between files point one way as well
//! (`tests/modules.rs`).

#![cfg_attr(not(test), deny(clippy::disallowed_methods))]

mod alloc;
pub mod amend;
pub mod backing;
pub mod bitmap;
pub mod check;
pub mod clone;
pub mod compact;
pub mod convert;
pub mod create;
mod disk;
mod door;
pub mod encryption;
pub mod files;
pub mod image;
pub mod inspect;
mod invalid;
pub mod keys;
pub mod maintenance;
pub mod measure;
mod patch;
mod tracker;
mod write;
mod writer;

pub use disk::LayerExt;
pub use door::DataDoor;
pub use image::{Image, OpenOptions, Qcow2};
pub use maintenance::ResizeOptions;
pub use qcow2_core::{
    DetectZeroes, Discard, DiskOptions, Error, ErrorKind, Extent, ExtentKind, GuestSource, Job, Layer, Mem,
    MemMut, NewImage, Raw, ReadStorage, Result, Storage, StorageExt, check_limit,
};
pub use qcow2_core::{blocks, compare, error, front_to_back, job, memory, salvage, source, splice, storage};
use qcow2_core::{walk, workers};
pub use qcow2_format as format;
pub use writer::WriteOptions;
