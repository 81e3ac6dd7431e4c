//! How a disk is written to.

/// What a guest's discard does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Discard {
    /// Nothing.
    #[default]
    Ignore,
    /// Frees the clusters, and their space in the file system.
    Unmap,
}

/// What a write of nothing but zeroes becomes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DetectZeroes {
    /// A write of data.
    #[default]
    Off,
    /// A write of zeroes that keeps clusters allocated.
    On,
    /// A write of zeroes that gives clusters up.
    Unmap,
}

/// How a disk of any format is written to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DiskOptions {
    /// What a guest's discard does.
    pub discard: Discard,
    /// What a write of nothing but zeroes becomes.
    pub detect_zeroes: DetectZeroes,
    /// Flush after every request: cache modes `writethrough` and `directsync`.
    pub flush_each: bool,
}
