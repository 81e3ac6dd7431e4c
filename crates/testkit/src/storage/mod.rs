//! Storage simulators: each wraps a real [`Storage`] and changes one thing about it.
//!
//! None but [`CountingStorage`] hands out a descriptor: a wrapper that did would be bypassed by the kernel's
//! copies.

mod aligned_only;
mod counting;
mod device;
mod door;
mod fault;
mod hooked;
mod scrambling;
mod short_io;
mod space;

pub use aligned_only::AlignedOnly;
pub use counting::{CountingStorage, Counts};
pub use device::Device;
pub use door::Door;
pub use fault::{Failing, Fault, FaultStorage};
pub use hooked::{Before, Hooked};
pub use scrambling::{Scrambling, scramble, scrambled_image, unscramble};
pub use short_io::ShortIo;
pub use space::{Space, free_clusters};

/// The host calls that a simulator tells apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Op {
    /// `pread`.
    Read,
    /// `pwrite`, `pwritev`.
    Write,
    /// `ftruncate`.
    SetLen,
    /// `fdatasync`.
    Sync,
    /// `close` of one of several descriptors.
    Close,
    /// `fallocate` to zeroes.
    Zero,
    /// `fallocate` to a hole, or a discard.
    Discard,
    /// `fallocate`.
    Allocate,
    /// `lseek` for holes.
    Run,
    /// `FICLONERANGE`.
    Clone,
    /// `sync_file_range`, a hint.
    BeginSync,
    /// `fadvise`, a hint.
    Forget,
}
