//! L2 table entries, standard and extended, decoded once into [`L2Mapping`].

use crate::compressed::COMPRESSED;
use crate::l1::{COPIED, OFFSET_MASK};
use crate::{CompressedDescriptor, FormatError, FormatResult, Geometry, HostOffset, SubclusterBitmap};

/// Bit 0 of a standard descriptor: the cluster reads as zeroes (version 3, without extended L2 entries).
pub const ZERO: u64 = 1;
/// Bits of a standard descriptor that must be 0.
pub const L2_RESERVED_MASK: u64 = 0x3f00_0000_0000_01fe;

/// One L2 table entry. `bitmap` is 0 without extended L2 entries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct L2Entry {
    /// First word: flags and descriptor.
    pub word: u64,
    /// Second word of an extended entry.
    pub bitmap: SubclusterBitmap,
}

/// What an L2 entry says about its cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum L2Mapping {
    /// The backing file decides; zeroes without one.
    Unallocated,
    /// Reads as zeroes. `host` is a preallocated cluster that is not read.
    Zero {
        /// Preallocated host cluster.
        host: Option<HostOffset>,
        /// Its refcount is exactly one.
        copied: bool,
    },
    /// Stored as it is.
    Data {
        /// Host cluster.
        host: HostOffset,
        /// Its refcount is exactly one.
        copied: bool,
    },
    /// Stored compressed.
    Compressed(CompressedDescriptor),
    /// Extended L2 entry of a standard cluster: the bitmap decides per subcluster.
    Subclusters {
        /// Host cluster, if there is one.
        host: Option<HostOffset>,
        /// Its refcount is exactly one.
        copied: bool,
        /// State of the 32 subclusters; valid, and without data bits where `host` is `None`.
        bitmap: SubclusterBitmap,
    },
}

impl L2Entry {
    /// A standard entry (no bitmap).
    pub const fn standard(word: u64) -> Self {
        Self { word, bitmap: SubclusterBitmap(0) }
    }
    /// Whether the cluster is compressed. Test this first: other bits then mean something else.
    pub const fn is_compressed(self) -> bool {
        self.word & COMPRESSED != 0
    }
    /// Bit 63. Only accurate in L2 tables reachable from the active L1 table.
    pub const fn copied(self) -> bool {
        self.word & COPIED != 0
    }
    /// Raw offset bits of a standard descriptor.
    pub const fn offset_bits(self) -> u64 {
        self.word & OFFSET_MASK
    }
    /// Reserved bits of a standard descriptor that are set although they must not be.
    pub const fn reserved_bits(self) -> u64 {
        self.word & L2_RESERVED_MASK
    }

    /// Decodes the entry. `external_data` says that the image has an external data file, where host offset 0 is
    /// a valid cluster if bit 63 is set; `version` is the image's.
    ///
    /// # Errors
    /// `Invalid` for a host offset that is not a multiple of the cluster size, a zero flag in version 2, a compressed
    /// cluster beside an external data file, and a subcluster that is both allocated and zero, or allocated without a
    /// host cluster. Reserved bits are ignored, as QEMU does; a check reports them.
    pub fn decode(self, geometry: &Geometry, version: u32, external_data: bool) -> FormatResult<L2Mapping> {
        if self.is_compressed() {
            if external_data {
                return Err(self.invalid("compressed cluster in an image with an external data file"));
            }
            return Ok(L2Mapping::Compressed(CompressedDescriptor::decode(self.word, geometry)));
        }
        let copied = self.copied();
        let host = match self.offset_bits() {
            0 if !(external_data && copied) => None,
            bits => Some(
                geometry
                    .aligned_host(bits)
                    .ok_or(self.invalid("the host offset is not a multiple of the cluster size"))?,
            ),
        };
        if geometry.extended_l2() {
            return self.decode_subclusters(host, copied);
        }
        if self.word & ZERO != 0 {
            if version < 3 {
                return Err(self.invalid("zero flag in a version 2 image"));
            }
            return Ok(L2Mapping::Zero { host, copied });
        }
        Ok(host.map_or(L2Mapping::Unallocated, |host| L2Mapping::Data { host, copied }))
    }

    fn decode_subclusters(self, host: Option<HostOffset>, copied: bool) -> FormatResult<L2Mapping> {
        let bitmap = self.bitmap;
        if !bitmap.is_valid() {
            return Err(FormatError::invalid(
                "L2 bitmap",
                bitmap.0,
                "a subcluster is both allocated and zero",
            ));
        }
        match host {
            None if bitmap.has_data() => Err(FormatError::invalid(
                "L2 bitmap",
                bitmap.0,
                "allocated subclusters without a host cluster",
            )),
            None if bitmap.0 == 0 => Ok(L2Mapping::Unallocated),
            host => Ok(L2Mapping::Subclusters { host, copied, bitmap }),
        }
    }

    fn invalid(self, reason: &'static str) -> FormatError {
        FormatError::invalid("L2 entry", self.word, reason)
    }
}

impl L2Mapping {
    /// The entry of this mapping.
    pub fn encode(&self, geometry: &Geometry) -> L2Entry {
        let word = |host: Option<HostOffset>, copied: bool, flags: u64| {
            host.map_or(0, |h| h.0 & OFFSET_MASK) | if copied { COPIED } else { 0 } | flags
        };
        match *self {
            Self::Unallocated => L2Entry::default(),
            Self::Zero { host, copied } if geometry.extended_l2() => {
                L2Entry { word: word(host, copied, 0), bitmap: SubclusterBitmap::ALL_ZERO }
            }
            Self::Data { host, copied } if geometry.extended_l2() => {
                L2Entry { word: word(Some(host), copied, 0), bitmap: SubclusterBitmap::ALL_DATA }
            }
            Self::Zero { host, copied } => L2Entry::standard(word(host, copied, ZERO)),
            Self::Data { host, copied } => L2Entry::standard(word(Some(host), copied, 0)),
            Self::Compressed(descriptor) => L2Entry::standard(descriptor.encode(geometry)),
            Self::Subclusters { host, copied, bitmap } => L2Entry { word: word(host, copied, 0), bitmap },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn geometry(extended: bool) -> Geometry {
        Geometry::new(16, 4, extended).unwrap()
    }

    #[test]
    fn the_compressed_bit_is_tested_before_the_zero_flag() {
        let entry = L2Entry::standard(COMPRESSED | 0x5001);
        assert!(matches!(entry.decode(&geometry(false), 3, false), Ok(L2Mapping::Compressed(_))));
        assert!(entry.decode(&geometry(false), 3, true).is_err());
    }

    #[test]
    fn version_2_has_no_zero_flag() {
        assert!(L2Entry::standard(ZERO).decode(&geometry(false), 2, false).is_err());
        assert_eq!(
            L2Entry::standard(ZERO).decode(&geometry(false), 3, false),
            Ok(L2Mapping::Zero { host: None, copied: false })
        );
    }

    #[test]
    fn host_offset_zero_is_data_only_in_an_external_data_file() {
        let entry = L2Entry::standard(COPIED);
        assert_eq!(entry.decode(&geometry(false), 3, false), Ok(L2Mapping::Unallocated));
        assert_eq!(
            entry.decode(&geometry(false), 3, true),
            Ok(L2Mapping::Data { host: HostOffset(0), copied: true })
        );
    }

    #[test]
    fn unaligned_offsets_and_contradicting_bitmaps_are_refused() {
        assert!(L2Entry::standard(COPIED | 0x200).decode(&geometry(false), 3, false).is_err());
        let both = L2Entry { word: COPIED | 0x10000, bitmap: SubclusterBitmap(1 | 1 << 32) };
        assert!(both.decode(&geometry(true), 3, false).is_err());
        let homeless = L2Entry { word: 0, bitmap: SubclusterBitmap(1) };
        assert!(homeless.decode(&geometry(true), 3, false).is_err());
    }

    proptest! {
        #[test]
        fn any_entry_gives_a_value_or_an_error_and_values_survive(
            word in any::<u64>(), bitmap in any::<u64>(), bits in 14u32..=21,
            extended in any::<bool>(), external in any::<bool>(),
        ) {
            let g = Geometry::new(bits, 4, extended).unwrap();
            let bitmap = SubclusterBitmap(if extended { bitmap } else { 0 });
            if let Ok(mapping) = (L2Entry { word, bitmap }).decode(&g, 3, external) {
                let again = mapping.encode(&g).decode(&g, 3, external);
                // An all-zero or all-data entry of an extended image has two spellings.
                match (mapping, again) {
                    (L2Mapping::Subclusters { .. }, Ok(L2Mapping::Subclusters { .. })) => {}
                    (before, after) => prop_assert_eq!(Ok(before), after),
                }
            }
        }
    }
}
