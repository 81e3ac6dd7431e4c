//! Where each field of the header lies, and changing a few of them in place.
//!
//! Offsets come from the structures of [`super::raw`]; nothing else says where a field is.

use std::marker::PhantomData;
use std::mem::offset_of;
use std::ops::Range;

use super::feature::{Autoclear, Compatible, Incompatible};
use super::raw::{COMPRESSION_TYPE_OFFSET, RawHeaderV2, RawHeaderV3, V2_LENGTH, V3_LENGTH};
use super::{CryptMethod, Header};
use crate::{FormatError, FormatResult, Geometry, HostOffset};

/// What a field holds: a big-endian number in the file.
pub trait Value: Copy {
    /// Bytes that it takes in the header.
    const WIDTH: usize;
    /// Its number.
    fn to_number(self) -> u64;
    /// The value of a number of that width.
    fn from_number(number: u64) -> Self;
}

macro_rules! value {
    ($type:ty, $width:literal, $number:ident => $from:expr, $value:ident => $to:expr) => {
        impl Value for $type {
            const WIDTH: usize = $width;
            fn to_number(self) -> u64 {
                let $value = self;
                $to
            }
            fn from_number($number: u64) -> Self {
                $from
            }
        }
    };
}

value!(u8, 1, n => n as u8, v => v.into());
value!(u32, 4, n => n as u32, v => v.into());
value!(u64, 8, n => n, v => v);
value!(HostOffset, 8, n => HostOffset(n), v => v.0);
value!(Incompatible, 8, n => Incompatible::from_bits_retain(n), v => v.bits());
value!(Compatible, 8, n => Compatible::from_bits_retain(n), v => v.bits());
value!(Autoclear, 8, n => Autoclear::from_bits_retain(n), v => v.bits());

/// A field of the header.
#[derive(Debug, Clone, Copy)]
pub struct Field<T> {
    name: &'static str,
    offset: usize,
    value: PhantomData<T>,
}

impl<T: Value> Field<T> {
    const fn at(name: &'static str, offset: usize) -> Self {
        Self { name, offset, value: PhantomData }
    }

    /// Its name in the specification.
    pub const fn name(&self) -> &'static str {
        self.name
    }

    /// The bytes of the header that it takes.
    pub const fn range(&self) -> Range<usize> {
        self.offset..self.offset + T::WIDTH
    }

    /// Reads it from the first bytes of an image.
    ///
    /// # Errors
    /// `Truncated` where they end before.
    pub fn read(&self, header: &[u8]) -> FormatResult<T> {
        let bytes = crate::bytes::slice(header, self.offset, T::WIDTH, self.name)?;
        Ok(T::from_number(bytes.iter().fold(0, |number, &byte| number << 8 | u64::from(byte))))
    }

    /// Writes it to the first bytes of an image; nothing where they end before.
    pub fn write(&self, header: &mut [u8], value: T) {
        if let Some(bytes) = header.get_mut(self.range()) {
            put(bytes, value.to_number());
        }
    }
}

/// Writes the last bytes of a number, as many as there is room for.
fn put(bytes: &mut [u8], number: u64) {
    let number = number.to_be_bytes();
    bytes.iter_mut().rev().zip(number.iter().rev()).for_each(|(byte, value)| *byte = *value);
}

macro_rules! fields {
    ($($raw:ident at $start:expr => { $($(#[$doc:meta])* $name:ident: $type:ty = $field:ident,)* })*) => {
        $($(
            $(#[$doc])*
            pub const $name: Field<$type> = Field::at(stringify!($field), $start + offset_of!($raw, $field));
        )*)*
    };
}

fields! {
    RawHeaderV2 at 0 => {
        /// 2 or 3.
        VERSION: u32 = version,
        /// Offset in the first cluster, 0 for none.
        BACKING_FILE_OFFSET: u64 = backing_file_offset,
        /// Bytes of the name.
        BACKING_FILE_SIZE: u32 = backing_file_size,
        /// log2 of the cluster size.
        CLUSTER_BITS: u32 = cluster_bits,
        /// Virtual size in bytes.
        SIZE: u64 = size,
        /// Encryption of guest data.
        CRYPT_METHOD: u32 = crypt_method,
        /// Entries in the active L1 table.
        L1_SIZE: u32 = l1_size,
        /// Start of the active L1 table.
        L1_TABLE_OFFSET: HostOffset = l1_table_offset,
        /// Start of the refcount table.
        REFCOUNT_TABLE_OFFSET: HostOffset = refcount_table_offset,
        /// Clusters of the refcount table.
        REFCOUNT_TABLE_CLUSTERS: u32 = refcount_table_clusters,
        /// Internal snapshots.
        NB_SNAPSHOTS: u32 = nb_snapshots,
        /// Start of the snapshot table.
        SNAPSHOTS_OFFSET: HostOffset = snapshots_offset,
    }
    RawHeaderV3 at V2_LENGTH => {
        /// Version 3.
        INCOMPATIBLE_FEATURES: Incompatible = incompatible_features,
        /// Version 3.
        COMPATIBLE_FEATURES: Compatible = compatible_features,
        /// Version 3.
        AUTOCLEAR_FEATURES: Autoclear = autoclear_features,
        /// Version 3: log2 of the refcount width in bits.
        REFCOUNT_ORDER: u32 = refcount_order,
        /// Version 3: bytes of the header.
        HEADER_LENGTH: u32 = header_length,
    }
}

/// Version 3, where the header is longer than 104 bytes.
pub const COMPRESSION_TYPE: Field<u8> = Field::at("compression_type", COMPRESSION_TYPE_OFFSET);

/// What no writer changes in the header of an image that is in use: it was read once, and is still what the file has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Steady {
    version: u32,
    geometry: Geometry,
    crypt_method: CryptMethod,
}

impl Steady {
    /// That of an image with these properties.
    pub const fn new(version: u32, geometry: Geometry, crypt_method: CryptMethod) -> Self {
        Self { version, geometry, crypt_method }
    }

    /// The steady field that begins at `offset`: its width and number.
    fn field_at(&self, offset: usize) -> Option<(usize, u64)> {
        let fields = [
            (CLUSTER_BITS, self.geometry.cluster_bits()),
            (CRYPT_METHOD, self.crypt_method.encode()),
            (REFCOUNT_ORDER, self.geometry.refcount_order()),
        ];
        let found = fields.into_iter().find(|(field, _)| field.offset == offset);
        found.map(|(field, number)| (field.range().len(), number.into()))
    }
}

impl Header {
    /// What stays as it is while the image is in use.
    pub const fn steady(&self) -> Steady {
        Steady::new(self.version, self.geometry, self.crypt_method)
    }
}

/// New values of a few fields that lie near each other, to be written at once. All fields lie in the first sector, which
/// a disk writes as a whole.
///
/// The write covers what lies between the named fields as well: only fields of [`Steady`] may, and they keep their value.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Patch {
    /// Offset, width and number of each, in the order in which they were named.
    fields: Vec<(usize, usize, u64)>,
}

impl Patch {
    /// Nothing yet.
    pub const fn new() -> Self {
        Self { fields: Vec::new() }
    }

    /// Sets a field; of two values of one field the last one counts.
    #[must_use]
    pub fn set<T: Value>(mut self, field: Field<T>, value: T) -> Self {
        self.fields.retain(|named| named.0 != field.offset);
        self.fields.push((field.offset, T::WIDTH, value.to_number()));
        self
    }

    /// Offset in the file and bytes of the write.
    ///
    /// # Errors
    /// `Invalid` for a patch without fields, one that covers a field whose value it does not know, and one of fields that
    /// version 2 does not have.
    pub fn encode(&self, steady: &Steady) -> FormatResult<(u64, Vec<u8>)> {
        let refused =
            |offset: usize, reason| Err(FormatError::invalid("header patch", offset as u64, reason));
        let mut fields = self.fields.clone();
        fields.sort_unstable();
        let Some(&(start, ..)) = fields.first() else { return refused(0, "it names no field") };
        let mut bytes = Vec::new();
        for (offset, width, number) in fields {
            if offset >= V3_LENGTH || (steady.version < 3 && offset >= V2_LENGTH) {
                return refused(offset, "not every header of this version has the field");
            }
            while start + bytes.len() < offset {
                let between = start + bytes.len();
                let Some((width, number)) = steady.field_at(between) else {
                    return refused(
                        between,
                        "the field lies between others that change, and its value is not known",
                    );
                };
                append(&mut bytes, width, number);
            }
            append(&mut bytes, width, number);
        }
        Ok((start as u64, bytes))
    }
}

fn append(bytes: &mut Vec<u8>, width: usize, number: u64) {
    let start = bytes.len();
    bytes.resize(start + width, 0);
    put(bytes.get_mut(start..).unwrap_or_default(), number);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn steady(version: u32, crypt_method: CryptMethod) -> Steady {
        Steady::new(version, Geometry::new(16, 4, false).unwrap(), crypt_method)
    }

    /// Offsets and widths of all fields behind the magic.
    fn table() -> Vec<(usize, usize)> {
        fn place<T: Value>(field: Field<T>) -> (usize, usize) {
            (field.range().start, field.range().len())
        }
        vec![
            place(VERSION),
            place(BACKING_FILE_OFFSET),
            place(BACKING_FILE_SIZE),
            place(CLUSTER_BITS),
            place(SIZE),
            place(CRYPT_METHOD),
            place(L1_SIZE),
            place(L1_TABLE_OFFSET),
            place(REFCOUNT_TABLE_OFFSET),
            place(REFCOUNT_TABLE_CLUSTERS),
            place(NB_SNAPSHOTS),
            place(SNAPSHOTS_OFFSET),
            place(INCOMPATIBLE_FEATURES),
            place(COMPATIBLE_FEATURES),
            place(AUTOCLEAR_FEATURES),
            place(REFCOUNT_ORDER),
            place(HEADER_LENGTH),
            place(COMPRESSION_TYPE),
        ]
    }

    #[test]
    fn the_fields_lie_without_gaps_where_the_specification_has_them() {
        let table = table();
        assert!(table.windows(2).all(|pair| pair[0].0 + pair[0].1 == pair[1].0), "{table:?}");
        assert_eq!((table[0].0, SIZE.range(), AUTOCLEAR_FEATURES.range()), (4, 24..32, 88..96));
        assert_eq!(COMPRESSION_TYPE.range(), 104..105);
    }

    #[test]
    fn what_lies_between_keeps_its_value() {
        for (method, number) in [(CryptMethod::None, 0), (CryptMethod::Aes, 1), (CryptMethod::Luks, 2)] {
            let patch = Patch::new().set(L1_TABLE_OFFSET, HostOffset(0x50000)).set(SIZE, 7).set(L1_SIZE, 9);
            let (offset, bytes) = patch.encode(&steady(2, method)).unwrap();
            let mut header = [0xee; 80];
            header[offset as usize..][..bytes.len()].copy_from_slice(&bytes);
            assert_eq!((offset, bytes.len()), (24, 24));
            assert_eq!(SIZE.read(&header), Ok(7));
            assert_eq!(CRYPT_METHOD.read(&header), Ok(number));
            assert_eq!(L1_SIZE.read(&header), Ok(9));
            assert_eq!(L1_TABLE_OFFSET.read(&header), Ok(HostOffset(0x50000)));
        }
    }

    #[test]
    fn a_patch_that_would_guess_is_refused() {
        let version_3 = steady(3, CryptMethod::None);
        let refused = |patch: Patch, steady: &Steady| patch.encode(steady).is_err();
        assert!(refused(Patch::new(), &version_3));
        // The backing file's name, the compatible bits, the refcount table: others may have changed them.
        assert!(refused(Patch::new().set(VERSION, 3).set(SIZE, 1), &version_3));
        let bits = Patch::new().set(INCOMPATIBLE_FEATURES, Incompatible::empty());
        assert!(!refused(bits.clone(), &version_3));
        assert!(refused(bits.clone().set(AUTOCLEAR_FEATURES, Autoclear::empty()), &version_3));
        assert!(refused(Patch::new().set(L1_SIZE, 1).set(NB_SNAPSHOTS, 1), &version_3));
        // Where these fields are in version 3, version 2 has its extensions.
        assert!(refused(bits, &steady(2, CryptMethod::None)));
        assert!(refused(Patch::new().set(COMPRESSION_TYPE, 1), &version_3));
    }

    #[test]
    fn every_pair_of_fields_is_patched_alone_or_refused() {
        let steady = Steady::new(3, Geometry::new(9, 6, false).unwrap(), CryptMethod::Luks);
        // A header of this image, with all else at odds with it.
        let mut header = [0x5a; V3_LENGTH];
        CLUSTER_BITS.write(&mut header, 9);
        CRYPT_METHOD.write(&mut header, 2);
        REFCOUNT_ORDER.write(&mut header, 6);
        let mut encoded = 0;
        for (a, a_width) in table() {
            for (b, b_width) in table() {
                let mut fields = vec![(a, a_width, 1), (b, b_width, 1)];
                fields.dedup();
                let patch = Patch { fields };
                let Ok((offset, bytes)) = patch.encode(&steady) else { continue };
                let mut after = header;
                after[offset as usize..][..bytes.len()].copy_from_slice(&bytes);
                let named = |at: &usize| (a..a + a_width).contains(at) || (b..b + b_width).contains(at);
                assert!((0..V3_LENGTH).all(|at| named(&at) || after[at] == header[at]), "{a} {b}");
                encoded += 1;
            }
        }
        assert!(encoded > 30, "{encoded}");
    }

    #[test]
    fn fields_of_a_header_that_is_cut() {
        assert_eq!(SIZE.read(&[0; 31]).unwrap_err().field(), Some("size"));
        let mut short = [0xee; 31];
        SIZE.write(&mut short, 1);
        assert_eq!(short, [0xee; 31]);
    }
}
