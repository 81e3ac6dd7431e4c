//! The structures that a rebuild replaced: nothing but them was in their clusters, so they are free whatever else is wrong.

use std::ops::Range;

use super::super::snapshots::SnapshotTable;
use super::super::stored::StoredRefcounts;
use super::super::target::{Stop, Target};
use super::super::walk::Walked;
use super::refcounts;
use crate::StorageExt;
use qcow2_core::check::Tally;

/// Where the header's structures were before a rebuild.
pub(super) struct Former {
    /// Bytes of the snapshot table.
    pub(super) snapshots: Range<u64>,
    /// Clusters of the refcount table, its blocks and the snapshot table.
    clusters: Vec<u64>,
}

/// The structures that a rebuild is about to replace.
pub(super) fn structures(
    target: &Target<'_>,
    snapshots: &SnapshotTable,
    stored: &StoredRefcounts<'_>,
) -> Former {
    let header = target.header;
    let geometry = &header.geometry;
    let table = header.snapshots_offset.get();
    let snapshots = table..table.saturating_add(snapshots.length);
    let refcount_table = geometry.cluster_index(header.refcount_table_offset.get());
    let blocks = (0..stored.table().len() as u64).filter_map(|index| stored.block_offset(index));
    let mut clusters: Vec<u64> = blocks.map(|offset| geometry.cluster_index(offset)).collect();
    clusters.extend(refcount_table..refcount_table + u64::from(header.refcount_table_clusters));
    if snapshots.end > snapshots.start {
        clusters
            .extend(geometry.cluster_index(snapshots.start)..geometry.cluster_index(snapshots.end - 1) + 1);
    }
    clusters.sort_unstable();
    clusters.dedup();
    Former { snapshots, clusters }
}

/// Frees those that nothing refers to any more. The header that no longer names them must be durable.
pub(super) fn free(
    target: &Target<'_>,
    former: &Former,
    stored: &mut StoredRefcounts<'_>,
    walked: &Walked,
    tally: &mut Tally,
) -> Result<(), Stop> {
    let geometry = &target.header.geometry;
    let mut written = false;
    for &cluster in former.clusters.iter().filter(|&&c| c < walked.counts.clusters()) {
        // A higher refcount tells of another reference, which damage may hide.
        if walked.counts.exact(cluster) != Some(0) || stored.get(cluster)? != Some(1) {
            continue;
        }
        target.job.checkpoint()?;
        refcounts::set(target, stored, cluster, 0)?;
        written = true;
        tally.fixed_leak(cluster << geometry.cluster_bits(), || {
            format!("cluster {cluster} refcount=1 reference=0")
        });
    }
    if written {
        target.storage.flush()?;
    }
    Ok(())
}
