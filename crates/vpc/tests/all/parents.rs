//! Differencing disks.

use std::sync::Arc;

use qcow2_core::disk::DiskOptions;
use qcow2_core::layer::SegmentKind;
use qcow2_core::{Chain, ErrorKind, Layer, Mem, MemMut};
use qcow2_vpc::structures::{DiskType, Header};

use crate::support::{bytes_of, disk, forged, image, memory, open, read};

const BLOCK: u32 = 16 << 10;
const BLOCKS: u32 = 12;

/// The child's header with a name of its parent, and with locators: platform, and the name's bytes, which lie from `at` on.
fn with_names(bytes: &mut Vec<u8>, name: &str, locators: &[(&[u8; 4], Vec<u8>)]) {
    let mut header = bytes[512..1536].to_vec();
    for (index, unit) in name.encode_utf16().enumerate() {
        header[64 + index * 2..][..2].copy_from_slice(&unit.to_be_bytes());
    }
    let footer = bytes.split_off(bytes.len() - 512);
    for (index, (platform, name)) in locators.iter().enumerate() {
        let entry = &mut header[576 + index * 24..][..24];
        entry[..4].copy_from_slice(*platform);
        entry[4..8].copy_from_slice(&512u32.to_be_bytes());
        entry[8..12].copy_from_slice(&(name.len() as u32).to_be_bytes());
        entry[16..24].copy_from_slice(&(bytes.len() as u64).to_be_bytes());
        bytes.extend(name);
        bytes.resize(bytes.len().next_multiple_of(512), 0);
    }
    header[36..40].fill(0);
    let sum = !header.iter().map(|byte| u32::from(*byte)).sum::<u32>();
    header[36..40].copy_from_slice(&sum.to_be_bytes());
    Header::parse(&header).unwrap();
    bytes[512..1536].copy_from_slice(&header);
    bytes.extend(footer);
}

/// A parent with data, and a child of it with two blocks, in each of which every third sector is there.
fn family() -> (Vec<u8>, Vec<u8>, Vec<u8>, Vec<u8>) {
    let size = u64::from(BLOCK * BLOCKS);
    let storage = memory(&forged(BLOCKS, BLOCK, DiskType::Dynamic));
    let below = disk(size, 7);
    let written = image(Arc::clone(&storage), true);
    written.write_at(Mem::from(&below[..]), 0).unwrap();
    written.close().unwrap();
    let mut child = forged(BLOCKS, BLOCK, DiskType::Differencing);
    let mut header = child[512..1536].to_vec();
    header[40..56].fill(1);
    child[512..1536].copy_from_slice(&header);
    with_names(&mut child, "base.vhd", &[]);
    let mut expected = below.clone();
    let footer = child.split_off(child.len() - 512);
    for (index, byte) in [(2usize, 0xaau8), (5, 0xbb)] {
        let sector = (child.len() / 512) as u32;
        child[1536 + index * 4..][..4].copy_from_slice(&sector.to_be_bytes());
        let mut bitmap = vec![0u8; 512];
        for sector in (0..BLOCK as usize / 512).step_by(3) {
            bitmap[sector / 8] |= 0x80 >> (sector % 8);
            let at = index * BLOCK as usize + sector * 512;
            expected[at..at + 512].fill(byte);
        }
        child.extend(bitmap);
        child.extend(vec![byte; BLOCK as usize]);
    }
    child.extend(footer);
    (bytes_of(&*storage), child, below, expected)
}

#[test]
fn a_child_is_read_with_its_parent_and_with_nothing_else() {
    let (parent, child, below, expected) = family();
    let layers = || vec![open(memory(&child)).unwrap(), open(memory(&parent)).unwrap()];
    assert!(read(layers()).unwrap() == expected);
    let error = read(vec![open(memory(&child)).unwrap()]).unwrap_err();
    assert_eq!((error.kind(), error.field()), (ErrorKind::UnsupportedFeature, Some("parent_unique_id")));
    let raw: Box<dyn Layer> = Box::new(qcow2_core::Raw::new(memory(&below)).unwrap());
    assert_eq!(read(vec![open(memory(&child)).unwrap(), raw]).unwrap_err().kind(), ErrorKind::Chain);
    // Another image with the same disk: its UUID is another one.
    let mut other = forged(BLOCKS, BLOCK, DiskType::Dynamic);
    let end = other.len() - 512;
    for at in [0, end] {
        other[at + 68..at + 84].fill(2);
        other[at + 64..at + 68].fill(0);
        let sum = !other[at..at + 512].iter().map(|byte| u32::from(*byte)).sum::<u32>();
        other[at + 64..at + 68].copy_from_slice(&sum.to_be_bytes());
    }
    let error = read(vec![open(memory(&child)).unwrap(), open(memory(&other)).unwrap()]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Chain);
    let mut layer = open(memory(&child)).unwrap();
    let error = layer.make_writable(DiskOptions::default()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::UnsupportedFeature);
}

#[test]
fn plans_of_a_child_have_no_gaps() {
    let (parent, child, _, expected) = family();
    let layer = open(memory(&child)).unwrap();
    for range in [0..expected.len() as u64, 33_000..33_001, 33_791..34_305, 80_000..100_000] {
        let (mut at, mut segments) = (range.start, Vec::new());
        layer.plan(range.clone(), &mut segments).unwrap();
        for segment in segments {
            assert_eq!(segment.start, at);
            at += segment.length;
            let mut bytes = vec![0; segment.length as usize];
            if let SegmentKind::Data(_) = segment.kind {
                layer.read_segment(&segment, MemMut::from(&mut bytes[..])).unwrap();
                assert!(bytes == expected[segment.start as usize..at as usize], "{segment:?}");
            }
        }
        assert_eq!(at, range.end);
    }
    let chain = Chain::new(vec![layer, open(memory(&parent)).unwrap()]).unwrap();
    for start in (0..expected.len() - 5000).step_by(3333) {
        let mut bytes = vec![0; 5000];
        chain.read_at(MemMut::from(&mut bytes[..]), start as u64).unwrap();
        assert!(bytes == expected[start..start + 5000], "{start}");
    }
}

fn utf16(name: &str) -> Vec<u8> {
    name.encode_utf16().flat_map(u16::to_le_bytes).collect()
}

#[test]
fn names_of_parents() {
    let relative = || (b"W2ru", utf16(r"..\images\base.vhd"));
    let absolute = || (b"W2ku", utf16(r"C:\images\absolute.vhd"));
    for (name, locators, expected) in [
        ("stored.vhd", vec![], Some("stored.vhd")),
        (r"D:\x\stored.vhd", vec![], Some("stored.vhd")),
        ("stored.vhd", vec![absolute()], Some("absolute.vhd")),
        ("stored.vhd", vec![absolute(), relative()], Some("../images/base.vhd")),
        ("stored.vhd", vec![relative(), absolute()], Some("../images/base.vhd")),
        ("", vec![(b"MacX", b"file://./base.vhd\0".to_vec())], Some("./base.vhd")),
        ("", vec![(b"W2ru", vec![0, 0xd8, 1, 0])], None),
        ("", vec![], None),
    ] {
        let mut child = forged(BLOCKS, BLOCK, DiskType::Differencing);
        with_names(&mut child, name, &locators);
        let backing = open(memory(&child)).unwrap().references().backing;
        let found = backing.map(|backing| String::from_utf8(backing.filename).unwrap());
        assert_eq!(found.as_deref(), expected, "{name} {locators:?}");
    }
}
