//! Visits every structure of the image.

use qcow2_format::L1Entry;

use super::bitmaps;
use super::l2::Shape;
use super::read_ahead::{Source, for_each_table};
use super::snapshots::SnapshotTable;
use super::stored::StoredRefcounts;
use super::target::{File, Stop, Target, short_l1};
use super::walk::{Walk, Walked};
use crate::image::l1_damage;
use crate::{MemMut, StorageExt};
use qcow2_core::check::{FindingCode, Repair, Tally};

/// L1 entries that are looked at together: their tables are read ahead.
const L1_WINDOW: usize = 1 << 16;

/// L2 tables that an L1 table may always refer to, whatever the size of the file.
const MIN_TABLES: u64 = 1024;

/// An L1 table, the active one or a snapshot's.
#[derive(Clone, Copy)]
struct L1Table {
    offset: u64,
    entries: u64,
    active: bool,
}

/// Visits everything that the image refers to, and its snapshots.
pub(super) fn walk_all<'a>(
    target: &'a Target<'_>,
    file: &File,
    snapshots: &SnapshotTable,
    stored: &mut StoredRefcounts<'a>,
    tally: &mut Tally,
    copied: &mut Tally,
) -> Result<Walked, Stop> {
    let mut walk = Walk::new(target, stored, file.clusters, file.length, tally, copied);
    walk.all(snapshots)?;
    Ok(walk.finish())
}

impl Walk<'_, '_> {
    /// Visits everything, in QEMU's order.
    fn all(&mut self, snapshots: &SnapshotTable) -> Result<(), Stop> {
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
        let cluster = self.target.header.geometry.cluster_index(offset);
        // What nearly every table has is known: its refcount block, one for each few tables, is not read again.
        let known = self.stored.all(true, cluster, 1).then_some(1);
        let Some(refcount) = known.map_or_else(|| self.stored.get(cluster), |one| Ok(Some(one)))? else {
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
