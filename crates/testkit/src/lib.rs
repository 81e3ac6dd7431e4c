//! Test support for the qcow2 crates.
