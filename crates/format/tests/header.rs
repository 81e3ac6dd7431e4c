//! The header parser against constants of the specification, against itself, and against arbitrary bytes.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests")]

use proptest::prelude::*;
use qcow2_format::header::extension::{BitmapsExtension, Extension, HEAD_LENGTH, Places};
use qcow2_format::header::feature::{Autoclear, Compatible, Incompatible};
use qcow2_format::{CompressionType, CryptMethod, FormatError, Geometry, Header, HostOffset};

fn header() -> Header {
    Header {
        version: 3,
        geometry: Geometry::new(16, 4, false).unwrap(),
        size: 1 << 30,
        crypt_method: CryptMethod::None,
        l1_size: 2,
        l1_table_offset: HostOffset(0x30000),
        refcount_table_offset: HostOffset(0x10000),
        refcount_table_clusters: 1,
        nb_snapshots: 0,
        snapshots_offset: HostOffset(0),
        incompatible: Incompatible::empty(),
        compatible: Compatible::LAZY_REFCOUNTS,
        autoclear: Autoclear::empty(),
        compression_type: CompressionType::Zlib,
        header_length: 112,
        unknown_fields: vec![],
        extensions: vec![],
        backing_file: None,
    }
}

fn be(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |n, &b| n << 8 | u64::from(b))
}

#[test]
fn fields_lie_where_the_specification_puts_them() {
    let mut h = header();
    h.backing_file = Some(b"base.qcow2".to_vec());
    h.extensions = vec![Extension::BackingFormat(b"qcow2".to_vec())];
    let bytes = h.encode().unwrap();
    assert_eq!(&bytes[..4], b"QFI\xfb");
    assert_eq!(be(&bytes[4..8]), 3);
    assert_eq!(be(&bytes[20..24]), 16);
    assert_eq!(be(&bytes[24..32]), 1 << 30);
    assert_eq!(be(&bytes[36..40]), 2);
    assert_eq!(be(&bytes[40..48]), 0x30000);
    assert_eq!(be(&bytes[48..56]), 0x10000);
    assert_eq!(be(&bytes[56..60]), 1);
    assert_eq!(be(&bytes[80..88]), 1, "lazy refcounts");
    assert_eq!(be(&bytes[96..100]), 4);
    assert_eq!(be(&bytes[100..104]), 112);
    assert_eq!(be(&bytes[112..116]), 0xe279_2aca, "backing format extension");
    let name = be(&bytes[8..16]) as usize;
    assert_eq!(be(&bytes[16..20]), 10);
    assert_eq!(&bytes[name..], b"base.qcow2");
}

#[test]
fn extensions_are_found_where_they_were_encoded() {
    let bitmaps =
        BitmapsExtension { count: 1, reserved: 0, directory_size: 32, directory_offset: HostOffset(0x50000) };
    let unknown = Extension::Unknown { magic: 0x1234_5678, data: b"odd".to_vec() };
    for backing_file in [None, Some(b"base".to_vec())] {
        let mut h = header();
        h.backing_file = backing_file;
        h.extensions = vec![unknown.clone()];
        let without = Places::find(&padded(h.encode().unwrap())).unwrap();
        assert_eq!(without, Places { bitmaps: None, end: 112 + 16 });
        h.extensions = vec![unknown.clone(), Extension::Bitmaps(bitmaps), unknown.clone()];
        let mut bytes = padded(h.encode().unwrap());
        let with = Places::find(&bytes).unwrap();
        let at = without.end as usize + HEAD_LENGTH;
        assert_eq!(
            with,
            Places { bitmaps: Some(at as u64), end: (at + BitmapsExtension::LENGTH + 16) as u64 }
        );
        assert_eq!(bytes[at - HEAD_LENGTH..at], BitmapsExtension::head());
        assert_eq!(bytes[at..at + BitmapsExtension::LENGTH], bitmaps.encode());
        let (field, place) = BitmapsExtension::directory_patch(HostOffset(0x70000));
        bytes[at + field as usize..][..8].copy_from_slice(&place);
        let moved = BitmapsExtension { directory_offset: HostOffset(0x70000), ..bitmaps };
        assert_eq!(Header::parse(&bytes).unwrap().bitmaps(), Some(&moved));
    }
    assert!(Places::find(&header().encode().unwrap()[..100]).is_err());
}

fn padded(mut bytes: Vec<u8>) -> Vec<u8> {
    bytes.resize(65536, 0);
    bytes
}

#[test]
fn unknown_fields_and_extensions_survive_a_rewrite() {
    let mut h = header();
    h.unknown_fields = vec![7; 16];
    h.header_length = 128;
    h.autoclear = Autoclear::BITMAPS | Autoclear::from_bits_retain(1 << 40);
    h.extensions = vec![
        Extension::Unknown { magic: 0x1234_5678, data: b"kept".to_vec() },
        Extension::Bitmaps(BitmapsExtension {
            count: 2,
            reserved: 0,
            directory_size: 64,
            directory_offset: HostOffset(0x50000),
        }),
        Extension::known_feature_names(),
    ];
    let bytes = h.encode().unwrap();
    assert_eq!(Header::parse(&bytes).unwrap(), h);
}

#[test]
fn unknown_incompatible_features_are_refused_by_the_images_own_name() {
    let mut h = header();
    h.extensions = vec![Extension::known_feature_names()];
    let mut bytes = h.encode().unwrap();
    bytes[72] = 0x80; // bit 63
    bytes[78] = 0x01; // bit 8
    let entry = 112 + 8 + 7 * 48; // rename the last entry of the table to incompatible bit 8
    bytes[entry] = 0;
    bytes[entry + 1] = 8;
    bytes[entry + 2..entry + 48].fill(0);
    bytes[entry + 2..entry + 11].copy_from_slice(b"time warp");
    let error = Header::parse(&bytes).unwrap_err();
    assert_eq!(
        error.to_string(),
        "Unsupported qcow2 feature(s): time warp, Unknown incompatible feature: 8000000000000000"
    );
}

#[test]
fn a_feature_name_that_the_table_cuts_short_is_a_name() {
    let mut h = header();
    h.extensions = vec![Extension::Unknown { magic: 0x6803_f857, data: b"\x00\x3fTest feature".to_vec() }];
    let mut bytes = h.encode().unwrap();
    bytes[72] = 0xe0; // bits 61, 62, 63
    let error = Header::parse(&bytes).unwrap_err().to_string();
    let expected =
        "Unsupported qcow2 feature(s): Test feature, Unknown incompatible feature: 6000000000000000";
    assert_eq!(error, expected);
}

#[test]
fn contradictions_are_refused_with_the_field() {
    type Poke = (usize, u64, usize, &'static str);
    let pokes: [Poke; 14] = [
        (0, 0, 4, "magic"),
        (4, 1, 4, "version"),
        (4, 4, 4, "version"),
        (8, 65537, 8, "backing_file_offset"),
        (20, 8, 4, "cluster_bits"),
        (20, 22, 4, "cluster_bits"),
        (24, u64::MAX, 8, "size"),
        (32, 3, 4, "crypt_method"),
        (36, 1, 4, "l1_size"),
        (40, 0x30200, 8, "l1_table_offset"),
        (48, 0x10001, 8, "refcount_table_offset"),
        (56, 1 << 20, 4, "refcount_table_offset"),
        (60, 65537, 4, "nb_snapshots"),
        (96, 7, 4, "refcount_order"),
    ];
    let good = header().encode().unwrap();
    for (at, value, width, field) in pokes {
        let mut bytes = good.clone();
        bytes.resize(65536, 0);
        bytes[at..at + width].copy_from_slice(&value.to_be_bytes()[8 - width..]);
        let error = Header::parse(&bytes).unwrap_err();
        assert_eq!(error.field(), Some(field), "poke at {at}: {error}");
    }
}

/// What no table could map is said to be too big, not the table too small: QEMU's limit is that of its numbers.
#[test]
fn a_disk_beyond_all_tables_is_too_big() {
    for (size, message) in [
        (1 << 59, "the L1 table is too small for the virtual size"),
        ((i32::MAX as u64) << 29, "the L1 table is too small for the virtual size"),
        (((i32::MAX as u64) << 29) + 1, "the virtual size is too big"),
        (1 << 60, "the virtual size is too big"),
    ] {
        let mut bytes = header().encode().unwrap();
        bytes[24..32].copy_from_slice(&u64::to_be_bytes(size));
        let error = Header::parse(&padded(bytes)).unwrap_err();
        assert!(error.to_string().contains(message), "{size}: {error}");
    }
}

#[test]
fn compression_type_and_its_bit_agree_or_nothing() {
    for (bit, value, ok) in [(0, 0, true), (8, 1, true), (8, 0, false), (0, 1, false), (8, 2, false)] {
        let mut bytes = header().encode().unwrap();
        bytes[79] = bit;
        bytes[104] = value;
        assert_eq!(Header::parse(&bytes).is_ok(), ok, "bit {bit}, type {value}");
    }
}

#[test]
fn an_extension_that_lies_about_its_length() {
    let mut h = header();
    h.extensions = vec![Extension::Unknown { magic: 1, data: vec![1; 8] }];
    let mut bytes = h.encode().unwrap();
    bytes.resize(65536, 0);
    bytes[116..120].copy_from_slice(&u32::MAX.to_be_bytes());
    assert!(matches!(Header::parse(&bytes), Err(FormatError::Invalid { .. })));
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_bytes_give_a_value_or_an_error(
        mut bytes in proptest::collection::vec(any::<u8>(), 0..600),
        plausible in any::<bool>(),
    ) {
        if plausible {
            let good = header().encode().unwrap();
            let n = good.len().min(bytes.len()).min(32);
            bytes[..n].copy_from_slice(&good[..n]);
        }
        let _ = Header::parse(&bytes);
    }

    #[test]
    fn a_poked_header_never_panics_and_what_parses_can_be_encoded(at in 0usize..200, value in any::<u64>()) {
        let mut h = header();
        h.extensions = vec![Extension::BackingFormat(b"raw".to_vec()), Extension::known_feature_names()];
        h.backing_file = Some(b"base".to_vec());
        let mut bytes = h.encode().unwrap();
        bytes[at..at + 8].copy_from_slice(&value.to_be_bytes());
        if let Ok(parsed) = Header::parse(&bytes)
            && let Ok(again) = parsed.encode()
        {
            let mut reparsed = Header::parse(&again).unwrap();
            reparsed.header_length = parsed.header_length;
            prop_assert_eq!(reparsed, parsed);
        }
    }
}
