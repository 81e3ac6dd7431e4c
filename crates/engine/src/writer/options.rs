//! How an image is written to.

use qcow2_transform::Window;

use crate::{DetectZeroes, Discard, DiskOptions};

/// How to write to an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct WriteOptions {
    /// What a guest's discard does.
    pub discard: Discard,
    /// What a write of nothing but zeroes becomes.
    pub detect_zeroes: DetectZeroes,
    /// Flush after every request: cache modes `writethrough` and `directsync`.
    pub flush_each: bool,
    /// Mark the image dirty while it is open, and write refcounts late: QEMU's `lazy-refcounts`. One that is not closed
    /// cleanly is repaired when it is opened again.
    pub lazy_refcounts: bool,
    /// Take the first free clusters in the order in which requests need them, and reserve none ahead: files are laid out as QEMU
    /// lays them out. Slower: each flush of new data syncs twice, a request that frees something is flushed, and neighbours of the guest
    /// need not be neighbours in the file.
    pub first_fit: bool,
    /// Level of compressed writes; the codec's default without one.
    pub compression_level: Option<u32>,
    /// Window of a zlib stream.
    pub compression_window: Window,
}

impl From<&WriteOptions> for DiskOptions {
    fn from(options: &WriteOptions) -> Self {
        let &WriteOptions { discard, detect_zeroes, flush_each, .. } = options;
        Self { discard, detect_zeroes, flush_each }
    }
}
