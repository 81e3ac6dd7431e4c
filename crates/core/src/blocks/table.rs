//! The table: read in slices of which some are kept, with the entries that the file does not have yet.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use parking_lot::RwLock;
use quick_cache::sync::{Cache, GuardResult};

use super::layout::Layout;
use crate::{Mem, MemMut, Result, Storage, StorageExt};

/// Entries of a slice: 16 KiB.
const SLICE: u32 = 4096;
/// Bytes of one read of a walk over the whole table.
const WALK: usize = 256 << 10;

pub(super) type Slice = [AtomicU32];

#[derive(Debug)]
pub(super) struct Table {
    slices: Cache<u32, Arc<Slice>>,
    /// Entries that the file does not have. Held shared while a slice is loaded: what is changed meanwhile is in it.
    pending: RwLock<BTreeMap<u32, u32>>,
    entries: AtomicU32,
}

impl Table {
    /// A table of which at most `kept` bytes stay in memory.
    pub(super) fn new(entries: u32, kept: u64) -> Self {
        let slices = (kept / u64::from(SLICE * 4)).clamp(2, u64::from(entries.div_ceil(SLICE)).max(2));
        Self {
            slices: Cache::new(slices as usize),
            pending: RwLock::default(),
            entries: AtomicU32::new(entries),
        }
    }

    pub(super) fn entries(&self) -> u32 {
        self.entries.load(Ordering::Acquire)
    }

    /// The slice with the entry `index`, and the index of its first one. One thread reads it, others that want it wait.
    pub(super) fn slice(
        &self,
        storage: &dyn Storage,
        layout: &Layout,
        index: u32,
    ) -> Result<(u32, Arc<Slice>)> {
        let number = index / SLICE;
        let load = || {
            let pending = self.pending.read();
            self.load(storage, layout, number, &pending)
        };
        let slice = match self.slices.get_value_or_guard(&number, None) {
            GuardResult::Value(slice) => slice,
            GuardResult::Guard(guard) => {
                let pending = self.pending.read();
                let slice = self.load(storage, layout, number, &pending)?;
                let _ = guard.insert(Arc::clone(&slice));
                slice
            }
            GuardResult::Timeout => load()?,
        };
        Ok((number * SLICE, slice))
    }

    fn load(
        &self,
        storage: &dyn Storage,
        layout: &Layout,
        number: u32,
        pending: &BTreeMap<u32, u32>,
    ) -> Result<Arc<Slice>> {
        let first = number * SLICE;
        let count = self.entries().saturating_sub(first).min(SLICE);
        let mut bytes = vec![0; count as usize * 4];
        storage.read_exact_at(MemMut::from(&mut bytes[..]), layout.table + u64::from(first) * 4)?;
        let slice: Arc<Slice> =
            bytes.as_chunks::<4>().0.iter().map(|entry| AtomicU32::new(layout.decode(*entry))).collect();
        for (index, entry) in pending.range(first..first + count) {
            if let Some(slot) = slice.get((index - first) as usize) {
                slot.store(*entry, Ordering::Release);
            }
        }
        Ok(slice)
    }

    /// The entry `index`, which the table has.
    pub(super) fn get(&self, storage: &dyn Storage, layout: &Layout, index: u32) -> Result<u32> {
        let (first, slice) = self.slice(storage, layout, index)?;
        Ok(slice.get((index - first) as usize).map_or(layout.absent, |slot| slot.load(Ordering::Acquire)))
    }

    /// Changes an entry in memory.
    pub(super) fn set(&self, index: u32, entry: u32) {
        let mut pending = self.pending.write();
        pending.insert(index, entry);
        if let Some(slice) = self.slices.peek(&(index / SLICE))
            && let Some(slot) = slice.get((index % SLICE) as usize)
        {
            slot.store(entry, Ordering::Release);
        }
    }

    /// How many entries the file does not have.
    pub(super) fn pending_count(&self) -> usize {
        self.pending.read().len()
    }

    /// The entries that the file does not have, in order.
    pub(super) fn pending(&self) -> Vec<(u32, u32)> {
        self.pending.read().iter().map(|(index, entry)| (*index, *entry)).collect()
    }

    /// Writes entries, those that are neighbours together.
    pub(super) fn write(&self, storage: &dyn Storage, layout: &Layout, entries: &[(u32, u32)]) -> Result<()> {
        for run in entries.chunk_by(|(a, _), (b, _)| a + 1 == *b) {
            let bytes: Vec<u8> = run.iter().flat_map(|(_, entry)| layout.encode(*entry)).collect();
            let Some((first, _)) = run.first() else { continue };
            storage.write_all_at(Mem::from(&bytes[..]), layout.table + u64::from(*first) * 4)?;
        }
        Ok(())
    }

    /// The file has these entries, durably.
    pub(super) fn settled(&self, entries: &[(u32, u32)]) {
        let mut pending = self.pending.write();
        for (index, _) in entries {
            pending.remove(index);
        }
    }

    /// Forgets what was read.
    pub(super) fn forget(&self) {
        self.slices.clear();
    }

    /// The file has another number of entries. No other request runs, and no entry waits for a flush.
    pub(super) fn resize(&self, entries: u32) {
        self.entries.store(entries, Ordering::Release);
        self.forget();
    }

    /// Calls `f` with every entry that the file has, in order.
    pub(super) fn walk(
        &self,
        storage: &dyn Storage,
        layout: &Layout,
        mut f: impl FnMut(u32, u32) -> Result<()>,
    ) -> Result<()> {
        let (end, mut index) = (self.entries(), 0);
        let mut bytes = vec![0; (end as usize * 4).min(WALK)];
        while index < end {
            let count = ((end - index) as usize).min(WALK / 4);
            let part = bytes.get_mut(..count * 4).unwrap_or_default();
            storage.read_exact_at(MemMut::from(&mut *part), layout.table + u64::from(index) * 4)?;
            for entry in part.as_chunks::<4>().0 {
                f(index, layout.decode(*entry))?;
                index += 1;
            }
        }
        Ok(())
    }
}
