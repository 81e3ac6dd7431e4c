//! Refcount table entries and refcount blocks of every width (section "Host cluster management").

use crate::{FormatError, FormatResult, Geometry, HostOffset, words};

/// Bits 9-63: host offset of the refcount block.
const REFCOUNT_OFFSET_MASK: u64 = 0xffff_ffff_ffff_fe00;

/// One refcount table entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct RefcountTableEntry(pub u64);

impl RefcountTableEntry {
    /// An entry for the block at `host`; 0 is no block.
    pub const fn new(host: HostOffset) -> Self {
        Self(host.0 & REFCOUNT_OFFSET_MASK)
    }
    /// The entries in a table's bytes.
    pub fn entries(table: &[u8]) -> impl ExactSizeIterator<Item = Self> + '_ {
        words::iter(table).map(Self)
    }
    /// The entry as it is in the file.
    pub const fn to_bytes(self) -> [u8; 8] {
        self.0.to_be_bytes()
    }
    /// Raw offset bits, 0 if there is no block.
    pub const fn offset_bits(self) -> u64 {
        self.0 & REFCOUNT_OFFSET_MASK
    }
    /// Reserved bits that are set although they must not be.
    pub const fn reserved_bits(self) -> u64 {
        self.0 & !REFCOUNT_OFFSET_MASK
    }

    /// Host offset of the refcount block, `None` if all its refcounts are 0.
    ///
    /// # Errors
    /// `Invalid` when the offset is not a multiple of the cluster size.
    pub fn block(self, geometry: &Geometry) -> FormatResult<Option<HostOffset>> {
        match self.offset_bits() {
            0 => Ok(None),
            bits => geometry.aligned_host(bits).map(Some).ok_or(FormatError::invalid(
                "refcount table entry",
                self.0,
                "the refcount block offset is not a multiple of the cluster size",
            )),
        }
    }
}

/// Reads entry `index` of a refcount block whose width is `1 << order` bits. `None` outside the block.
pub fn get(block: &[u8], index: usize, order: u32) -> Option<u64> {
    fn wide<const N: usize>(block: &[u8], index: usize) -> Option<[u8; N]> {
        let at = index.checked_mul(N)?;
        block.get(at..at.checked_add(N)?)?.try_into().ok()
    }
    match order {
        0..=2 => {
            let per_byte = 8usize >> order;
            let byte = *block.get(index / per_byte)?;
            let shift = (index % per_byte) << order;
            let mask = (1u16 << (1 << order)) - 1;
            Some(u64::from((u16::from(byte) >> shift) & mask))
        }
        3 => block.get(index).copied().map(u64::from),
        4 => wide(block, index).map(|b| u64::from(u16::from_be_bytes(b))),
        5 => wide(block, index).map(|b| u64::from(u32::from_be_bytes(b))),
        6 => wide(block, index).map(u64::from_be_bytes),
        _ => None,
    }
}

/// Writes entry `index` of a refcount block whose width is `1 << order` bits. `None`, and nothing written, outside the
/// block or when `value` does not fit.
pub fn set(block: &mut [u8], index: usize, order: u32, value: u64) -> Option<()> {
    if order > 6 || (order < 6 && value >> (1u32 << order) != 0) {
        return None;
    }
    if order < 3 {
        let per_byte = 8usize >> order;
        let byte = block.get_mut(index / per_byte)?;
        let shift = (index % per_byte) << order;
        let mask = ((1u16 << (1 << order)) - 1) << shift;
        *byte = (*byte & !(mask as u8)) | ((value as u8) << shift);
        return Some(());
    }
    let width = 1usize << (order - 3);
    let at = index.checked_mul(width)?;
    let target = block.get_mut(at..at.checked_add(width)?)?;
    target.copy_from_slice(value.to_be_bytes().get(8 - width..)?);
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sub_byte_entries_start_at_the_least_significant_bit() {
        let mut block = [0u8; 8];
        set(&mut block, 1, 0, 1).unwrap();
        assert_eq!(block[0], 0b10);
        set(&mut block, 1, 2, 0xa).unwrap();
        assert_eq!(block[0], 0xa2);
        set(&mut block, 3, 1, 0b11).unwrap();
        assert_eq!(block[0], 0xe2);
    }

    #[test]
    fn values_and_indices_that_do_not_fit() {
        let mut block = [0u8; 8];
        assert!(set(&mut block, 0, 0, 2).is_none());
        assert!(set(&mut block, 0, 4, 65536).is_none());
        assert!(set(&mut block, 1, 6, 1).is_none());
        assert!(get(&block, 64, 0).is_none());
        assert!(get(&block, usize::MAX, 6).is_none());
        assert_eq!(block, [0; 8]);
    }

    proptest! {
        #[test]
        fn a_set_entry_reads_back_and_leaves_the_others(
            order in 0u32..=6, index in 0usize..8, value in any::<u64>(), fill in any::<u8>(),
        ) {
            let max = u64::MAX >> (64 - (1u32 << order));
            let mut block = [fill; 64];
            let before: Vec<_> = (0..8).map(|i| get(&block, i, order)).collect();
            set(&mut block, index, order, value & max).unwrap();
            for (i, &old) in before.iter().enumerate() {
                let expected = if i == index { Some(value & max) } else { old };
                prop_assert_eq!(get(&block, i, order), expected);
            }
        }
    }
}
