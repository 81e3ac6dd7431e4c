//! Parallels disk images, expanding ones: of the magics "WithoutFreeSpace", whose table counts sectors, and "WithouFreSpacExt", whose
//! table counts clusters.
//!
//! After QEMU's description of the format (`docs/interop/parallels.rst`) and its driver `block/parallels.c`, whose limits these are. All
//! numbers are little endian. A header of 64 bytes is followed by the table of clusters (BAT) and, from a place that the header says, by
//! the clusters. A mark in the header says that the image is in use: one that is found when the image is opened for writing is repaired
//! first, as QEMU does.
//!
//! A disk with snapshots, or one that is split, is a folder (`disk.hdd`) with a descriptor and such images: a [`Bundle`].

#![forbid(unsafe_code)]
#![cfg_attr(not(test), deny(clippy::disallowed_methods))]

mod bundle;
mod check;
pub mod descriptor;
mod extension;
mod inspect;
mod layer;
mod new;
pub mod structures;

pub use bundle::{Bundle, open_any};
pub use inspect::{Inspection, inspect, inspect_bytes};
pub use layer::{Parallels, ParallelsScheme, open};
pub use new::NewParallels;
pub use qcow2_core::blocks::OpenOptions;
