//! The block allocation table ([MS-VHDX] 2.5): which blocks there are, and where.

use qcow2_core::{ErrorKind, Result};

use super::MIB;
use super::fields::invalid;

/// Sectors of a chunk: as many as a sector bitmap block has bits (2.4.2).
pub const SECTORS_PER_CHUNK: u64 = 1 << 23;

const STATE: u64 = 7;
const OFFSET: u64 = !(MIB - 1);

const PAYLOAD_NOT_PRESENT: u64 = 0;
const PAYLOAD_UNDEFINED: u64 = 1;
const PAYLOAD_ZERO: u64 = 2;
const PAYLOAD_UNMAPPED: u64 = 3;
/// What version 0.95 of the specification had for it; QEMU reads it.
const PAYLOAD_UNMAPPED_0_95: u64 = 5;
const PAYLOAD_FULLY_PRESENT: u64 = 6;
const PAYLOAD_PARTIALLY_PRESENT: u64 = 7;
const BITMAP_NOT_PRESENT: u64 = 0;
const BITMAP_PRESENT: u64 = 6;

/// How a disk is cut into blocks, and blocks into chunks, whose entries end with that of a sector bitmap.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// Bytes of a block.
    pub block_size: u64,
    /// Bytes of a sector.
    pub sector_size: u64,
    /// Sector bitmaps are in use.
    pub has_parent: bool,
}

impl Geometry {
    /// Blocks of a chunk.
    pub fn chunk_ratio(&self) -> u64 {
        (SECTORS_PER_CHUNK * self.sector_size / self.block_size).max(1)
    }

    /// Blocks of a disk of `size` bytes.
    pub fn blocks(&self, size: u64) -> u64 {
        size.div_ceil(self.block_size)
    }

    /// Entries of the table for a disk of `size` bytes.
    pub fn entries(&self, size: u64) -> u64 {
        let (blocks, ratio) = (self.blocks(size), self.chunk_ratio());
        match self.has_parent {
            true => blocks.div_ceil(ratio) * (ratio + 1),
            false => blocks + blocks.saturating_sub(1) / ratio,
        }
    }

    /// The entry of a block.
    pub fn entry_of(&self, block: u64) -> u64 {
        block + block / self.chunk_ratio()
    }

    /// The entry of the sector bitmap of a block's chunk.
    pub fn bitmap_entry_of(&self, block: u64) -> u64 {
        let ratio = self.chunk_ratio();
        block / ratio * (ratio + 1) + ratio
    }

    /// The block of an entry; none for that of a sector bitmap.
    pub fn block_of(&self, entry: u64) -> Option<u64> {
        let period = self.chunk_ratio() + 1;
        (entry % period != period - 1).then(|| entry - entry / period)
    }
}

/// What an entry says of its block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Payload {
    /// Not in this image.
    NotPresent,
    /// Reads as zeroes: zero, unmapped, or without defined contents.
    Zero,
    /// All of it is in the file, from this byte on.
    Present(u64),
    /// The sectors that the bitmap says are, the others are the parent's.
    Partial(u64),
}

/// What the entry of a payload block says.
///
/// # Errors
/// `Corrupt` for a state that there is not.
pub fn payload(entry: u64) -> Result<Payload> {
    match entry & STATE {
        PAYLOAD_NOT_PRESENT => Ok(Payload::NotPresent),
        PAYLOAD_UNDEFINED | PAYLOAD_ZERO | PAYLOAD_UNMAPPED | PAYLOAD_UNMAPPED_0_95 => Ok(Payload::Zero),
        PAYLOAD_FULLY_PRESENT => Ok(Payload::Present(entry & OFFSET)),
        PAYLOAD_PARTIALLY_PRESENT => Ok(Payload::Partial(entry & OFFSET)),
        state => Err(invalid(ErrorKind::Corrupt, "BAT entry", state, "a state that no payload block has")),
    }
}

/// The entry of a payload block.
pub fn encode_payload(payload: Payload) -> u64 {
    match payload {
        Payload::NotPresent => PAYLOAD_NOT_PRESENT,
        Payload::Zero => PAYLOAD_ZERO,
        Payload::Present(offset) => offset & OFFSET | PAYLOAD_FULLY_PRESENT,
        Payload::Partial(offset) => offset & OFFSET | PAYLOAD_PARTIALLY_PRESENT,
    }
}

/// The entry of a sector bitmap block.
pub fn encode_bitmap(offset: u64) -> u64 {
    offset & OFFSET | BITMAP_PRESENT
}

/// Where an entry says that its sector bitmap block is, if anywhere.
///
/// # Errors
/// `Corrupt` for a state that there is not.
pub fn bitmap_block(entry: u64) -> Result<Option<u64>> {
    match entry & STATE {
        BITMAP_NOT_PRESENT => Ok(None),
        BITMAP_PRESENT => Ok(Some(entry & OFFSET)),
        state => Err(invalid(ErrorKind::Corrupt, "BAT entry", state, "a state that no sector bitmap has")),
    }
}

/// The place that an entry in a state without contents keeps for its block: its writer may use it again.
pub(crate) fn anchor(entry: u64) -> Option<u64> {
    let kept = matches!(entry & STATE, PAYLOAD_UNDEFINED | PAYLOAD_UNMAPPED | PAYLOAD_UNMAPPED_0_95);
    Some(entry & OFFSET).filter(|offset| kept && *offset != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_of_blocks_and_bitmaps_alternate_as_qemu_counts_them() {
        let geometry = Geometry { block_size: 32 << 20, sector_size: 512, has_parent: false };
        assert_eq!(geometry.chunk_ratio(), 128);
        // Disks of a whole chunk, and of a block more.
        for (blocks, plain, differencing) in
            [(0, 0, 0), (1, 1, 129), (128, 128, 129), (129, 130, 258), (256, 257, 258)]
        {
            let size = blocks * geometry.block_size;
            assert_eq!(geometry.entries(size), plain, "{blocks}");
            assert_eq!(Geometry { has_parent: true, ..geometry }.entries(size), differencing, "{blocks}");
        }
        for block in 0..400 {
            assert_eq!(geometry.block_of(geometry.entry_of(block)), Some(block));
            assert_eq!(geometry.block_of(geometry.bitmap_entry_of(block)), None);
        }
        let large = Geometry { block_size: 1 << 20, sector_size: 4096, has_parent: true };
        assert_eq!((large.chunk_ratio(), large.bitmap_entry_of(32768)), (32768, 2 * 32769 - 1));
        assert_eq!(Geometry { block_size: 256 << 20, ..geometry }.chunk_ratio(), 16);
    }

    #[test]
    fn states() {
        for kind in [Payload::NotPresent, Payload::Zero, Payload::Present(7 << 20), Payload::Partial(9 << 20)]
        {
            assert_eq!(payload(encode_payload(kind)).unwrap(), kind);
        }
        for state in [1, 2, 3, 5] {
            assert_eq!(payload(5 << 20 | state).unwrap(), Payload::Zero);
        }
        assert_eq!(payload(4).unwrap_err().kind(), ErrorKind::Corrupt);
        assert_eq!((bitmap_block(0).unwrap(), bitmap_block(3 << 20 | 6).unwrap()), (None, Some(3 << 20)));
        assert_eq!(bitmap_block(7).unwrap_err().kind(), ErrorKind::Corrupt);
        assert_eq!((anchor(5 << 20 | 3), anchor(3), anchor(5 << 20 | 6)), (Some(5 << 20), None, None));
    }
}
