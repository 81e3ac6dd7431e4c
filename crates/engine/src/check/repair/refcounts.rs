//! Writing single refcounts in place.

use qcow2_format::refcount;

use super::super::compare::Fix;
use super::super::counts::ReferenceCounts;
use super::super::stored::{Block, StoredRefcounts};
use super::super::target::{Stop, Target};
use super::bytes;
use crate::StorageExt;

/// Gives every cluster whose block exists the refcount that `fix` allows, and makes that durable.
pub(super) fn write(
    target: &Target<'_>,
    stored: &mut StoredRefcounts<'_>,
    counts: &ReferenceCounts,
    fix: Fix,
) -> Result<(), Stop> {
    let geometry = &target.header.geometry;
    let (entries, order) = (geometry.refcount_block_entries(), geometry.refcount_order());
    let mut written = false;
    for index in 0..counts.clusters().div_ceil(entries) {
        target.job.checkpoint()?;
        let first = index * entries;
        let end = (first + entries).min(counts.clusters());
        let Block::Present(block) = stored.block(index)? else { continue };
        let mut changed: Option<Vec<u8>> = None;
        for cluster in first..end {
            let place = (cluster - first) as usize;
            let old = refcount::get(block, place, order).unwrap_or(0);
            let new = fix.target(old, counts.get(cluster));
            if new != old {
                let bytes = changed.get_or_insert_with(|| block.to_vec());
                // A count never exceeds what a refcount can hold.
                let _ = refcount::set(bytes, place, order, new);
            }
        }
        if let (Some(bytes), Some(offset)) = (changed, stored.block_offset(index)) {
            bytes::write(target.storage, &bytes, offset)?;
            stored.forget_block();
            written = true;
        }
    }
    if written {
        target.storage.flush()?;
    }
    Ok(())
}

/// Gives one cluster, whose block exists, a refcount.
pub(super) fn set(
    target: &Target<'_>,
    stored: &mut StoredRefcounts<'_>,
    cluster: u64,
    refcount: u64,
) -> Result<(), Stop> {
    let geometry = &target.header.geometry;
    let index = geometry.refcount_table_index(cluster);
    let (Block::Present(block), order) = (stored.block(index)?, geometry.refcount_order()) else {
        return Ok(());
    };
    let mut bytes = block.to_vec();
    let _ = refcount::set(&mut bytes, geometry.refcount_block_index(cluster) as usize, order, refcount);
    if let Some(offset) = stored.block_offset(index) {
        bytes::write(target.storage, &bytes, offset)?;
        stored.forget_block();
    }
    Ok(())
}
