//! The overlap check: guest data is never written over the image's own structures, in release builds too.

use std::collections::HashSet;

use qcow2_format::header::extension::BitmapsExtension;
use qcow2_format::{Geometry, L1Entry, SnapshotRecord};

use crate::image::Qcow2;

/// Host clusters that hold metadata.
#[derive(Debug, Default)]
pub(crate) struct MetadataMap {
    /// Structures that do not move in single clusters: start and end cluster, and a name for the message.
    fixed: Vec<(u64, u64, &'static str)>,
    /// Active L2 tables and refcount blocks.
    clusters: HashSet<u64>,
}

impl MetadataMap {
    pub(super) fn new(image: &Qcow2, refcount_blocks: impl Iterator<Item = u64>) -> Self {
        let g = *image.geometry();
        let header = image.header();
        let mut map = Self { fixed: vec![(0, 1, "header")], clusters: HashSet::new() };
        map.set_l1(&g, header.l1_table_offset.0, u64::from(header.l1_size));
        let table = u64::from(header.refcount_table_clusters) * g.cluster_size();
        map.add_fixed(&g, header.refcount_table_offset.0, table, "refcount table");
        if let Some((offset, length)) = header.crypto_header() {
            map.add_fixed(&g, offset.0, length, "encryption header");
        }
        let snapshots = image.snapshots();
        let table: usize = snapshots.iter().map(SnapshotRecord::encoded_length).sum();
        map.set_snapshots(&g, &snapshots, header.snapshots_offset.0, table as u64);
        map.set_bitmaps(&g, image.bitmap_directory().as_ref());
        map.clusters.extend(refcount_blocks.map(|o| g.cluster_index(o)));
        let tables = image.mapping.read();
        let offsets = tables.l1.iter().map(|&e| L1Entry(e).offset_bits()).filter(|&o| o != 0);
        map.clusters.extend(offsets.map(|o| g.cluster_index(o)));
        map
    }

    fn add_fixed(&mut self, g: &Geometry, offset: u64, bytes: u64, name: &'static str) {
        if bytes > 0 {
            let first = g.cluster_index(offset);
            self.fixed.push((first, first + g.clusters_for(bytes), name));
        }
    }

    /// Records the place of the snapshot table and of the snapshots' L1 tables.
    pub(super) fn set_snapshots(
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
    pub(super) fn set_l1(&mut self, g: &Geometry, offset: u64, entries: u64) {
        self.fixed.retain(|f| f.2 != "active L1 table");
        self.add_fixed(g, offset, entries * 8, "active L1 table");
    }

    /// Records the place of the bitmap directory.
    pub(super) fn set_bitmaps(&mut self, g: &Geometry, directory: Option<&BitmapsExtension>) {
        self.fixed.retain(|f| f.2 != "bitmap directory");
        if let Some(directory) = directory {
            self.add_fixed(g, directory.directory_offset.0, directory.directory_size, "bitmap directory");
        }
    }

    /// Records the place of the refcount table.
    pub(super) fn set_refcount_table(&mut self, g: &Geometry, offset: u64, clusters: u64) {
        self.fixed.retain(|f| f.2 != "refcount table");
        self.add_fixed(g, offset, clusters * g.cluster_size(), "refcount table");
    }

    /// Records a new L2 table or refcount block.
    pub(crate) fn add(&mut self, cluster: u64) {
        self.clusters.insert(cluster);
    }

    /// Whether the cluster is an L2 table or a refcount block.
    pub(super) fn has(&self, cluster: u64) -> bool {
        self.clusters.contains(&cluster)
    }

    /// Forgets an L2 table or a refcount block that nothing refers to.
    pub(super) fn remove(&mut self, cluster: u64) {
        self.clusters.remove(&cluster);
    }

    /// The structure that a write to clusters `first..end` would hit.
    pub(super) fn hit(&self, first: u64, end: u64) -> Option<&'static str> {
        if let Some(fixed) = self.fixed.iter().find(|f| f.0 < end && first < f.1) {
            return Some(fixed.2);
        }
        (first..end).any(|c| self.clusters.contains(&c)).then_some("L2 table or refcount block")
    }
}
