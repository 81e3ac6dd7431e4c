//! How much space a copy of a disk takes at most.

use std::ops::ControlFlow;

use crate::walk::{Steps, for_each_extent};
use crate::{GuestSource, Job, Result};

/// How much is listed at once: more over holes.
const STEPS: Steps = Steps::growing(1 << 30, 1 << 40, 16 << 10);

/// Bytes of `source` that are not known to read as zeroes, each run of them widened to whole `blocks`.
///
/// # Errors
/// `Aborted` through `job`; what reading the disk's metadata gives.
pub fn data_bytes(source: &dyn GuestSource, block: u64, job: &Job) -> Result<u64> {
    // The progress is that of what follows.
    let job = &job.silent();
    let block = block.max(1);
    let (mut bytes, mut counted) = (0, 0);
    for_each_extent(source, 0..source.virtual_size(), STEPS, job, |extent| {
        if !extent.zero {
            // A block in which two extents meet counts once.
            let first = (extent.start / block * block).max(counted);
            counted = (extent.start + extent.length).next_multiple_of(block).max(counted);
            bytes += counted.saturating_sub(first);
        }
        Ok(ControlFlow::Continue(()))
    })?;
    Ok(bytes)
}
