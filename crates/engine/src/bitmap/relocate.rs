//! Moving stored bitmaps, raw: what they say does not matter here.
//!
//! Each reference to a place is one aligned word of eight bytes: in a bitmap's table, in the directory, in the
//! header's extension. It changes when what it refers to is durable.

use qcow2_format::HostOffset;
use qcow2_format::bitmap::{BitmapCluster, BitmapDirectoryEntry};
use qcow2_format::header::extension::BitmapsExtension;

use crate::Result;
use crate::maintenance::Session;

impl Session<'_> {
    /// Moves what of the bitmaps lies behind cluster `bound` below it, where there is room. Returns how many clusters.
    pub(crate) fn move_bitmaps(&self, bound: u64) -> Result<u64> {
        let g = self.geometry();
        let Some(mut directory) = self.image.bitmap_directory() else { return Ok(0) };
        let high = |offset: u64, bytes: u64| g.cluster_index(offset) + g.clusters_for(bytes) > bound;
        let mut moved = 0;
        let mut at = directory.directory_offset.0;
        for record in self.image.bitmaps()? {
            let entry = &record.entry;
            let bytes = u64::from(entry.table_size) * 8;
            if bytes > 0 {
                moved += self.move_bits(&self.image.bitmap_table(entry)?, entry.table_offset.0, bound)?;
            }
            if bytes > 0
                && high(entry.table_offset.0, bytes)
                && let Some(to) = self.take_low(bytes, bound)?
            {
                let mut table = vec![0u8; bytes as usize];
                self.read(entry.table_offset.0, &mut table)?;
                self.write_table(to, table)?;
                self.barrier()?;
                let (field, place) = BitmapDirectoryEntry::table_patch(HostOffset(to));
                self.write(at + field, &place)?;
                self.barrier()?;
                self.unlink(entry.table_offset.0, bytes);
                moved += g.clusters_for(bytes);
            }
            at += entry.encoded_length() as u64;
        }
        let (from, bytes) = (directory.directory_offset.0, directory.directory_size);
        if high(from, bytes)
            && let Some(extension) = self.find_extension()?
            && let Some(to) = self.take_low(bytes, bound)?
        {
            let mut copy = vec![0u8; bytes as usize];
            self.read(from, &mut copy)?;
            self.write_table(to, copy)?;
            self.barrier()?;
            let (field, place) = BitmapsExtension::directory_patch(HostOffset(to));
            self.write(extension + field, &place)?;
            self.barrier()?;
            directory.directory_offset = HostOffset(to);
            self.writer.note_bitmaps(self.image, Some(&directory));
            self.image.set_bitmap_directory(Some(directory));
            self.unlink(from, bytes);
            moved += g.clusters_for(bytes);
        }
        Ok(moved)
    }

    /// Moves the data clusters of one bitmap, whose table is at `place`.
    fn move_bits(&self, table: &[BitmapCluster], place: u64, bound: u64) -> Result<u64> {
        let g = self.geometry();
        let mut moves: Vec<(u64, u64, u64)> = Vec::new();
        for (index, cluster) in (0u64..).zip(table) {
            let BitmapCluster::Data(host) = *cluster else { continue };
            if g.cluster_index(host.0) >= bound
                && let Some(to) = self.take_low(g.cluster_size(), bound)?
            {
                let mut bytes = vec![0u8; g.cluster_len()];
                self.read(host.0, &mut bytes)?;
                let written = self.write_table(to, bytes);
                written.inspect_err(|_| moves.iter().for_each(|m| self.abandon(m.2, g.cluster_size())))?;
                moves.push((index, host.0, to));
            }
        }
        if moves.is_empty() {
            return Ok(0);
        }
        self.barrier()?;
        for &(index, _, to) in &moves {
            let entry = BitmapCluster::Data(HostOffset(to)).encode();
            self.write(place + index * 8, &entry.to_bytes())?;
        }
        self.barrier()?;
        moves.iter().for_each(|&(_, from, _)| self.unlink(from, g.cluster_size()));
        Ok(moves.len() as u64)
    }
}
