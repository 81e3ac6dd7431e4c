//! What is remembered while refcounts change beside those in the file.

/// What a fork needs to become the image's refcounts, or to be forgotten.
#[derive(Debug)]
pub(super) struct Fork {
    /// The refcount table in the file.
    pub(super) former: Vec<u64>,
    /// Behind everything in use, and the length of the file, when the fork began.
    pub(super) end: u64,
    pub(super) length: u64,
    /// Reservations that were taken: first and number of clusters.
    pub(super) taken: Vec<(u64, u64)>,
    /// Free clusters inside the file that were taken, and had no space.
    pub(super) holes: Vec<u64>,
    /// No cluster below is free both in the file and in the fork.
    pub(super) search: u64,
    /// The block of the file that was looked at last, with its index.
    pub(super) looked_at: Option<(u64, Vec<u8>)>,
    /// First and number of clusters of the new table.
    pub(super) table: Option<(u64, u64)>,
}

impl Fork {
    /// Host offset of the block with this index in the file; 0 if there is none.
    pub(super) fn former(&self, index: u64) -> u64 {
        self.former.get(index as usize).copied().unwrap_or(0)
    }
}
