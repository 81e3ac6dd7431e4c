//! Compressed cluster descriptors (section "Compressed Clusters Descriptor").

use crate::geometry::COMPRESSED_SECTOR_SIZE;
use crate::{FormatError, FormatResult, Geometry, HostOffset};

/// Bit 62 of an L2 entry: the cluster is compressed.
pub(crate) const COMPRESSED: u64 = 1 << 62;

/// Where the compressed bytes of one cluster lie. Sector-granular: the stream itself says where it ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct CompressedDescriptor {
    /// First byte, at any alignment.
    pub offset: HostOffset,
    /// 512-byte sectors used beyond the one that holds `offset`.
    pub additional_sectors: u64,
}

impl CompressedDescriptor {
    /// Splits an L2 entry that has the compressed bit. Bits 62 and 63 are not looked at.
    pub fn decode(entry: u64, geometry: &Geometry) -> Self {
        let bits = geometry.compressed_offset_bits();
        let descriptor = entry & (COMPRESSED - 1);
        Self { offset: HostOffset(descriptor & ((1 << bits) - 1)), additional_sectors: descriptor >> bits }
    }

    /// The descriptor for `length` bytes of compressed data at `offset`.
    ///
    /// # Errors
    /// `Invalid` when the offset or the length does not fit the descriptor of this cluster size, or length is 0.
    pub fn for_data(offset: HostOffset, length: u64, geometry: &Geometry) -> FormatResult<Self> {
        if offset.0 >= geometry.compressed_offset_limit() {
            return Err(FormatError::invalid("compressed offset", offset.0, "beyond the descriptor's bits"));
        }
        let last = length
            .checked_sub(1)
            .and_then(|l| offset.0.checked_add(l))
            .ok_or(FormatError::invalid("compressed length", length, "empty or beyond 64 bits"))?;
        let additional_sectors = last / COMPRESSED_SECTOR_SIZE - offset.0 / COMPRESSED_SECTOR_SIZE;
        if additional_sectors > geometry.compressed_max_sectors() {
            return Err(FormatError::invalid("compressed length", length, "more sectors than fit"));
        }
        Ok(Self { offset, additional_sectors })
    }

    /// The L2 entry of this descriptor.
    pub fn encode(&self, geometry: &Geometry) -> u64 {
        COMPRESSED | (self.additional_sectors << geometry.compressed_offset_bits()) | self.offset.0
    }

    /// Bytes from `offset` to the end of the last sector: at most two clusters, at least 1.
    pub const fn max_length(&self) -> u64 {
        (self.additional_sectors + 1) * COMPRESSED_SECTOR_SIZE - self.offset.0 % COMPRESSED_SECTOR_SIZE
    }

    /// First byte behind the last sector.
    pub const fn end(&self) -> u64 {
        // At most 2^62 + 2^22: no overflow.
        self.offset.0 + self.max_length()
    }

    /// Indices of the first and last host cluster that hold a sector of the data: each of them is referenced.
    pub const fn host_clusters(&self, geometry: &Geometry) -> (u64, u64) {
        (geometry.cluster_index(self.offset.0), geometry.cluster_index(self.end() - 1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_entry_decodes_and_encodes_back(entry in any::<u64>(), bits in 9u32..=21) {
            let g = Geometry::new(bits, 4, false).unwrap();
            let d = CompressedDescriptor::decode(entry, &g);
            prop_assert_eq!(d.encode(&g), COMPRESSED | (entry & (COMPRESSED - 1)));
            prop_assert!(d.max_length() >= 1 && d.max_length() <= 2 * g.cluster_size());
        }

        #[test]
        fn data_fits_its_sectors(offset in 0u64..1 << 40, length in 1u64..=512, bits in 9u32..=21) {
            let g = Geometry::new(bits, 4, false).unwrap();
            let d = CompressedDescriptor::for_data(HostOffset(offset), length, &g).unwrap();
            prop_assert!(d.max_length() >= length && d.max_length() < length + 512);
            let (first, last) = d.host_clusters(&g);
            prop_assert!(first <= offset >> bits && last >= (offset + length - 1) >> bits);
        }
    }

    #[test]
    fn beyond_the_descriptor() {
        let g = Geometry::new(21, 4, false).unwrap();
        assert!(CompressedDescriptor::for_data(HostOffset(1 << 49), 10, &g).is_err());
        assert!(CompressedDescriptor::for_data(HostOffset(0), 0, &g).is_err());
        assert!(CompressedDescriptor::for_data(HostOffset(0), (4 << 20) + 1, &g).is_err());
    }
}
