//! COPIED flags: set exactly where a cluster has one reference.

use qcow2_format::{L1Entry, L2Entry};

use super::super::compare::Fix;
use super::super::report::{FindingCode, Tally};
use super::super::stored::StoredRefcounts;
use super::super::walk::Walked;
use super::super::{Stop, Target};
use super::detach::detach;
use super::metadata::Metadata;
use crate::{MemMut, StorageExt};

/// L1 entries that are read at once.
const WINDOW: u64 = 1 << 13;

/// Entries with a wrong flag, and the refcounts of their clusters.
type Wrong = Vec<(L2Entry, u64)>;

pub(super) struct Flags<'a, 'b, 'c> {
    pub(super) target: &'a Target<'a>,
    pub(super) stored: &'b mut StoredRefcounts<'c>,
    pub(super) walked: &'b mut Walked,
    pub(super) fix: Fix,
    pub(super) metadata: &'b Metadata,
    pub(super) tally: &'b mut Tally,
}

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
                super::write(storage, &new.to_bytes(), l1 + index * 8)?;
                storage.flush()?;
                entry = new;
            }
            if let Some(new) = flags.l1_entry(index, entry, repair && own)? {
                super::write(storage, &new.to_bytes(), l1 + index * 8)?;
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
    /// The refcount that a cluster has when the repair is done; `None` where it cannot be known.
    fn refcount(&mut self, offset: u64) -> Result<Option<u64>, Stop> {
        let cluster = self.target.header.geometry.cluster_index(offset);
        let stored = self.stored.get(cluster)?;
        let counts = &self.walked.counts;
        let counted = (cluster < counts.clusters()).then(|| counts.get(cluster));
        Ok(stored.map(|stored| counted.map_or(stored, |counted| self.fix.target(stored, counted))))
    }

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
        super::write(self.target.storage, &table, offset)?;
        Ok(true)
    }

    /// The L2 table at `offset` with its flags as they must be, and the entries that have another one, with their
    /// refcount.
    pub(super) fn judge(&mut self, offset: u64) -> Result<(Vec<u8>, Wrong), Stop> {
        let header = self.target.header;
        let geometry = &header.geometry;
        let mut table = vec![0; geometry.cluster_len()];
        self.target.storage.read_padded_at(MemMut::from(&mut table[..]), offset)?;
        let mut found = Vec::new();
        for bytes in table.chunks_exact_mut(geometry.l2_entry_size() as usize) {
            let entry = L2Entry::read(bytes);
            let external = header.has_data_file();
            if entry.word == 0
                || entry.is_compressed()
                || (entry.offset_bits() == 0 && !(external && entry.copied()))
            {
                continue;
            }
            // Clusters of an external data file have no refcounts: exactly one reference, by definition.
            let refcount = if external { Some(1) } else { self.refcount(entry.offset_bits())? };
            if let Some(refcount) = refcount.filter(|r| (*r == 1) != entry.copied()) {
                entry.with_copied(!entry.copied()).write(bytes);
                found.push((entry, refcount));
            }
        }
        Ok((table, found))
    }
}
