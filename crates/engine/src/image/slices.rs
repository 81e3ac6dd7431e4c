//! The cache of L2 table slices: 4 KiB pieces, so that a small read does not load a whole table.
//!
//! Loading is single-flight per slice and blocks nobody who asks for another one. Eviction is quick_cache's S3-FIFO.

use std::sync::Arc;

use qcow2_format::{Geometry, HostOffset, L2Entry, l2, words};
use quick_cache::sync::{Cache, GuardResult};

use crate::{MemMut, Result, Storage, StorageExt};

/// Bytes of a slice, unless clusters are smaller.
const SLICE_BYTES: u64 = 4096;
/// Default upper end of the cache.
const DEFAULT_MAX_BYTES: u64 = 32 << 20;

/// Words of one slice in the machine's byte order.
pub(crate) type Slice = Arc<[u64]>;

#[derive(Debug)]
pub(crate) struct SliceCache {
    cache: Cache<u64, Slice>,
    bytes: u64,
    geometry: Geometry,
}

impl SliceCache {
    pub(super) fn new(geometry: &Geometry, disk_size: u64, limit: Option<u64>) -> Self {
        let bytes = SLICE_BYTES.min(geometry.cluster_size());
        let whole = geometry.clusters_for(disk_size).saturating_mul(geometry.l2_entry_size());
        let capacity = limit.unwrap_or(DEFAULT_MAX_BYTES).min(whole).div_ceil(bytes).max(2);
        Self { cache: Cache::new(capacity as usize), bytes, geometry: *geometry }
    }

    /// Entries in one slice.
    pub(crate) fn entries(&self) -> u64 {
        self.bytes / self.geometry.l2_entry_size()
    }

    /// Bytes in one slice.
    pub(crate) fn slice_bytes(&self) -> u64 {
        self.bytes
    }

    /// Host offset of the slice that holds entry `l2_index` of the L2 table at `table`, and the entry's index in it.
    pub(crate) fn locate(&self, table: HostOffset, l2_index: u64) -> (HostOffset, u64) {
        let entries = self.entries();
        // A table offset has at most 56 bits.
        (HostOffset(table.0 + l2_index / entries * self.bytes), l2_index % entries)
    }

    /// The slice at `offset`, where it is cached.
    pub(super) fn peek(&self, offset: u64) -> Option<Slice> {
        self.cache.get(&offset)
    }

    /// The slice at `offset`, read if it is not cached. One thread reads, others that want it wait.
    pub(super) fn load(&self, storage: &dyn Storage, offset: u64) -> Result<Slice> {
        match self.cache.get_value_or_guard(&offset, None) {
            GuardResult::Value(slice) => Ok(slice),
            GuardResult::Guard(guard) => {
                let slice = load(storage, offset, self.bytes)?;
                // Refused only when the slice was replaced meanwhile: then this copy is not kept.
                let _ = guard.insert(slice.clone());
                Ok(slice)
            }
            GuardResult::Timeout => load(storage, offset, self.bytes),
        }
    }

    /// `count` slices from `offset` on, read in one transfer and not kept.
    pub(super) fn load_uncached(&self, storage: &dyn Storage, offset: u64, count: u64) -> Result<Vec<Slice>> {
        let mut buf = vec![0u8; (count * self.bytes) as usize];
        storage.read_exact_at(MemMut::from(&mut buf[..]), offset).map_err(|e| e.with_field("L2 table"))?;
        Ok(buf.chunks_exact(self.bytes as usize).map(|bytes| words::decode(bytes).into()).collect())
    }

    /// How many entries from `index` on, at most `limit`, say the same: see [`l2::run_length`].
    pub(super) fn run(&self, slice: &[u64], index: u64, limit: u64) -> u64 {
        l2::run_length(slice, index as usize, limit, &self.geometry)
    }

    /// Forgets everything: the tables were changed behind the cache's back.
    pub(super) fn clear(&self) {
        self.cache.clear();
    }

    /// Replaces the slice at `offset` by what was just written there.
    pub(super) fn insert(&self, offset: u64, slice: Slice) {
        self.cache.insert(offset, slice);
    }

    /// Forgets the slices of a table: its cluster was freed or changes outside the cache.
    pub(super) fn remove_table(&self, table: u64, table_bytes: u64) {
        for offset in (table..table + table_bytes).step_by(self.bytes as usize) {
            self.cache.remove(&offset);
        }
    }

    /// Changes entry `index` of a slice.
    pub(crate) fn set_entry(&self, slice: &mut [u64], index: u64, entry: L2Entry) {
        entry.to_words(slice, index as usize, &self.geometry);
    }

    /// Entry `index` of a slice; unallocated outside, which no caller asks for.
    pub(crate) fn entry(&self, slice: &[u64], index: u64) -> L2Entry {
        L2Entry::of_words(slice, index as usize, &self.geometry)
    }
}

fn load(storage: &dyn Storage, offset: u64, bytes: u64) -> Result<Slice> {
    let mut buf = vec![0u8; bytes as usize];
    storage.read_exact_at(MemMut::from(&mut buf[..]), offset).map_err(|e| e.with_field("L2 table"))?;
    Ok(words::decode(&buf).into())
}
