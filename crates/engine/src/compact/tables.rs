//! The L2 tables of an image.

use qcow2_format::{L1Entry, L2Entry, words};

use crate::image::Qcow2;
use crate::{ErrorKind, MemMut, Result, StorageExt};

/// Most host clusters that may be remembered, each in 64 bytes: a quarter of the memory that is allowed.
pub(super) fn most_remembered(image: &Qcow2) -> u64 {
    image.limits().max_memory / 4 / 64
}

/// One L2 table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Table {
    /// Host offset.
    pub(super) offset: u64,
    /// Index of an L1 entry that refers to it.
    pub(super) l1_index: usize,
    /// L1 entries that refer to it: as often are the clusters counted that its entries refer to.
    pub(super) weight: u64,
}

/// The L2 tables of the active disk and of all snapshots, each once, by their place.
pub(super) fn tables(image: &Qcow2) -> Result<Vec<Table>> {
    let mut found = Vec::new();
    let mut add = |l1: &[u64]| -> Result<()> {
        for (l1_index, &entry) in l1.iter().enumerate() {
            let offset = L1Entry(entry).offset_bits();
            if offset != 0 {
                found.push(Table { offset, l1_index, weight: 1 });
            }
        }
        let bytes = (found.len() * size_of::<Table>()) as u64;
        let limit = image.limits().max_memory;
        if bytes > limit {
            let message =
                format!("{} references to L2 tables exceed the limit of {limit} bytes", found.len());
            return Err(image.error(ErrorKind::Limit, message));
        }
        Ok(())
    };
    add(image.mapping().l1())?;
    for snapshot in image.snapshots().iter() {
        let mut bytes = vec![0u8; snapshot.l1_size as usize * 8];
        image.storage().read_exact_at(MemMut::from(&mut bytes[..]), snapshot.l1_table_offset.0)?;
        add(&words::decode(&bytes))?;
    }
    found.sort_unstable_by_key(|table| table.offset);
    found.dedup_by(|again, first| {
        let same = again.offset == first.offset;
        first.weight += if same { again.weight } else { 0 };
        same
    });
    Ok(found)
}

/// Reads the entries of an L2 table that is current in the file.
pub(super) fn read_words(image: &Qcow2, offset: u64) -> Result<Vec<u64>> {
    let mut bytes = vec![0u8; image.geometry().cluster_len()];
    image.storage().read_exact_at(MemMut::from(&mut bytes[..]), offset)?;
    Ok(words::decode(&bytes))
}

/// Entry `number` of a table's words.
pub(super) fn entry_at(image: &Qcow2, words: &[u64], number: usize) -> L2Entry {
    L2Entry::of_words(words, number, image.geometry())
}

/// Guest offset of an entry.
pub(super) fn guest_of(image: &Qcow2, l1_index: usize, number: usize) -> u64 {
    let g = image.geometry();
    (l1_index as u64).wrapping_mul(g.l2_coverage()).wrapping_add(number as u64 * g.cluster_size())
}
