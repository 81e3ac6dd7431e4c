//! The refcounts that the image stores: refcount table and blocks, and which clusters have exactly one reference.

use qcow2_format::limits::MAX_CLUSTER_BITS;
use qcow2_format::refcount::{self, RefcountTableEntry};
use qcow2_format::{Geometry, HostOffset};

use super::read_ahead::{Source, Table, for_each_table};
use super::target::Target;
use crate::{Error, ErrorKind, MemMut, Result, Storage, StorageExt};

/// Clusters whose bits share an allocation.
const PAGE: u64 = 1 << 17;
const PAGE_WORDS: usize = (PAGE / 64) as usize;

/// The largest offset that a cluster of any size can be read at.
const MAX_OFFSET: u64 = i64::MAX as u64 - (1 << MAX_CLUSTER_BITS);

/// The stored refcounts. Blocks are read when they are needed and not kept, but for the last one; what is kept of all
/// is one bit per cluster of the file, which answers nearly every question about a COPIED flag.
pub(super) struct StoredRefcounts<'a> {
    storage: &'a dyn Storage,
    geometry: Geometry,
    table: Vec<RefcountTableEntry>,
    ones: Vec<Option<Box<[u64; PAGE_WORDS]>>>,
    block: Vec<u8>,
    loaded: Option<u64>,
}

/// A refcount block, by its index in the refcount table.
pub(super) enum Block<'b> {
    /// There is none: all refcounts are 0.
    Absent,
    /// Its bytes.
    Present(&'b [u8]),
    /// It cannot be read, for this reason.
    Unreadable(&'static str),
}

impl<'a> StoredRefcounts<'a> {
    /// Reads the refcount table, and from the blocks of the file's `clusters` which of them have one reference.
    pub(super) fn load(target: &Target<'a>, clusters: u64) -> Result<Self> {
        let header = target.header;
        let geometry = header.geometry;
        let bytes = u64::from(header.refcount_table_clusters) * geometry.cluster_size();
        let limits = &target.options.limits;
        let too_large = |what: &str, limit: u64| {
            Error::new(ErrorKind::Limit, format!("the {what} exceeds the limit of {limit} bytes"))
        };
        if bytes > limits.max_metadata_bytes {
            return Err(too_large("refcount table", limits.max_metadata_bytes));
        }
        if clusters / 8 > limits.max_memory {
            return Err(too_large("check's map of refcounts", limits.max_memory));
        }
        let mut raw = vec![0; usize::try_from(bytes).unwrap_or(usize::MAX)];
        target.storage.read_padded_at(MemMut::from(&mut raw[..]), header.refcount_table_offset.get())?;
        let mut stored = Self {
            storage: target.storage,
            geometry,
            table: RefcountTableEntry::entries(&raw).collect(),
            ones: vec![None; usize::try_from(clusters.div_ceil(PAGE)).unwrap_or(usize::MAX)],
            block: vec![0; geometry.cluster_len()],
            loaded: None,
        };
        stored.load_ones(target, clusters.div_ceil(geometry.refcount_block_entries()))?;
        Ok(stored)
    }

    /// The refcount table.
    pub(super) fn table(&self) -> &[RefcountTableEntry] {
        &self.table
    }

    /// Block `index` of the table.
    pub(super) fn block(&mut self, index: u64) -> Result<Block<'_>> {
        let entry = usize::try_from(index).ok().and_then(|i| self.table.get(i)).copied().unwrap_or_default();
        let offset = match entry.block(&self.geometry) {
            Ok(None) => return Ok(Block::Absent),
            Ok(Some(HostOffset(offset))) => offset,
            Err(_) => return Ok(Block::Unreadable("the refcount block is not cluster aligned")),
        };
        if offset > MAX_OFFSET {
            return Ok(Block::Unreadable("the refcount block lies beyond the largest file offset"));
        }
        if self.loaded != Some(index) {
            self.loaded = None;
            self.storage.read_padded_at(MemMut::from(&mut self.block[..]), offset)?;
            self.loaded = Some(index);
        }
        Ok(Block::Present(&self.block))
    }

    /// Host offset of block `index`, where it can be read.
    pub(super) fn block_offset(&self, index: u64) -> Option<u64> {
        let entry = usize::try_from(index).ok().and_then(|i| self.table.get(i))?;
        entry.block(&self.geometry).ok().flatten().map(HostOffset::get)
    }

    /// Forgets the block that is kept: it was written to.
    pub(super) fn forget_block(&mut self) {
        self.loaded = None;
    }

    /// The stored refcount of a cluster; `None` where its block cannot be read.
    pub(super) fn get(&mut self, cluster: u64) -> Result<Option<u64>> {
        let geometry = self.geometry;
        let index = usize::try_from(geometry.refcount_block_index(cluster)).unwrap_or(usize::MAX);
        Ok(match self.block(geometry.refcount_table_index(cluster))? {
            Block::Absent => Some(0),
            Block::Present(block) => refcount::get(block, index, geometry.refcount_order()),
            Block::Unreadable(_) => None,
        })
    }

    /// Whether each of `length` clusters has (`one`), or none of them has, a stored refcount of exactly 1. False for
    /// clusters behind the end of the file, about which no bit is kept.
    pub(super) fn all(&self, one: bool, first: u64, length: u64) -> bool {
        let end = first.saturating_add(length);
        let mut cluster = first;
        while cluster < end {
            let bit = cluster % 64;
            let count = (64 - bit).min(end - cluster);
            let mask = (u64::MAX >> (64 - count)) << bit;
            let Ok(page) = usize::try_from(cluster / PAGE) else { return false };
            let Some(page) = self.ones.get(page) else { return false };
            let word =
                page.as_ref().and_then(|p| p.get(((cluster % PAGE) / 64) as usize)).copied().unwrap_or(0);
            if word & mask != if one { mask } else { 0 } {
                return false;
            }
            cluster += count;
        }
        true
    }

    /// Reads the first `blocks` blocks, as far as they can be read.
    fn load_ones(&mut self, target: &Target<'_>, blocks: u64) -> Result<()> {
        let order = self.geometry.refcount_order();
        let readable =
            |index: &u64| self.block_offset(*index).filter(|o| *o <= MAX_OFFSET).map(|o| (*index, o));
        let (indices, offsets): (Vec<u64>, Vec<u64>) = (0..blocks).filter_map(|i| readable(&i)).unzip();
        let source = Source {
            storage: self.storage,
            file_length: self.storage.size()?,
            table_length: self.geometry.cluster_len(),
        };
        // 64 refcounts are 8 bytes times their width in bits.
        let masks =
            |block: &[u8]| Some(block.chunks_exact(8 << order).map(|c| ones(c, order)).collect::<Vec<u64>>());
        let entries = self.geometry.refcount_block_entries();
        let mut keep = |place: usize, read: Result<&Table<Vec<u64>>>| -> Result<()> {
            target.job.checkpoint()?;
            if let (Table::Summary(masks), Some(index)) = (read?, indices.get(place)) {
                self.ones_of_block(index * entries, masks);
            }
            Ok(())
        };
        for_each_table(source, &offsets, target.options.readers, masks, &mut keep)
    }

    /// Takes which refcounts from the one of cluster `first` on are 1, 64 in a word.
    fn ones_of_block(&mut self, first: u64, masks: &[u64]) {
        for (i, mask) in masks.iter().enumerate().filter(|(_, mask)| **mask != 0) {
            let cluster = first + 64 * i as u64;
            let Some(page) = usize::try_from(cluster / PAGE).ok().and_then(|p| self.ones.get_mut(p)) else {
                return;
            };
            let page = page.get_or_insert_with(|| Box::new([0; PAGE_WORDS]));
            if let Some(word) = page.get_mut(((cluster % PAGE) / 64) as usize) {
                *word = *mask;
            }
        }
    }
}

/// Which of 64 refcounts are 1.
fn ones(chunk: &[u8], order: u32) -> u64 {
    /// 64 refcounts of 16 bits, all 1: what most of a block is.
    const ONES: [[u8; 2]; 64] = [[0, 1]; 64];
    match (order, chunk.as_chunks::<2>().0) {
        (4, pairs) if pairs == ONES => u64::MAX,
        (4, pairs) => {
            pairs.iter().enumerate().fold(0, |mask, (i, pair)| mask | u64::from(*pair == [0, 1]) << i)
        }
        _ => (0..64).fold(0, |mask, i| mask | u64::from(refcount::get(chunk, i, order) == Some(1)) << i),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ones_of_every_width() {
        for order in 0..=6 {
            let mut chunk = vec![0; 8 << order];
            let mut expected = 0;
            for i in [0, 5, 33, 63] {
                refcount::set(&mut chunk, i, order, 1).unwrap();
                expected |= 1 << i;
            }
            if order > 0 {
                refcount::set(&mut chunk, 7, order, (1 << (1 << order).min(16)) - 1).unwrap();
            }
            assert_eq!(ones(&chunk, order), expected, "{order}");
        }
        assert_eq!(ones(&[0, 1].repeat(64), 4), u64::MAX);
    }
}
