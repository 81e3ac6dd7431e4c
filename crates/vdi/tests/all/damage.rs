//! Damaged images, and differencing ones.

use std::sync::Arc;

use qcow2_core::check::Repair;
use qcow2_core::disk::DiskOptions;
use qcow2_core::{ErrorKind, Job, Layer, Mem};
use qcow2_testkit::contract::LayerContract;
use qcow2_testkit::{Fixture, Qemu};
use qcow2_vdi::OpenOptions;

use crate::support::{bytes_of, disk, forged, image, memory, new, open, read};

/// The empty image of 3 blocks with other entries, each a block's.
fn with_map(entries: &[u32], allocated: u32, blocks: usize) -> Vec<u8> {
    let mut bytes = new(3 << 20, false);
    for (index, entry) in entries.iter().enumerate() {
        bytes[512 + index * 4..][..4].copy_from_slice(&entry.to_le_bytes());
    }
    bytes[0x184..0x188].copy_from_slice(&allocated.to_le_bytes());
    bytes.resize(1024 + (blocks << 20), 7);
    bytes
}

#[test]
fn what_a_check_finds_is_what_qemu_finds() {
    let free = u32::MAX;
    let cases: [(&[u32], u32, usize, &[&str]); 6] = [
        (&[free, free, free], 0, 0, &[]),
        (&[1, 0, free], 2, 2, &[]),
        (&[0, 0, 1], 3, 2, &["block index 0 also used by 0"]),
        (&[0, 3, free], 1, 2, &["block index 1 too large, is 3"]),
        (&[0, 1, free], 1, 2, &["allocated blocks mismatch, is 2, should be 1"]),
        (
            &[7, 7, 9],
            1,
            0,
            &[
                "block index 0 too large, is 7",
                "block index 1 too large, is 7",
                "block index 2 too large, is 9",
                "allocated blocks mismatch, is 0, should be 1",
            ],
        ),
    ];
    let (qemu, fixture) = (Qemu::find(), Fixture::new());
    for (entries, allocated, blocks, expected) in cases {
        let bytes = with_map(entries, allocated, blocks);
        let layer = open(memory(&bytes)).unwrap();
        let report = layer.as_checkable().unwrap().check(10, &Job::new()).unwrap();
        let found: Vec<_> = report.findings.iter().map(|finding| finding.message.as_str()).collect();
        assert_eq!(found, expected, "{entries:?}");
        if let Some(qemu) = &qemu {
            let path = fixture.file("damaged", &bytes);
            let theirs = qemu.img(&["check", "-f", "vdi", path.to_str().unwrap()]);
            let lines: Vec<_> =
                theirs.stderr.lines().filter_map(|line| line.strip_prefix("ERROR: ")).collect();
            assert_eq!(lines, expected, "{theirs:?}");
        }
    }
    // QEMU does not look where the file ends.
    let layer = open(memory(&with_map(&[2, free, free], 1, 1))).unwrap();
    let check = layer.as_checkable().unwrap();
    let report = check.check(10, &Job::new()).unwrap();
    assert_eq!((report.corruptions, report.findings[0].offset), (1, Some(512)));
    let error = check.repair(Repair::All, 10, &Job::new()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::UnsupportedFeature);
}

#[test]
fn damage_is_named_where_it_is_met() {
    let free = u32::MAX;
    let bytes = with_map(&[0, 5, free], 1, 1);
    let error = read(vec![open(memory(&bytes)).unwrap()]).unwrap_err();
    assert_eq!(
        (error.kind(), error.field(), error.offset()),
        (ErrorKind::Corrupt, Some("block map entry"), Some(516))
    );
    // Nothing is written where that could hit another block.
    for entries in [[0, 5, free], [0, 0, free]] {
        let storage = memory(&with_map(&entries, 1, 1));
        let written = image(Arc::clone(&storage), true);
        let error = written.write_at(Mem::from(&[1; 512][..]), 2 << 20).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        written.write_at(Mem::from(&[1; 512][..]), 512).unwrap();
    }
    let cut = &new(3 << 20, false)[..515];
    let error = open(memory(cut)).unwrap_err();
    assert_eq!((error.kind(), error.field()), (ErrorKind::Corrupt, Some("block map entry")));
}

#[test]
fn limits_of_the_caller_are_kept() {
    let bytes = new(3 << 20, false);
    let open = |options: OpenOptions| qcow2_vdi::open(memory(&bytes), &options).map(|_| ());
    open(OpenOptions { max_virtual_size: 3 << 20, max_metadata_bytes: 12, cache_bytes: Some(0) }).unwrap();
    for options in [
        OpenOptions { max_virtual_size: (3 << 20) - 1, ..OpenOptions::default() },
        OpenOptions { max_metadata_bytes: 11, ..OpenOptions::default() },
    ] {
        assert_eq!(open(options).unwrap_err().kind(), ErrorKind::Limit);
    }
}

/// A parent with data, and a child of it with some blocks, one of them discarded.
fn family() -> (Vec<u8>, Vec<u8>, Vec<u8>) {
    let (blocks, block) = (20, 4096);
    let storage = memory(&forged(blocks, block, 0));
    let size = u64::from(blocks * block);
    let below = disk(size, 9);
    let written = image(Arc::clone(&storage), true);
    written.write_at(Mem::from(&below[..]), 0).unwrap();
    written.close().unwrap();
    let parent = bytes_of(&*storage);
    let mut child = forged(blocks, block, 0);
    child[0x4c] = 4;
    child[0x188..0x198].fill(8);
    child[0x1a8..0x1b8].fill(1);
    child[0x1b8..0x1c8].fill(2);
    child[512 + 4 * 3..][..4].copy_from_slice(&1u32.to_le_bytes());
    child[512 + 4 * 5..][..4].copy_from_slice(&0u32.to_le_bytes());
    child[512 + 4 * 6..][..4].copy_from_slice(&0xffff_fffe_u32.to_le_bytes());
    child[0x184] = 2;
    child.extend(vec![0xaa; 4096]);
    child.extend(vec![0xbb; 4096]);
    (parent, child, below)
}

#[test]
fn a_child_is_read_with_its_parent_and_with_nothing_else() {
    let (parent, child, below) = family();
    let mut expected = below.clone();
    expected[3 * 4096..4 * 4096].fill(0xbb);
    expected[5 * 4096..6 * 4096].fill(0xaa);
    expected[6 * 4096..7 * 4096].fill(0);
    let layers = || vec![open(memory(&child)).unwrap(), open(memory(&parent)).unwrap()];
    assert!(read(layers()).unwrap() == expected);
    let error = read(vec![open(memory(&child)).unwrap()]).unwrap_err();
    assert_eq!((error.kind(), error.field()), (ErrorKind::UnsupportedFeature, Some("uuid_link")));
    assert!(error.message().contains("01010101-0101-0101-0101-010101010101"), "{error}");
    // Another image, the parent after a change, and what is no VDI image.
    for at in [0x188, 0x198] {
        let mut other = parent.clone();
        other[at] = 9;
        let error = read(vec![open(memory(&child)).unwrap(), open(memory(&other)).unwrap()]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Chain);
    }
    let raw: Box<dyn Layer> = Box::new(qcow2_core::Raw::new(memory(&below)).unwrap());
    assert_eq!(read(vec![open(memory(&child)).unwrap(), raw]).unwrap_err().kind(), ErrorKind::Chain);
    let mut layer = open(memory(&child)).unwrap();
    let error = layer.make_writable(DiskOptions::default()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::UnsupportedFeature);
}

#[test]
fn files_that_are_cut_off_anywhere() {
    let storage = memory(&forged(20, 4096, 0));
    let written = image(Arc::clone(&storage), true);
    let expected = disk(20 * 4096, 3);
    written.write_at(Mem::from(&expected[..]), 0).unwrap();
    written.close().unwrap();
    let file = bytes_of(&*storage);
    LayerContract { name: "cut", file: &file, open: &open, expected: &expected, below: None }.check();
}
