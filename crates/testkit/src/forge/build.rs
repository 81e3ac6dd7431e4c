//! From the builder's description to bytes: tables, snapshots, bitmaps, refcounts, and the header last.

use std::collections::BTreeMap;

use super::{Built, COMPRESSED, COPIED, Entries, Forge, Layout, field};
use crate::Sparse;

/// L2 tables of one view of the disk: L1 index to host offset.
type Tables = BTreeMap<u64, u64>;

impl Forge {
    /// Lays out the image and computes its refcounts.
    pub fn build(mut self) -> Built {
        let mut layout = Layout {
            cluster_bits: self.cluster_bits,
            entry_size: if self.extended { 16 } else { 8 },
            ..Layout::default()
        };
        let active = std::mem::take(&mut self.entries);
        let snapshots = std::mem::take(&mut self.snapshots);
        for entries in snapshots.iter().map(|s| &s.entries).chain([&active]) {
            for (entry, _) in entries.values() {
                for cluster in self.referred(*entry) {
                    *self.refs.entry(cluster).or_default() += 1;
                }
            }
        }

        let l1_len = self.l1_len(self.size);
        (layout.l1, layout.l2) = self.write_tables(&active, l1_len, true);
        for snapshot in &snapshots {
            let (l1, _) = self.write_tables(&snapshot.entries, self.l1_len(snapshot.size), false);
            layout.snapshot_l1.push(l1);
        }
        self.write_snapshot_table(&snapshots, &mut layout);
        self.write_bitmaps(&mut layout);
        let table_clusters = self.write_refcounts(&mut layout);
        self.write_header(&mut layout, l1_len, table_clusters, snapshots.len() as u32);

        let end = self.next.max(self.file.len()).next_multiple_of(self.cluster_size());
        self.file.set_len(end);
        Built { bytes: self.file, data_file: self.data_file, layout }
    }

    /// Metadata clusters: referred to once.
    fn take(&mut self, bytes: u64) -> u64 {
        let clusters = bytes.div_ceil(self.cluster_size()).max(1);
        let at = self.alloc(clusters);
        for cluster in 0..clusters {
            *self.refs.entry((at >> self.cluster_bits) + cluster).or_default() += 1;
        }
        at
    }

    fn write_tables(&mut self, entries: &Entries, l1_len: u64, active: bool) -> (u64, Tables) {
        let mut tables = Tables::new();
        let flag = if active { COPIED } else { 0 };
        let l1 = self.take(l1_len * 8);
        for (&guest_cluster, &(entry, bitmap)) in entries {
            let (index, slot) = (guest_cluster / self.per_table(), guest_cluster % self.per_table());
            let table = match tables.get(&index) {
                Some(&table) => table,
                None => {
                    let table = self.take(self.cluster_size());
                    self.file.write(table, &vec![0; self.cluster_size() as usize]);
                    self.file.put_u64(l1 + index * 8, table | flag);
                    tables.insert(index, table);
                    table
                }
            };
            let copied = entry & COMPRESSED == 0
                && entry & COPIED != 0
                && active
                && self.referred(entry).iter().all(|cluster| self.refs[cluster] == 1);
            let value = if copied { entry } else { entry & !COPIED };
            if self.extended {
                self.file.put_u64(table + slot * 16, value);
                self.file.put_u64(table + slot * 16 + 8, bitmap);
            } else {
                self.file.put_u64(table + slot * 8, value);
            }
        }
        (l1, tables)
    }

    fn write_snapshot_table(&mut self, snapshots: &[super::Snapshot], layout: &mut Layout) {
        if snapshots.is_empty() {
            return;
        }
        let mut table = Vec::new();
        let mut starts = Vec::new();
        for (snapshot, l1) in snapshots.iter().zip(&layout.snapshot_l1) {
            starts.push(table.len() as u64);
            table.extend_from_slice(&l1.to_be_bytes());
            table.extend_from_slice(&(self.l1_len(snapshot.size) as u32).to_be_bytes());
            table.extend_from_slice(&(snapshot.id.len() as u16).to_be_bytes());
            table.extend_from_slice(&(snapshot.name.len() as u16).to_be_bytes());
            table.extend_from_slice(&1_700_000_000u32.to_be_bytes());
            table.extend_from_slice(&123_000_000u32.to_be_bytes());
            table.extend_from_slice(&[0; 12]);
            table.extend_from_slice(&(snapshot.extra.len() as u32).to_be_bytes());
            table.extend_from_slice(&snapshot.extra);
            table.extend_from_slice(&snapshot.id);
            table.extend_from_slice(&snapshot.name);
            table.resize(table.len().next_multiple_of(8), 0);
        }
        layout.snapshot_table = self.take(table.len() as u64);
        layout.snapshot_entries = starts.iter().map(|s| s + layout.snapshot_table).collect();
        self.file.write(layout.snapshot_table, &table);
    }

    fn write_bitmaps(&mut self, layout: &mut Layout) {
        let bitmaps = std::mem::take(&mut self.bitmaps);
        if bitmaps.is_empty() {
            return;
        }
        let mut directory = Vec::new();
        for bitmap in &bitmaps {
            let bits = self.size.div_ceil(1 << bitmap.granularity_bits);
            let entries = bits.div_ceil(8).div_ceil(self.cluster_size()).max(1);
            let table = self.take(entries * 8);
            for (i, part) in bitmap.data.chunks(self.cluster_size() as usize).enumerate() {
                let at = self.take(self.cluster_size());
                self.file.write(at, part);
                self.file.put_u64(table + i as u64 * 8, at);
            }
            directory.extend_from_slice(&table.to_be_bytes());
            directory.extend_from_slice(&(entries as u32).to_be_bytes());
            directory.extend_from_slice(&bitmap.flags.to_be_bytes());
            directory.extend_from_slice(&[1, bitmap.granularity_bits]);
            directory.extend_from_slice(&(bitmap.name.len() as u16).to_be_bytes());
            directory.extend_from_slice(&[0; 4]);
            directory.extend_from_slice(&bitmap.name);
            directory.resize(directory.len().next_multiple_of(8), 0);
        }
        layout.bitmap_directory = self.take(directory.len() as u64);
        self.file.write(layout.bitmap_directory, &directory);
        let mut data = (bitmaps.len() as u32).to_be_bytes().to_vec();
        data.extend_from_slice(&[0; 4]);
        data.extend_from_slice(&(directory.len() as u64).to_be_bytes());
        data.extend_from_slice(&layout.bitmap_directory.to_be_bytes());
        self.extensions.push((field::EXT_BITMAPS, data));
        self.features[2] |= field::AUTOCLEAR_BITMAPS;
    }

    /// Writes the refcount table and its blocks, which count themselves. Gives the table's clusters.
    fn write_refcounts(&mut self, layout: &mut Layout) -> u32 {
        let bits = 1u64 << self.refcount_order;
        let per_block = self.cluster_size() * 8 / bits;
        let highest = self.refs.keys().last().copied().unwrap_or(0) + 64;
        // Blocks added below are few; a table with as many spare entries as used ones always holds them.
        let table_len = (highest / per_block + 1) * 2 * 8;
        let table_clusters = table_len.div_ceil(self.cluster_size());
        layout.refcount_table = self.take(table_len);
        loop {
            let missing = self
                .refs
                .keys()
                .map(|cluster| cluster / per_block)
                .find(|index| !layout.refcount_blocks.contains_key(index));
            let Some(index) = missing else { break };
            let block = self.take(self.cluster_size());
            layout.refcount_blocks.insert(index, block);
        }
        for (&index, &block) in &layout.refcount_blocks {
            assert!(index * 8 < table_clusters << self.cluster_bits, "refcount table too small");
            self.file.put_u64(layout.refcount_table + index * 8, block);
            self.file.write(block, &vec![0; self.cluster_size() as usize]);
        }
        for (&cluster, &count) in &self.refs {
            assert!(bits == 64 || count < 1 << bits, "refcount {count} does not fit {bits} bits");
            let block = layout.refcount_blocks[&(cluster / per_block)];
            put_refcount(&mut self.file, block, cluster % per_block, bits, count);
        }
        table_clusters as u32
    }

    fn write_header(&mut self, layout: &mut Layout, l1_len: u64, table_clusters: u32, snapshots: u32) {
        let mut h = Sparse::new(u64::from(self.header_length));
        h.put_u32(0, field::MAGIC);
        h.put_u32(field::VERSION, self.version);
        h.put_u32(field::CLUSTER_BITS, self.cluster_bits);
        h.put_u64(field::SIZE, self.size);
        h.put_u32(field::CRYPT_METHOD, self.crypt_method);
        h.put_u32(field::L1_SIZE, l1_len as u32);
        h.put_u64(field::L1_OFFSET, layout.l1);
        h.put_u64(field::REFCOUNT_OFFSET, layout.refcount_table);
        h.put_u32(field::REFCOUNT_CLUSTERS, table_clusters);
        h.put_u32(field::SNAPSHOTS, snapshots);
        h.put_u64(field::SNAPSHOTS_OFFSET, layout.snapshot_table);
        if self.version >= 3 {
            h.put_u64(field::INCOMPATIBLE, self.features[0]);
            h.put_u64(field::COMPATIBLE, self.features[1]);
            h.put_u64(field::AUTOCLEAR, self.features[2]);
            h.put_u32(field::REFCOUNT_ORDER, self.refcount_order);
            h.put_u32(field::HEADER_LENGTH, self.header_length);
            if self.zstd {
                h.write(field::COMPRESSION_TYPE, &[1]);
            }
        }
        let mut at = u64::from(self.header_length);
        for (magic, data) in &self.extensions {
            layout.extensions.push(at);
            h.put_u32(at, *magic);
            h.put_u32(at + 4, data.len() as u32);
            h.write(at + 8, data);
            at = (at + 8 + data.len() as u64).next_multiple_of(8);
        }
        layout.extensions.push(at);
        h.write(at, &[0; 8]);
        if !self.backing.is_empty() {
            layout.backing_name = at + 8;
            h.write(at + 8, &self.backing);
            h.put_u64(field::BACKING_OFFSET, at + 8);
            h.put_u32(field::BACKING_SIZE, self.backing.len() as u32);
        }
        assert!(h.len() <= self.cluster_size(), "the header does not fit the first cluster");
        self.file.write(0, &h.to_vec());
    }
}

/// Sets entry `index` of a refcount block; below a byte, bit 0 of the first byte belongs to entry 0.
fn put_refcount(file: &mut Sparse, block: u64, index: u64, bits: u64, count: u64) {
    if bits >= 8 {
        let width = (bits / 8) as usize;
        file.write(block + index * bits / 8, &count.to_be_bytes()[8 - width..]);
    } else {
        let at = block + index * bits / 8;
        let byte = file.get(at, 1)[0] | (count << (index * bits % 8)) as u8;
        file.write(at, &[byte]);
    }
}
