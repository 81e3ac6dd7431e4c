//! Damaged images, and those that lie.

use std::sync::Arc;

use qcow2_core::check::{FindingCode, Repair};
use qcow2_core::{ErrorKind, Job, Mem};
use qcow2_testkit::contract::LayerContract;
use qcow2_vpc::structures::{DiskType, Footer, Geometry};
use qcow2_vpc::{OpenOptions, Subformat, inspect, inspect_bytes};

use crate::support::{bytes_of, disk, forged, image, memory, new, open, read};

/// A dynamic disk with data, as bytes, and the data.
fn filled() -> (Vec<u8>, Vec<u8>) {
    let storage = memory(&forged(12, 16 << 10, DiskType::Dynamic));
    let expected = disk(12 * (16 << 10), 2);
    let written = image(Arc::clone(&storage), true);
    written.write_at(Mem::from(&expected[..]), 0).unwrap();
    written.close().unwrap();
    (bytes_of(&*storage), expected)
}

#[test]
fn one_footer_is_enough() {
    let (sound, expected) = filled();
    let end = sound.len() - 512;
    for damaged in [0, 100, end, end + 100] {
        let mut bytes = sound.clone();
        bytes[damaged] ^= 0x55;
        LayerContract { name: "damaged", file: &bytes, open: &open, expected: &expected, below: None }
            .check();
    }
    let mut bytes = sound;
    bytes[100] ^= 1;
    bytes[end + 100] ^= 1;
    let error = open(memory(&bytes)).unwrap_err();
    assert_eq!((error.kind(), error.field()), (ErrorKind::Corrupt, Some("checksum")));
}

#[test]
fn a_guest_forges_no_header() {
    // A dynamic disk written to the first sectors of a fixed one: QEMU opens that.
    let dynamic = new(64 << 20, Subformat::Dynamic, true);
    let mut bytes = new(1 << 20, Subformat::Fixed, true);
    bytes[..dynamic.len()].copy_from_slice(&dynamic);
    let expected = bytes[..1 << 20].to_vec();
    assert!(read(vec![open(memory(&bytes)).unwrap()]).unwrap() == expected);
    // A fixed disk that was cut off.
    let error = open(memory(&new(1 << 20, Subformat::Fixed, true)[..1 << 20])).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidHeader);
}

#[test]
fn damage_is_named_where_it_is_met() {
    let (sound, _) = filled();
    let with = |at: usize, field: &[u8]| {
        let mut bytes = sound.clone();
        bytes[at..at + field.len()].copy_from_slice(field);
        bytes
    };
    // In the footer, the header, the BAT, behind the end of the file.
    for entry in [0u32, 2, 3, 0x7fff_ffff] {
        let error = read(vec![open(memory(&with(1536, &entry.to_be_bytes()))).unwrap()]).unwrap_err();
        let found = (error.kind(), error.field(), error.offset());
        assert_eq!(found, (ErrorKind::Corrupt, Some("BAT entry"), Some(1536)), "{entry}");
    }
    // Two blocks that share bytes are read, and nothing is written to new blocks.
    let first: [u8; 4] = sound[1540..1544].try_into().unwrap();
    let storage = memory(&with(1536, &(u32::from_be_bytes(first) + 1).to_be_bytes()));
    let written = image(storage, true);
    written.write_at(Mem::from(&[1; 512][..]), 512).unwrap();
    let shared = with(1536, &[0xff; 4]);
    let mut shared = shared;
    shared[1540..1544]
        .copy_from_slice(&(u32::from_be_bytes(sound[1544..1548].try_into().unwrap()) + 1).to_be_bytes());
    let written = image(memory(&shared), true);
    assert_eq!(written.write_at(Mem::from(&[1; 512][..]), 0).unwrap_err().kind(), ErrorKind::Corrupt);
    let error = open(memory(&with(512, b"x"))).unwrap_err();
    assert_eq!(
        (error.kind(), error.field(), error.offset()),
        (ErrorKind::InvalidHeader, Some("cookie"), Some(512))
    );
}

#[test]
fn what_speaks_against_an_image_is_found() {
    let usual = OpenOptions::default();
    let tight = OpenOptions { max_virtual_size: 4096, max_metadata_bytes: 3, ..OpenOptions::default() };
    let dynamic = new(8 << 20, Subformat::Dynamic, true);
    let fixed = new(1 << 20, Subformat::Fixed, true);
    let mut child = forged(12, 16 << 10, DiskType::Differencing);
    let mut damaged = dynamic.clone();
    damaged[520] ^= 1;
    let cut = dynamic[..1537].to_vec();
    for (bytes, limits, expected) in [
        (&dynamic, &usual, &[][..]),
        (&dynamic, &tight, &["LIMIT", "LIMIT"]),
        (&fixed, &usual, &[]),
        (&fixed, &tight, &["LIMIT"]),
        (&child, &usual, &["BACKING_FILE"]),
        (&damaged, &usual, &["HEADER_INVALID"]),
        (&cut, &usual, &["TABLE_OUT_OF_BOUNDS"]),
    ] {
        let found = inspect(&*memory(bytes), limits).unwrap();
        let codes: Vec<_> = found.findings.iter().map(|finding| finding.code.as_str()).collect();
        assert_eq!(codes, expected);
    }
    child.truncate(2000);
    let found = inspect_bytes(&child, None, &usual);
    assert!(found.header.is_some() && found.footer.is_some());
    assert!(inspect_bytes(&fixed[..4096], None, &usual).footer.is_none());
}

#[test]
fn limits_of_the_caller_are_kept() {
    let bytes = new(8 << 20, Subformat::Dynamic, true);
    let open = |options: OpenOptions| qcow2_vpc::open(memory(&bytes), &options).map(|_| ());
    open(OpenOptions { max_virtual_size: 8 << 20, max_metadata_bytes: 16, cache_bytes: Some(0) }).unwrap();
    for options in [
        OpenOptions { max_virtual_size: (8 << 20) - 1, ..OpenOptions::default() },
        OpenOptions { max_metadata_bytes: 15, ..OpenOptions::default() },
    ] {
        assert_eq!(open(options).unwrap_err().kind(), ErrorKind::Limit);
    }
}

#[test]
fn what_a_check_finds_and_repairs() {
    let (sound, expected) = filled();
    let end = sound.len() - 512;
    let mut changed = sound.clone();
    let footer = Footer::parse(&sound[..512]).unwrap().resized(4096, Geometry::LARGEST);
    changed[end..].copy_from_slice(footer.bytes());
    let mut long = sound.clone();
    long.truncate(end);
    long.extend(vec![7; 40_000]);
    long.extend(&sound[end..]);
    let with = |at: usize| {
        let mut bytes = sound.clone();
        bytes[at] ^= 1;
        bytes
    };
    let cases: [(Vec<u8>, u64, u64, &[FindingCode]); 6] = [
        (sound.clone(), 0, 0, &[]),
        (with(100), 1, 0, &[FindingCode::Copy]),
        (with(end + 100), 1, 0, &[FindingCode::Copy]),
        (changed, 1, 0, &[FindingCode::Copy]),
        (long, 0, 3, &[FindingCode::Leak]),
        (with(1539), 1, 0, &[FindingCode::BlockShared]),
    ];
    for (bytes, corruptions, leaks, codes) in cases {
        let storage = memory(&bytes);
        let check = |repair: Option<Repair>| {
            let layer = open(Arc::clone(&storage)).unwrap();
            let layer = layer.as_checkable().unwrap();
            match repair {
                Some(repair) => layer.repair(repair, 10, &Job::new()).unwrap(),
                None => layer.check(10, &Job::new()).unwrap(),
            }
        };
        let report = check(None);
        let found: Vec<_> = report.findings.iter().map(|finding| finding.code).collect();
        assert_eq!((report.corruptions, report.leaks, &found[..]), (corruptions, leaks, codes), "{report:?}");
        assert_eq!(bytes_of(&*storage), bytes, "a check changes nothing");
        let repaired = check(Some(Repair::All));
        if codes.contains(&FindingCode::BlockShared) {
            assert_eq!((repaired.corruptions, bytes_of(&*storage) == bytes), (1, true));
            continue;
        }
        assert_eq!((repaired.corruptions_fixed, repaired.leaks_fixed), (corruptions, leaks));
        assert!(check(None).is_clean());
        assert!(bytes_of(&*storage) == sound && read(vec![open(storage).unwrap()]).unwrap() == expected);
    }
}
