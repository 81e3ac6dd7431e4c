//! The image engine: storage, backing chains, mapping, reading, checking and converting qcow2 images.
//!
//! Layering (imports point down only): `node -> engine -> transform -> format`. Nothing here knows of
//! JavaScript; nothing below here does I/O.

#![cfg_attr(not(test), deny(clippy::disallowed_methods))]

pub mod amend;
pub mod backing;
pub mod bitmap;
pub mod check;
pub mod clone;
pub mod compact;
pub mod compare;
pub mod convert;
pub mod create;
pub mod error;
pub mod image;
pub mod inspect;
pub mod job;
pub mod maintenance;
pub mod measure;
pub mod memory;
pub mod salvage;
pub mod source;
pub mod splice;
pub mod storage;
mod workers;
mod write;

pub use error::{Error, ErrorKind, Result};
pub use image::{Image, Layer, OpenOptions, Qcow2, Raw};
pub use job::Job;
pub use memory::{Mem, MemMut};
pub use qcow2_format as format;
pub use source::{Extent, ExtentKind, GuestSource};
pub use storage::{Storage, StorageExt};
pub use write::{DetectZeroes, Discard, ResizeOptions, WriteOptions};
