//! Refcounts of clusters that follow each other: a block is looked up once for all that it counts. Snapshots count the references of
//! whole disks.

use std::ops::Range;

use qcow2_format::{Geometry, refcount};

use super::allocator::Allocator;
use super::overlap::MetadataMap;
use super::refcounts::{PIECE, Refcounts};
use crate::Result;

/// The parts of a run that one block counts each.
fn by_block(g: Geometry, run: Range<u64>) -> impl Iterator<Item = Range<u64>> {
    let mut at = run.start;
    std::iter::from_fn(move || {
        let start = at;
        let block = g.refcount_table_index(start);
        at = block.saturating_add(1).saturating_mul(g.refcount_block_entries()).min(run.end);
        (start < run.end).then_some(start..at)
    })
}

impl Refcounts {
    /// Calls `visit` with each cluster of the run and its refcount.
    pub(crate) fn for_counts(&mut self, run: Range<u64>, mut visit: impl FnMut(u64, u64)) -> Result<()> {
        let g = self.geometry;
        for part in by_block(g, run) {
            let block = self.block(part.start)?.map(|block| block.bytes.as_slice()).unwrap_or_default();
            let first = g.refcount_block_index(part.start) as usize;
            for (index, cluster) in (first..).zip(part) {
                visit(cluster, refcount::get(block, index, g.refcount_order()).unwrap_or(0));
            }
        }
        Ok(())
    }

    /// [`Refcounts::increment`] or [`Refcounts::decrement`] for each cluster of the run.
    fn count_run(&mut self, run: Range<u64>, more: bool) -> Result<()> {
        for part in by_block(self.geometry, run) {
            let counted = self.count_part(part.clone(), more)?;
            // What is special about one of them is for those who tell it.
            for cluster in counted..part.end {
                if more { self.increment(cluster) } else { self.decrement(cluster) }?;
            }
        }
        Ok(())
    }

    /// Counts the clusters at the start of the part of a run for which that is possible; returns the first for which it is not.
    fn count_part(&mut self, part: Range<u64>, more: bool) -> Result<u64> {
        let g = self.geometry;
        let order = g.refcount_order();
        if !self.may_change(g.refcount_table_index(part.start)) {
            return Ok(part.start);
        }
        let Some(block) = self.block(part.start)? else { return Ok(part.start) };
        let first = g.refcount_block_index(part.start) as usize;
        let mut index = first;
        for _ in part.clone() {
            let count = refcount::get(&block.bytes, index, order).unwrap_or(0);
            let next = if more { count.checked_add(1) } else { count.checked_sub(1) };
            if next.and_then(|next| refcount::set(&mut block.bytes, index, order, next)).is_none() {
                break;
            }
            index += 1;
        }
        let mut waiting = 0;
        if index > first {
            let piece = |index: usize| (index << order) / 8 / PIECE;
            for piece in piece(first)..=piece(index - 1) {
                waiting += if block.dirty.insert(piece) { PIECE } else { 0 };
            }
        }
        self.waiting += waiting;
        Ok(part.start + (index - first) as u64)
    }
}

impl Allocator {
    /// [`Allocator::count_beside`] for each cluster of the run.
    pub(crate) fn count_run_beside(
        &mut self,
        run: Range<u64>,
        more: bool,
        metadata: &MetadataMap,
    ) -> Result<()> {
        for part in by_block(self.geometry, run) {
            self.fork_for(part.start, metadata)?;
            self.refcounts.count_run(part, more)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;
    use qcow2_format::Geometry;

    use super::*;
    use crate::storage::MemoryStorage;
    use crate::{Storage, StorageExt};

    /// Blocks of 512 bytes, the last of which there is not.
    fn refcounts(order: u32) -> Refcounts {
        let geometry = Geometry::new(9, order, false).unwrap();
        let storage = MemoryStorage::new();
        storage.resize(16 * geometry.cluster_size()).unwrap();
        Refcounts::of_blocks(&(Arc::new(storage) as Arc<dyn Storage>), geometry, 1, [2, 3, 4])
    }

    proptest! {
        /// As one by one: counts, what waits to be written, and the first error.
        #[test]
        fn runs_count_as_their_clusters_do(
            order in 0u32..7, runs in proptest::collection::vec((0u64..10_000, 1u64..3000, any::<bool>()), 1..12)
        ) {
            let (mut by_run, mut one_by_one) = (refcounts(order), refcounts(order));
            let end = 3 * by_run.geometry.refcount_block_entries() + 10;
            for (start, length, more) in runs {
                let run = start % end..(start % end + length).min(end);
                let each = |refcounts: &mut Refcounts| run.clone().try_for_each(|cluster| {
                    if more { refcounts.increment(cluster) } else { refcounts.decrement(cluster) }.map(drop)
                });
                let expected = each(&mut one_by_one).map_err(|e| e.to_string());
                prop_assert_eq!(by_run.count_run(run.clone(), more).map_err(|e| e.to_string()), expected);
                prop_assert_eq!(by_run.waiting_bytes(), one_by_one.waiting_bytes());
            }
            let mut found = Vec::new();
            by_run.for_counts(0..end, |cluster, count| found.push((cluster, count))).unwrap();
            for (cluster, count) in found {
                prop_assert_eq!(count, one_by_one.get(cluster).unwrap(), "cluster {}", cluster);
            }
        }
    }
}
