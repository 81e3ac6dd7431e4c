//! What is asked of a compaction, and what it tells.

use crate::image::Qcow2;
use crate::{Result, StorageExt};

/// How to compact.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CompactOptions {
    /// Move clusters from the end of the file into free ones.
    pub rewrite: bool,
    /// Give clusters up that hold nothing but zeroes: all data is read.
    pub zeroes: bool,
    /// Change nothing; tell what would be had.
    pub dry_run: bool,
}

/// What a compaction did, or would do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CompactResult {
    /// Length of the image file before, in bytes.
    pub length_before: u64,
    /// Length of the image file afterwards, in bytes.
    pub length_after: u64,
    /// Bytes that the image file, and an external data file, took on the disk before.
    pub allocated_before: u64,
    /// The same afterwards.
    pub allocated_after: u64,
    /// Clusters that nothing referred to.
    pub leaked_clusters: u64,
    /// Clusters given up because they held nothing but zeroes, compressed ones among them.
    pub zero_clusters: u64,
    /// Host clusters that moved.
    pub moved_clusters: u64,
}

impl CompactResult {
    /// Bytes given back to the file system. A file on a system without holes, or whose clusters had none, gives
    /// back what it became shorter.
    pub fn reclaimed(&self) -> u64 {
        self.allocated_before.saturating_sub(self.allocated_after)
    }
}

/// The sizes as they are, as those before a compaction.
pub(super) fn measure(image: &Qcow2) -> Result<CompactResult> {
    let mut allocated = 0;
    for storage in [Some(image.storage()), image.data_file()].into_iter().flatten() {
        allocated += storage.space_in_use()?;
    }
    let length = image.storage().size()?;
    Ok(CompactResult {
        length_before: length,
        length_after: length,
        allocated_before: allocated,
        allocated_after: allocated,
        ..CompactResult::default()
    })
}
