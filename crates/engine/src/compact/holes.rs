//! Holes in the file for free host clusters.

use super::space::preallocated;
use crate::maintenance::Session;
use crate::{Job, Result, Storage, StorageExt};

/// Clusters looked at between two looks at the job.
const STEP: u64 = 1 << 14;

impl Session<'_> {
    /// Punches a hole for every run of free host clusters that has space in the file.
    pub(super) fn punch_free(&self, job: &Job) -> Result<()> {
        let g = self.geometry();
        let storage = &**self.image.storage();
        let length = storage.size()?;
        let all = preallocated(storage)? > 0;
        let free = |offset, length| storage.free(offset, length);
        let clusters = length / g.cluster_size();
        let mut at = 0;
        while at < clusters {
            job.checkpoint()?;
            let stop = (at + STEP).min(clusters);
            job.advance((stop - at) * g.cluster_size());
            while at < stop {
                let (run, next) = self.writer.with_alloc(|alloc, _| alloc.find_free(at, stop))?;
                if let Some((first, count)) = run {
                    self.free_run(storage, first * g.cluster_size(), count * g.cluster_size(), all, &free)?;
                }
                at = next.max(at + 1);
            }
        }
        Ok(())
    }

    /// Frees where there is something: a hole costs a change of the file system's own tables. `all` of it, where space can be taken that
    /// the file system calls a hole.
    pub(super) fn free_run(
        &self,
        storage: &dyn Storage,
        start: u64,
        length: u64,
        all: bool,
        free: &dyn Fn(u64, u64) -> Result<()>,
    ) -> Result<()> {
        if all {
            return free(start, length);
        }
        let end = start + length;
        let mut at = start;
        while at < end {
            let run = storage.run(at..end)?;
            let stop = run.end.clamp(at + 1, end);
            if run.data {
                let size = self.geometry().cluster_size();
                let first = at - at % size;
                let last = stop.next_multiple_of(size).min(end);
                free(first, last - first)?;
                at = last;
            } else {
                at = stop;
            }
        }
        Ok(())
    }
}
