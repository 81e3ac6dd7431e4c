//! Images of QEMU's, of Parallels' and ours, held against the contracts of layers, disks and writers; damaged ones.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, reason = "tests")]

mod bundles;
mod damage;
mod extension;
mod images;
mod support;
mod writing;
