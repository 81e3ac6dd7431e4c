//! L2 table entries, standard and extended, decoded once into [`L2Mapping`].

use crate::compressed::COMPRESSED;
use crate::l1::{COPIED, OFFSET_MASK};
use crate::{CompressedDescriptor, FormatError, FormatResult, Geometry, HostOffset, SubclusterBitmap, words};

/// Bit 0 of a standard descriptor: the cluster reads as zeroes (version 3, without extended L2 entries).
const ZERO: u64 = 1;
/// Bits of a standard descriptor that must be 0.
const L2_RESERVED_MASK: u64 = 0x3f00_0000_0000_01fe;

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
    /// An entry of two words.
    const fn extended(word: u64, bitmap: u64) -> Self {
        Self { word, bitmap: SubclusterBitmap(bitmap) }
    }

    /// The entries in the bytes of a table, or of whole entries of one, without extended L2 entries.
    pub fn standard_entries(table: &[u8]) -> impl ExactSizeIterator<Item = Self> + '_ {
        words::iter(table).map(Self::standard)
    }
    /// The entries in the bytes of a table, or of whole entries of one, with extended L2 entries.
    pub fn extended_entries(table: &[u8]) -> impl ExactSizeIterator<Item = Self> + '_ {
        table.as_chunks::<16>().0.iter().map(|bytes| {
            let pair = u128::from_be_bytes(*bytes);
            Self::extended((pair >> 64) as u64, pair as u64)
        })
    }
    /// The entries in the bytes of a table, or of whole entries of one, in the form of this image.
    pub fn entries<'a>(table: &'a [u8], geometry: &Geometry) -> impl Iterator<Item = Self> + 'a {
        table.chunks_exact(geometry.l2_entry_size() as usize).map(Self::read)
    }
    /// The entry in bytes of the length of one, 8 or 16; unallocated where there are fewer.
    pub fn read(bytes: &[u8]) -> Self {
        let mut words = words::iter(bytes);
        Self::extended(words.next().unwrap_or(0), words.next().unwrap_or(0))
    }
    /// Writes the entry to bytes of the length of one, 8 or 16.
    pub fn write(self, bytes: &mut [u8]) {
        let pair = [self.word.to_be_bytes(), self.bitmap.0.to_be_bytes()];
        bytes.as_chunks_mut::<8>().0.iter_mut().zip(pair).for_each(|(slot, word)| *slot = word);
    }
    /// Entry `index` of a table's words; unallocated outside.
    #[inline]
    pub fn of_words(table: &[u64], index: usize, geometry: &Geometry) -> Self {
        let word = |at: usize| table.get(at).copied().unwrap_or(0);
        match geometry.extended_l2() {
            true => Self::extended(word(index * 2), word(index * 2 + 1)),
            false => Self::standard(word(index)),
        }
    }
    /// Changes entry `index` of a table's words; nothing outside.
    #[inline]
    pub fn to_words(self, table: &mut [u64], index: usize, geometry: &Geometry) {
        let at = if geometry.extended_l2() { index * 2 } else { index };
        if let Some(word) = table.get_mut(at) {
            *word = self.word;
        }
        if geometry.extended_l2()
            && let Some(bitmap) = table.get_mut(at + 1)
        {
            *bitmap = self.bitmap.0;
        }
    }

    /// Whether the cluster is compressed. Test this first: other bits then mean something else.
    pub const fn is_compressed(self) -> bool {
        self.word & COMPRESSED != 0
    }
    /// Bit 63. Only accurate in L2 tables reachable from the active L1 table.
    pub const fn copied(self) -> bool {
        self.word & COPIED != 0
    }
    /// The entry with bit 63 set or not.
    #[must_use]
    pub const fn with_copied(self, copied: bool) -> Self {
        Self { word: if copied { self.word | COPIED } else { self.word & !COPIED }, ..self }
    }
    /// Whether a standard descriptor has the zero flag, which extended L2 entries have not.
    pub const fn has_zero_flag(self, geometry: &Geometry) -> bool {
        self.word & ZERO != 0 && !geometry.extended_l2()
    }
    /// The entry without the zero flag, where it can have one.
    #[must_use]
    pub const fn without_zero_flag(self, geometry: &Geometry) -> Self {
        Self { word: if geometry.extended_l2() { self.word } else { self.word & !ZERO }, ..self }
    }
    /// Whether nothing is set but perhaps the zero flag: no host cluster, nothing that could be wrong.
    pub const fn is_bare(self) -> bool {
        self.word <= ZERO && self.bitmap.0 == 0
    }
    /// Raw offset bits of a standard descriptor.
    pub const fn offset_bits(self) -> u64 {
        self.word & OFFSET_MASK
    }
    /// The host offset of an entry with nothing special about it: a standard cluster that has a host cluster, and does not read as
    /// zeroes by a flag. [`L2Entry::decode`] judges all others.
    #[inline]
    pub const fn sound_host(self, geometry: &Geometry) -> Option<u64> {
        let offset = self.offset_bits();
        let sound = offset != 0
            && !self.is_compressed()
            && !self.has_zero_flag(geometry)
            && self.bitmap.is_valid()
            && geometry.in_cluster(offset) == 0;
        if sound { Some(offset) } else { None }
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

/// How many entries of a table's words, from `index` on and at most `limit`, say the same about clusters that follow each
/// other: not allocated, or at host offsets that follow each other. At least 1. Entries of subclusters and of compressed
/// clusters stand alone.
#[inline]
pub fn run_length(table: &[u64], index: usize, limit: u64, geometry: &Geometry) -> u64 {
    let Some((first, rest)) = table.get(index..).and_then(<[u64]>::split_first) else {
        return 1;
    };
    let entry = L2Entry::standard(*first);
    if geometry.extended_l2() || entry.is_compressed() {
        return 1;
    }
    let step = if entry.offset_bits() == 0 { 0 } else { geometry.cluster_size() };
    let limit = usize::try_from(limit.saturating_sub(1)).unwrap_or(usize::MAX);
    // The steps stay inside the offset: it has at most 56 bits, and a table 2^18 entries of 2 MiB.
    if entry.offset_bits() > OFFSET_MASK - step * table.len() as u64 {
        return 1;
    }
    let mut next = *first;
    let following = rest.iter().take(limit).take_while(|word| {
        next = next.wrapping_add(step);
        **word == next
    });
    1 + following.count() as u64
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

    #[test]
    fn the_two_forms_in_a_table() {
        let entry = L2Entry { word: COPIED | 0x50000, bitmap: SubclusterBitmap(3 << 32 | 4) };
        let mut bytes = [0xee; 16];
        entry.write(&mut bytes);
        assert_eq!(L2Entry::read(&bytes), entry);
        assert_eq!(L2Entry::extended_entries(&bytes).collect::<Vec<_>>(), [entry]);
        assert_eq!(L2Entry::entries(&bytes, &geometry(true)).collect::<Vec<_>>(), [entry]);
        assert!(L2Entry::entries(&bytes, &geometry(false)).eq(L2Entry::standard_entries(&bytes)));
        assert_eq!(L2Entry::read(&bytes[..8]), L2Entry::standard(entry.word));
        assert_eq!(L2Entry::standard_entries(&bytes).next(), Some(L2Entry::standard(entry.word)));
        let words = words::decode(&bytes);
        assert_eq!(L2Entry::of_words(&words, 0, &geometry(true)), entry);
        assert_eq!(L2Entry::of_words(&words, 1, &geometry(false)), L2Entry::standard(3 << 32 | 4));
        assert_eq!(L2Entry::of_words(&words, 1, &geometry(true)), L2Entry::default());
        let mut changed = [7; 4];
        entry.to_words(&mut changed, 1, &geometry(true));
        assert_eq!(changed, [7, 7, words[0], words[1]]);
        entry.to_words(&mut changed, 0, &geometry(false));
        assert_eq!(changed, [words[0], 7, words[0], words[1]]);
        entry.to_words(&mut changed, 4, &geometry(false));
        assert_eq!(changed, [words[0], 7, words[0], words[1]]);
    }

    #[test]
    fn flags() {
        let (standard, extended) = (geometry(false), geometry(true));
        let entry = L2Entry::standard(COPIED | 0x50000 | ZERO);
        assert!(entry.has_zero_flag(&standard) && !entry.has_zero_flag(&extended));
        assert_eq!(entry.without_zero_flag(&standard).word, COPIED | 0x50000);
        assert_eq!(entry.without_zero_flag(&extended), entry);
        assert_eq!(entry.with_copied(false).word, 0x50000 | ZERO);
        assert_eq!(entry.with_copied(false).with_copied(true), entry);
        assert!(L2Entry::standard(ZERO).is_bare() && L2Entry::default().is_bare());
        assert!(![COPIED, 2, 512, COMPRESSED].iter().any(|word| L2Entry::standard(*word).is_bare()));
        assert!(!L2Entry { word: 0, bitmap: SubclusterBitmap(1 << 63) }.is_bare());
    }

    #[test]
    fn runs() {
        let g = geometry(false);
        let cluster = g.cluster_size();
        let first = COPIED | 0x50000;
        let table =
            [first, first + cluster, first + 2 * cluster, 0, 0, ZERO, 0x90000, COMPRESSED, COMPRESSED];
        let runs = |limit| -> Vec<u64> { (0..10).map(|at| run_length(&table, at, limit, &g)).collect() };
        assert_eq!(runs(u64::MAX), [3, 2, 1, 2, 1, 1, 1, 1, 1, 1]);
        assert_eq!(runs(2), [2, 2, 1, 2, 1, 1, 1, 1, 1, 1]);
        assert_eq!(runs(0), [1; 10]);
        assert_eq!(run_length(&table, 0, u64::MAX, &geometry(true)), 1);
        // The last offset has no next one: it would be another flag.
        let last = OFFSET_MASK & !(cluster - 1);
        assert_eq!(run_length(&[last, last + cluster], 0, 2, &g), 1);
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
            // Most words are not aligned.
            for word in [word, word & !(g.cluster_size() - 2), word & !(g.cluster_size() - 1)] {
                let entry = L2Entry { word, bitmap };
                let Some(host) = entry.sound_host(&g) else { continue };
                let found = match entry.decode(&g, 2, external) {
                    Ok(L2Mapping::Data { host, .. } | L2Mapping::Subclusters { host: Some(host), .. }) => Some(host.0),
                    _ => None,
                };
                prop_assert_eq!(found, Some(host));
            }
        }
    }
}
