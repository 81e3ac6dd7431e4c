//! Feature bits and the feature name table.

use bitflags::bitflags;

use crate::bytes::slice;

bitflags! {
    /// An unknown bit here means that the image must not be opened.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
    pub struct Incompatible: u64 {
        /// Refcounts may be inconsistent.
        const DIRTY = 1 << 0;
        /// Any structure may be damaged; the image must not be written to.
        const CORRUPT = 1 << 1;
        /// Guest clusters are in an external data file.
        const DATA_FILE = 1 << 2;
        /// `compression_type` is not 0.
        const COMPRESSION_TYPE = 1 << 3;
        /// L2 entries are 128 bits with a subcluster bitmap.
        const EXTENDED_L2 = 1 << 4;
        /// Bits of later versions of the format.
        const _ = !0;
    }
}

bitflags! {
    /// Unknown bits here can be ignored.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
    pub struct Compatible: u64 {
        /// Refcount updates can be postponed behind the dirty bit.
        const LAZY_REFCOUNTS = 1 << 0;
        /// Bits of later versions of the format.
        const _ = !0;
    }
}

bitflags! {
    /// A writer that does not know a bit here clears it before its first write.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
    pub struct Autoclear: u64 {
        /// The bitmaps extension is consistent.
        const BITMAPS = 1 << 0;
        /// The external data file is a consistent raw image on its own.
        const DATA_FILE_RAW = 1 << 1;
        /// Bits of later versions of the format.
        const _ = !0;
    }
}

impl Incompatible {
    /// The bits that this library implements.
    pub const SUPPORTED: Self = Self::DIRTY
        .union(Self::CORRUPT)
        .union(Self::DATA_FILE)
        .union(Self::COMPRESSION_TYPE)
        .union(Self::EXTENDED_L2);

    /// The bits that this library does not implement.
    pub const fn unsupported(self) -> u64 {
        self.bits() & !Self::SUPPORTED.bits()
    }
}

impl Autoclear {
    /// The bits that this library implements.
    pub const SUPPORTED: Self = Self::BITMAPS.union(Self::DATA_FILE_RAW);
}

/// Which feature bitmap an entry of the name table describes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FeatureSet {
    /// `incompatible_features`
    Incompatible,
    /// `compatible_features`
    Compatible,
    /// `autoclear_features`
    Autoclear,
    /// A bitmap of a later version of the format.
    Unknown(u8),
}

/// One entry of the feature name table.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct FeatureName {
    /// Which bitmap.
    pub set: FeatureSet,
    /// Which bit, 0-63.
    pub bit: u8,
    /// Name, at most 46 bytes.
    pub name: Vec<u8>,
}

/// Bytes of one entry.
const ENTRY_LENGTH: usize = 48;

/// The names this library writes: the bits known to QEMU 10, in its order.
pub const KNOWN_FEATURES: [(FeatureSet, u8, &str); 8] = [
    (FeatureSet::Incompatible, 0, "dirty bit"),
    (FeatureSet::Incompatible, 1, "corrupt bit"),
    (FeatureSet::Incompatible, 2, "external data file"),
    (FeatureSet::Incompatible, 3, "compression type"),
    (FeatureSet::Incompatible, 4, "extended L2 entries"),
    (FeatureSet::Compatible, 0, "lazy refcounts"),
    (FeatureSet::Autoclear, 0, "bitmaps"),
    (FeatureSet::Autoclear, 1, "raw external data"),
];

/// Splits the table; a last entry that is cut short reads as if zeroes followed.
pub(super) fn parse_names(data: &[u8]) -> Vec<FeatureName> {
    data.chunks(ENTRY_LENGTH)
        .filter_map(|entry| {
            let mut whole = [0; ENTRY_LENGTH];
            whole.get_mut(..entry.len())?.copy_from_slice(entry);
            let entry = &whole[..];
            let set = match *entry.first()? {
                0 => FeatureSet::Incompatible,
                1 => FeatureSet::Compatible,
                2 => FeatureSet::Autoclear,
                other => FeatureSet::Unknown(other),
            };
            let name = slice(entry, 2, ENTRY_LENGTH - 2, "feature name").ok()?;
            let end = name.iter().position(|&b| b == 0).unwrap_or(name.len());
            let name = name.get(..end)?.to_vec();
            Some(FeatureName { set, bit: *entry.get(1)?, name })
        })
        .collect()
}

/// The table's bytes. A name beyond 46 bytes is cut.
pub(super) fn encode_names(names: &[FeatureName]) -> Vec<u8> {
    let mut table = Vec::with_capacity(names.len() * ENTRY_LENGTH);
    for FeatureName { set, bit, name } in names {
        let end = table.len() + ENTRY_LENGTH;
        table.push(match set {
            FeatureSet::Incompatible => 0,
            FeatureSet::Compatible => 1,
            FeatureSet::Autoclear => 2,
            FeatureSet::Unknown(other) => *other,
        });
        table.push(*bit);
        table.extend_from_slice(name);
        table.resize(end, 0);
    }
    table
}

/// The table of [`KNOWN_FEATURES`].
pub(super) fn known_names() -> Vec<FeatureName> {
    KNOWN_FEATURES
        .iter()
        .map(|&(set, bit, name)| FeatureName { set, bit, name: name.as_bytes().to_vec() })
        .collect()
}

/// Names of the set bits of `bits` in `set`: the image's own name, else ours; of the bits that have none the mask in
/// hexadecimal, as QEMU says it.
pub fn names_of(set: FeatureSet, bits: u64, table: &[FeatureName]) -> Vec<String> {
    let label = match set {
        FeatureSet::Incompatible => "incompatible",
        FeatureSet::Compatible => "compatible",
        FeatureSet::Autoclear => "autoclear",
        FeatureSet::Unknown(_) => "unknown",
    };
    let name = |bit: u8| {
        let own = table.iter().find(|f| f.set == set && f.bit == bit && !f.name.is_empty());
        own.map(|f| String::from_utf8_lossy(&f.name).into_owned()).or_else(|| {
            let known = KNOWN_FEATURES.iter().find(|k| k.0 == set && k.1 == bit);
            known.map(|k| k.2.to_owned())
        })
    };
    let mut unknown = 0;
    let mut names = Vec::new();
    for bit in (0..64u8).filter(|bit| bits & (1 << bit) != 0) {
        match name(bit) {
            Some(name) => names.push(name),
            None => unknown |= 1u64 << bit,
        }
    }
    if unknown != 0 {
        names.push(format!("Unknown {label} feature: {unknown:x}"));
    }
    names
}
