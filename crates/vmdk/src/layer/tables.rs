//! Grain tables in memory: those that were used last, of all extents.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use qcow2_core::Result;
use quick_cache::Weighter;
use quick_cache::sync::{Cache, GuardResult};

/// Bytes of tables that are kept unless the caller says otherwise.
const DEFAULT_BYTES: u64 = 32 << 20;
/// Bytes of a common table in memory.
const COMMON: u64 = 4096;

/// The entries of a table in the machine's byte order. They change in place.
#[derive(Debug)]
pub(super) struct Table(Box<[AtomicU64]>);

impl Table {
    pub(super) fn new(entries: Vec<u64>) -> Self {
        Self(entries.into_iter().map(AtomicU64::new).collect())
    }

    /// An entry; 0 for one that the table does not have.
    pub(super) fn get(&self, index: u64) -> u64 {
        self.0.get(index as usize).map_or(0, |entry| entry.load(Ordering::Acquire))
    }

    pub(super) fn set(&self, index: u64, value: u64) {
        if let Some(entry) = self.0.get(index as usize) {
            entry.store(value, Ordering::Release);
        }
    }

    /// Entries of 0 from the first on.
    pub(super) fn empty_from(&self, index: u64) -> u64 {
        let rest = self.0.get(index as usize..).unwrap_or_default();
        rest.iter().take_while(|entry| entry.load(Ordering::Acquire) == 0).count() as u64
    }
}

#[derive(Debug, Clone)]
struct ByBytes;

impl Weighter<(usize, u64), Arc<Table>> for ByBytes {
    fn weight(&self, _: &(usize, u64), table: &Arc<Table>) -> u64 {
        (table.0.len() as u64 * 8).max(1)
    }
}

/// By the number of the extent, and the table's number in it.
#[derive(Debug)]
pub(super) struct TableCache(Cache<(usize, u64), Arc<Table>, ByBytes>);

impl TableCache {
    pub(super) fn new(limit: Option<u64>) -> Self {
        let bytes = limit.unwrap_or(DEFAULT_BYTES).max(2 * COMMON);
        Self(Cache::with_weighter((bytes / COMMON).min(8192) as usize, bytes, ByBytes))
    }

    /// The table, from the cache or by `load`. One thread loads it, others that want it wait.
    pub(super) fn get(&self, key: (usize, u64), load: impl FnOnce() -> Result<Table>) -> Result<Arc<Table>> {
        match self.0.get_value_or_guard(&key, None) {
            GuardResult::Value(table) => Ok(table),
            GuardResult::Guard(guard) => {
                let table = Arc::new(load()?);
                // Refused only when the table was replaced meanwhile: then this copy is not kept.
                let _ = guard.insert(Arc::clone(&table));
                Ok(table)
            }
            GuardResult::Timeout => load().map(Arc::new),
        }
    }

    /// Replaces what is cached, and what is being loaded.
    pub(super) fn put(&self, key: (usize, u64), table: Arc<Table>) {
        self.0.insert(key, table);
    }
}
