//! VMDK, VMware's disk images: a descriptor and the extents that it lists.
//!
//! What is said here follows VMware's "Virtual Disk Format 5.0" for descriptors, hosted sparse extents and streams, and the driver
//! `block/vmdk.c` of QEMU, whose limits these are, for what that document leaves out (COWD and seSparse extents). Where QEMU skips
//! a line of a descriptor, or takes a disk for another one, the image is refused with the place at fault.
//!
//! The crate stands on `qcow2-core` beside the engine, which does not know it: an image is a [`qcow2_core::Layer`]. Extents are files
//! that an image names; nobody here opens them.

#![forbid(unsafe_code)]
#![cfg_attr(not(test), deny(clippy::disallowed_methods))]

mod cid;
pub mod cowd;
pub mod descriptor;
mod fields;
pub mod geometry;
mod inspect;
mod layer;
mod new;
pub mod sesparse;
pub mod sparse;
mod stream;

pub use fields::SECTOR;
pub use inspect::{Inspection, inspect, inspect_bytes};
pub use layer::{ExtentInfo, OpenOptions, Vmdk};
pub use new::{AdapterType, CreateOptions, NewVmdk, Parent, Subformat};
