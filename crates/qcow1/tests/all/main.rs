//! Images of version 1: those of QEMU, damaged ones, and new ones.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, reason = "tests")]

mod images;
mod new;
