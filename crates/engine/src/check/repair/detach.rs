//! L2 tables whose cluster something else refers to as well: an entry was damaged so that it leads to a table. What is a
//! wrong flag in the table is guest data elsewhere, so the table moves out before a flag is corrected.

use qcow2_format::{HostOffset, L1Entry};

use super::super::stored::Block;
use super::super::target::Stop;
use super::bytes::write;
use super::judge::Flags;
use super::refcounts;
use crate::{MemMut, StorageExt};

/// Clusters behind the end of the file that are looked at: the first ones may be leaked.
const GROWTH: u64 = 64;

/// Copies the table of an active L1 entry to a cluster of its own, if it shares its cluster with what is no table and has
/// flags to correct; gives the entry that refers to the copy, which is durable. None also where no cluster is free.
pub(super) fn detach(flags: &mut Flags<'_, '_, '_>, entry: L1Entry) -> Result<Option<L1Entry>, Stop> {
    let header = flags.target.header;
    let geometry = &header.geometry;
    let storage = flags.target.storage;
    let old = entry.offset_bits();
    let cluster = geometry.cluster_index(old);
    let is_table = geometry.in_cluster(old) == 0 && flags.walked.tables.get(&cluster).is_some_and(|n| *n > 0);
    if !is_table || flags.walked.is_table_alone(cluster) || flags.metadata.covers(cluster) {
        return Ok(None);
    }
    if flags.judge(old)?.1.is_empty() {
        return Ok(None);
    }
    let Some(free) = find_free(flags)? else { return Ok(None) };
    let mut bytes = vec![0; geometry.cluster_len()];
    storage.read_padded_at(MemMut::from(&mut bytes[..]), old)?;
    let new = free << geometry.cluster_bits();
    write(storage, &bytes, new)?;
    refcounts::set(flags.target, flags.stored, free, 1)?;
    storage.flush()?;
    flags.walked.move_table(cluster, free)?;
    Ok(Some(entry.with_table(HostOffset(new))))
}

/// A cluster inside the file that nothing refers to and nothing counts.
fn find_free(flags: &mut Flags<'_, '_, '_>) -> Result<Option<u64>, Stop> {
    let geometry = flags.target.header.geometry;
    let clear = flags.walked.uncounted.clusters();
    // The file may grow a little where nothing leads behind its end.
    let inside = geometry.clusters_for(flags.target.storage.size()?);
    let end = if clear.is_empty() { inside + GROWTH } else { inside };
    for cluster in 0..end {
        flags.target.job.checkpoint()?;
        let unused = flags.walked.counts.get(cluster) == 0
            && !flags.metadata.covers(cluster)
            && !clear.iter().any(|range| range.contains(&cluster))
            && flags.stored.get(cluster)? == Some(0);
        let counted = |block: Block<'_>| matches!(block, Block::Present(_));
        if unused && counted(flags.stored.block(geometry.refcount_table_index(cluster))?) {
            return Ok(Some(cluster));
        }
    }
    Ok(None)
}
