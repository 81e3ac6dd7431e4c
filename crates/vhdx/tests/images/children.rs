//! Differencing images that are made and written to.

use std::sync::Arc;

use qcow2_core::check::FindingCode;
use qcow2_core::convert::{ConvertOptions, Delta};
use qcow2_core::disk::DiskOptions;
use qcow2_core::new_image::{Hosts, NewImage};
use qcow2_core::{Disk, ErrorKind, Job, Mem, MemMut, Storage};
use qcow2_engine::Image;
use qcow2_engine::convert::{ConvertTarget, convert};
use qcow2_engine::create::NewTarget;
use qcow2_testkit::contract::ChildContract;
use qcow2_testkit::disks::{bytes_of, made, read};
use qcow2_testkit::ops::stamped;
use qcow2_vhdx::{NewOptions, OpenOptions, Parent, ParentId, Subformat, Vhdx};

use crate::forge::{MIB, check, create, memory, open_disk, open_layer};

/// An image with stamped sectors, as bytes.
fn parent(sector_size: u32) -> Vec<u8> {
    let storage = memory(&[]);
    let new = NewOptions { size: 2 * MIB, block_size: MIB, sector_size, ..NewOptions::default() };
    create(&new, Arc::clone(&storage)).unwrap();
    let disk = open_disk(Arc::clone(&storage)).unwrap();
    for (offset, length) in [(0, 9 * 512), (900_096, 300_032), (1_500_160, 100_352)] {
        disk.write_at(Mem::from(&stamped(offset, length, 1_000_000)[..]), offset).unwrap();
    }
    disk.close().unwrap();
    drop(disk);
    bytes_of(&*storage)
}

fn id_of(parent: &[u8]) -> ParentId {
    let text = open_layer(memory(parent)).unwrap().content_id().unwrap();
    let id = ParentId::parse(&text).unwrap();
    assert_eq!(id.to_string(), text);
    id
}

fn child_options(parent: &[u8], name: &str) -> NewOptions {
    let id = id_of(parent);
    let parent = Some(Parent { filename: name.as_bytes().to_vec(), id });
    NewOptions { size: id.size, block_size: MIB, parent, ..NewOptions::default() }
}

fn new_child(parent: &[u8]) -> Vec<u8> {
    made(&child_options(parent, "base.vhdx").plan().unwrap())
}

fn number<const N: usize>(bytes: &[u8], at: usize) -> u64 {
    bytes[at..at + N].iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

fn utf16(text: &str) -> Vec<u8> {
    text.encode_utf16().flat_map(u16::to_le_bytes).collect()
}

/// By the fields of the published specification, read by hand: 2.6.1, 2.6.2.1, 2.6.2.6.
#[test]
fn a_new_child_is_what_the_specification_says() {
    let parent = parent(512);
    let child = new_child(&parent);
    // The second entry of the region table is the metadata's.
    let region = number::<8>(&child, (192 << 10) + 16 + 32 + 16) as usize;
    let table = &child[region..region + 65536];
    assert_eq!((&table[..8], number::<2>(table, 10)), (&b"metadata"[..], 6));
    let item = |guid: &[u8; 4]| {
        let entry =
            (32..).step_by(32).map(|at| &table[at..at + 32]).find(|entry| entry[..4] == *guid).unwrap();
        let at = region + number::<4>(entry, 16) as usize;
        (&child[at..at + number::<4>(entry, 20) as usize], number::<4>(entry, 24))
    };
    let (parameters, _) = item(&0xcaa1_6737u32.to_le_bytes());
    assert_eq!((number::<4>(parameters, 0), number::<4>(parameters, 4)), (MIB, 2));
    // A required item that is none of the disk.
    let (locator, flags) = item(&0xa8d3_5f2du32.to_le_bytes());
    assert_eq!((number::<4>(locator, 0), flags, number::<2>(locator, 18)), (0xb04a_efb7, 4, 2));
    let pair = |index: usize| {
        let entry = &locator[20 + index * 12..][..12];
        let text = |at: usize, length: usize| {
            locator[number::<4>(entry, at) as usize..][..number::<2>(entry, length) as usize].to_vec()
        };
        (text(0, 8), text(4, 10))
    };
    let found = Vhdx::open(memory(&parent), &OpenOptions::default()).unwrap();
    let linkage = format!("{{{}}}", found.header().data_write_guid);
    assert_eq!(pair(0), (utf16("parent_linkage"), utf16(&linkage)));
    assert_eq!(pair(1), (utf16("relative_path"), utf16(r".\base.vhdx")));
    let layer = open_layer(memory(&child)).unwrap();
    assert_eq!(layer.references().backing.unwrap().filename, b"./base.vhdx");
    let below = read(vec![open_layer(memory(&parent)).unwrap()]).unwrap();
    assert!(read(vec![layer, open_layer(memory(&parent)).unwrap()]).unwrap() == below);
    assert!(check(memory(&child)).unwrap().is_clean());
}

#[test]
fn what_a_child_cannot_be() {
    let parent = parent(512);
    let refused = |change: &dyn Fn(&mut NewOptions)| {
        let mut options = child_options(&parent, "base.vhdx");
        change(&mut options);
        let error = options.plan().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument);
        error.field()
    };
    assert_eq!(refused(&|options| options.subformat = Subformat::Fixed), Some("subformat"));
    assert_eq!(refused(&|options| options.size += MIB), Some("size"));
    for name in ["", "a\0b", &"x".repeat(5000)] {
        let named = |options: &mut NewOptions| *options = child_options(&parent, name);
        assert_eq!(refused(&named), Some("backing_file"));
    }
    if cfg!(unix) {
        assert_eq!(refused(&|options| *options = child_options(&parent, r"a\b")), Some("backing_file"));
        let child = made(&child_options(&parent, "/disks/base.vhdx").plan().unwrap());
        let backing = open_layer(memory(&child)).unwrap().references().backing.unwrap();
        assert_eq!(backing.filename, b"/disks/base.vhdx");
    }
}

/// Sectors of both sizes.
#[test]
fn children_keep_the_contract_of_children() {
    let sound = |storage: Arc<dyn Storage>| {
        let report = check(storage).unwrap();
        let left = |code: FindingCode| matches!(code, FindingCode::NotClosed | FindingCode::Copy);
        assert!(report.findings.iter().all(|finding| left(finding.code)), "{report:?}");
    };
    let parent = parent(512);
    let child = new_child(&parent);
    let open = |storage| open_layer(storage);
    ChildContract { name: "vhdx", child: &child, parent: &parent, open: &open, unit: 65536, sound: &sound }
        .check();
}

/// A write leaves what is around it the parent's, also in sectors of 4096 bytes; the parent is another one once it was written to.
#[test]
fn a_child_is_written_to() {
    for sector_size in [512, 4096] {
        let parent = parent(sector_size);
        let storage = memory(&new_child(&parent));
        let guid = |storage: &Arc<dyn Storage>| {
            Vhdx::open(Arc::clone(storage), &OpenOptions::default()).unwrap().header().data_write_guid
        };
        let before = guid(&storage);
        let mut top = open_layer(Arc::clone(&storage)).unwrap();
        top.make_writable(DiskOptions::default()).unwrap();
        let disk = Image::new(vec![top, open_layer(memory(&parent)).unwrap()]).unwrap();
        let mut expected = read(vec![open_layer(memory(&parent)).unwrap()]).unwrap();
        for (at, length) in [(100, 3000), (5000, 1), (1_000_000, 200_000), (2 * MIB - 512, 512)] {
            disk.write_at(Mem::from(&vec![7; length][..]), at).unwrap();
            expected[at as usize..at as usize + length].fill(7);
        }
        assert_eq!(disk.grow(4 * MIB).unwrap_err().kind(), ErrorKind::UnsupportedFeature);
        disk.close().unwrap();
        drop(disk);
        assert_ne!(guid(&storage), before);
        let layers = || vec![open_layer(Arc::clone(&storage)).unwrap(), open_layer(memory(&parent)).unwrap()];
        assert!(read(layers()).unwrap() == expected, "{sector_size}");
        let report = check(Arc::clone(&storage)).unwrap();
        assert_eq!((report.is_clean(), report.allocated_clusters), (true, 2));
        let changed = memory(&parent);
        let below = open_disk(Arc::clone(&changed)).unwrap();
        below.write_at(Mem::from(&[1; 512][..]), 0).unwrap();
        below.close().unwrap();
        drop(below);
        let layers = vec![open_layer(Arc::clone(&storage)).unwrap(), open_layer(changed).unwrap()];
        assert_eq!(read(layers).unwrap_err().kind(), ErrorKind::Chain);
    }
}

/// Only blocks that differ are in the new image.
#[test]
fn a_disk_is_converted_onto_a_parent() {
    let parent = parent(512);
    let child = memory(&new_child(&parent));
    let mut top = open_layer(child).unwrap();
    top.make_writable(DiskOptions::default()).unwrap();
    let source = Image::new(vec![top, open_layer(memory(&parent)).unwrap()]).unwrap();
    source.write_at(Mem::from(&[9; 1000][..]), MIB).unwrap();
    let mut expected = vec![0; 2 << 20];
    source.read_at(MemMut::from(&mut expected[..]), 0).unwrap();
    let copy = memory(&[]);
    let image: Arc<dyn NewImage> = Arc::new(child_options(&parent, "base.vhdx").plan().unwrap());
    let target = ConvertTarget::New(NewTarget::Format { image, hosts: Hosts::from(Arc::clone(&copy)) });
    let delta = Some(Delta { layers: 1, base_size: source.virtual_size() });
    convert(&source, target, &ConvertOptions { delta, ..ConvertOptions::default() }, &Job::new()).unwrap();
    let report = check(Arc::clone(&copy)).unwrap();
    assert_eq!((report.is_clean(), report.allocated_clusters), (true, 1));
    assert!(read(vec![open_layer(copy).unwrap(), open_layer(memory(&parent)).unwrap()]).unwrap() == expected);
}
