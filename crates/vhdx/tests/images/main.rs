//! Images of this crate, QEMU's and Hyper-V's, held against the contracts and each other; damaged ones; power cuts and failing calls.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, reason = "tests")]

mod children;
mod contract;
mod crash;
mod damaged;
mod forge;
mod qemu;
mod samples;
mod writing;
