//! COPIED flags: set exactly where a cluster has one reference.

use qcow2_format::L1Entry;

use super::super::target::Stop;
use super::bytes::write;
use super::detach::detach;
use super::judge::Flags;
use crate::{MemMut, StorageExt};
use qcow2_core::check::FindingCode;

/// L1 entries that are read at once.
const WINDOW: u64 = 1 << 13;

/// Judges the flags of the active L1 table and its L2 tables by the refcounts as they will be, and corrects them if
/// `repair`. Durable on return.
pub(super) fn check(flags: &mut Flags<'_, '_, '_>, repair: bool) -> Result<(), Stop> {
    let header = flags.target.header;
    let storage = flags.target.storage;
    let (l1, entries) = (header.l1_table_offset.get(), u64::from(header.l1_size));
    let mut written = false;
    for start in (0..entries).step_by(WINDOW as usize) {
        let mut window = vec![0; (entries - start).min(WINDOW) as usize * 8];
        storage.read_padded_at(MemMut::from(&mut window[..]), l1 + start * 8)?;
        for (index, entry) in (start..).zip(L1Entry::entries(&window)) {
            if entry.offset_bits() == 0 {
                continue;
            }
            flags.target.job.checkpoint()?;
            // Where the table shares a cluster with something else, its entries may be that.
            let own = flags.walked.counts.exact(header.geometry.cluster_index(l1 + index * 8)) == Some(1);
            let mut entry = entry;
            if repair
                && own
                && let Some(new) = detach(flags, entry)?
            {
                write(storage, &new.to_bytes(), l1 + index * 8)?;
                storage.flush()?;
                entry = new;
            }
            if let Some(new) = flags.l1_entry(index, entry, repair && own)? {
                write(storage, &new.to_bytes(), l1 + index * 8)?;
                written = true;
            }
            written |= flags.table(entry.offset_bits(), repair)?;
        }
    }
    if written {
        storage.flush()?;
    }
    Ok(())
}

impl Flags<'_, '_, '_> {
    fn l1_entry(&mut self, index: u64, entry: L1Entry, repair: bool) -> Result<Option<L1Entry>, Stop> {
        let offset = entry.offset_bits();
        let Some(refcount) = self.refcount(offset)?.filter(|r| (*r == 1) != entry.copied()) else {
            return Ok(None);
        };
        let message = || {
            format!("OFLAG_COPIED L2 cluster: l1_index={index} l1_entry={:x} refcount={refcount}", entry.0)
        };
        if !repair {
            self.tally.corruption(FindingCode::L1Copied, offset, message);
            return Ok(None);
        }
        self.tally.fixed_corruption(FindingCode::L1Copied, offset, message);
        Ok(Some(entry.with_copied(!entry.copied())))
    }

    /// Judges one L2 table; true if it was written. A table that is not where a table can be is left alone: its
    /// bytes are something else's.
    fn table(&mut self, offset: u64, repair: bool) -> Result<bool, Stop> {
        let header = self.target.header;
        let geometry = &header.geometry;
        if geometry.in_cluster(offset) != 0 || offset >= self.target.storage.size()? {
            return Ok(false);
        }
        let (table, found) = self.judge(offset)?;
        let cluster = geometry.cluster_index(offset);
        let possible = !self.metadata.covers(cluster);
        // Where something else refers to the cluster too, its bytes may be guest data.
        let repair = repair && self.walked.is_table_alone(cluster);
        for (entry, refcount) in &found {
            let at = entry.offset_bits();
            let message =
                || format!("OFLAG_COPIED data cluster: l2_entry={:x} refcount={refcount}", entry.word);
            if repair && possible {
                self.tally.fixed_corruption(FindingCode::L2Copied, at, message);
            } else {
                self.tally.corruption(FindingCode::L2Copied, at, message);
            }
        }
        if found.is_empty() || !repair {
            return Ok(false);
        }
        if !possible {
            self.tally.check_error(FindingCode::L2Copied, offset, || {
                "ERROR: Could not write L2 table; metadata overlap check failed".into()
            });
            return Ok(false);
        }
        write(self.target.storage, &table, offset)?;
        Ok(true)
    }
}
