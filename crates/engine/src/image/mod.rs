//! An open disk image: a chain of layers, top first, read as one disk.
//!
//! Reading is plan, then execute: a layer turns a guest range into segments ([`plan`]), then the bytes are read or
//! inflated straight into the caller's buffer ([`Image::read_at`]). No lock is held across data I/O.

mod bitmaps;
mod chain;
mod clones;
mod inflated;
mod layer;
mod mapping;
mod open;
mod options;
mod plan;
mod preallocation;
mod qcow2;
mod slices;
mod snapshots;
mod state;
mod tables;
mod writing;

pub use bitmaps::BitmapRecord;
pub use chain::Image;
pub(crate) use clones::{Clones, LiveCopy};
pub(crate) use mapping::{Loaded, Mapping, Missing};
pub use open::{read_header, read_header_for_check};
pub use options::OpenOptions;
pub use qcow2::{BackingReference, DataFileReference, ExtentReference, Qcow2, References};
pub use qcow2_core::layer::{Segment, SegmentKind};
pub use qcow2_core::{Layer, Raw};
pub(crate) use slices::Slice;
pub(crate) use snapshots::{l1_damage, load as load_snapshots};
pub(crate) use tables::Pending;
