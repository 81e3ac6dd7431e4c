//! The VHDX image format of Hyper-V, to the published specification [MS-VHDX]: fixed, dynamic and differencing images are read, made
//! and written to.
//!
//! The crate stands on `qcow2-core` beside the engine, which does not know it: an image is a [`qcow2_core::Layer`]. Its log is
//! replayed in memory where the image is opened for reading, and on disk where it is opened for writing.
//!
//! Where the specification and QEMU differ, what QEMU writes is read: images with a log GUID and no valid entry are clean.

#![forbid(unsafe_code)]
#![cfg_attr(not(test), deny(clippy::disallowed_methods))]

mod check;
mod file;
mod inspect;
mod layer;
mod new;
mod overlay;
mod sectors;
mod space;
pub mod structures;
mod write;

pub use inspect::{Inspection, inspect, inspect_bytes};
pub use layer::{OpenOptions, Vhdx};
pub use new::{NewOptions, NewVhdx, Parent, ParentId, Subformat};
