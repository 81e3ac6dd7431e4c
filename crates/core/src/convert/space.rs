//! How much space a copy of a disk takes at most.

use crate::{GuestSource, Job, Result};

/// Guest bytes whose extents are listed at once.
const STEP: u64 = 1 << 30;
/// The number of extents at which a step ends early.
const MOST_EXTENTS: usize = 16 << 10;

/// Bytes of `source` that are not known to read as zeroes, each run of them widened to whole `blocks`.
///
/// # Errors
/// `Aborted` through `job`; what reading the disk's metadata gives.
pub fn data_bytes(source: &dyn GuestSource, block: u64, job: &Job) -> Result<u64> {
    // The progress is that of what follows.
    let job = &job.silent();
    let block = block.max(1);
    let size = source.virtual_size();
    let mut extents = Vec::new();
    let (mut bytes, mut counted, mut start) = (0, 0, 0);
    while start < size {
        job.checkpoint()?;
        extents.clear();
        let end = source.extents_up_to(start, STEP.min(size - start), MOST_EXTENTS, job, &mut extents)?;
        for extent in extents.iter().filter(|extent| !extent.zero) {
            // A block in which two extents meet counts once.
            let first = (extent.start / block * block).max(counted);
            counted = (extent.start + extent.length).next_multiple_of(block).max(counted);
            bytes += counted.saturating_sub(first);
        }
        start = end;
    }
    Ok(bytes)
}
