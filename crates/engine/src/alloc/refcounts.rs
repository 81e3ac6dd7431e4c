//! The image's refcounts: table, and a bounded cache of blocks with their changes.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use qcow2_format::header::field::{self, Patch, Steady};
use qcow2_format::limits::MAX_REFCOUNT_TABLE_BYTES;
use qcow2_format::refcount::{self, RefcountTableEntry};
use qcow2_format::{Geometry, Header, HostOffset, words};

use super::forked::Fork;
use crate::patch::write_patch;
use crate::{Error, ErrorKind, Mem, MemMut, Result, Storage, StorageExt};

/// Bytes of blocks that the cache keeps, beyond changed ones.
const CACHE_BYTES: u64 = 4 << 20;
/// Unit in which changed blocks are written.
pub(super) const PIECE: usize = 4096;

#[derive(Debug)]
pub(crate) struct Refcounts {
    pub(super) storage: Arc<dyn Storage>,
    pub(super) geometry: Geometry,
    /// Of the header that names the table.
    steady: Steady,
    pub(super) table: Vec<u64>,
    pub(super) table_offset: u64,
    pub(super) blocks: HashMap<u64, Block>,
    pub(super) clock: u64,
    /// Bytes of changed pieces.
    pub(super) waiting: usize,
    /// Changes go beside what is in the file.
    pub(super) fork: Option<Fork>,
}

#[derive(Debug)]
pub(super) struct Block {
    pub(super) offset: u64,
    pub(super) bytes: Vec<u8>,
    /// Pieces that differ from the file.
    pub(super) dirty: BTreeSet<usize>,
    /// Pieces were taken to be written: until they are, the file must not be asked.
    writing: bool,
    used: u64,
}

impl Block {
    pub(crate) fn new(offset: u64, bytes: Vec<u8>, used: u64) -> Self {
        Self { offset, bytes, dirty: BTreeSet::new(), writing: false, used }
    }
    fn is_in_file(&self) -> bool {
        self.dirty.is_empty() && !self.writing
    }
    fn touch(&mut self, clock: u64) -> &mut Self {
        self.used = clock;
        self
    }
}

/// Bytes to write, with their place.
pub(crate) type Write = (u64, Vec<u8>);

impl Refcounts {
    pub(crate) fn load(storage: &Arc<dyn Storage>, header: &Header) -> Result<Self> {
        let bytes = u64::from(header.refcount_table_clusters) * header.geometry.cluster_size();
        // The header's check limits the table to 8 MiB.
        let mut table = vec![0u8; bytes as usize];
        storage
            .read_exact_at(MemMut::from(&mut table[..]), header.refcount_table_offset.0)
            .map_err(|e| e.with_field("refcount table"))?;
        Ok(Self::new(
            storage,
            header.geometry,
            header.steady(),
            words::decode(&table),
            header.refcount_table_offset.0,
        ))
    }

    fn new(
        storage: &Arc<dyn Storage>,
        geometry: Geometry,
        steady: Steady,
        table: Vec<u64>,
        table_offset: u64,
    ) -> Self {
        Self {
            storage: Arc::clone(storage),
            geometry,
            steady,
            table,
            table_offset,
            blocks: HashMap::new(),
            clock: 0,
            waiting: 0,
            fork: None,
        }
    }

    /// Refcounts whose table is in cluster `table`, and its blocks in the clusters `blocks`.
    #[cfg(test)]
    pub(super) fn of_blocks(
        storage: &Arc<dyn Storage>,
        geometry: Geometry,
        table: u64,
        blocks: impl IntoIterator<Item = u64>,
    ) -> Self {
        let steady = Steady::new(3, geometry, qcow2_format::CryptMethod::None);
        let size = geometry.cluster_size();
        let blocks = blocks.into_iter().map(|cluster| cluster * size).collect();
        Self::new(storage, geometry, steady, blocks, table * size)
    }

    /// Host offsets of all refcount blocks.
    pub(crate) fn block_offsets(&self) -> impl Iterator<Item = u64> {
        self.table.iter().map(|&e| RefcountTableEntry(e).offset_bits()).filter(|&o| o != 0)
    }

    /// First and number of clusters of the refcount table.
    pub(crate) fn table_clusters(&self) -> (u64, u64) {
        let g = &self.geometry;
        (g.cluster_index(self.table_offset), g.clusters_for(self.table.len() as u64 * 8))
    }

    /// Refcount of host cluster `cluster`.
    pub(crate) fn get(&mut self, cluster: u64) -> Result<u64> {
        let (order, index) = self.place(cluster);
        Ok(match self.block(cluster)? {
            Some(block) => refcount::get(&block.bytes, index, order).unwrap_or(0),
            None => 0,
        })
    }

    /// Sets the refcount of `cluster`, whose block must exist.
    pub(crate) fn set(&mut self, cluster: u64, value: u64) -> Result<()> {
        self.update(cluster, |_| Some(value.into())).map(|_| ())
    }

    /// Adds one reference to `cluster`; returns the refcount.
    pub(crate) fn increment(&mut self, cluster: u64) -> Result<u64> {
        self.update(cluster, |count| Some(u128::from(count) + 1))
    }

    /// Drops one reference of `cluster`; returns the refcount.
    pub(crate) fn decrement(&mut self, cluster: u64) -> Result<u64> {
        self.update(cluster, |count| count.checked_sub(1).map(u128::from))
    }

    /// Changes the refcount of `cluster`, whose block must exist, to what `change` makes of it: `None` where that would
    /// be less than 0. Returns the refcount. One look at the block: snapshots count the references of whole disks.
    fn update(&mut self, cluster: u64, change: impl FnOnce(u64) -> Option<u128>) -> Result<u64> {
        let (order, index) = self.place(cluster);
        let piece = (index << order) / 8 / PIECE;
        let number = self.geometry.refcount_table_index(cluster);
        if self.is_covered(cluster) && !self.may_change(number) {
            let message = format!("refcount block {number} was about to change in the file inside a fork");
            return Err(Error::new(ErrorKind::Internal, message));
        }
        let Some(block) = self.block(cluster)? else {
            return Err(self.corrupt(format!("host cluster {cluster} has no refcount block")));
        };
        let Some(value) = change(refcount::get(&block.bytes, index, order).unwrap_or(0)) else {
            return Err(self.corrupt(format!("host cluster {cluster} was referenced with a refcount of 0")));
        };
        // The largest 64-bit refcount has a successor as well.
        let fits = |value: &u64| refcount::set(&mut block.bytes, index, order, *value).is_some();
        let Some(value) = u64::try_from(value).ok().filter(fits) else {
            let max = self.geometry.refcount_max();
            let message = format!("a refcount of {value} exceeds the image's largest ({max})");
            return Err(Error::new(ErrorKind::Limit, message).with_field("refcount_bits"));
        };
        if block.dirty.insert(piece) {
            self.waiting += PIECE;
        }
        Ok(value)
    }

    /// The first run of at most `limit` free clusters in `from..end`, looking at no more than `budget` clusters; and
    /// the cluster to go on from.
    pub(super) fn find_free(
        &mut self,
        from: u64,
        end: u64,
        limit: u64,
        budget: u64,
    ) -> Result<(Option<(u64, u64)>, u64)> {
        let stop = end.min(from.saturating_add(budget));
        let mut at = from;
        while at < stop && self.get(at)? != 0 {
            at += 1;
        }
        let start = at;
        while at < end.min(start.saturating_add(limit)) && self.get(at)? == 0 {
            at += 1;
        }
        Ok(((at > start && start < stop).then_some((start, at - start)), at))
    }

    fn place(&self, cluster: u64) -> (u32, usize) {
        (self.geometry.refcount_order(), self.geometry.refcount_block_index(cluster) as usize)
    }

    fn corrupt(&self, message: String) -> Error {
        self.storage.located(Error::new(ErrorKind::Corrupt, message)).with_field("refcount")
    }

    /// The block that counts `cluster`, or `None` where there is none.
    pub(super) fn block(&mut self, cluster: u64) -> Result<Option<&mut Block>> {
        let index = self.geometry.refcount_table_index(cluster);
        self.clock += 1;
        let clock = self.clock;
        if !self.blocks.contains_key(&index) {
            let entry = RefcountTableEntry(self.table.get(index as usize).copied().unwrap_or(0));
            let offset = entry.block(&self.geometry).map_err(|e| {
                let error = Error::new(ErrorKind::Corrupt, format!("refcount block {index}: {e}"));
                let error = error.with_field("refcount table entry").with_source(e);
                self.storage.located(error).with_offset(self.table_offset + index * 8)
            })?;
            let Some(offset) = offset else { return Ok(None) };
            let mut bytes = vec![0u8; self.geometry.cluster_len()];
            self.storage
                .read_exact_at(MemMut::from(&mut bytes[..]), offset.0)
                .map_err(|e| e.with_field("refcount block"))?;
            self.insert(index, Block::new(offset.0, bytes, clock));
        }
        let block = self.blocks.get_mut(&index);
        Ok(block.map(|block| block.touch(clock)))
    }

    /// Caches a block; the least recently used one that is in the file as it is makes room.
    pub(super) fn insert(&mut self, index: u64, block: Block) {
        let capacity = (CACHE_BYTES / self.geometry.cluster_size()).max(4) as usize;
        while self.blocks.len() >= capacity {
            let clean = self.blocks.iter().filter(|(_, b)| b.is_in_file());
            let Some(oldest) = clean.min_by_key(|(_, b)| b.used).map(|(i, _)| *i) else { break };
            self.blocks.remove(&oldest);
        }
        self.blocks.insert(index, block);
    }

    /// Bytes of changed pieces that wait to be written.
    pub(crate) fn waiting_bytes(&self) -> usize {
        self.waiting
    }

    /// Takes the changed pieces, neighbours joined, to be written before anything that relies on them. Their blocks stay
    /// in memory until [`Refcounts::note_written`]: read again meanwhile, they would be what they were.
    pub(crate) fn take_dirty(&mut self) -> Vec<Write> {
        self.waiting = 0;
        let mut writes: Vec<Write> = Vec::new();
        let mut dirty: Vec<&mut Block> = self.blocks.values_mut().filter(|b| !b.dirty.is_empty()).collect();
        dirty.sort_by_key(|b| b.offset);
        for block in dirty {
            block.writing = true;
            for piece in std::mem::take(&mut block.dirty) {
                let start = piece * PIECE;
                let end = (start + PIECE).min(block.bytes.len());
                let offset = block.offset + start as u64;
                let bytes = block.bytes.get(start..end).unwrap_or_default();
                match writes.last_mut() {
                    Some((at, data)) if *at + data.len() as u64 == offset => data.extend_from_slice(bytes),
                    _ => writes.push((offset, bytes.to_vec())),
                }
            }
        }
        writes
    }

    /// Writes the changed pieces now. Nobody else writes refcounts meanwhile. What an error leaves unwritten waits on.
    pub(crate) fn write_dirty(&mut self) -> Result<()> {
        for (offset, bytes) in self.take_dirty() {
            if let Err(error) = self.storage.write_all_at(Mem::from(bytes.as_slice()), offset) {
                self.take_back();
                return Err(error);
            }
        }
        self.note_written();
        Ok(())
    }

    /// What was taken may not be in the file.
    fn take_back(&mut self) {
        for block in self.blocks.values_mut().filter(|block| block.writing) {
            block.writing = false;
            let pieces = 0..block.bytes.len().div_ceil(PIECE);
            self.waiting += pieces.filter(|piece| block.dirty.insert(*piece)).count() * PIECE;
        }
    }

    /// What was taken is in the file.
    pub(crate) fn note_written(&mut self) {
        self.blocks.values_mut().for_each(|block| block.writing = false);
    }

    /// The cluster behind the last one with a refcount, for storage whose length says nothing.
    pub(super) fn end_of_use(&mut self) -> Result<u64> {
        let g = self.geometry;
        for index in (0..self.table.len() as u64).rev() {
            let first = index * g.refcount_block_entries();
            if !self.is_covered(first) {
                continue;
            }
            for cluster in (first..first + g.refcount_block_entries()).rev() {
                if self.get(cluster)? != 0 {
                    return Ok(cluster + 1);
                }
            }
        }
        Ok(1)
    }

    /// Whether `cluster` has a refcount block.
    pub(crate) fn is_covered(&self, cluster: u64) -> bool {
        self.has_block(self.geometry.refcount_table_index(cluster))
    }

    /// Whether the block with this index exists.
    pub(super) fn has_block(&self, index: u64) -> bool {
        self.table.get(index as usize).is_some_and(|&e| RefcountTableEntry(e).offset_bits() != 0)
    }

    /// Whether the table has an entry for the block with this index.
    pub(super) fn fits_table(&self, index: u64) -> bool {
        index < self.table.len() as u64
    }

    /// Makes sure that `cluster`, which is free, has a refcount block; new metadata is placed from `cluster` on, where
    /// everything must be free. Returns how many clusters that took and, where the refcount table moved, its new
    /// place for the header. All of it is durable when this returns but the table entry, which the next sync covers,
    /// like the refcounts that need it.
    pub(super) fn cover(&mut self, cluster: u64) -> Result<Covered> {
        let g = self.geometry;
        let index = g.refcount_table_index(cluster);
        if index >= self.table.len() as u64 {
            return self.grow_table(cluster);
        }
        // The new block counts itself: it is the first cluster that it covers, or lies in what it covers.
        let offset = cluster * g.cluster_size();
        let mut block = Block::new(offset, vec![0u8; g.cluster_len()], self.clock);
        let own = g.refcount_block_index(cluster) as usize;
        refcount::set(&mut block.bytes, own, g.refcount_order(), 1);
        self.add_block(index, block)?;
        Ok(Covered { clusters: 1, moved: None })
    }

    /// Makes the block with this index, which is in the table, in the free cluster `place`, which another block counts.
    /// Nobody else writes refcounts meanwhile.
    pub(super) fn cover_from(&mut self, index: u64, place: u64) -> Result<()> {
        let g = self.geometry;
        self.set(place, 1)?;
        let block = Block::new(place * g.cluster_size(), vec![0u8; g.cluster_len()], self.clock);
        if let Err(error) = self.write_dirty().and_then(|()| self.add_block(index, block)) {
            self.set(place, 0)?;
            return Err(error);
        }
        Ok(())
    }

    /// Writes a new block, then its entry in the table. The entry must never be durable before the block and its
    /// refcount: the block would have a refcount of 0.
    fn add_block(&mut self, index: u64, block: Block) -> Result<()> {
        let offset = block.offset;
        self.storage.write_all_at(Mem::from(block.bytes.as_slice()), offset)?;
        self.storage.flush()?;
        self.write_entry(index, offset)?;
        if let Some(entry) = self.table.get_mut(index as usize) {
            *entry = offset;
        }
        self.insert(index, block);
        Ok(())
    }

    /// Writes the entry of a block: its host offset, 0 for none.
    pub(super) fn write_entry(&self, index: u64, offset: u64) -> Result<()> {
        let entry = RefcountTableEntry::new(HostOffset(offset)).to_bytes();
        self.storage.write_all_at(Mem::from(&entry[..]), self.table_offset + index * 8)
    }

    /// Writes a larger table behind `cluster`, with the blocks that count the new metadata itself.
    fn grow_table(&mut self, cluster: u64) -> Result<Covered> {
        let g = self.geometry;
        let per_table_cluster = g.cluster_size() / 8;
        let needed = g.refcount_table_index(cluster) + 1;
        let mut entries = needed + needed / 2;
        // Both parts of the new metadata must be covered by the new table: grow until they are.
        let (blocks, table_clusters) = loop {
            let table_clusters = entries.div_ceil(per_table_cluster);
            let mut blocks = 1;
            let last = loop {
                let last = cluster + blocks + table_clusters - 1;
                let first_block = g.refcount_table_index(cluster);
                let wanted = g.refcount_table_index(last) - first_block + 1;
                if wanted <= blocks {
                    break last;
                }
                blocks = wanted;
            };
            entries = table_clusters * per_table_cluster;
            if g.refcount_table_index(last) < entries {
                break (blocks, table_clusters);
            }
            entries += per_table_cluster;
        };
        if table_clusters * g.cluster_size() > MAX_REFCOUNT_TABLE_BYTES {
            let message = "the image is at its largest size: the refcount table cannot grow".to_owned();
            return Err(self.storage.located(Error::new(ErrorKind::Limit, message)));
        }
        let mut table = self.table.clone();
        table.resize(entries as usize, 0);
        let first_block = g.refcount_table_index(cluster);
        let used = cluster..cluster + blocks + table_clusters;
        let mut new_blocks = Vec::new();
        for number in 0..blocks {
            let offset = (cluster + number) * g.cluster_size();
            let mut bytes = vec![0u8; g.cluster_len()];
            for c in used.clone().filter(|&c| g.refcount_table_index(c) == first_block + number) {
                refcount::set(&mut bytes, g.refcount_block_index(c) as usize, g.refcount_order(), 1);
            }
            self.storage.write_all_at(Mem::from(bytes.as_slice()), offset)?;
            if let Some(entry) = table.get_mut((first_block + number) as usize) {
                *entry = offset;
            }
            new_blocks.push((first_block + number, Block::new(offset, bytes, self.clock)));
        }
        let table_offset = (cluster + blocks) * g.cluster_size();
        let bytes = words::encode(&table);
        self.storage.write_all_at(Mem::from(bytes.as_slice()), table_offset)?;
        self.storage.flush()?;
        let old = self.table_clusters();
        write_patch(&*self.storage, &self.steady, &header_fields(table_offset, table_clusters))?;
        self.storage.flush()?;
        self.table = table;
        self.table_offset = table_offset;
        for (index, block) in new_blocks {
            self.insert(index, block);
        }
        let moved = Some(Moved { old, table_offset: HostOffset(table_offset), table_clusters });
        Ok(Covered { clusters: blocks + table_clusters, moved })
    }
}

/// What names a refcount table in the header.
pub(crate) fn header_fields(offset: u64, clusters: u64) -> Patch {
    let patch = Patch::new().set(field::REFCOUNT_TABLE_OFFSET, HostOffset(offset));
    // The table has at most 8 MiB.
    patch.set(field::REFCOUNT_TABLE_CLUSTERS, clusters as u32)
}

/// What covering a cluster took.
#[derive(Debug)]
pub(super) struct Covered {
    /// New metadata clusters, from the covered one on.
    pub(super) clusters: u64,
    /// The refcount table's move, if it moved.
    pub(super) moved: Option<Moved>,
}

/// A refcount table that moved.
#[derive(Debug)]
pub(super) struct Moved {
    /// First and number of the old table's clusters, now free.
    pub(super) old: (u64, u64),
    pub(super) table_offset: HostOffset,
    pub(super) table_clusters: u64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::MemoryStorage;

    /// Refcounts in clusters of 1 MiB, of which the cache keeps four, with `blocks` blocks behind the table.
    fn refcounts(blocks: u64) -> Refcounts {
        let geometry = Geometry::new(20, 6, false).unwrap();
        let storage = MemoryStorage::new();
        storage.resize((blocks + 2) * geometry.cluster_size()).unwrap();
        Refcounts::of_blocks(&(Arc::new(storage) as Arc<dyn Storage>), geometry, 1, 2..blocks + 2)
    }

    #[test]
    fn what_a_flush_has_not_written_yet_is_not_read_from_the_file() {
        let mut refcounts = refcounts(8);
        let entries = refcounts.geometry.refcount_block_entries();
        refcounts.set(7, 1).unwrap();
        let writes = refcounts.take_dirty();
        // A request looks at others before the flush comes to write.
        for number in 1..8 {
            assert_eq!(refcounts.get(number * entries).unwrap(), 0);
        }
        assert_eq!(refcounts.get(7).unwrap(), 1);
        for (offset, bytes) in writes {
            refcounts.storage.write_all_at(Mem::from(bytes.as_slice()), offset).unwrap();
        }
        refcounts.note_written();
        for number in 1..8 {
            refcounts.get(number * entries).unwrap();
        }
        assert!(refcounts.blocks.len() <= 4, "written blocks make room");
        assert_eq!(refcounts.get(7).unwrap(), 1);
    }
}
