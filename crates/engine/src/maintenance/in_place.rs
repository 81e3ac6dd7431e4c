//! What gives space back where there is none: nothing is written to clusters that have no space already.
//!
//! A table of entries loses one of them in two writes. The first one moves the entry to the end, where the table's tail from that
//! entry on lies inside a sector: nothing but the order changes. The second one, of the header, makes the table shorter. A tail
//! that is longer goes to free clusters that have space. Refcounts follow in their places when that is durable: a crash in
//! between leaves leaks.

use std::ops::Range;
use std::sync::Arc;

use qcow2_format::SnapshotRecord;

use super::session::{SECTOR, Session};
use crate::image::read_header;
use crate::{Error, Mem, MemMut, Result, StorageExt};

impl Session<'_> {
    /// Takes the entry at the bytes `gone` out of a table of `length` bytes at `table`, as far as the table goes without it.
    /// Returns where that is, durably: the same place or another one; `None` where there is no space for it.
    pub(crate) fn table_without(&self, table: u64, length: u64, gone: &Range<u64>) -> Result<Option<u64>> {
        if gone.end == length {
            return Ok(Some(table));
        }
        let mut bytes = vec![0u8; length as usize];
        // The padding of the last entry may not be in the file.
        self.image.storage().read_padded_at(MemMut::from(&mut bytes[..]), table)?;
        let entry = (gone.end - gone.start) as usize;
        let tail = bytes.get_mut(gone.start as usize..).unwrap_or_default();
        tail.rotate_left(entry.min(tail.len()));
        let start = table + gone.start;
        if start / SECTOR == (table + length - 1) / SECTOR {
            self.write(start, tail)?;
            self.barrier()?;
            return Ok(Some(table));
        }
        bytes.truncate(bytes.len() - entry);
        self.write_to_spare(&bytes)
    }

    /// Writes a table to free clusters that have space, durably; `None` where there are none.
    fn write_to_spare(&self, bytes: &[u8]) -> Result<Option<u64>> {
        let g = self.geometry();
        // What is reserved is free as well.
        self.free_now()?;
        let length = bytes.len() as u64;
        let taken = self.writer.with_alloc(|alloc, metadata| alloc.take_spare(length, metadata))?;
        let Some(offset) = taken.map(|cluster| cluster * g.cluster_size()) else { return Ok(None) };
        // No more than that: what follows in the last cluster may have no space.
        match self.image.storage().write_all_at(Mem::from(bytes), offset) {
            Ok(()) => {
                self.image.forget_slices(offset, g.clusters_for(length) * g.cluster_size());
                self.barrier().map(|()| Some(offset))
            }
            // A file system that writes nothing in place.
            Err(error) if error.is_no_space() => {
                self.abandon(offset, length);
                self.barrier().map(|()| None)
            }
            Err(error) => Err(self.writer.poison(error)),
        }
    }

    /// Frees what a table that went from `length` bytes at `table` to `now` bytes at `place` does not need any more.
    pub(crate) fn free_rest_of_table(&self, table: u64, length: u64, place: u64, now: u64) {
        let g = self.geometry();
        let kept = if place == table { g.clusters_for(now) * g.cluster_size() } else { 0 };
        self.unlink(table + kept, length.next_multiple_of(g.cluster_size()).saturating_sub(kept));
    }

    /// Removes a snapshot, whose plan found no space for tables beside the old ones: `full` is its error.
    pub(super) fn remove_snapshot_in_place(&self, index: usize, full: Error) -> Result<()> {
        let former = self.image.snapshots();
        let Some(record) = former.get(index) else { return Err(full) };
        let l1 = self.snapshot_l1(record)?;
        // All that will be freed is looked at before anything is changed.
        self.for_references(&l1, |_| Ok(()))?;
        let length = |records: &[SnapshotRecord]| -> u64 {
            records.iter().map(|record| record.encoded_length() as u64).sum()
        };
        let (before, whole) = (length(former.get(..index).unwrap_or_default()), length(&former));
        let gone = before..before + record.encoded_length() as u64;
        let mut left = former.to_vec();
        left.remove(index);
        let table = read_header(&**self.image.storage())?.snapshots_offset.0;
        let place = if left.is_empty() { Some(0) } else { self.table_without(table, whole, &gone)? };
        let Some(place) = place else {
            let why = "nor has the file any for a snapshot table; the last snapshot of the list can be deleted without";
            return Err(full.because(why));
        };
        self.writer.write_snapshots_place(self.image, left.len() as u32, place)?;
        self.barrier()?;
        let left: Arc<[SnapshotRecord]> = left.into();
        self.writer.forget_l2_tables(self.image, &l1);
        self.writer.note_snapshots(self.image, &left, place, length(&left));
        self.writer.note_active(self.image, &self.image.l1(), self.writer.l1_offset());
        self.free_rest_of_table(table, whole, place, length(&left));
        self.image.set_snapshots(left);
        self.unlink(record.l1_table_offset.0, u64::from(record.l1_size) * 8);
        self.drop_in_place(&l1)
    }

    /// Takes the references of a tree away that nobody reads any more, durably. While refcounts and COPIED flags do not agree, the
    /// image is marked as one that was not closed cleanly: whoever opens it to write repairs it. Version 2 has no such mark; what
    /// the active disk may share keeps its refcount there, as a leak.
    fn drop_in_place(&self, l1: &[u64]) -> Result<()> {
        let size = self.geometry().cluster_size();
        for (index, &entry) in l1.iter().enumerate() {
            if let Some(table) = self.table_of(entry, index)? {
                self.image.forget_slices(table.0, size);
            }
        }
        if !self.writer.mark_dirty(self.image)? {
            self.for_references(l1, |clusters| {
                let mut free = Vec::new();
                self.for_counts(clusters, |cluster, count| {
                    if count == 1 {
                        free.push(cluster);
                    }
                })?;
                free.into_iter().for_each(|cluster| self.unlink(cluster * size, size));
                Ok(())
            })?;
            return self.barrier();
        }
        self.drop_references(l1)?;
        self.barrier()?;
        self.restore_copied()?;
        self.writer.unmark_dirty(self.image)
    }
}
