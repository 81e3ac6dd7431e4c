//! Images of QEMU's, of other products and ours, held against the contracts of layers, disks and writers; damaged ones; children.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, reason = "tests")]

mod damage;
mod images;
mod parents;
mod support;
mod writing;
