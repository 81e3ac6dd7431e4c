//! VMDK images: those of QEMU and VMware, forged and damaged ones, reading and writing.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, reason = "tests")]

mod coming;
mod forged;
mod new;
mod power;
mod qemu;
mod streamed;
mod support;
mod writing;
