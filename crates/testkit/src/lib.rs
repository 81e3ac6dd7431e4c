//! Test support for the qcow2 crates.

pub mod storage;
