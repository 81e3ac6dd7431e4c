//! Which COPIED flags are wrong.

use qcow2_format::L2Entry;

use super::super::compare::Fix;
use super::super::stored::StoredRefcounts;
use super::super::target::{Stop, Target};
use super::super::walk::Walked;
use super::metadata::Metadata;
use crate::{MemMut, StorageExt};
use qcow2_core::check::Tally;

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

impl Flags<'_, '_, '_> {
    /// The refcount that a cluster has when the repair is done; `None` where it cannot be known.
    pub(super) fn refcount(&mut self, offset: u64) -> Result<Option<u64>, Stop> {
        let cluster = self.target.header.geometry.cluster_index(offset);
        let stored = self.stored.get(cluster)?;
        let counts = &self.walked.counts;
        let counted = (cluster < counts.clusters()).then(|| counts.get(cluster));
        Ok(stored.map(|stored| counted.map_or(stored, |counted| self.fix.target(stored, counted))))
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
