//! NBD, the network block device protocol: its structures ([`protocol`]), a server of disks ([`server`]), and a client ([`client`]).
//!
//! The server stands on [`qcow2_core::Disk`] alone and knows no format. What a client says is bounded before anything is allocated for
//! it, and whatever it says ends that client at most.

#![forbid(unsafe_code)]
#![cfg_attr(not(test), deny(clippy::disallowed_methods))]

pub mod client;
mod incoming;
pub mod protocol;
pub mod server;
mod transport;

pub use qcow2_core::{Disk, Durability};
pub use transport::{Encrypt, Socket};
