//! L1 table entries (section "Cluster mapping").

use crate::{FormatError, FormatResult, Geometry, HostOffset};

/// Bit 63: the refcount of what the entry points to is exactly one.
pub const COPIED: u64 = 1 << 63;
/// Bits 9-55: host offset.
pub const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// Bits that must be 0.
pub const L1_RESERVED_MASK: u64 = 0x7f00_0000_0000_01ff;

/// One L1 table entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct L1Entry(pub u64);

impl L1Entry {
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
