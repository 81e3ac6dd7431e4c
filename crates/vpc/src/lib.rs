//! Virtual hard disks (VHD), which QEMU calls `vpc`: fixed, dynamic and differencing ones.
//!
//! After Microsoft's "Virtual Hard Disk Image Format Specification", version 1.0, and what the products make of it: which of the two sizes
//! in the footer counts depends on the program that made the image, as in QEMU's driver `block/vpc.c`. All numbers are big endian.
//!
//! A fixed disk is its bytes and a footer of 512 bytes. A dynamic one begins with a copy of the footer and a header; its blocks lie at the
//! places that a table (BAT) says, each behind a bitmap of its sectors, and the footer is at the end. A differencing one has in its blocks
//! the sectors that its bitmaps say, and all others are its parent's.

#![forbid(unsafe_code)]
#![cfg_attr(not(test), deny(clippy::disallowed_methods))]

mod awaited;
mod check;
mod fixed;
mod footers;
mod inspect;
mod layer;
mod new;
mod parent;
pub mod structures;

pub use fixed::Fixed;
pub use footers::{Footers, read_footers};
pub use inspect::{Inspection, inspect, inspect_bytes};
pub use layer::{Vpc, VpcScheme, footer_of, open};
pub use new::{NewOptions, Preset, Subformat, new_vpc};
pub use parent::{Parent, ParentId};
pub use qcow2_core::blocks::OpenOptions;
