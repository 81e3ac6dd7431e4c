//! Walking what an L1 table refers to.

use std::collections::HashMap;
use std::ops::Range;

use qcow2_format::{Geometry, HostOffset, L1Entry, L2Entry, L2Mapping, SnapshotRecord, words};

use super::session::Session;
use crate::invalid::invalid;
use crate::{ErrorKind, Result, StorageExt};

/// References dropped between two looks at how many wait.
const LOOK_EVERY: u64 = 4096;

/// References that a tree makes, to host clusters that follow each other: an L2 table, data clusters, clusters with compressed data.
type References = Range<u64>;

/// Entries of an L2 table that refer to one host cluster each, and these follow each other.
struct Run {
    /// Number of the first entry.
    first: usize,
    clusters: Range<u64>,
}

impl Session<'_> {
    /// Calls `visit` with all host clusters that `l1` refers to, once per reference, in guest order. Stops with the first
    /// error.
    pub(super) fn for_references(
        &self,
        l1: &[u64],
        mut visit: impl FnMut(References) -> Result<()>,
    ) -> Result<()> {
        let g = self.geometry();
        let mut table = vec![0u8; g.cluster_len()];
        for (index, &entry) in l1.iter().enumerate() {
            let Some(offset) = self.table_of(entry, index)? else { continue };
            let own = g.cluster_index(offset.0);
            visit(own..own + 1)?;
            self.read(offset.0, &mut table)?;
            self.references_in(&table, index)?.into_iter().try_for_each(&mut visit)?;
        }
        Ok(())
    }

    /// Host clusters that the entries of an L2 table refer to.
    pub(super) fn references_in(&self, table: &[u8], l1_index: usize) -> Result<Vec<References>> {
        let g = self.geometry();
        let mut runs: Vec<References> = Vec::new();
        for (number, entry) in L2Entry::entries(table, &g).enumerate() {
            let clusters = self.clusters_of(entry, &g, l1_index, number)?;
            match runs.last_mut() {
                Some(last) if last.end == clusters.start => last.end = clusters.end,
                _ if clusters.is_empty() => {}
                _ => runs.push(clusters),
            }
        }
        Ok(runs)
    }

    /// Host clusters that one L2 entry refers to.
    #[inline]
    pub(super) fn clusters_of(
        &self,
        entry: L2Entry,
        g: &Geometry,
        l1_index: usize,
        number: usize,
    ) -> Result<Range<u64>> {
        match entry.sound_host(g) {
            // What most entries are.
            Some(host) if !self.image.header().has_data_file() => {
                let cluster = g.cluster_index(host);
                Ok(cluster..cluster + 1)
            }
            _ if entry.word == 0 && entry.bitmap.0 == 0 => Ok(0..0),
            _ => self.clusters_of_any(entry, g, l1_index, number),
        }
    }

    fn clusters_of_any(
        &self,
        entry: L2Entry,
        g: &Geometry,
        l1_index: usize,
        number: usize,
    ) -> Result<Range<u64>> {
        let guest = l1_index as u64 * g.l2_coverage() + number as u64 * g.cluster_size();
        let none = 0..0;
        let one = |host: HostOffset| g.cluster_index(host.0)..g.cluster_index(host.0) + 1;
        Ok(match self.image.decode_entry(entry, guest)? {
            L2Mapping::Compressed(descriptor) => {
                let (first, last) = descriptor.host_clusters(g);
                first..last + 1
            }
            // Clusters of an external data file are not counted.
            _ if self.image.header().has_data_file() => none,
            L2Mapping::Unallocated => none,
            L2Mapping::Data { host, .. } => one(host),
            L2Mapping::Zero { host, .. } | L2Mapping::Subclusters { host, .. } => host.map_or(none, one),
        })
    }

    pub(super) fn table_of(&self, entry: u64, index: usize) -> Result<Option<HostOffset>> {
        let g = self.geometry();
        let guest = index as u64 * g.l2_coverage();
        L1Entry(entry).table(&g).map_err(|e| self.image.corrupt_entry(e, guest))
    }

    /// Refuses a tree whose references cannot all be counted once more, or that refers to clusters that are not counted
    /// at all. Writes nothing.
    pub(super) fn check_references(&self, l1: &[u64]) -> Result<()> {
        let max = self.geometry().refcount_max();
        let limit = self.image.limits().max_memory / 32;
        // Only packed clusters are referred to more than once by one tree, and no more often than they are counted;
        // remember those that may reach the limit.
        let mut repeated: HashMap<u64, u64> = HashMap::new();
        let mut previous = None;
        self.for_references(l1, |clusters| {
            self.checkpoint()?;
            let mut few = true;
            self.for_counts(clusters.clone(), |_, count| few &= count != 0 && count <= max / 2)?;
            if few {
                return Ok(());
            }
            clusters.into_iter().try_for_each(|cluster| {
                let count = self.refcount(cluster)?;
                if count == 0 {
                    let message = format!("host cluster {cluster} is referenced but has a refcount of 0");
                    return Err(self.image.error(ErrorKind::Corrupt, message));
                }
                if count <= max / 2 {
                    return Ok(());
                }
                let mut more = 1;
                if count > 1 || previous == Some(cluster) {
                    if repeated.len() as u64 >= limit {
                        let message = "too many packed clusters to account for";
                        return Err(self.image.error(ErrorKind::Limit, message));
                    }
                    let times = repeated.entry(cluster).or_insert(0);
                    *times += 1;
                    more = *times;
                }
                previous = Some(cluster);
                if count > max.saturating_sub(more) {
                    let message = format!(
                        "host cluster {cluster} has a refcount of {count}, and its references counted once more would \
                         exceed the largest refcount of this image ({max})"
                    );
                    return Err(self.image.error(ErrorKind::Limit, message).with_field("refcount_bits"));
                }
                Ok(())
            })
        })
    }

    /// Takes every reference of `l1` away.
    pub(super) fn drop_references(&self, l1: &[u64]) -> Result<()> {
        let size = self.geometry().cluster_size();
        let mut visited = 0u64;
        self.for_references(l1, |clusters| {
            let count = clusters.end - clusters.start;
            self.unlink(clusters.start * size, count * size);
            visited += count;
            if visited < LOOK_EVERY {
                return Ok(());
            }
            visited = 0;
            self.limit_unlinked()
        })
    }

    /// Sets and clears the COPIED flags of the active disk, in place, as the refcounts say. Durable on return.
    pub(crate) fn restore_copied(&self) -> Result<()> {
        let g = self.geometry();
        let mut table = vec![0u8; g.cluster_len()];
        let mut l1 = self.image.l1();
        let old_l1 = words::encode(&l1);
        for (index, entry) in l1.iter_mut().enumerate() {
            let Some(offset) = self.table_of(*entry, index)? else { continue };
            self.read(offset.0, &mut table)?;
            let old = table.clone();
            let exclusive = self.refcount(g.cluster_index(offset.0))? == 1;
            if self.rewrite_table(&mut table, index, exclusive)? {
                self.write_changed(offset.0, &old, &table)?;
                self.image.forget_slices(offset.0, g.cluster_size());
            }
            *entry = L1Entry::new(offset, exclusive).0;
        }
        self.write_changed(self.writer.l1_offset(), &old_l1, &words::encode(&l1))?;
        self.image.changing().replace_l1(l1);
        self.barrier()
    }

    /// Changes the flags in one table's bytes; true if any changed. In a table that is shared, no flag may be set.
    pub(super) fn rewrite_table(&self, table: &mut [u8], l1_index: usize, exclusive: bool) -> Result<bool> {
        // In an external data file every allocated cluster is exclusive: its flag says that it is allocated.
        if self.image.header().has_data_file() {
            return Ok(false);
        }
        let g = self.geometry();
        let width = g.l2_entry_size() as usize;
        let mut changed = false;
        let mut run = Run { first: 0, clusters: 0..0 };
        for number in 0..table.len() / width {
            let bytes = table.get(number * width..(number + 1) * width).unwrap_or_default();
            let entry = L2Entry::read(bytes);
            let counted = entry.word != 0 && !entry.is_compressed();
            let clusters = if counted { self.clusters_of(entry, &g, l1_index, number)? } else { 0..0 };
            let follows = run.first as u64 + (run.clusters.end - run.clusters.start) == number as u64;
            if follows && run.clusters.end == clusters.start && !clusters.is_empty() {
                run.clusters.end = clusters.end;
                continue;
            }
            changed |= self.rewrite_run(table, &run, exclusive)?;
            run = Run { first: number, clusters };
            if counted && run.clusters.is_empty() {
                changed |= set_copied(table.get_mut(number * width..).unwrap_or_default(), width, false);
            }
        }
        Ok(self.rewrite_run(table, &run, exclusive)? || changed)
    }

    /// As [`Session::rewrite_table`], for the entries of a run.
    fn rewrite_run(&self, table: &mut [u8], run: &Run, exclusive: bool) -> Result<bool> {
        let width = self.geometry().l2_entry_size() as usize;
        let mut entries = table.get_mut(run.first * width..).unwrap_or_default().chunks_exact_mut(width);
        let mut changed = false;
        let mut flag = |copied| {
            changed |= entries.next().is_some_and(|bytes| set_copied(bytes, width, copied));
        };
        if exclusive {
            self.for_counts(run.clusters.clone(), |_, count| flag(count == 1))?;
        } else {
            run.clusters.clone().for_each(|_| flag(false));
        }
        Ok(changed)
    }

    /// Reads a snapshot's L1 table, within the format's limits.
    pub(super) fn snapshot_l1(&self, record: &SnapshotRecord) -> Result<Vec<u64>> {
        let checked = record.check_l1(&self.geometry(), self.image.virtual_size());
        checked.map_err(|e| self.image.storage().located(invalid(e, ErrorKind::Corrupt)))?;
        let mut bytes = vec![0u8; record.l1_size as usize * 8];
        self.read(record.l1_table_offset.0, &mut bytes)?;
        Ok(words::decode(&bytes))
    }
}

/// Sets the COPIED flag of the first entry, of `width` bytes, as given; true if it was not so.
fn set_copied(entries: &mut [u8], width: usize, copied: bool) -> bool {
    let bytes = entries.get_mut(..width).unwrap_or_default();
    let entry = L2Entry::read(bytes);
    if entry.copied() == copied {
        return false;
    }
    entry.with_copied(copied).write(bytes);
    true
}
