//! Images of QEMU's and ours, held against the contracts of layers, disks and writers; damaged ones; differencing ones.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, reason = "tests")]

mod damage;
mod images;
mod support;
mod writing;
