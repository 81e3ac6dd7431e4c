//! Differencing disks.

use std::sync::Arc;

use qcow2_core::check::{Finding, FindingCode};
use qcow2_core::convert::{ConvertOptions, Delta};
use qcow2_core::disk::DiskOptions;
use qcow2_core::layer::SegmentKind;
use qcow2_core::new_image::Hosts;
use qcow2_core::space::Preallocation;
use qcow2_core::{Chain, Disk, ErrorKind, Job, Layer, Mem, MemMut, Storage};
use qcow2_engine::Image;
use qcow2_engine::convert::{ConvertTarget, convert};
use qcow2_engine::create::NewTarget;
use qcow2_testkit::contract::ChildContract;
use qcow2_testkit::disks::made;
use qcow2_testkit::ops::stamped;
use qcow2_vpc::structures::{DiskType, Footer, Header};
use qcow2_vpc::{NewOptions, Parent, ParentId, Subformat, new_vpc};

use crate::support::{bytes_of, disk, forged, image, memory, new, open, read};

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
    // Alone, as a layer: what the parent has is not there.
    let alone = read(vec![open(memory(&child)).unwrap()]).unwrap();
    assert!(alone[2 * BLOCK as usize..][..1024] == [[0xaa; 512], [0; 512]].concat());
    // One that does not say where its parent is cannot be meant to be read so.
    let nameless = forged(BLOCKS, BLOCK, DiskType::Differencing);
    let error = read(vec![open(memory(&nameless)).unwrap()]).unwrap_err();
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
}

/// The number of `N` bytes at an offset, as the specification has them.
fn big<const N: usize>(bytes: &[u8], at: usize) -> u64 {
    bytes[at..at + N].iter().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

fn parent_of(bytes: &[u8], filename: &str, changed: u32) -> Parent {
    let footer = Footer::parse(&bytes[bytes.len() - 512..]).unwrap();
    Parent { filename: filename.as_bytes().to_vec(), id: ParentId::of(&footer), changed }
}

fn child_options(parent: Parent) -> NewOptions {
    NewOptions { size: parent.id.size, parent: Some(parent), ..NewOptions::default() }
}

/// By the fields of the published specification, read by hand.
#[test]
fn a_new_child_is_what_the_specification_says() {
    for (kind, force_size) in [(Subformat::Dynamic, false), (Subformat::Fixed, true)] {
        let parent = new(10 << 20, kind, force_size);
        let child =
            made(&*new_vpc(child_options(parent_of(&parent, "images/base.vhd", 900_000_000))).unwrap());
        let (footer, of_parent) = (&child[child.len() - 512..], &parent[parent.len() - 512..]);
        assert_eq!((&child[..512], &footer[..8]), (footer, &b"conectix"[..]));
        assert_eq!((big::<4>(footer, 60), big::<8>(footer, 16)), (4, 512));
        // The size that counts, and the geometry, are the parent's; the UUID is not.
        let size = open(memory(&parent)).unwrap().virtual_size();
        assert_eq!((big::<8>(footer, 48), &footer[56..60]), (size, &of_parent[56..60]));
        assert_ne!(footer[68..84], of_parent[68..84]);
        let header = &child[512..1536];
        assert_eq!(&header[..8], b"cxsparse");
        assert_eq!((&header[40..56], big::<4>(header, 56)), (&of_parent[68..84], 900_000_000));
        let name: Vec<u8> = "base.vhd".encode_utf16().flat_map(u16::to_be_bytes).chain([0, 0]).collect();
        assert_eq!(header[64..64 + name.len()], name);
        let (locator, place) = (&header[576..600], big::<8>(header, 592) as usize);
        assert_eq!(&locator[..4], b"W2ru");
        let located = utf16(r".\images\base.vhd");
        assert_eq!((big::<4>(locator, 4), big::<4>(locator, 8)), (512, located.len() as u64));
        assert_eq!(child[place..place + located.len()], located);
        assert!(header[600..].iter().all(|byte| *byte == 0));
        // A BAT behind the name, with no block.
        let table = big::<8>(header, 16) as usize;
        let entries = big::<4>(header, 28);
        assert!(table >= place + 512 && entries == size.div_ceil(2 << 20));
        assert!(child[table..child.len() - 512].iter().all(|byte| *byte == 0xff));
        assert_eq!(child.len(), table + 512 + 512);
        let found = read(vec![open(memory(&child)).unwrap(), open(memory(&parent)).unwrap()]).unwrap();
        assert_eq!(found.len() as u64, size);
        let backing = open(memory(&child)).unwrap().references().backing.unwrap();
        assert_eq!(String::from_utf8(backing.filename).unwrap(), "./images/base.vhd");
    }
}

#[test]
fn names_that_are_stored() {
    let parent = new(3 << 20, Subformat::Dynamic, true);
    let stored = |name: &str| {
        let child = made(&*new_vpc(child_options(parent_of(&parent, name, 0)))?);
        let backing = open(memory(&child)).unwrap().references().backing.unwrap();
        Ok::<_, qcow2_core::Error>(String::from_utf8(backing.filename).unwrap())
    };
    assert_eq!(stored("../base.vhd").unwrap(), "../base.vhd");
    assert_eq!(stored("b\u{e4}se \u{1f4be}.vhd").unwrap(), "./b\u{e4}se \u{1f4be}.vhd");
    if cfg!(unix) {
        assert_eq!(stored("/disks/base.vhd").unwrap(), "/disks/base.vhd");
        assert_eq!(stored(r"a\b").unwrap_err().kind(), ErrorKind::InvalidArgument);
    }
    for name in ["", "a\0b", &"x".repeat(256), &"x/".repeat(1500)] {
        let error = stored(name).unwrap_err();
        assert_eq!((error.kind(), error.field()), (ErrorKind::InvalidArgument, Some("backing_file")));
    }
    let mut raw = parent_of(&parent, "x", 0);
    raw.filename = vec![0xff];
    assert_eq!(new_vpc(child_options(raw)).unwrap_err().field(), Some("backing_file"));
}

#[test]
fn what_a_child_cannot_be() {
    let parent = new(3 << 20, Subformat::Dynamic, true);
    let refused = |change: &dyn Fn(&mut NewOptions)| {
        let mut options = child_options(parent_of(&parent, "base.vhd", 0));
        change(&mut options);
        new_vpc(options).unwrap_err().field()
    };
    assert_eq!(refused(&|options| options.subformat = Subformat::Fixed), Some("subformat"));
    assert_eq!(refused(&|options| options.preallocation = Preallocation::Full), Some("preallocation"));
    assert_eq!(refused(&|options| options.size += 512), Some("size"));
}

#[test]
fn a_parent_that_was_made_later_is_another_one() {
    let parent = new(3 << 20, Subformat::Dynamic, true);
    let judged = |changed: u32| {
        let child = made(&*new_vpc(child_options(parent_of(&parent, "base.vhd", changed))).unwrap());
        read(vec![open(memory(&child)).unwrap(), open(memory(&parent)).unwrap()]).map(|_| ())
    };
    let made_at = parent_of(&parent, "", 0).id.time_stamp;
    for sound in [0, made_at, made_at - 3600, u32::MAX] {
        judged(sound).unwrap();
    }
    let error = judged(made_at - 100_000).unwrap_err();
    assert_eq!((error.kind(), error.field()), (ErrorKind::Chain, Some("parent_time_stamp")));
}

/// A parent with stamped sectors, and a child of it.
#[test]
fn children_keep_the_contract_of_children() {
    let sound = |storage: Arc<dyn Storage>| {
        let layer = open(storage).unwrap();
        let report = layer.as_checkable().unwrap().check(10, &Job::new()).unwrap();
        let harmless = |finding: &Finding| matches!(finding.code, FindingCode::Copy | FindingCode::Leak);
        assert!(report.findings.iter().all(harmless), "{report:?}");
    };
    let storage = memory(&forged(24, 4096, DiskType::Dynamic));
    let disk = image(Arc::clone(&storage), true);
    for (offset, length) in [(0, 9 * 512), (20_480, 4096), (50_176, 30_720)] {
        disk.write_at(Mem::from(&stamped(offset, length, 1_000_000)[..]), offset).unwrap();
    }
    disk.close().unwrap();
    let parent = bytes_of(&*storage);
    let mut child = forged(24, 4096, DiskType::Differencing);
    let id = parent[68..84].to_vec();
    child[552..568].copy_from_slice(&id);
    with_names(&mut child, "base.vhd", &[(b"W2ru", utf16("base.vhd"))]);
    ChildContract { name: "vpc", child: &child, parent: &parent, open: &open, unit: 4096, sound: &sound }
        .check();
}

/// Names lie behind the table, where new blocks could be.
#[test]
fn names_of_parents_are_not_written_over() {
    let (parent, _, below, _) = family();
    let mut child = forged(BLOCKS, BLOCK, DiskType::Differencing);
    child[552..568].fill(1);
    let names = [(b"W2ku", utf16(r"C:\images\base.vhd")), (b"W2ru", utf16(r".\base.vhd"))];
    with_names(&mut child, "base.vhd", &names);
    let storage = memory(&child);
    let mut top = open(Arc::clone(&storage)).unwrap();
    top.make_writable(DiskOptions::default()).unwrap();
    let disk = Image::new(vec![top, open(memory(&parent)).unwrap()]).unwrap();
    let mut expected = below;
    for at in (0..expected.len() - 3000).step_by(7001) {
        disk.write_at(Mem::from(&[at as u8; 3000][..]), at as u64).unwrap();
        expected[at..at + 3000].fill(at as u8);
    }
    let error = disk.grow(u64::from(BLOCK * BLOCKS) + 512).unwrap_err();
    assert_eq!((error.kind(), error.field()), (ErrorKind::UnsupportedFeature, Some("size")));
    disk.close().unwrap();
    drop(disk);
    let child = bytes_of(&*storage);
    let layer = open(memory(&child)).unwrap();
    assert_eq!(layer.references().backing.unwrap().filename, b"./base.vhd");
    assert!(layer.as_checkable().unwrap().check(9, &Job::new()).unwrap().is_clean());
    assert!(read(vec![layer, open(memory(&parent)).unwrap()]).unwrap() == expected);
}

/// Only what differs is in the new image, and what the base has shows through.
#[test]
fn a_disk_is_converted_onto_a_parent() {
    let parent = new(9 << 20, Subformat::Dynamic, true);
    let storage = memory(&parent);
    let disk = image(Arc::clone(&storage), true);
    disk.write_at(Mem::from(&[7; 3 << 20][..]), 1 << 20).unwrap();
    disk.close().unwrap();
    let parent = bytes_of(&*storage);
    let child = memory(&made(&*new_vpc(child_options(parent_of(&parent, "base.vhd", 0))).unwrap()));
    let mut top = open(Arc::clone(&child)).unwrap();
    top.make_writable(DiskOptions::default()).unwrap();
    let source = Image::new(vec![top, open(memory(&parent)).unwrap()]).unwrap();
    source.write_at(Mem::from(&[9; 1000][..]), 5 << 20).unwrap();
    source.write_zeroes(2 << 20, 5000, true).unwrap();
    let mut expected = vec![0; 9 << 20];
    source.read_at(MemMut::from(&mut expected[..]), 0).unwrap();
    let copy = memory(b"");
    let image = new_vpc(child_options(parent_of(&parent, "base.vhd", 0))).unwrap();
    let target = ConvertTarget::New(NewTarget::Format { image, hosts: Hosts::from(Arc::clone(&copy)) });
    let delta = Some(Delta { layers: 1, base_size: 9 << 20 });
    convert(&source, target, &ConvertOptions { delta, ..ConvertOptions::default() }, &Job::new()).unwrap();
    let layers = vec![open(Arc::clone(&copy)).unwrap(), open(memory(&parent)).unwrap()];
    assert!(read(layers).unwrap() == expected);
    // Two blocks of five.
    let report = open(copy).unwrap().as_checkable().unwrap().check(9, &Job::new()).unwrap();
    assert_eq!((report.is_clean(), report.allocated_clusters), (true, 2));
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
