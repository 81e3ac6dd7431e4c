//! Headers and ciphers, held against QEMU, cryptsetup and published vectors. One program for all: each program costs a link.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, reason = "tests")]

mod damaged;
mod keys;
mod layer;
mod luks2;
mod matrix;
mod support;
mod tools;
