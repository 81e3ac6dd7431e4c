//! Changing the entries of one L2 table, slice by slice: what is written is a slice.

use qcow2_format::L2Mapping;

use super::tables::{Table, entry_at, guest_of, read_words};
use crate::Result;
use crate::image::Qcow2;

/// A changed slice: its host offset and its words.
pub(super) type Slice = (u64, Vec<u64>);

/// One L2 table that is current in the file, and what it becomes.
pub(super) struct TableEdit<'a> {
    image: &'a Qcow2,
    table: Table,
    words: Vec<u64>,
}

impl<'a> TableEdit<'a> {
    pub(super) fn read(image: &'a Qcow2, table: Table) -> Result<Self> {
        Ok(Self { image, table, words: read_words(image, table.offset)? })
    }

    /// The first entry of each slice.
    pub(super) fn slices(&self) -> impl Iterator<Item = usize> + use<> {
        (0..self.image.geometry().l2_entries() as usize).step_by(self.image.slices().entries() as usize)
    }

    /// Replaces the entries of the slice that begins with entry `first` by what `change` makes of them, which gets the guest offset,
    /// too: `None` keeps one.
    /// Gives the slice if it changed; after an error, nothing of it is to be written.
    pub(super) fn slice(
        &mut self,
        first: usize,
        mut change: impl FnMut(u64, &L2Mapping) -> Result<Option<L2Mapping>>,
    ) -> Result<Option<Slice>> {
        let Self { image, table, words } = self;
        let g = image.geometry();
        let per_slice = image.slices().entries() as usize;
        let mut changed = false;
        for number in first..first + per_slice {
            let entry = entry_at(image, words, number);
            if entry.word == 0 {
                continue;
            }
            let guest = guest_of(image, table.l1_index, number);
            let old = image.decode_entry(entry, guest)?;
            if let Some(new) = change(guest, &old)?.filter(|new| *new != old) {
                image.slices().set_entry(words, number as u64, new.encode(g));
                changed = true;
            }
        }
        let length = (image.slices().slice_bytes() / 8) as usize;
        let start = first / per_slice * length;
        let slice = words.get(start..start + length).filter(|_| changed);
        Ok(slice.map(|slice| (table.offset + start as u64 * 8, slice.to_vec())))
    }
}
