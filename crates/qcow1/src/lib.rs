//! The qcow image format, version 1: QEMU's format before qcow2, with the same magic. Images are read, and made: empty,
//! or by copying a disk front to back. One that exists is not changed.
//!
//! The format has no document of its own: what is said here follows the driver `block/qcow.c` of QEMU, whose limits these are.
//! A header, a table or a name that the file ends in front of is refused as damage, where QEMU reads zeroes.
//! The crate stands on `qcow2-core` beside the engine, which does not know it: an image is a [`qcow2_core::Layer`].

#![forbid(unsafe_code)]
#![cfg_attr(not(test), deny(clippy::disallowed_methods))]

pub mod format;
mod inflate;
mod inspect;
mod layer;
mod new;

pub use inspect::{Inspection, inspect, inspect_bytes};
pub use layer::{OpenOptions, Qcow1};
pub use new::NewQcow1;
