//! Whole disks: convert and clone. One program for all: each program costs a link.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, reason = "tests")]

mod clone;
mod clone_crash;
mod convert;
mod streamed;
