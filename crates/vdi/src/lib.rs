//! VirtualBox disk images, version 1.1: dynamic, static, and differencing ones.
//!
//! The format has no specification of its own. What is said here follows VirtualBox's published sources (`VDICore.h`) and the driver
//! `block/vdi.c` of QEMU, whose limits these are; other block sizes than QEMU's 1 MiB are read as well. All numbers are little endian.
//!
//! A header of 512 bytes is followed by the block map, an entry of 4 bytes for each block, and the data. A differencing image names its
//! parent by UUIDs and by no file name: which file that is says who opens it.

#![forbid(unsafe_code)]
#![cfg_attr(not(test), deny(clippy::disallowed_methods))]

mod check;
mod inspect;
mod layer;
mod new;
mod parent;
pub mod structures;

pub use inspect::{Inspection, inspect, inspect_bytes};
pub use layer::{Vdi, VdiScheme, open};
pub use new::NewVdi;
pub use parent::ParentId;
pub use qcow2_core::blocks::OpenOptions;
