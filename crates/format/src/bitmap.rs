//! Bitmap directory and table entries (section "Bitmaps").

use bitflags::bitflags;

use crate::bytes::{be16, be32, be64, padded8, slice};
use crate::l1::OFFSET_MASK;
use crate::limits::{BITMAP_GRANULARITY_BITS, MAX_BITMAP_NAME, MAX_BITMAP_TABLE_ENTRIES};
use crate::{FormatError, FormatResult, Geometry, HostOffset, words};

/// Bytes of a directory entry before its extra data.
pub const FIXED_LENGTH: usize = 24;
/// The only bitmap type: dirty tracking.
pub const DIRTY_TRACKING: u8 = 1;

bitflags! {
    /// Flags of a directory entry.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
    pub struct BitmapFlags: u32 {
        /// Not saved correctly: the contents may be stale.
        const IN_USE = 1 << 0;
        /// Enabled: every write must be recorded.
        const AUTO = 1 << 1;
        /// Unknown extra data may be ignored.
        const EXTRA_DATA_COMPATIBLE = 1 << 2;
        /// Bits of later versions of the format.
        const _ = !0;
    }
}

impl BitmapFlags {
    /// Bits that must be 0.
    pub const fn reserved_bits(self) -> u32 {
        self.bits() & !0b111
    }
}

/// One entry of the bitmap directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BitmapDirectoryEntry {
    /// Start of the bitmap table.
    pub table_offset: HostOffset,
    /// Entries in it.
    pub table_size: u32,
    /// Flags.
    pub flags: BitmapFlags,
    /// Type: 1 is dirty tracking.
    pub kind: u8,
    /// log2 of the bytes per bit.
    pub granularity_bits: u8,
    /// Name, as bytes.
    pub name: Vec<u8>,
    /// Extra data, kept on rewrite.
    pub extra_data: Vec<u8>,
}

impl BitmapDirectoryEntry {
    /// Where in an entry to write what to give it other flags: 4 bytes that lie in one sector.
    pub const fn flags_patch(flags: BitmapFlags) -> (u64, [u8; 4]) {
        (12, flags.bits().to_be_bytes())
    }

    /// Where in an entry to write what to give it another table: 8 bytes that lie in one sector.
    pub const fn table_patch(table_offset: HostOffset) -> (u64, [u8; 8]) {
        (0, table_offset.0.to_be_bytes())
    }

    /// Parses the entry at the start of `bytes`, the rest of the directory; returns it and the bytes it takes.
    ///
    /// # Errors
    /// `Truncated` when the entry exceeds the directory. Values are judged by [`BitmapDirectoryEntry::validate`].
    pub fn parse(bytes: &[u8]) -> FormatResult<(Self, usize)> {
        let field = "bitmap directory entry";
        let name_length = usize::from(be16(bytes, 18, field)?);
        let extra_length = be32(bytes, 20, field)? as usize;
        let name_at = FIXED_LENGTH.saturating_add(extra_length);
        let total = padded8(name_at.saturating_add(name_length));
        let entry = slice(bytes, 0, total, field)?;
        let one = |at| slice(entry, at, 1, field).map(|b| b.first().copied().unwrap_or(0));
        let parsed = Self {
            table_offset: HostOffset(be64(entry, 0, field)?),
            table_size: be32(entry, 8, field)?,
            flags: BitmapFlags::from_bits_retain(be32(entry, 12, field)?),
            kind: one(16)?,
            granularity_bits: one(17)?,
            name: slice(entry, name_at, name_length, field)?.to_vec(),
            extra_data: slice(entry, FIXED_LENGTH, extra_length, field)?.to_vec(),
        };
        Ok((parsed, total))
    }

    /// Bytes the entry takes in the directory, with padding.
    pub fn encoded_length(&self) -> usize {
        padded8(FIXED_LENGTH + self.extra_data.len() + self.name.len())
    }

    /// Appends the entry with its padding.
    ///
    /// # Errors
    /// `Limit` for a name above 1023 bytes or extra data beyond 32 bits.
    pub fn encode(&self, out: &mut Vec<u8>) -> FormatResult<()> {
        if self.name.len() > MAX_BITMAP_NAME {
            return Err(FormatError::Limit {
                field: "bitmap name",
                value: self.name.len() as u64,
                limit: MAX_BITMAP_NAME as u64,
            });
        }
        let extra_length = u32::try_from(self.extra_data.len()).map_err(|_| FormatError::Limit {
            field: "extra data of a bitmap directory entry",
            value: self.extra_data.len() as u64,
            limit: u32::MAX.into(),
        })?;
        let start = out.len();
        out.extend_from_slice(&self.table_offset.0.to_be_bytes());
        out.extend_from_slice(&self.table_size.to_be_bytes());
        out.extend_from_slice(&self.flags.bits().to_be_bytes());
        out.extend_from_slice(&[self.kind, self.granularity_bits]);
        out.extend_from_slice(&(self.name.len() as u16).to_be_bytes());
        out.extend_from_slice(&extra_length.to_be_bytes());
        out.extend_from_slice(&self.extra_data);
        out.extend_from_slice(&self.name);
        out.resize(start + padded8(out.len() - start), 0);
        Ok(())
    }

    /// Bitmap table entries that a disk of `virtual_size` needs at this granularity.
    pub fn table_entries_for(&self, virtual_size: u64, geometry: &Geometry) -> u64 {
        let bits = match 1u64.checked_shl(self.granularity_bits.into()) {
            Some(granularity) => virtual_size.div_ceil(granularity),
            None => 1,
        };
        geometry.clusters_for(bits.div_ceil(8))
    }

    /// Whether the entry keeps the format's rules for a disk of `virtual_size`. A bitmap in use may have the size of
    /// an earlier disk.
    ///
    /// # Errors
    /// `Invalid` or `Limit`, naming the field.
    pub fn validate(&self, virtual_size: u64, geometry: &Geometry) -> FormatResult<()> {
        let invalid = |field, value, reason| Err(FormatError::invalid(field, value, reason));
        if self.table_size == 0 || self.table_offset.0 == 0 {
            return invalid("bitmap_table_size", self.table_size.into(), "the bitmap has no table");
        }
        if !self.table_offset.is_aligned(geometry.cluster_size()) {
            return invalid("bitmap_table_offset", self.table_offset.0, "not a multiple of the cluster size");
        }
        if self.table_size > MAX_BITMAP_TABLE_ENTRIES {
            return Err(FormatError::Limit {
                field: "bitmap_table_size",
                value: self.table_size.into(),
                limit: MAX_BITMAP_TABLE_ENTRIES.into(),
            });
        }
        if self.flags.reserved_bits() != 0 {
            return invalid("bitmap flags", self.flags.bits().into(), "reserved bits are set");
        }
        if self.kind != DIRTY_TRACKING {
            return invalid("bitmap type", self.kind.into(), "unknown type");
        }
        if !BITMAP_GRANULARITY_BITS.contains(&self.granularity_bits) {
            return invalid("granularity_bits", self.granularity_bits.into(), "not between 9 and 31");
        }
        if self.name.is_empty() || self.name.len() > MAX_BITMAP_NAME {
            return invalid("name_size", self.name.len() as u64, "not between 1 and 1023");
        }
        if !self.flags.contains(BitmapFlags::IN_USE)
            && u64::from(self.table_size) != self.table_entries_for(virtual_size, geometry)
        {
            return invalid("bitmap_table_size", self.table_size.into(), "does not match the virtual size");
        }
        Ok(())
    }
}

/// One entry of a bitmap table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct BitmapTableEntry(pub u64);

/// What a bitmap table entry says about its cluster of bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum BitmapCluster {
    /// All bits are 0.
    Zeroes,
    /// All bits are 1.
    Ones,
    /// Stored.
    Data(HostOffset),
}

impl BitmapCluster {
    /// The table entry of this cluster.
    pub const fn encode(self) -> BitmapTableEntry {
        BitmapTableEntry(match self {
            Self::Zeroes => 0,
            Self::Ones => 1,
            Self::Data(host) => host.0 & OFFSET_MASK,
        })
    }
}

impl BitmapTableEntry {
    /// The entries in a table's bytes.
    pub fn entries(table: &[u8]) -> impl ExactSizeIterator<Item = Self> + '_ {
        words::iter(table).map(Self)
    }
    /// The entry as it is in the file.
    pub const fn to_bytes(self) -> [u8; 8] {
        self.0.to_be_bytes()
    }
    /// Bits that must be 0.
    pub const fn reserved_bits(self) -> u64 {
        let always = self.0 & !(OFFSET_MASK | 1);
        if self.0 & OFFSET_MASK != 0 { always | (self.0 & 1) } else { always }
    }

    /// Decodes the entry.
    ///
    /// # Errors
    /// `Invalid` for reserved bits or an offset that is not a multiple of the cluster size.
    pub fn decode(self, geometry: &Geometry) -> FormatResult<BitmapCluster> {
        if self.reserved_bits() != 0 {
            return Err(FormatError::invalid("bitmap table entry", self.0, "reserved bits are set"));
        }
        match self.0 & OFFSET_MASK {
            0 if self.0 & 1 != 0 => Ok(BitmapCluster::Ones),
            0 => Ok(BitmapCluster::Zeroes),
            bits => geometry.aligned_host(bits).map(BitmapCluster::Data).ok_or(FormatError::invalid(
                "bitmap table entry",
                self.0,
                "the offset is not a multiple of the cluster size",
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn entries_survive_a_round_trip(
            name in proptest::collection::vec(any::<u8>(), 1..60),
            extra_data in proptest::collection::vec(any::<u8>(), 0..30),
            flags in 0u32..8,
        ) {
            let before = BitmapDirectoryEntry {
                table_offset: HostOffset(0x10000), table_size: 1, flags: BitmapFlags::from_bits_retain(flags),
                kind: 1, granularity_bits: 16, name, extra_data,
            };
            let mut bytes = Vec::new();
            before.encode(&mut bytes).unwrap();
            prop_assert_eq!(BitmapDirectoryEntry::parse(&bytes).unwrap(), (before.clone(), bytes.len()));
            let after = BitmapDirectoryEntry {
                table_offset: HostOffset(0x20000), flags: BitmapFlags::IN_USE, ..before
            };
            let (at, table) = BitmapDirectoryEntry::table_patch(after.table_offset);
            bytes[at as usize..][..8].copy_from_slice(&table);
            let (at, flags) = BitmapDirectoryEntry::flags_patch(after.flags);
            bytes[at as usize..][..4].copy_from_slice(&flags);
            prop_assert_eq!(BitmapDirectoryEntry::parse(&bytes).unwrap(), (after, bytes.len()));
        }

        #[test]
        fn any_bytes_give_a_value_or_an_error(
            bytes in proptest::collection::vec(any::<u8>(), 0..200), size in any::<u64>(),
        ) {
            if let Ok((entry, length)) = BitmapDirectoryEntry::parse(&bytes) {
                prop_assert!(length <= bytes.len());
                let _ = entry.validate(size, &Geometry::new(9, 4, false).unwrap());
            }
        }
    }

    #[test]
    fn table_entries() {
        let g = Geometry::new(16, 4, false).unwrap();
        assert_eq!(BitmapTableEntry(1).decode(&g), Ok(BitmapCluster::Ones));
        assert_eq!(BitmapTableEntry(0x10000).decode(&g), Ok(BitmapCluster::Data(HostOffset(0x10000))));
        for cluster in [BitmapCluster::Zeroes, BitmapCluster::Ones, BitmapCluster::Data(HostOffset(0x70000))]
        {
            let entry = BitmapTableEntry::entries(&cluster.encode().to_bytes()).next().unwrap();
            assert_eq!(entry.decode(&g), Ok(cluster));
        }
        assert!(BitmapTableEntry(0x10001).decode(&g).is_err());
        assert!(BitmapTableEntry(0x200).decode(&g).is_err());
    }
}
