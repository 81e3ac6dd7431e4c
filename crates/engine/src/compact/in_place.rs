//! Leaks, zeroes and holes: nothing moves.

use std::ops::Range;

use qcow2_format::Geometry;

use super::options::{CompactOptions, CompactResult};
use super::survey::ZeroScan;
use super::table_edit::TableEdit;
use super::tables::{Table, tables};
use crate::check::References;
use crate::maintenance::Session;
use crate::{Job, Result, StorageExt};

/// Changed slices of L2 tables that wait for a sync.
pub(super) const BATCH_SLICES: usize = 2048;
/// Clusters that wait to lose a reference.
const BATCH_CLUSTERS: u64 = 1 << 16;

/// Changes of one table that wait.
#[derive(Debug, Default)]
pub(super) struct Edits {
    /// Host offset and new words of each changed slice.
    pub(super) slices: Vec<(u64, Vec<u64>)>,
    /// Host clusters that lose a reference with them: place in bytes, and how many references.
    pub(super) unlinked: Vec<(u64, u64)>,
    /// Entries that gave their data up.
    pub(super) emptied: u64,
}

impl Session<'_> {
    /// Does what the options ask for, step by step.
    pub(super) fn compact(
        &self,
        references: &References,
        options: CompactOptions,
        job: &Job,
        result: &mut CompactResult,
    ) -> Result<()> {
        let steps = 1 + u64::from(options.zeroes) + u64::from(options.rewrite);
        job.set_total(result.length_before.saturating_mul(steps));
        result.leaked_clusters = self.free_leaks(references)?;
        if options.zeroes {
            self.give_up_zeroes(job, result)?;
        }
        self.punch_free(job)?;
        self.punch_stale_data(job)?;
        if options.rewrite { self.rewrite(job, result) } else { Ok(()) }
    }

    /// Gives every cluster the refcount that its references make. Returns how many had too high a one.
    fn free_leaks(&self, references: &References) -> Result<u64> {
        if references.leaks == 0 {
            return Ok(0);
        }
        let mut shared = false;
        for cluster in 0..references.clusters() {
            let wanted = references.get(cluster);
            if self.refcount(cluster)? > wanted {
                self.set_refcount(cluster, wanted)?;
                shared |= wanted > 0;
            }
        }
        self.barrier()?;
        if shared {
            // What has one reference less may be exclusive now.
            self.restore_copied()?;
        }
        Ok(references.leaks)
    }

    /// Replaces clusters that hold nothing but zeroes by zero clusters.
    fn give_up_zeroes(&self, job: &Job, result: &mut CompactResult) -> Result<()> {
        let mut scan = ZeroScan::new(self.image, self.disk.layers().len() > 1)?;
        let mut edits = Edits::default();
        let tables = tables(self.image)?;
        let share = result.length_before / (tables.len() as u64).max(1);
        for table in tables {
            let emptied = self.empty_table(table, &mut scan, &mut edits, job);
            if emptied.is_err() || edits.are_many() {
                // Also what was found before an error or a cancellation: it is complete by itself.
                result.zero_clusters += edits.emptied;
                self.publish(std::mem::take(&mut edits))?;
            }
            emptied?;
            job.advance(share);
        }
        result.zero_clusters += edits.emptied;
        self.publish(edits)?;
        if scan.needs_no_flag() { self.drop_empty_tables(job) } else { Ok(()) }
    }

    fn empty_table(&self, table: Table, scan: &mut ZeroScan<'_>, edits: &mut Edits, job: &Job) -> Result<()> {
        let mut edit = TableEdit::read(self.image, table)?;
        for first in edit.slices() {
            job.checkpoint()?;
            // Kept apart until the slice is complete: an error leaves it as it is.
            let mut freed = Vec::new();
            let slice = edit.slice(first, |guest, mapping| {
                let Some(emptied) = scan.look(guest, mapping)? else { return Ok(None) };
                freed.extend(emptied.freed);
                Ok(Some(emptied.new))
            })?;
            edits.emptied += freed.len() as u64;
            edits.unlink(&self.geometry(), freed, table.weight);
            edits.slices.extend(slice);
        }
        Ok(())
    }

    /// Makes changes of tables durable, then frees what lost its references. What the changes refer to is durable.
    pub(super) fn publish(&self, edits: Edits) -> Result<()> {
        let Edits { slices, unlinked, .. } = edits;
        let external = self.image.header().has_data_file();
        let size = self.geometry().cluster_size();
        self.image.changing().put_slices(slices.into_iter().map(|(offset, words)| (offset, words.into())));
        if external {
            self.barrier()?;
            self.end_reads()?;
            let data = self.image.data_host()?;
            let end = data.size()?;
            for host in unlinked.iter().map(|u| u.0).filter(|host| *host < end) {
                data.zero(host, size.min(end - host), true)?;
            }
        } else {
            for &(host, references) in &unlinked {
                (0..references).for_each(|_| self.unlink(host, size));
            }
            self.barrier()?;
        }
        self.writer.with_alloc(|alloc, _| alloc.give_back().map(drop))
    }
}

impl Edits {
    /// Takes `weight` references from each of some runs of host clusters.
    fn unlink(&mut self, g: &Geometry, runs: Vec<Range<u64>>, weight: u64) {
        self.unlinked.extend(runs.into_iter().flatten().map(|cluster| (cluster * g.cluster_size(), weight)));
    }

    /// Whether it is time to publish.
    pub(super) fn are_many(&self) -> bool {
        let references: u64 = self.unlinked.iter().map(|u| u.1).sum();
        self.slices.len() >= BATCH_SLICES || references >= BATCH_CLUSTERS
    }
}
