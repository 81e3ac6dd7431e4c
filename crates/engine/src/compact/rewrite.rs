//! Moving clusters from the end of the file into free ones further down.
//!
//! In passes, each with a bound: what lies behind it moves below it. First the structures that must be contiguous, then
//! L2 tables, then what the tables refer to ([`sweep`](super::sweep)). The bound is the number of clusters in
//! use: were there no structures of several clusters, that many would do. What found no room moves in the next
//! pass, which has more; passes end when the file gets no shorter.
//!
//! A cluster that several entries refer to moves once; its new place is remembered until the last of them was seen.
//! Everything else is known from one entry: memory is bounded by what is shared, and by one batch.

use super::options::CompactResult;
use super::sweep::Sweep;
use crate::maintenance::Session;
use crate::{Job, Result};

/// Most passes. Two do nearly always.
const PASSES: usize = 8;

impl Session<'_> {
    /// Makes the file short.
    pub(super) fn rewrite(&self, job: &Job, result: &mut CompactResult) -> Result<()> {
        let mut progress = result.length_before;
        for _ in 0..PASSES {
            self.writer.restart_allocation(self.image)?;
            let (used, end) = self.extent()?;
            if used >= end {
                break;
            }
            let before = result.moved_clusters;
            let moved = self.pass(used, job, &mut progress, result);
            // Also after a cancellation: what moved is freed, and the file cut.
            self.free_now()?;
            self.writer.drop_blocks(self.image, used)?;
            self.writer.restart_allocation(self.image)?;
            moved?;
            if self.extent()?.1 >= end && result.moved_clusters == before {
                break;
            }
        }
        job.advance(progress);
        Ok(())
    }

    /// Clusters in use, and the end of the last one.
    fn extent(&self) -> Result<(u64, u64)> {
        self.writer.with_alloc(|alloc, _| {
            let end = alloc.end();
            let mut used = 0;
            let mut at = 0;
            while at < end {
                let (free, next) = alloc.find_free(at, end)?;
                used += free.map_or(end, |run| run.0) - at;
                at = free.map_or(end, |_| next);
            }
            Ok((used, end))
        })
    }

    fn pass(&self, bound: u64, job: &Job, progress: &mut u64, result: &mut CompactResult) -> Result<()> {
        result.moved_clusters += self.move_structures(bound, job)?;
        result.moved_clusters += self.move_l2_tables(bound, job)?;
        let mut sweep = Sweep::new(self, bound)?;
        let swept = sweep.all(job, progress);
        result.moved_clusters += sweep.moved();
        swept
    }
}
