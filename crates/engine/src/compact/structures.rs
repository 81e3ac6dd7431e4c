//! Moving what has a fixed structure: the active L1 table, the snapshot table and its L1 tables, bitmaps, and the
//! refcount structures. What finds no contiguous room stays for the next pass.

use std::sync::Arc;

use qcow2_format::{HostOffset, SnapshotRecord, words};

use crate::maintenance::Session;
use crate::{ErrorKind, Job, Result};

/// Refcount blocks that move between two syncs.
const BLOCKS: usize = 1024;

impl Session<'_> {
    /// Takes the lowest free clusters for `bytes` that end at or before cluster `limit`, with a refcount of one. Returns
    /// their host offset.
    pub(crate) fn take_low(&self, bytes: u64, limit: u64) -> Result<Option<u64>> {
        let g = self.geometry();
        let count = g.clusters_for(bytes).max(1);
        let found = self.writer.with_alloc(|alloc, _| alloc.lowest_free(count, 1, limit))?;
        let Some(first) = found else { return Ok(None) };
        (first..first + count).try_for_each(|cluster| self.set_refcount(cluster, 1))?;
        Ok(Some(first * g.cluster_size()))
    }

    /// Whether clusters for `bytes` at `offset` reach behind `bound`.
    fn behind(&self, offset: u64, bytes: u64, bound: u64) -> bool {
        let g = self.geometry();
        bytes > 0 && g.cluster_index(offset) + g.clusters_for(bytes) > bound
    }

    /// Moves every structure that reaches behind cluster `bound` below it. Returns how many clusters moved.
    pub(super) fn move_structures(&self, bound: u64, job: &Job) -> Result<u64> {
        let g = self.geometry();
        let mut moved = 0;
        let l1_bytes = self.image.mapping().l1().len() as u64 * 8;
        if self.behind(self.writer.l1_offset(), l1_bytes, bound) {
            moved += self.move_active_l1(bound)?;
        }
        job.checkpoint()?;
        moved += self.move_snapshots(bound)?;
        job.checkpoint()?;
        moved += self.move_bitmaps(bound)?;
        job.checkpoint()?;
        let (used, first, clusters) = self.writer.refcount_table()?;
        if first + clusters > bound
            && let Some(to) = self.take_low(used, bound)?
        {
            self.barrier()?;
            self.writer.move_refcount_table(self.image, to)?;
            moved += g.clusters_for(used);
        }
        job.checkpoint()?;
        self.free_now()?;
        moved += self.move_blocks(bound)?;
        self.free_now()?;
        Ok(moved)
    }

    /// Makes durable and free what lost its references.
    pub(crate) fn free_now(&self) -> Result<()> {
        self.barrier()?;
        self.writer.with_alloc(|alloc, _| alloc.give_back().map(drop))
    }

    /// Moves the active L1 table to the lowest place that ends at or before cluster `limit`. Returns how many clusters
    /// moved: none where there is no such place.
    pub(crate) fn move_active_l1(&self, limit: u64) -> Result<u64> {
        let g = self.geometry();
        let l1 = self.image.l1();
        let bytes = l1.len() as u64 * 8;
        let Some(to) = self.take_low(bytes, limit)? else { return Ok(0) };
        self.write_table(to, words::encode(&l1))?;
        self.barrier()?;
        let former = self.writer.l1_offset();
        // As many entries as before.
        self.writer.write_l1_place(self.image, l1.len() as u32, to)?;
        self.writer.note_active(self.image, &l1, to);
        self.barrier()?;
        self.unlink(former, bytes);
        Ok(g.clusters_for(bytes))
    }

    /// Writes a new snapshot table if it, or an L1 table that it names, reaches behind `bound`.
    fn move_snapshots(&self, bound: u64) -> Result<u64> {
        let g = self.geometry();
        let header = crate::image::read_header(&**self.image.storage())?;
        let mut records: Vec<SnapshotRecord> = self.image.snapshots().to_vec();
        let length: u64 = records.iter().map(|r| r.encoded_length() as u64).sum();
        let former = (header.snapshots_offset.0, length);
        let (mut unlinked, mut moved) = (Vec::new(), Vec::new());
        for record in &mut records {
            let (from, bytes) = (record.l1_table_offset.0, u64::from(record.l1_size) * 8);
            if self.behind(from, bytes, bound)
                && let Some(to) = self.take_low(bytes, bound)?
            {
                let mut l1 = vec![0u8; bytes as usize];
                self.read(from, &mut l1)?;
                let written = self.write_table(to, l1);
                written.inspect_err(|_| moved.iter().for_each(|&(to, bytes)| self.abandon(to, bytes)))?;
                moved.push((to, bytes));
                record.l1_table_offset = HostOffset(to);
                unlinked.push((from, bytes));
            }
        }
        if unlinked.is_empty() && !self.behind(former.0, former.1, bound) {
            return Ok(0);
        }
        let mut bytes = Vec::new();
        for record in &records {
            let encoded = record.encode(&mut bytes, self.image.virtual_size());
            encoded.map_err(|e| self.image.error(ErrorKind::Limit, e.to_string()).with_source(e))?;
        }
        let length = bytes.len() as u64;
        let to = match self.take_low(length, bound)? {
            Some(to) => to,
            None if unlinked.is_empty() => return Ok(0),
            None => self.allocate(length)?,
        };
        let written = self.write_table(to, bytes);
        written.inspect_err(|_| moved.iter().for_each(|&(to, bytes)| self.abandon(to, bytes)))?;
        self.barrier()?;
        self.writer.write_snapshots_place(self.image, records.len() as u32, to)?;
        let records: Arc<[SnapshotRecord]> = records.into();
        self.writer.note_snapshots(self.image, &records, to, length);
        self.image.set_snapshots(records);
        self.barrier()?;
        unlinked.push(former);
        unlinked.iter().for_each(|&(offset, bytes)| self.unlink(offset, bytes));
        Ok(unlinked.iter().map(|u| g.clusters_for(u.1)).sum())
    }

    /// Moves the refcount blocks that lie behind `bound`; those that count only what is behind will be given up.
    fn move_blocks(&self, bound: u64) -> Result<u64> {
        let g = self.geometry();
        let blocks = self.writer.with_alloc(|alloc, _| Ok(alloc.refcounts.blocks()))?;
        let high: Vec<(u64, u64)> = blocks
            .into_iter()
            .filter(|&(index, offset)| {
                g.cluster_index(offset) >= bound && index * g.refcount_block_entries() < bound
            })
            .collect();
        let mut moved = 0;
        for blocks in high.chunks(BLOCKS) {
            let mut moves = Vec::new();
            for &(index, offset) in blocks {
                if let Some(to) = self.take_low(g.cluster_size(), bound)? {
                    moves.push((index, offset, to));
                }
            }
            self.barrier()?;
            self.writer.move_blocks(self.image, &moves)?;
            moved += moves.len() as u64;
        }
        Ok(moved)
    }
}
