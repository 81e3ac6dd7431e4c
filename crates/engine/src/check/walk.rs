//! Visits every structure of the image and counts what it refers to.

use std::collections::BTreeMap;

use qcow2_format::{L1Entry, L2Entry};

use super::counts::ReferenceCounts;
use super::l2::Shape;
use super::read_ahead::{Source, for_each_table};
use super::report::{FindingCode, Tally};
use super::snapshots::SnapshotTable;
use super::stored::StoredRefcounts;
use super::uncounted::Uncounted;
use super::{Repair, Stop, Target, bitmaps, short_l1};
use crate::image::l1_damage;
use crate::{MemMut, StorageExt};

/// L1 entries that are looked at together: their tables are read ahead.
const L1_WINDOW: usize = 1 << 16;

/// L2 tables that an L1 table may always refer to, whatever the size of the file.
const MIN_TABLES: u64 = 1024;

/// How the active guest clusters lie in the file.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Fragmentation {
    pub(super) allocated: u64,
    pub(super) fragmented: u64,
    pub(super) compressed: u64,
}

/// An L1 table, the active one or a snapshot's.
#[derive(Clone, Copy)]
struct L1Table {
    offset: u64,
    entries: u64,
    active: bool,
}

/// What a walk collected.
pub(super) struct Walked {
    pub(super) counts: ReferenceCounts,
    pub(super) fragmentation: Fragmentation,
    /// The refcount structures themselves are damaged.
    pub(super) rebuild: bool,
    /// L2 entries to write, by their host offset.
    pub(super) entries: BTreeMap<u64, L2Entry>,
    /// Clusters that are referred to as L2 tables, and how often; of a repair only.
    pub(super) tables: BTreeMap<u64, u64>,
    /// The last cluster that a repair moved a table to.
    pub(super) moved_to: u64,
    /// References that are not in `counts`; of a repair only.
    pub(super) uncounted: Uncounted,
    /// Nothing of the bitmaps was counted: a repair gives them up.
    pub(super) without_bitmaps: bool,
}

impl Walked {
    /// Whether a cluster is an L2 table and nothing else.
    pub(super) fn is_table_alone(&self, cluster: u64) -> bool {
        let tables = self.tables.get(&cluster).copied();
        tables.is_some() && tables == self.counts.exact(cluster)
    }

    /// One L1 entry refers to the table in `new` instead of the one in `old`.
    pub(super) fn move_table(&mut self, old: u64, new: u64) -> Result<(), Stop> {
        self.counts.add(new, 1, &mut |_| {})?;
        self.counts.remove_one(old);
        *self.tables.entry(new).or_insert(0) += 1;
        self.moved_to = self.moved_to.max(new);
        if let Some(tables) = self.tables.get_mut(&old) {
            *tables = tables.saturating_sub(1);
        }
        Ok(())
    }
}

/// The walk and what it collects.
pub(super) struct Walk<'a, 'b> {
    pub(super) target: &'a Target<'a>,
    pub(super) stored: &'b mut StoredRefcounts<'a>,
    pub(super) counts: ReferenceCounts,
    pub(super) tally: &'b mut Tally,
    /// COPIED flags: told behind the refcounts, on which they depend.
    pub(super) copied: &'b mut Tally,
    pub(super) fragmentation: Fragmentation,
    pub(super) file_length: u64,
    /// L2 entries that a repair replaces, by their host offset: a table that is shared is visited more than once.
    pub(super) entries: BTreeMap<u64, L2Entry>,
    tables: BTreeMap<u64, u64>,
    uncounted: Uncounted,
    without_bitmaps: bool,
    rebuild: bool,
    /// Clusters of the file.
    clusters: u64,
}

impl<'a, 'b> Walk<'a, 'b> {
    pub(super) fn new(
        target: &'a Target<'a>,
        stored: &'b mut StoredRefcounts<'a>,
        clusters: u64,
        file_length: u64,
        tally: &'b mut Tally,
        copied: &'b mut Tally,
    ) -> Self {
        let max = target.header.geometry.refcount_max();
        let counts = ReferenceCounts::new(clusters, max, target.options.limits.max_memory);
        let fragmentation = Fragmentation::default();
        Self {
            target,
            stored,
            counts,
            tally,
            copied,
            fragmentation,
            file_length,
            entries: BTreeMap::new(),
            tables: BTreeMap::new(),
            uncounted: Uncounted::new(clusters, target.options.limits.max_memory),
            without_bitmaps: false,
            rebuild: false,
            clusters,
        }
    }

    pub(super) fn finish(self) -> Walked {
        let Self { counts, fragmentation, rebuild, entries, tables, uncounted, without_bitmaps, .. } = self;
        Walked { counts, fragmentation, rebuild, entries, tables, uncounted, without_bitmaps, moved_to: 0 }
    }

    /// Visits everything, in QEMU's order.
    pub(super) fn all(&mut self, snapshots: &SnapshotTable) -> Result<(), Stop> {
        let header = self.target.header;
        let geometry = &header.geometry;
        self.target.job.set_total(header.size.saturating_mul(1 + snapshots.entries.len() as u64));
        self.reference(0, geometry.cluster_size())?;
        let l1_end = header.l1_table_offset.get().saturating_add(u64::from(header.l1_size) * 8);
        // Farther behind the file it is told by its reference.
        if short_l1(self.target.storage, header)?
            && l1_end < self.file_length.saturating_add(geometry.cluster_size())
        {
            self.tally.corruption(FindingCode::BeyondEndOfFile, header.l1_table_offset.get(), || {
                "the file ends inside the active L1 table".to_owned()
            });
        }
        self.l1_table(L1Table {
            offset: header.l1_table_offset.get(),
            entries: header.l1_size.into(),
            active: true,
        })?;
        self.snapshots(snapshots)?;
        self.reference(header.snapshots_offset.get(), snapshots.length)?;
        let refcount_table = u64::from(header.refcount_table_clusters) * geometry.cluster_size();
        // Behind one that cannot be right are refcounts at most, no references.
        let hidden = self.tally.hidden;
        self.reference(header.refcount_table_offset.get(), refcount_table)?;
        self.tally.hidden = hidden;
        if let Some((offset, length)) = header.crypto_header() {
            self.reference(offset.get(), length)?;
        }
        self.without_bitmaps = bitmaps::walk(self)?;
        self.refcount_blocks()
    }

    /// Counts one reference to every cluster of `offset..offset + length`. The file's last cluster may be cut short,
    /// but a region that ends a cluster or more behind the file is not counted.
    pub(super) fn reference(&mut self, offset: u64, length: u64) -> Result<(), Stop> {
        let geometry = &self.target.header.geometry;
        if length == 0 {
            return Ok(());
        }
        let end = offset.saturating_add(length);
        if end >= self.file_length.saturating_add(geometry.cluster_size()) {
            self.tally.corruption(FindingCode::BeyondEndOfFile, offset, || {
                format!(
                    "counting reference for region exceeding the end of the file by one cluster or more: \
                     offset {offset:#x} size {length:#x}"
                )
            });
            if self.target.repair.is_some() {
                self.uncounted.note(geometry.cluster_index(offset)..geometry.cluster_index(end - 1) + 1)?;
            }
            return Ok(());
        }
        let first = geometry.cluster_index(offset);
        self.count(first, geometry.cluster_index(end - 1) - first + 1)
    }

    /// Counts one reference to each of `length` clusters.
    pub(super) fn count(&mut self, first: u64, length: u64) -> Result<(), Stop> {
        let bits = self.target.header.geometry.cluster_bits();
        let tally = &mut *self.tally;
        self.counts.add(first, length, &mut |cluster| {
            let offset = cluster << bits;
            tally.corruption(FindingCode::RefcountOverflow, offset, || {
                format!(
                    "overflow cluster offset={offset:#x}\nUse qemu-img amend to increase the refcount entry width or \
                     qemu-img convert to create a clean copy if the image cannot be opened for writing"
                )
            });
        })?;
        Ok(())
    }

    fn snapshots(&mut self, snapshots: &SnapshotTable) -> Result<(), Stop> {
        let header = self.target.header;
        let count = snapshots.entries.len();
        if header.has_data_file() && count > 0 {
            self.tally.corruption(FindingCode::Snapshot, header.snapshots_offset.get(), || {
                format!("{count} snapshots in image with data file")
            });
        }
        for snapshot in &snapshots.entries {
            let offset = snapshot.l1_offset;
            // A table behind the file is told by its reference.
            let wrong = l1_damage(offset, snapshot.l1_size, &header.geometry, u64::MAX);
            if let Some(wrong) = wrong {
                self.tally.corruption(FindingCode::Snapshot, offset, || {
                    format!(
                        "snapshot {} ({}) {wrong}; snapshot table entry corrupted",
                        snapshot.id, snapshot.name
                    )
                });
                continue;
            }
            self.l1_table(L1Table { offset, entries: snapshot.l1_size.into(), active: false })?;
        }
        Ok(())
    }

    fn l1_table(&mut self, table: L1Table) -> Result<(), Stop> {
        self.reference(table.offset, table.entries * 8)?;
        // Each table advances the progress by the size of the disk, in equal parts per entry.
        let share = self.target.header.size / table.entries.max(1);
        let mut buffer = vec![0; L1_WINDOW.min(usize::try_from(table.entries).unwrap_or(L1_WINDOW)) * 8];
        let mut tables = 0;
        for start in (0..table.entries).step_by(L1_WINDOW) {
            let count = (table.entries - start).min(L1_WINDOW as u64);
            let window = buffer.get_mut(..count as usize * 8).unwrap_or_default();
            self.target.storage.read_padded_at(MemMut::from(&mut *window), table.offset + start * 8)?;
            let entries = (start..).zip(L1Entry::entries(window));
            let used: Vec<_> = entries.filter(|(_, entry)| entry.0 != 0).collect();
            tables += used.iter().filter(|(_, entry)| entry.offset_bits() < self.file_length).count() as u64;
            if tables > self.clusters.max(MIN_TABLES) {
                // Each would be read again for every entry that refers to it: a small file, and hours of reading.
                let clusters = self.clusters;
                let message =
                    format!("the L1 table refers to at least {tables} L2 tables in {clusters} clusters");
                return Err(Stop::corrupt(message, table.offset));
            }
            self.target.job.advance(share * (count - used.len() as u64));
            self.l2_tables(&used, table.active, share)?;
        }
        self.target.job.advance(self.target.header.size - share * table.entries);
        Ok(())
    }

    /// Visits the L2 tables of the L1 entries `used`, which come with their index.
    fn l2_tables(&mut self, used: &[(u64, L1Entry)], active: bool, share: u64) -> Result<(), Stop> {
        let Target { storage, header, options, job, .. } = self.target;
        let geometry = &header.geometry;
        let offsets: Vec<u64> = used.iter().map(|(_, entry)| entry.offset_bits()).collect();
        let mut entries = used.iter();
        let source =
            Source { storage: *storage, file_length: self.file_length, table_length: geometry.cluster_len() };
        let shape = Shape::of(header, self.file_length);
        let runs = |bytes: &[u8]| shape.runs(bytes);
        for_each_table(source, &offsets, options.readers, runs, |_, table| {
            job.checkpoint()?;
            let Some(&(index, entry)) = entries.next() else { return Ok(()) };
            let offset = entry.offset_bits();
            if entry.reserved_bits() != 0 {
                self.tally.corruption(FindingCode::L1Reserved, offset, || {
                    format!("found L1 entry with reserved bits set: {:x}", entry.0)
                });
            }
            self.reference(offset, geometry.cluster_size())?;
            if self.target.repair.is_some() && offset < self.file_length {
                *self.tables.entry(geometry.cluster_index(offset)).or_insert(0) += 1;
            }
            if geometry.in_cluster(offset) != 0 {
                self.tally.corruption(FindingCode::L2TableUnaligned, offset, || {
                    format!("l2_offset={offset:x}: Table is not cluster aligned; L1 entry corrupted")
                });
            }
            // A repair judges the flags behind the refcounts, when those are right.
            let judge_copied = active && self.target.repair.is_none() && self.l1_copied(index, entry)?;
            self.l2_table(offset, table?, active, judge_copied)?;
            job.advance(share);
            Ok(())
        })
    }

    /// Judges the COPIED flag of an active L1 entry; false when the flags of its L2 table cannot be judged.
    fn l1_copied(&mut self, index: u64, entry: L1Entry) -> Result<bool, Stop> {
        let offset = entry.offset_bits();
        if offset == 0 {
            return Ok(false);
        }
        let Some(refcount) = self.stored.get(self.target.header.geometry.cluster_index(offset))? else {
            return Ok(false);
        };
        if (refcount == 1) != entry.copied() {
            self.copied.corruption(FindingCode::L1Copied, offset, || {
                format!(
                    "OFLAG_COPIED L2 cluster: l1_index={index} l1_entry={:x} refcount={refcount}",
                    entry.0
                )
            });
        }
        Ok(true)
    }

    /// Counts the refcount blocks, last: each must be referred to by its table alone.
    fn refcount_blocks(&mut self) -> Result<(), Stop> {
        let geometry = self.target.header.geometry;
        let table = self.stored.table().to_vec();
        for (index, entry) in table.into_iter().enumerate().filter(|(_, entry)| entry.0 != 0) {
            let offset = entry.offset_bits();
            let cluster = geometry.cluster_index(offset);
            let wrong = if entry.reserved_bits() != 0 {
                format!("refcount table entry {index} has reserved bits set")
            } else if geometry.in_cluster(offset) != 0 {
                format!("refcount block {index} is not cluster aligned; refcount table entry corrupted")
            } else if cluster >= self.clusters.max(self.counts.clusters()) {
                let message = || format!("refcount block {index} is outside image");
                if self.target.repair == Some(Repair::All) {
                    // The new structures have a block in its place.
                    self.rebuild = true;
                    self.tally.fixed_corruption(FindingCode::RefcountTableEntry, offset, message);
                } else {
                    self.tally.corruption(FindingCode::RefcountTableEntry, offset, message);
                }
                continue;
            } else {
                // A narrow refcount cannot count that something else refers to the block too.
                let shared = self.counts.get(cluster) > 0;
                self.rebuild |= shared && self.target.repair == Some(Repair::All);
                self.reference(offset, geometry.cluster_size())?;
                let references = self.counts.get(cluster);
                if references != 1 {
                    self.rebuild = true;
                    self.tally.corruption(FindingCode::RefcountBlockShared, offset, || {
                        format!("refcount block {index} refcount={references}")
                    });
                }
                continue;
            };
            self.rebuild = true;
            self.tally.corruption(FindingCode::RefcountTableEntry, offset, || wrong);
        }
        Ok(())
    }
}
