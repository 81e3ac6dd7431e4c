//! Where the metadata is that L2 tables must not share a cluster with.

use std::ops::Range;

use qcow2_format::header::feature::Autoclear;
use qcow2_format::limits::MAX_L1_BYTES;

use super::super::snapshots::SnapshotTable;
use super::super::stored::StoredRefcounts;
use super::super::target::Target;
use crate::Result;

/// Clusters of the header, the L1 tables, the refcount structures, the snapshot table, the bitmap directory and the
/// encryption header: a write to an L2 table that lies on one of them would destroy more than it repairs.
pub(super) struct Metadata {
    /// Sorted by start.
    ranges: Vec<Range<u64>>,
}

impl Metadata {
    pub(super) fn of(
        target: &Target<'_>,
        snapshots: &SnapshotTable,
        stored: &StoredRefcounts<'_>,
    ) -> Result<Self> {
        let header = target.header;
        let geometry = &header.geometry;
        let size = geometry.cluster_size();
        let mut regions = vec![
            (0, size),
            (header.l1_table_offset.get(), u64::from(header.l1_size) * 8),
            (header.refcount_table_offset.get(), u64::from(header.refcount_table_clusters) * size),
            (header.snapshots_offset.get(), snapshots.length),
        ];
        regions.extend(header.crypto_header().map(|(offset, length)| (offset.get(), length)));
        let bitmaps = header.bitmaps().filter(|_| header.autoclear.contains(Autoclear::BITMAPS));
        regions.extend(bitmaps.map(|b| (b.directory_offset.get(), b.directory_size)));
        // A table that is too large to be one would cover everything.
        let l1_tables = snapshots.entries.iter().map(|s| (s.l1_offset, u64::from(s.l1_size) * 8));
        regions.extend(l1_tables.filter(|(_, length)| *length <= MAX_L1_BYTES));
        regions.extend(stored.table().iter().filter(|e| e.0 != 0).map(|e| (e.offset_bits(), size)));
        let mut ranges: Vec<_> = regions
            .into_iter()
            .filter(|(_, length)| *length > 0)
            .map(|(offset, length)| {
                let end = offset.saturating_add(length - 1);
                geometry.cluster_index(offset)..geometry.cluster_index(end) + 1
            })
            .collect();
        ranges.sort_unstable_by_key(|r| r.start);
        // Merged, so that the one range that starts at or before a cluster is the only one that can cover it.
        let mut merged: Vec<Range<u64>> = Vec::with_capacity(ranges.len());
        for range in ranges {
            match merged.last_mut().filter(|last| range.start <= last.end) {
                Some(last) => last.end = last.end.max(range.end),
                None => merged.push(range),
            }
        }
        Ok(Self { ranges: merged })
    }

    /// Whether the cluster is one of them.
    pub(super) fn covers(&self, cluster: u64) -> bool {
        let index = self.ranges.partition_point(|r| r.start <= cluster);
        index.checked_sub(1).and_then(|i| self.ranges.get(i)).is_some_and(|r| r.contains(&cluster))
    }
}
