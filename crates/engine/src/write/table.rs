//! L2 tables that can be changed in place: new ones, and copies of shared ones.

use std::sync::Arc;

use qcow2_format::{GuestOffset, HostOffset, L1Entry};

use crate::alloc::Unlinked;
use crate::alloc::{Allocation, Wish};
use crate::image::{Missing, Qcow2};
use crate::writer::Writer;
use crate::{ErrorKind, Result, StorageExt};

/// The slice of an exclusive L2 table that maps a guest offset.
#[derive(Debug, Clone, Copy)]
pub(super) struct SlicePlace {
    /// Where the slice is.
    pub(super) offset: HostOffset,
    /// Index in it of the entry for the guest offset.
    pub(super) index: u64,
}

/// Where the slice for a guest offset is, if it can be changed in place.
pub(super) fn exclusive_slice(image: &Qcow2, l1: &[u64], guest: GuestOffset) -> Result<Option<SlicePlace>> {
    let g = image.geometry();
    let entry = L1Entry(l1.get(g.l1_index(guest) as usize).copied().unwrap_or(0));
    let table = entry.table(g).map_err(|e| image.corrupt_entry(e, guest.0))?;
    Ok(table.filter(|_| entry.copied()).map(|table| {
        let (offset, index) = image.slices().locate(table, g.l2_index(guest));
        SlicePlace { offset, index }
    }))
}

impl Writer {
    /// Gives the L1 entry for `guest` an L2 table that only the active disk refers to: a new one, or a copy of the
    /// shared one.
    pub(super) fn prepare_table(&self, image: &Qcow2, guest: u64) -> Result<()> {
        let _one = self.tables.lock();
        let g = *image.geometry();
        let guest = GuestOffset(guest);
        let index = g.l1_index(guest) as usize;
        let old = {
            let mapping = image.mapping();
            if exclusive_slice(image, mapping.l1(), guest)?.is_some() {
                return Ok(());
            }
            let Some(&entry) = mapping.l1().get(index) else {
                let message = format!("guest offset {guest} is beyond the L1 table");
                return Err(image.error(ErrorKind::Corrupt, message).with_field("l1_size"));
            };
            L1Entry(entry).table(&g).map_err(|e| image.corrupt_entry(e, guest.0))?
        };
        let slice_bytes = image.slices().slice_bytes();
        let slices = g.cluster_size() / slice_bytes;
        let mut words: Vec<Arc<[u64]>> = Vec::with_capacity(slices as usize);
        for number in 0..slices {
            words.push(match old {
                // A shared table does not change, and `tables` keeps others from replacing it.
                Some(table) => self.shared_slice(image, HostOffset(table.0 + number * slice_bytes), guest)?,
                None => vec![0; (slice_bytes / 8) as usize].into(),
            });
        }
        // A copied table must be durable before the L1 entry names it, whatever the cluster held.
        let allocation = {
            let mut alloc = self.alloc.lock();
            let allocation = alloc.allocate(1, old.is_some(), Wish::default(), &mut self.metadata.lock());
            allocation.map_err(|e| {
                let corrupt = e.kind() == ErrorKind::Corrupt;
                self.poison_unless_full(if corrupt { e.with_field("L2 table") } else { e })
            })?
        };
        if let Err(error) = self.space_for_table(image, &allocation, index) {
            self.alloc.lock().abandon(allocation);
            return Err(error);
        }
        let table = allocation.cluster * g.cluster_size();
        let mut mapping = image.changing();
        mapping.put_slices((0u64..).zip(words).map(|(number, slice)| (table + number * slice_bytes, slice)));
        let barrier = old.is_some() || !allocation.host_zero || !allocation.durable;
        mapping.set_l1_entry(index, L1Entry::new(HostOffset(table), true), barrier);
        if let Some(old) = old {
            mapping.unlink(Unlinked { cluster: g.cluster_index(old.0), count: 1, punch: false });
        }
        let mut metadata = self.metadata.lock();
        metadata.add(allocation.cluster);
        Ok(())
    }

    /// Reserves what a flush will write of a new table, and of the L1 entry that names it: a file system that runs full
    /// fails this request, not the flush of those before it.
    fn space_for_table(&self, image: &Qcow2, table: &Allocation, l1_index: usize) -> Result<()> {
        let storage = image.storage();
        let size = image.geometry().cluster_size();
        storage.reserve(table.cluster * size, size)?;
        storage.reserve(self.l1_offset() + l1_index as u64 * 8, 8)
    }

    fn shared_slice(&self, image: &Qcow2, offset: HostOffset, guest: GuestOffset) -> Result<Arc<[u64]>> {
        let found = image.mapping().slice(image.slices(), offset, &Default::default());
        match found {
            Some(slice) => Ok(slice),
            None => {
                let loaded = image.load_slice(Missing { offset, generation: 0, guest })?;
                loaded.into_slice().ok_or_else(|| image.error(ErrorKind::Internal, "a slice was not loaded"))
            }
        }
    }
}
