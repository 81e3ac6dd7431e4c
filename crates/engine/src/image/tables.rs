//! The tables of a layer, for those who change it: nothing else than what is here does.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Deref;
use std::sync::Arc;

use parking_lot::{RwLockReadGuard, RwLockWriteGuard};
use qcow2_format::{CompressedDescriptor, HostOffset, L1Entry};

use super::mapping::Mapping;
use super::qcow2::Qcow2;
use super::slices::{Slice, SliceCache};
use crate::alloc::Unlinked;

/// L1 entries in the unit that is written at once: a sector.
const L1_UNIT: usize = 64;

/// What one flush writes.
pub(crate) struct Pending {
    /// Changed slices by their host offset.
    pub(crate) slices: BTreeMap<u64, Slice>,
    /// Start entry and the entries of each changed unit of the L1 table.
    pub(crate) l1: Vec<(usize, Vec<u64>)>,
    /// Host clusters that lost a reference.
    pub(crate) unlinked: Vec<Unlinked>,
    /// Held by the requests that planned before.
    pub(crate) epoch: Arc<()>,
    /// The slices refer to bytes that must be durable before them.
    pub(crate) links_need_barrier: bool,
    /// The L1 entries refer to tables that must be durable before them.
    pub(crate) tables_need_barrier: bool,
}

/// The mapping while it is changed: nobody plans meanwhile.
pub(crate) struct Changing<'a> {
    mapping: RwLockWriteGuard<'a, Mapping>,
    cache: &'a SliceCache,
}

impl Deref for Changing<'_> {
    type Target = Mapping;

    fn deref(&self) -> &Mapping {
        &self.mapping
    }
}

impl Changing<'_> {
    /// Changes a slice, which is at `offset` and current. `barrier`: not durable before what was written for it.
    pub(crate) fn change_slice(
        &mut self,
        offset: HostOffset,
        mut slice: Slice,
        barrier: bool,
        change: impl FnOnce(&mut [u64]),
    ) {
        // A reader's copy stays as it was; without one the words change in place.
        self.mapping.dirty.remove(&offset.0);
        change(Arc::make_mut(&mut slice));
        self.mapping.dirty.insert(offset.0, slice);
        self.mapping.generation += 1;
        self.mapping.links_need_barrier |= barrier;
    }

    /// Puts slices in the place of those at the same host offsets.
    pub(crate) fn put_slices(&mut self, slices: impl IntoIterator<Item = (u64, Slice)>) {
        self.mapping.dirty.extend(slices);
        self.mapping.generation += 1;
    }

    /// Changes an L1 entry. `barrier`: not durable before the table that it names.
    pub(crate) fn set_l1_entry(&mut self, index: usize, entry: L1Entry, barrier: bool) {
        if let Some(place) = self.mapping.l1.get_mut(index) {
            *place = entry.0;
        }
        self.mapping.dirty_l1.insert(index);
        self.mapping.generation += 1;
        self.mapping.tables_need_barrier |= barrier;
    }

    /// Puts another L1 table, which is in the file as it is, in the place of the one that it gives.
    pub(crate) fn replace_l1(&mut self, l1: Vec<u64>) -> Vec<u64> {
        self.mapping.generation += 1;
        std::mem::replace(&mut self.mapping.l1, l1)
    }

    /// Records that host clusters lost a reference.
    pub(crate) fn unlink(&mut self, run: Unlinked) {
        run.push_to(&mut self.mapping.unlinked);
    }

    /// Takes what is waiting and begins a new epoch, at one moment. The slices stay where readers find them.
    pub(crate) fn take_pending(&mut self) -> Pending {
        let mapping = &mut *self.mapping;
        let units: BTreeSet<usize> = std::mem::take(&mut mapping.dirty_l1)
            .into_iter()
            .map(|index| index / L1_UNIT * L1_UNIT)
            .collect();
        let l1 = units
            .into_iter()
            .map(|start| {
                let end = (start + L1_UNIT).min(mapping.l1.len());
                (start, mapping.l1.get(start..end).unwrap_or_default().to_vec())
            })
            .collect();
        Pending {
            slices: mapping.dirty.clone(),
            l1,
            unlinked: std::mem::take(&mut mapping.unlinked),
            epoch: std::mem::replace(&mut mapping.epoch, Arc::new(())),
            links_need_barrier: std::mem::take(&mut mapping.links_need_barrier),
            tables_need_barrier: std::mem::take(&mut mapping.tables_need_barrier),
        }
    }

    /// Moves written slices to the cache, unless they changed again meanwhile.
    pub(crate) fn settle(&mut self, slices: &BTreeMap<u64, Slice>) {
        for (offset, slice) in slices {
            if self.mapping.dirty.get(offset).is_some_and(|now| Arc::ptr_eq(now, slice)) {
                self.mapping.dirty.remove(offset);
                self.cache.insert(*offset, Arc::clone(slice));
            }
        }
    }
}

impl Qcow2 {
    /// The mapping, which does not change while it is held.
    pub(crate) fn mapping(&self) -> RwLockReadGuard<'_, Mapping> {
        self.mapping.read()
    }

    /// The mapping, to change it.
    pub(crate) fn changing(&self) -> Changing<'_> {
        Changing { mapping: self.mapping.write(), cache: &self.slices }
    }

    /// The slices of L2 tables that are in memory.
    pub(crate) fn slices(&self) -> &SliceCache {
        &self.slices
    }

    /// Forgets what the cache has of clusters at `offset`: something else is there now.
    pub(crate) fn forget_slices(&self, offset: u64, bytes: u64) {
        self.slices.remove_table(offset, bytes);
    }

    /// Forgets what a compressed cluster inflated to: other data is stored there now.
    pub(crate) fn forget_inflated(&self, descriptor: &CompressedDescriptor) {
        self.inflated.remove(descriptor);
    }
}
