//! The overlap check: guest data is never written over the image's own structures, in release builds too.

use std::collections::HashSet;

use qcow2_format::header::extension::BitmapsExtension;
use qcow2_format::{Geometry, SnapshotRecord};

/// Host clusters that hold metadata.
#[derive(Debug, Default)]
pub(crate) struct MetadataMap {
    /// Structures that do not move in single clusters: start and end cluster, and a name for the message.
    fixed: Vec<(u64, u64, &'static str)>,
    /// Active L2 tables and refcount blocks.
    clusters: HashSet<u64>,
}

impl MetadataMap {
    pub(crate) fn add_fixed(&mut self, g: &Geometry, offset: u64, bytes: u64, name: &'static str) {
        if bytes > 0 {
            let first = g.cluster_index(offset);
            self.fixed.push((first, first + g.clusters_for(bytes), name));
        }
    }

    /// Records the place of the snapshot table and of the snapshots' L1 tables.
    pub(crate) fn set_snapshots(
        &mut self,
        g: &Geometry,
        records: &[SnapshotRecord],
        offset: u64,
        bytes: u64,
    ) {
        self.fixed.retain(|f| f.2 != "snapshot table" && f.2 != "snapshot L1 table");
        self.add_fixed(g, offset, bytes, "snapshot table");
        for record in records {
            let bytes = u64::from(record.l1_size) * 8;
            self.add_fixed(g, record.l1_table_offset.0, bytes, "snapshot L1 table");
        }
    }

    /// Records the place of the active L1 table.
    pub(crate) fn set_l1(&mut self, g: &Geometry, offset: u64, entries: u64) {
        self.fixed.retain(|f| f.2 != "active L1 table");
        self.add_fixed(g, offset, entries * 8, "active L1 table");
    }

    /// Records the place of the bitmap directory.
    pub(crate) fn set_bitmaps(&mut self, g: &Geometry, directory: Option<&BitmapsExtension>) {
        self.fixed.retain(|f| f.2 != "bitmap directory");
        if let Some(directory) = directory {
            self.add_fixed(g, directory.directory_offset.0, directory.directory_size, "bitmap directory");
        }
    }

    /// Records the place of the refcount table.
    pub(crate) fn set_refcount_table(&mut self, g: &Geometry, offset: u64, clusters: u64) {
        self.fixed.retain(|f| f.2 != "refcount table");
        self.add_fixed(g, offset, clusters * g.cluster_size(), "refcount table");
    }

    /// Records a new L2 table or refcount block.
    pub(crate) fn add(&mut self, cluster: u64) {
        self.clusters.insert(cluster);
    }

    /// Whether the cluster is an L2 table or a refcount block.
    pub(crate) fn has(&self, cluster: u64) -> bool {
        self.clusters.contains(&cluster)
    }

    /// Forgets an L2 table or a refcount block that nothing refers to.
    pub(crate) fn remove(&mut self, cluster: u64) {
        self.clusters.remove(&cluster);
    }

    /// The structure that a write to clusters `first..end` would hit.
    pub(crate) fn hit(&self, first: u64, end: u64) -> Option<&'static str> {
        if let Some(fixed) = self.fixed.iter().find(|f| f.0 < end && first < f.1) {
            return Some(fixed.2);
        }
        (first..end).any(|c| self.clusters.contains(&c)).then_some("L2 table or refcount block")
    }
}
