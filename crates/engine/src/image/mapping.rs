//! The mapping of one layer, which is under its lock.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use qcow2_format::{GuestOffset, HostOffset};

use super::slices::{Slice, SliceCache};
use crate::alloc::Unlinked;

/// L1 and changed L2 slices of a layer. Readers plan under the shared lock; writers publish under the exclusive one.
/// The lock is never held across I/O: a slice that is not in memory is loaded without it, then looked for again.
#[derive(Debug)]
pub(crate) struct Mapping {
    /// The L1 table.
    pub(super) l1: Vec<u64>,
    /// L2 slices that differ from the file, by host offset; they win over the cache.
    pub(super) dirty: BTreeMap<u64, Slice>,
    /// Indices of L1 entries that differ from the file.
    pub(super) dirty_l1: BTreeSet<usize>,
    /// Counts changes of slices: a slice loaded without the lock is only good while this stands still.
    pub(super) generation: u64,
    /// Held by requests while they may still use host offsets that they planned: see `alloc/quarantine.rs`.
    pub(super) epoch: Arc<()>,
    /// Host clusters that lost a reference since the last flush.
    pub(super) unlinked: Vec<Unlinked>,
    /// A link since the last flush refers to bytes that must be durable before it: copied data, reused clusters, or
    /// refcounts that are not durable yet.
    pub(super) links_need_barrier: bool,
    /// An L1 entry since the last flush refers to a table that must be durable before it.
    pub(super) tables_need_barrier: bool,
}

/// Slices loaded without the lock: one, or those of a piece of a table.
#[derive(Debug, Default)]
pub(crate) struct Loaded {
    /// Where the first one is.
    pub(super) offset: HostOffset,
    pub(super) slices: Vec<Slice>,
    pub(super) generation: u64,
}

impl Loaded {
    /// The slice, of one.
    pub(crate) fn into_slice(self) -> Option<Slice> {
        self.slices.into_iter().next()
    }

    /// The slice at `offset`.
    fn slice(&self, offset: HostOffset, slice_bytes: u64) -> Option<&Slice> {
        let index = offset.0.checked_sub(self.offset.0)? / slice_bytes;
        self.slices.get(usize::try_from(index).ok()?)
    }
}

/// A slice that planning needs and memory does not have.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Missing {
    pub(crate) offset: HostOffset,
    pub(crate) generation: u64,
    /// What needs it.
    pub(crate) guest: GuestOffset,
}

impl Mapping {
    pub(super) fn new(l1: Vec<u64>) -> Self {
        Self {
            l1,
            dirty: BTreeMap::new(),
            dirty_l1: BTreeSet::new(),
            generation: 0,
            epoch: Arc::new(()),
            unlinked: Vec::new(),
            links_need_barrier: false,
            tables_need_barrier: false,
        }
    }

    /// The L1 table.
    pub(crate) fn l1(&self) -> &[u64] {
        &self.l1
    }

    /// How many L2 slices differ from the file.
    pub(crate) fn dirty_slices(&self) -> u64 {
        self.dirty.len() as u64
    }

    /// How many runs of host clusters lost a reference since the last flush.
    pub(crate) fn unlinked(&self) -> usize {
        self.unlinked.len()
    }

    /// That the slice at `offset`, which `guest` needs, is not in memory.
    pub(crate) fn missing(&self, offset: HostOffset, guest: GuestOffset) -> Missing {
        Missing { offset, generation: self.generation, guest }
    }

    /// The slice at `offset`, from memory only.
    pub(crate) fn slice(&self, cache: &SliceCache, offset: HostOffset, loaded: &Loaded) -> Option<Slice> {
        if let Some(slice) = self.dirty.get(&offset.0) {
            return Some(Arc::clone(slice));
        }
        cache.peek(offset.0).or_else(|| {
            let current = loaded.generation == self.generation;
            loaded.slice(offset, cache.slice_bytes()).filter(|_| current).cloned()
        })
    }
}
