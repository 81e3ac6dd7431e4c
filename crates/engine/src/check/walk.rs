//! Counting what the structures of an image refer to.

use std::collections::BTreeMap;

use qcow2_format::L2Entry;

use super::counts::ReferenceCounts;
use super::stored::StoredRefcounts;
use super::target::{Stop, Target};
use super::uncounted::Uncounted;
use qcow2_core::check::{FindingCode, Tally};

/// How the active guest clusters lie in the file.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Fragmentation {
    pub(super) allocated: u64,
    pub(super) fragmented: u64,
    pub(super) compressed: u64,
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
    pub(super) tables: BTreeMap<u64, u64>,
    pub(super) uncounted: Uncounted,
    pub(super) without_bitmaps: bool,
    pub(super) rebuild: bool,
    /// Clusters of the file.
    pub(super) clusters: u64,
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
}
