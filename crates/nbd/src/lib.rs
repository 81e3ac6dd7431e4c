//! NBD, the network block device protocol: its structures ([`protocol`]), and a server of disks ([`server`]).
//!
//! The server stands on [`qcow2_core::Disk`] alone and knows no format. What a client says is bounded before anything is allocated for
//! it, and whatever it says ends that client at most.

#![forbid(unsafe_code)]
#![cfg_attr(not(test), deny(clippy::disallowed_methods))]

pub mod protocol;
pub mod server;

pub use qcow2_core::{Disk, Durability};
