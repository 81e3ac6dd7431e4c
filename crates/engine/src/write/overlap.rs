//! Where the structures of an image are when it is opened for writing.

use qcow2_format::{L1Entry, SnapshotRecord};

use crate::alloc::MetadataMap;
use crate::image::Qcow2;

impl MetadataMap {
    pub(super) fn of(image: &Qcow2, refcount_blocks: impl Iterator<Item = u64>) -> Self {
        let g = *image.geometry();
        let header = image.header();
        let mut map = Self::default();
        map.add_fixed(&g, 0, 1, "header");
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
        refcount_blocks.for_each(|o| map.add(g.cluster_index(o)));
        let tables = image.mapping();
        let offsets = tables.l1().iter().map(|&e| L1Entry(e).offset_bits()).filter(|&o| o != 0);
        offsets.for_each(|o| map.add(g.cluster_index(o)));
        map
    }
}
