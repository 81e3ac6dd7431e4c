//! L1 table entries (section "Cluster mapping").

use crate::{FormatError, FormatResult, Geometry, HostOffset, words};

/// Bit 63: the refcount of what the entry points to is exactly one.
pub(crate) const COPIED: u64 = 1 << 63;
/// Bits 9-55: host offset.
pub(crate) const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// Bits that must be 0.
const L1_RESERVED_MASK: u64 = 0x7f00_0000_0000_01ff;

/// One L1 table entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct L1Entry(pub u64);

impl L1Entry {
    /// An entry that names a table which no file has: in the place of one that cannot be read.
    pub const NOWHERE: Self = Self(OFFSET_MASK);

    /// The entries in a table's bytes.
    pub fn entries(table: &[u8]) -> impl ExactSizeIterator<Item = Self> + '_ {
        words::iter(table).map(Self)
    }
    /// The entry as it is in the file.
    pub const fn to_bytes(self) -> [u8; 8] {
        self.0.to_be_bytes()
    }
    /// An entry for the L2 table at `host`.
    pub const fn new(host: HostOffset, copied: bool) -> Self {
        Self((host.0 & OFFSET_MASK) | if copied { COPIED } else { 0 })
    }
    /// Raw offset bits, 0 if there is no L2 table.
    pub const fn offset_bits(self) -> u64 {
        self.0 & OFFSET_MASK
    }
    /// Whether the refcount of the L2 table is exactly one. Only accurate in the active L1 table.
    pub const fn copied(self) -> bool {
        self.0 & COPIED != 0
    }
    /// The entry with its flag set or not.
    #[must_use]
    pub const fn with_copied(self, copied: bool) -> Self {
        Self(if copied { self.0 | COPIED } else { self.0 & !COPIED })
    }
    /// The entry for the same L2 table at another place: all other bits stay.
    #[must_use]
    pub const fn with_table(self, host: HostOffset) -> Self {
        Self((self.0 & !OFFSET_MASK) | (host.0 & OFFSET_MASK))
    }
    /// Reserved bits that are set although they must not be.
    pub const fn reserved_bits(self) -> u64 {
        self.0 & L1_RESERVED_MASK
    }

    /// Host offset of the L2 table, `None` if there is none.
    ///
    /// # Errors
    /// `Invalid` when the offset is not a multiple of the cluster size. Reserved bits are ignored, as QEMU does;
    /// a check reports them.
    pub fn table(self, geometry: &Geometry) -> FormatResult<Option<HostOffset>> {
        match self.offset_bits() {
            0 => Ok(None),
            bits => geometry.aligned_host(bits).map(Some).ok_or(FormatError::invalid(
                "L1 entry",
                self.0,
                "the L2 table offset is not a multiple of the cluster size",
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_keep_the_other_bits() {
        let entry = L1Entry(COPIED | 0x7f00_0000_0005_0001);
        assert_eq!(entry.with_table(HostOffset(0x9_0000)).0, COPIED | 0x7f00_0000_0009_0001);
        assert_eq!(entry.with_copied(false).0, 0x7f00_0000_0005_0001);
        assert_eq!(entry.with_copied(false).with_copied(true), entry);
        assert_eq!(L1Entry::entries(&entry.to_bytes()).collect::<Vec<_>>(), [entry]);
        assert!(L1Entry::NOWHERE.table(&Geometry::new(9, 4, false).unwrap()).unwrap().unwrap().0 > 1 << 55);
    }
}
