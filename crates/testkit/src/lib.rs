//! Test support for the qcow2 crates.
//!
//! - [`oracle`]: runs qemu-img and qemu-io, the judges of interoperability
//! - [`forge`], [`malformed`]: images built byte by byte, sound and broken, without the format crate
//! - [`model`], [`reader`]: what a disk must contain, and a slow reader straight from the specification
//! - [`matrix`]: geometries and operations that produce every kind of entry
//! - [`storage`]: simulators of storage
//! - [`ops`]: guest operations, and sectors that carry their identity
//! - [`recorder`], [`crash`], [`audit`]: power cuts, and the judgement of what they leave
//! - [`contents`], [`plans`]: all that an image holds, with snapshots and bitmaps, and the plans that change them
//! - [`contract`]: what any layer that is read must keep
//! - [`disks`]: whole disks, and the files that they are in
//! - [`trace`]: the recorded installation of a system
//! - [`loop_device`]: real block devices
//! - [`skip`]: says which test cannot run here
//!
//! A failed step here is a failed test, so the code panics freely and says what it was doing.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "test support: a failed step is a failed test"
)]

pub mod alloc;
pub mod at;
pub mod audit;
pub mod chain;
pub mod contents;
pub mod contract;
pub mod crash;
pub mod disk_model;
pub mod disks;
pub mod folder;
pub mod forge;
pub mod loop_device;
pub mod malformed;
pub mod matrix;
pub mod model;
pub mod ops;
pub mod oracle;
pub mod plans;
pub mod reader;
pub mod recorder;
pub mod rng;
pub mod skip;
pub mod sparse;
pub mod storage;
pub mod trace;

pub use forge::Forge;
pub use model::Disk;
pub use oracle::{Fixture, Qemu};
pub use rng::Rng;
pub use skip::skipped;
pub use sparse::Sparse;
