//! Moving L2 tables: the L1 entries that refer to them follow.

use qcow2_format::{HostOffset, L1Entry, words};

use super::tables::{Table, entry_at, read_words, tables};
use crate::maintenance::Session;
use crate::{Job, MemMut, Result, StorageExt};

/// Bytes of tables that move between two syncs.
const BATCH_BYTES: u64 = 32 << 20;

/// Tables that are given up between two syncs.
const BATCH_TABLES: u64 = 4096;

/// Where an L1 entry is.
#[derive(Debug, Clone, Copy)]
struct Place {
    /// Host offset of the table that the entry refers to.
    table: u64,
    /// Index of the snapshot; `None` for the active L1 table.
    snapshot: Option<usize>,
    index: usize,
    entry: L1Entry,
}

impl Session<'_> {
    /// Moves the L2 tables behind cluster `bound` below it. Returns how many.
    pub(super) fn move_l2_tables(&self, bound: u64, job: &Job) -> Result<u64> {
        let g = self.geometry();
        let mut high = tables(self.image)?;
        high.retain(|table| g.cluster_index(table.offset) >= bound);
        if high.is_empty() {
            return Ok(0);
        }
        let places = self.places(bound)?;
        let mut moved = 0;
        for batch in high.chunks((BATCH_BYTES / g.cluster_size()).max(1) as usize) {
            job.checkpoint()?;
            moved += self.move_batch(batch, &places, bound)?;
        }
        Ok(moved)
    }

    /// Moves one L2 table, of the active disk alone, to the lowest place before cluster `limit`.
    pub(crate) fn lower_l2_table(&self, offset: u64, limit: u64) -> Result<u64> {
        let table = Table { offset, l1_index: 0, weight: 1 };
        let mut places = self.places(self.geometry().cluster_index(offset))?;
        places.retain(|place| place.table == offset);
        self.move_batch(&[table], &places, limit)
    }

    /// Gives up the L2 tables that map nothing, where that reads as zeroes.
    pub(super) fn drop_empty_tables(&self, job: &Job) -> Result<()> {
        let g = self.geometry();
        let places = self.places(0)?;
        let mut waiting = 0;
        for table in tables(self.image)? {
            job.checkpoint()?;
            let words = read_words(self.image, table.offset)?;
            let maps = (0..g.l2_entries() as usize).map(|number| entry_at(self.image, &words, number));
            if maps.into_iter().any(|entry| entry.without_zero_flag(&g).word != 0) {
                continue;
            }
            self.for_users(&places, table.offset, |place| self.set_l1_entry(place, L1Entry(0)))?;
            (0..table.weight).for_each(|_| self.unlink(table.offset, g.cluster_size()));
            waiting += 1;
            if waiting == BATCH_TABLES {
                self.free_now()?;
                waiting = 0;
            }
        }
        self.free_now()
    }

    /// Calls `visit` for each L1 entry that refers to `table`.
    fn for_users(&self, places: &[Place], table: u64, visit: impl FnMut(&Place) -> Result<()>) -> Result<()> {
        let first = places.partition_point(|place| place.table < table);
        places.iter().skip(first).take_while(|place| place.table == table).try_for_each(visit)
    }

    fn move_batch(&self, batch: &[Table], places: &[Place], bound: u64) -> Result<u64> {
        let g = self.geometry();
        let mut moves: Vec<(Table, u64)> = Vec::new();
        for table in batch {
            let Some(to) = self.take_low(g.cluster_size(), bound)? else { break };
            self.set_refcount(g.cluster_index(to), table.weight)?;
            let mut bytes = vec![0u8; g.cluster_len()];
            self.read(table.offset, &mut bytes)?;
            let written = self.write_l2_table(to, &bytes);
            written.inspect_err(|_| {
                // One reference is given back already.
                (1..table.weight).for_each(|_| self.abandon(to, g.cluster_size()));
                for (table, to) in &moves {
                    (0..table.weight).for_each(|_| self.abandon(*to, g.cluster_size()));
                }
            })?;
            moves.push((*table, to));
        }
        self.barrier()?;
        for &(table, to) in &moves {
            self.image.forget_slices(to, g.cluster_size());
            self.writer.with_alloc(|_, metadata| {
                metadata.add(g.cluster_index(to));
                Ok(())
            })?;
            // The flag stays.
            self.for_users(places, table.offset, |place| {
                self.set_l1_entry(place, place.entry.with_table(HostOffset(to)))
            })?;
            (0..table.weight).for_each(|_| self.unlink(table.offset, g.cluster_size()));
        }
        self.free_now()?;
        Ok(moves.len() as u64)
    }

    /// Changes one L1 entry.
    fn set_l1_entry(&self, place: &Place, new: L1Entry) -> Result<()> {
        match place.snapshot {
            Some(number) => {
                let snapshots = self.image.snapshots();
                let l1 = snapshots.get(number).map_or(HostOffset(0), |record| record.l1_table_offset);
                self.write(l1.0 + place.index as u64 * 8, &new.to_bytes())
            }
            None => {
                self.image.changing().set_l1_entry(place.index, new, false);
                Ok(())
            }
        }
    }

    /// The L1 entries that refer to tables behind `bound`, by table.
    fn places(&self, bound: u64) -> Result<Vec<Place>> {
        let g = self.geometry();
        let mut places = Vec::new();
        let mut add = |l1: &[u64], snapshot| {
            for (index, entry) in l1.iter().map(|word| L1Entry(*word)).enumerate() {
                let table = entry.offset_bits();
                if table != 0 && g.cluster_index(table) >= bound {
                    places.push(Place { table, snapshot, index, entry });
                }
            }
        };
        add(self.image.mapping().l1(), None);
        for (number, record) in self.image.snapshots().iter().enumerate() {
            let mut bytes = vec![0u8; record.l1_size as usize * 8];
            self.image.storage().read_exact_at(MemMut::from(&mut bytes[..]), record.l1_table_offset.0)?;
            add(&words::decode(&bytes), Some(number));
        }
        places.sort_unstable_by_key(|place| place.table);
        Ok(places)
    }
}
