//! Trees of tables written beside those in the file: nothing refers to them before the header does.
//!
//! A tree that is shared keeps its tables as they are: what only a snapshot refers to may have COPIED flags, which mean
//! something in the active disk's tables alone. The active disk gets tables of its own where flags differ.

use std::ops::Range;

use qcow2_format::{HostOffset, L1Entry};

use super::session::{Session, WAITING_LIMIT};
use crate::alloc::Unlinked;
use crate::{Mem, Result, StorageExt};

/// Runs that are freed together.
const FREED_AT_ONCE: usize = 1024;

impl Session<'_> {
    /// Begins to change refcounts beside those in the file.
    pub(super) fn fork(&self) -> Result<()> {
        // What waits in quarantine goes back to the refcounts in the file.
        self.barrier()?;
        self.writer.check()?;
        self.writer.with_alloc(|alloc, _| alloc.fork()).map_err(|e| self.writer.poison(e))
    }

    /// Makes everything durable that was written beside.
    pub(super) fn settle_fork(&self) -> Result<()> {
        let writes = self.writer.with_fork(|alloc, metadata| alloc.seal_fork(metadata))?;
        writes.iter().try_for_each(|(offset, bytes)| self.write_beside(*offset, bytes))?;
        self.writer.alloc().refcounts.note_written();
        self.image.storage().flush().map_err(|e| self.writer.poison(e))
    }

    /// Forgets everything that was written beside. The header does not name it, not even perhaps.
    pub(super) fn undo_fork(&self) {
        self.writer.alloc().undo_fork(self.writer.check().is_ok());
    }

    /// Writes what nothing refers to. A failure harms nothing.
    fn write_beside(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.writer.check()?;
        self.image.storage().write_all_at(Mem::from(bytes), offset)?;
        self.behind.wrote(bytes.len() as u64);
        Ok(())
    }

    /// Writes a table to contiguous clusters of its own; returns its host offset.
    pub(super) fn write_table_beside(&self, mut bytes: Vec<u8>) -> Result<u64> {
        let g = self.geometry();
        let clusters = g.clusters_for(bytes.len() as u64).max(1);
        let place = self.writer.with_fork(|alloc, metadata| alloc.allocate_beside(clusters, metadata))?;
        let place = place * g.cluster_size();
        bytes.resize((clusters * g.cluster_size()) as usize, 0);
        // It may have been an L2 table in another life.
        self.image.forget_slices(place, clusters * g.cluster_size());
        self.write_beside(place, &bytes)?;
        Ok(place)
    }

    /// Counts a reference of each cluster once more, or once less. Blocks of the fork are written when many wait.
    fn count(&self, runs: impl IntoIterator<Item = Range<u64>>, more: bool) -> Result<()> {
        self.writer.with_fork(|alloc, metadata| {
            for run in runs {
                alloc.count_run_beside(run, more, metadata)?;
                if alloc.refcounts.waiting_bytes() > WAITING_LIMIT {
                    self.writer.check()?;
                    alloc.refcounts.write_dirty()?;
                }
            }
            Ok(())
        })
    }

    /// As [`Session::count`], of the cluster of a table.
    fn count_table(&self, table: HostOffset, more: bool) -> Result<()> {
        let own = self.geometry().cluster_index(table.0);
        self.count(Some(own..own + 1), more)
    }

    /// Calls `visit` with index, host offset and bytes of every L2 table of `l1`.
    fn for_tables(
        &self,
        l1: &[u64],
        mut visit: impl FnMut(usize, HostOffset, &mut Vec<u8>) -> Result<()>,
    ) -> Result<()> {
        let mut table = vec![0u8; self.geometry().cluster_len()];
        for (index, &entry) in l1.iter().enumerate() {
            let Some(offset) = self.table_of(entry, index)? else { continue };
            self.read(offset.0, &mut table)?;
            visit(index, offset, &mut table)?;
        }
        Ok(())
    }

    /// The L1 table whose entries are what `entry` makes of the L2 tables of `l1`, which it gets as `for_tables` has it.
    fn map_tables(
        &self,
        l1: &[u64],
        mut entry: impl FnMut(usize, HostOffset, &mut Vec<u8>) -> Result<L1Entry>,
    ) -> Result<Vec<u64>> {
        let mut mapped = vec![0; l1.len()];
        self.for_tables(l1, |index, offset, table| {
            let new = entry(index, offset, table)?;
            mapped.get_mut(index).into_iter().for_each(|slot| *slot = new.0);
            Ok(())
        })?;
        Ok(mapped)
    }

    /// A new L1 table that refers to all that `l1` refers to, counted once more. L2 tables without COPIED flags are
    /// shared, of the others it has copies without them.
    pub(super) fn share(&self, l1: &[u64]) -> Result<Vec<u64>> {
        self.map_tables(l1, |index, offset, table| {
            self.checkpoint()?;
            self.count(self.references_in(table, index)?, true)?;
            if self.rewrite_table(table, index, false)? {
                return Ok(L1Entry::new(HostOffset(self.write_table_beside(table.clone())?), true));
            }
            self.count_table(offset, true)?;
            Ok(L1Entry::new(offset, false))
        })
    }

    /// Counts everything that `l1` refers to once less.
    pub(super) fn drop_beside(&self, l1: &[u64]) -> Result<()> {
        self.for_tables(l1, |index, offset, table| {
            self.checkpoint()?;
            self.count(self.references_in(table, index)?, false)?;
            self.count_table(offset, false)
        })
    }

    /// `l1` with COPIED flags where a refcount is one. L2 tables in which flags differ are copied.
    pub(super) fn restore_beside(&self, l1: &[u64]) -> Result<Vec<u64>> {
        let g = self.geometry();
        self.map_tables(l1, |index, offset, table| {
            self.checkpoint()?;
            let exclusive = self.refcount(g.cluster_index(offset.0))? == 1;
            if !self.rewrite_table(table, index, exclusive)? {
                return Ok(L1Entry::new(offset, exclusive));
            }
            // The copy is exclusive in any case.
            self.rewrite_table(table, index, true)?;
            let place = self.write_table_beside(table.clone())?;
            self.count_table(offset, false)?;
            Ok(L1Entry::new(HostOffset(place), true))
        })
    }

    /// Gives the space back of what `l1` referred to and nothing refers to now. The switch is durable, and no request
    /// can reach it.
    pub(super) fn free_dropped(&self, l1: &[u64]) -> Result<()> {
        let g = self.geometry();
        let mut free: Vec<Unlinked> = Vec::new();
        self.for_tables(l1, |index, offset, table| {
            let own = g.cluster_index(offset.0);
            // What a shared table refers to is as shared.
            if self.refcount(own)? != 0 {
                return Ok(());
            }
            for clusters in self.references_in(table, index)? {
                self.for_counts(clusters, |cluster, count| {
                    let repeated = free.last().is_some_and(|last| last.cluster + last.count == cluster + 1);
                    if count == 0 && !repeated {
                        Unlinked { cluster, count: 1, punch: true }.push_to(&mut free);
                    }
                })?;
            }
            Unlinked { cluster: own, count: 1, punch: true }.push_to(&mut free);
            self.image.forget_slices(offset.0, g.cluster_size());
            // The last one may go on with the next table: each is a call of the file system, and tables lie side by side.
            let last = if free.len() > FREED_AT_ONCE { free.pop() } else { None };
            if last.is_some() {
                self.give_up(std::mem::replace(&mut free, Vec::from_iter(last)));
            }
            Ok(())
        })?;
        self.give_up(free);
        Ok(())
    }

    fn give_up(&self, free: Vec<Unlinked>) {
        let mut alloc = self.writer.alloc();
        free.into_iter().for_each(|run| alloc.give_up(run));
    }
}
