//! New refcount structures, from the counted references alone.
//!
//! They are written to clusters that nothing refers to and that the old structures, as far as they can be read, do not
//! count either. Until the header names them they are unused bytes: a crash before leaves the old image, a crash
//! behind the new one. The old structures are counted in the new ones, and freed later as any other leak.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use qcow2_format::header::field::{self, Patch};
use qcow2_format::limits::{MAX_REFCOUNT_TABLE_BYTES, MAX_SNAPSHOT_TABLE_BYTES};
use qcow2_format::refcount::{self, RefcountTableEntry};
use qcow2_format::{Geometry, Header, HostOffset};

use super::super::compare::Fix;
use super::super::counts::ReferenceCounts;
use super::super::snapshots::SnapshotTable;
use super::super::stored::StoredRefcounts;
use super::super::target::{Stop, Target};
use super::super::uncounted::Uncounted;
use super::super::walk::Walked;
use super::bytes;
use crate::invalid::invalid;
use crate::patch::write_patch;
use crate::{Error, ErrorKind, StorageExt};

/// Extra data of an entry that is written anew.
const EXTRA_DATA: u32 = 24;

pub(super) struct Builder<'a, 'b, 'c> {
    target: &'a Target<'a>,
    stored: &'b mut StoredRefcounts<'c>,
    counts: &'b ReferenceCounts,
    uncounted: &'b Uncounted,
    /// Clusters that something refers to without being counted: the structures must not come to lie there.
    kept_clear: Vec<Range<u64>>,
    /// Of those, the ones that count when the structures are in the file, and their references.
    inside: BTreeMap<u64, u64>,
    fix: Fix,
    /// Of the new structures.
    geometry: Geometry,
    /// Clusters that were taken, and their refcounts.
    taken: BTreeMap<u64, u64>,
    /// Where the search for free clusters goes on.
    next: u64,
    /// Clusters of the old refcount table, which the header names until the switch.
    old_table: Range<u64>,
}

/// Writes the structures, and a new snapshot table if the old one is damaged, and switches the header to them. Returns
/// the new header.
pub(super) fn rebuild(
    target: &Target<'_>,
    snapshots: &SnapshotTable,
    stored: &mut StoredRefcounts<'_>,
    walked: &Walked,
    fix: Fix,
) -> Result<Header, Stop> {
    let mut header = target.header.clone();
    let mut builder = Builder::new(target, stored, walked, fix, header.geometry);
    if snapshots.damaged > 0 {
        builder.snapshot_table(snapshots, &mut header)?;
    } else {
        header.nb_snapshots = snapshots.entries.len() as u32;
    }
    builder.structures(&mut header)?;
    switch(target, &header)?;
    Ok(header)
}

/// Switches the header to new structures, in one write inside one sector: they appear together.
pub(super) fn switch(target: &Target<'_>, header: &Header) -> Result<(), Stop> {
    let patch = Patch::new()
        .set(field::REFCOUNT_TABLE_OFFSET, header.refcount_table_offset)
        .set(field::REFCOUNT_TABLE_CLUSTERS, header.refcount_table_clusters)
        .set(field::NB_SNAPSHOTS, header.nb_snapshots)
        .set(field::SNAPSHOTS_OFFSET, header.snapshots_offset);
    write_patch(target.storage, &header.steady(), &patch)?;
    target.storage.flush()?;
    Ok(())
}

impl<'a, 'b, 'c> Builder<'a, 'b, 'c> {
    pub(super) fn new(
        target: &'a Target<'a>,
        stored: &'b mut StoredRefcounts<'c>,
        walked: &'b Walked,
        fix: Fix,
        geometry: Geometry,
    ) -> Self {
        let Walked { counts, uncounted, .. } = walked;
        let (kept_clear, inside) = (uncounted.clusters(), BTreeMap::new());
        let old = target.header.geometry.cluster_index(target.header.refcount_table_offset.get());
        let old_table = old..old + u64::from(target.header.refcount_table_clusters);
        Self {
            target,
            stored,
            counts,
            uncounted,
            kept_clear,
            inside,
            fix,
            geometry,
            taken: BTreeMap::new(),
            next: 0,
            old_table,
        }
    }

    /// Writes all refcount structures, makes them durable, and enters their place into `header`.
    pub(super) fn structures(&mut self, header: &mut Header) -> Result<(), Stop> {
        let (blocks, table, table_clusters) = self.place()?;
        self.write(&blocks, table)?;
        self.target.storage.flush()?;
        header.refcount_table_offset = HostOffset(table << self.geometry.cluster_bits());
        header.refcount_table_clusters = table_clusters;
        Ok(())
    }

    /// Takes one free cluster that gets `refcount`.
    pub(super) fn take_one(&mut self, refcount: u64) -> Result<u64, Stop> {
        let cluster = self.take(1)?;
        self.taken.insert(cluster, refcount);
        Ok(cluster)
    }

    /// The refcount that a cluster gets.
    fn refcount(&mut self, cluster: u64) -> Result<u64, Stop> {
        if let Some(refcount) = self.taken.get(&cluster) {
            return Ok(*refcount);
        }
        let counted = match self.inside.get(&cluster) {
            // As the walk counts them: up to what a refcount can hold.
            Some(more) => (self.counts.get(cluster).saturating_add(*more)).min(self.geometry.refcount_max()),
            None => self.counts.get(cluster),
        };
        if self.fix.leaks {
            return Ok(counted);
        }
        // Damage elsewhere may hide references: what was in use stays in use.
        Ok(self.stored.get(cluster)?.map_or(counted, |stored| stored.max(counted)))
    }

    fn is_free(&mut self, cluster: u64) -> Result<bool, Stop> {
        Ok(self.counts.get(cluster) == 0
            && !self.taken.contains_key(&cluster)
            && !self.is_kept_clear(cluster)
            && !self.old_table.contains(&cluster)
            && self.stored.get(cluster)?.is_none_or(|stored| stored == 0))
    }

    fn is_kept_clear(&self, cluster: u64) -> bool {
        let behind = self.kept_clear.partition_point(|range| range.start <= cluster);
        let range = behind.checked_sub(1).and_then(|index| self.kept_clear.get(index));
        range.is_some_and(|range| range.contains(&cluster))
    }

    /// Takes `count` contiguous free clusters; returns the first.
    fn take(&mut self, count: u64) -> Result<u64, Stop> {
        let (mut start, mut length) = (self.next, 0);
        while length < count {
            self.target.job.checkpoint()?;
            if self.is_free(start + length)? {
                length += 1;
            } else {
                start += length + 1;
                length = 0;
            }
        }
        if count == 1 {
            self.next = start + 1;
        }
        self.taken.extend((start..start + count).map(|cluster| (cluster, 1)));
        Ok(start)
    }

    pub(super) fn snapshot_table(
        &mut self,
        snapshots: &SnapshotTable,
        header: &mut Header,
    ) -> Result<(), Stop> {
        let mut bytes = Vec::new();
        for record in &snapshots.records {
            let mut record = record.clone();
            record.extra_data_size = record.extra_data_size.max(EXTRA_DATA);
            let encoded = record.encode(&mut bytes, header.size);
            encoded.map_err(|e| Stop::Error(invalid(e, ErrorKind::Corrupt)))?;
        }
        let limit = MAX_SNAPSHOT_TABLE_BYTES;
        if bytes.len() as u64 > limit {
            let message = format!("the repaired snapshot table exceeds the limit of {limit} bytes");
            return Err(Stop::Error(Error::new(ErrorKind::Limit, message)));
        }
        header.nb_snapshots = snapshots.records.len() as u32;
        header.snapshots_offset = HostOffset(0);
        if !bytes.is_empty() {
            let geometry = &header.geometry;
            let clusters = geometry.clusters_for(bytes.len() as u64);
            bytes.resize((clusters << geometry.cluster_bits()) as usize, 0);
            let offset = self.take(clusters)? << geometry.cluster_bits();
            bytes::write(self.target.storage, &bytes, offset)?;
            header.snapshots_offset = HostOffset(offset);
        }
        Ok(())
    }

    /// Finds a place for every block that is needed, those for the new structures included, and for their table.
    fn place(&mut self) -> Result<(BTreeMap<u64, u64>, u64, u32), Stop> {
        let geometry = self.geometry;
        let entries = geometry.refcount_block_entries();
        let mut blocks = BTreeMap::new();
        for index in 0..self.counts.clusters().div_ceil(entries) {
            self.target.job.checkpoint()?;
            let end = ((index + 1) * entries).min(self.counts.clusters());
            for cluster in index * entries..end {
                if self.refcount(cluster)? > 0 {
                    blocks.insert(index, self.take(1)?);
                    break;
                }
            }
        }
        let file = geometry.clusters_for(self.target.storage.size()?);
        let mut table = (0, 0);
        loop {
            // Clusters that were taken behind the file need blocks themselves, and so does what lies in front of them.
            let end = self.taken.keys().next_back().map_or(0, |last| last + 1);
            self.inside = self.uncounted.inside(end.max(file))?;
            let used = self.taken.keys().chain(self.inside.keys());
            let missing: BTreeSet<u64> = used.map(|c| c / entries).collect();
            let missing: Vec<u64> = missing.into_iter().filter(|i| !blocks.contains_key(i)).collect();
            for &index in &missing {
                blocks.insert(index, self.take(1)?);
            }
            let highest = blocks.keys().next_back().copied().unwrap_or(0);
            let clusters = geometry.clusters_for((highest + 1) * 8);
            if clusters > table.1 {
                for cluster in table.0..table.0 + table.1 {
                    self.taken.remove(&cluster);
                }
                table = (self.take(clusters)?, clusters);
            } else if missing.is_empty() {
                break;
            }
        }
        let limit = MAX_REFCOUNT_TABLE_BYTES;
        if table.1 << geometry.cluster_bits() > limit {
            let message = format!("the refcount table would exceed the limit of {limit} bytes");
            return Err(Stop::Error(Error::new(ErrorKind::Limit, message)));
        }
        Ok((blocks, table.0, table.1 as u32))
    }

    fn write(&mut self, blocks: &BTreeMap<u64, u64>, table: u64) -> Result<(), Stop> {
        let geometry = self.geometry;
        let (bits, order) = (geometry.cluster_bits(), geometry.refcount_order());
        let entries = geometry.refcount_block_entries();
        let highest = blocks.keys().next_back().copied().unwrap_or(0);
        let mut words = vec![0; (geometry.clusters_for((highest + 1) * 8) << bits) as usize];
        for (&index, &cluster) in blocks {
            self.target.job.checkpoint()?;
            let mut block = vec![0; geometry.cluster_len()];
            for (place, counted) in (index * entries..(index + 1) * entries).enumerate() {
                let value = self.refcount(counted)?;
                if value > 0 && refcount::set(&mut block, place, order, value).is_none() {
                    return Err(too_wide(counted << bits, value, geometry.refcount_bits()));
                }
            }
            bytes::write(self.target.storage, &block, cluster << bits)?;
            if let Some(word) = words.get_mut(index as usize * 8..index as usize * 8 + 8) {
                word.copy_from_slice(&RefcountTableEntry::new(HostOffset(cluster << bits)).to_bytes());
            }
        }
        bytes::write(self.target.storage, &words, table << bits)?;
        Ok(())
    }
}

/// A refcount that the width of the new structures cannot hold.
fn too_wide(offset: u64, value: u64, bits: u32) -> Stop {
    let message = format!(
        "Cannot decrease refcount entry width to {bits} bits: Cluster at offset {offset:#x} has a refcount of {value}"
    );
    Stop::Error(Error::new(ErrorKind::Limit, message).with_field("refcount_bits"))
}
