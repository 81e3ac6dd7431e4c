//! An open disk from outside: opening it for writing, which may repair it first, closing it, and its requests as those of any
//! [`Disk`](qcow2_core::disk::Disk).

mod close;
mod open;
mod requests;

pub use open::LayerExt;
