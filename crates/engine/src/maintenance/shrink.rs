//! Shrinking the virtual disk.
//!
//! The new L1 table, and a copy of the one L2 table that reaches over the new end, are written beside the old ones. One
//! write of the header, inside a sector, switches size and L1 table; what only the old ones refer to is freed
//! behind it. A crash leaves the old disk or the new one, and leaks. Readers that planned before go on: what
//! they use is in quarantine until they end. Refcount blocks that count nothing any more go last.
//!
//! Where there is no space for other tables, the header's write makes the disk and its L1 table shorter where they are, and what
//! lies behind the end goes out of the tables when that is durable.

use qcow2_format::{HostOffset, L1Entry, L2Entry, words};

use super::session::Session;
use crate::{Result, StorageExt};
use qcow2_core::layer::{Place, SegmentKind};

/// The L2 table that reaches over the new end.
struct Cut {
    l1_index: usize,
    /// The table's host offset before, and its bytes.
    former: HostOffset,
    bytes: Vec<u8>,
    /// Bytes of the entries that stay.
    kept: usize,
}

/// Tables of the smaller disk, beside those in use: their host offsets.
struct Beside {
    l2: Option<u64>,
    l1: u64,
}

/// The disk is as it is to be; where there is no space to make its file shorter, that stays as long as it is.
fn unless_full(done: Result<()>) -> Result<()> {
    match done {
        Err(error) if error.is_no_room() => Ok(()),
        done => done,
    }
}

impl Session<'_> {
    /// Cuts the disk to `size` bytes, which are fewer than it has. What is behind is lost.
    ///
    /// # Errors
    /// `Corrupt` for damaged tables, before anything changes; else as [`crate::Image::write_at`].
    pub(crate) fn shrink(&self, size: u64) -> Result<()> {
        let g = self.geometry();
        let old_l1 = self.image.l1();
        let kept = g.l1_entries_for(size) as usize;
        // A disk of no bytes has a table, too.
        let entries = kept.max(1).min(old_l1.len().max(1));
        let mut gone = old_l1.clone();
        gone.iter_mut().take(kept).for_each(|entry| *entry = 0);
        let cut = self.cut_table(&old_l1, size)?;
        // All that will be freed is looked at before anything is changed.
        self.for_references(&gone, |_| self.checkpoint())?;
        if self.writer.load_bitmaps(self.image, true)? {
            self.barrier()?;
        }
        let mut l1 = old_l1.clone();
        l1.truncate(kept);
        l1.resize(entries, 0);
        let former = self.writer.l1_offset();
        let beside = match self.place_beside(&mut l1, cut.as_ref()) {
            Err(error) if error.is_no_space() => None,
            written => Some(written?),
        };
        let offset = beside.as_ref().map_or(former, |beside| beside.l1);
        self.barrier()?;
        // At most as many entries as before.
        self.writer.write_active(self.image, size, entries as u32, offset)?;
        self.barrier()?;
        self.writer.note_active(self.image, &l1, offset);
        // The size first: who finds nothing mapped behind the end sees that it is the end.
        self.image.set_virtual_size(size);
        self.image.changing().replace_l1(l1.clone());
        self.image.next_generation();
        self.writer.bitmaps.resize(size, self.image.limits().max_memory)?;
        let Some(beside) = beside else {
            self.cut_in_place(&old_l1, &l1, &gone, cut.as_ref())?;
            self.cut_contents(size)?;
            return unless_full(self.drop_empty_blocks());
        };
        self.free_behind(&gone, cut.as_ref())?;
        self.unlink(former, old_l1.len() as u64 * 8);
        self.cut_contents(size)?;
        unless_full(self.lower(beside.l2, beside.l1))?;
        unless_full(self.drop_empty_blocks())
    }

    /// Gives back what counted nothing but what was behind the end.
    fn drop_empty_blocks(&self) -> Result<()> {
        self.free_now()?;
        self.writer.drop_blocks(self.image, 0).map(drop)
    }

    /// Writes the tables of the smaller disk to clusters of their own. `l1` gets its entry for the L2 table that is cut.
    fn place_beside(&self, l1: &mut [u64], cut: Option<&Cut>) -> Result<Beside> {
        let mut l2 = None;
        let mut entries = l1.to_vec();
        if let Some(cut) = cut {
            let offset = self.write_cut(cut)?;
            if let Some(entry) = entries.get_mut(cut.l1_index) {
                *entry = L1Entry::new(HostOffset(offset), true).0;
            }
            l2 = Some(offset);
        }
        let written = self.allocate(entries.len() as u64 * 8).and_then(|offset| {
            self.write_table(offset, words::encode(&entries))?;
            Ok(offset)
        });
        let offset = written.inspect_err(|_| {
            l2.iter().for_each(|table| self.abandon(*table, self.geometry().cluster_size()));
        })?;
        l1.copy_from_slice(&entries);
        Ok(Beside { l2, l1: offset })
    }

    /// Writes what stays of the L2 table over the new end to a cluster of its own.
    fn write_cut(&self, cut: &Cut) -> Result<u64> {
        let mut table = cut.bytes.clone();
        table.get_mut(cut.kept..).unwrap_or_default().fill(0);
        let offset = self.allocate(self.geometry().cluster_size())?;
        self.write_l2_table(offset, &table)?;
        Ok(offset)
    }

    /// The disk is shorter, durably, and its tables are where they were. Frees what is behind its end.
    fn cut_in_place(&self, old_l1: &[u64], l1: &[u64], gone: &[u64], cut: Option<&Cut>) -> Result<()> {
        let g = self.geometry();
        let (place, old_bytes) = (self.writer.l1_offset(), old_l1.len() as u64 * 8);
        let kept = g.clusters_for(l1.len() as u64 * 8) * g.cluster_size();
        // Behind the entries that count, others would find some when they make the table longer.
        let mut table = words::encode(l1);
        table.resize(kept.min(old_bytes) as usize, 0);
        let mut old = words::encode(old_l1);
        old.truncate(table.len());
        self.write_changed(place, &old, &table)?;
        let own = match cut {
            Some(cut) => self.refcount(g.cluster_index(cut.former.0))? == 1,
            None => true,
        };
        if let Some(cut) = cut.filter(|_| own) {
            let behind = cut.bytes.get(cut.kept..).unwrap_or_default();
            self.write_changed(cut.former.0 + cut.kept as u64, behind, &vec![0; behind.len()])?;
            self.image.forget_slices(cut.former.0, g.cluster_size());
        }
        self.barrier()?;
        if let Some(cut) = cut.filter(|_| own) {
            self.for_cut(cut, |cluster| self.unlink(cluster * g.cluster_size(), g.cluster_size()))?;
        }
        self.drop_references(gone)?;
        self.unlink(place + kept, old_bytes.next_multiple_of(g.cluster_size()).saturating_sub(kept));
        self.barrier()?;
        match cut.filter(|_| !own).map(|cut| self.replace_cut(cut)) {
            // What a snapshot shares stays mapped behind the end, where nobody reads: growing drops it.
            Some(Err(error)) if error.is_no_room() => Ok(()),
            done => done.unwrap_or(Ok(())),
        }
    }

    /// Gives the disk an L2 table without what is behind the end, where it shared one: there may be space now.
    fn replace_cut(&self, cut: &Cut) -> Result<()> {
        let size = self.geometry().cluster_size();
        let offset = self.write_cut(cut)?;
        self.barrier()?;
        let entry = L1Entry::new(HostOffset(offset), true);
        self.write(self.writer.l1_offset() + cut.l1_index as u64 * 8, &entry.to_bytes())?;
        let mut l1 = self.image.l1();
        if let Some(place) = l1.get_mut(cut.l1_index) {
            *place = entry.0;
        }
        self.writer.note_active(self.image, &l1, self.writer.l1_offset());
        self.image.changing().replace_l1(l1);
        self.barrier()?;
        self.for_cut(cut, |cluster| self.unlink(cluster * size, size))?;
        self.unlink(cut.former.0, size);
        self.barrier()
    }

    /// The new tables were written behind everything: they go down into what became free, so that the file is short.
    fn lower(&self, l2_table: Option<u64>, l1: u64) -> Result<()> {
        let g = self.geometry();
        self.free_now()?;
        if let Some(offset) = l2_table {
            self.lower_l2_table(offset, g.cluster_index(offset))?;
        }
        self.move_active_l1(g.cluster_index(l1))?;
        self.free_now()
    }

    /// The L2 table that has entries on both sides of the new end, where one behind it is in use.
    fn cut_table(&self, l1: &[u64], size: u64) -> Result<Option<Cut>> {
        let g = self.geometry();
        let boundary = g.clusters_for(size);
        let kept = (boundary % g.l2_entries() * g.l2_entry_size()) as usize;
        let l1_index = (boundary / g.l2_entries()) as usize;
        if kept == 0 {
            return Ok(None);
        }
        let Some(former) = self.table_of(l1.get(l1_index).copied().unwrap_or(0), l1_index)? else {
            return Ok(None);
        };
        let mut bytes = vec![0u8; g.cluster_len()];
        self.read(former.0, &mut bytes)?;
        let cut = Cut { l1_index, former, kept, bytes };
        self.for_cut(&cut, |_| ())?;
        let used = cut.bytes.get(kept..).unwrap_or_default().iter().any(|byte| *byte != 0);
        Ok(used.then_some(cut))
    }

    /// Calls `visit` with every host cluster that an entry behind the new end refers to.
    fn for_cut(&self, cut: &Cut, mut visit: impl FnMut(u64)) -> Result<()> {
        let g = self.geometry();
        let first = cut.kept / g.l2_entry_size() as usize;
        let behind = cut.bytes.get(cut.kept..).unwrap_or_default();
        for (number, entry) in L2Entry::entries(behind, &g).enumerate() {
            self.clusters_of(entry, &g, cut.l1_index, first + number)?.for_each(&mut visit);
        }
        Ok(())
    }

    fn free_behind(&self, gone: &[u64], cut: Option<&Cut>) -> Result<()> {
        let size = self.geometry().cluster_size();
        self.drop_references(gone)?;
        if let Some(cut) = cut {
            self.for_cut(cut, |cluster| self.unlink(cluster * size, size))?;
            self.unlink(cut.former.0, size);
        }
        Ok(())
    }

    /// What is left of the last cluster behind the end, and of an external data file.
    fn cut_contents(&self, size: u64) -> Result<()> {
        let g = self.geometry();
        if self.image.header().has_data_file() {
            let data = self.image.data_host()?;
            return match data.traits().block_device || data.size()? <= size {
                true => Ok(()),
                false => data.resize(size),
            };
        }
        let mut segments = Vec::new();
        self.image.plan_read(size..size.next_multiple_of(g.cluster_size()), &mut segments)?;
        for segment in segments {
            if let SegmentKind::Data(Place { host, .. }) = segment.kind
                && self.refcount(g.cluster_index(host))? == 1
            {
                let (data, length) = (self.image.data_at(segment.start, host)?, segment.length);
                match data.zero(host, length, false) {
                    // A hole needs none.
                    Err(error) if error.is_no_space() => data.zero(host, length, true)?,
                    zeroed => zeroed?,
                }
            }
        }
        Ok(())
    }
}
