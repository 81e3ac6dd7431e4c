//! Damaged images, and differencing ones.

use std::sync::Arc;

use qcow2_core::check::{FindingCode, Repair};
use qcow2_core::space::Preallocation;
use qcow2_core::storage::{Access, FileStorage};
use qcow2_core::{ErrorKind, Job, Layer, Mem, Storage};
use qcow2_testkit::contract::{ChildContract, LayerContract};
use qcow2_testkit::crash::{Durability, Session};
use qcow2_testkit::disks::made;
use qcow2_testkit::ops::stamped;
use qcow2_testkit::recorder::RecordingStorage;
use qcow2_testkit::{Fixture, Qemu, Sparse};
use qcow2_vdi::structures::Header;
use qcow2_vdi::{NewVdi, OpenOptions, ParentId};

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
    // Of leaks there are none.
    let report = check.repair(Repair::Leaks, 10, &Job::new()).unwrap();
    assert_eq!((report.corruptions, report.corruptions_fixed), (1, 0));
}

/// What a repair leaves has no damage, every block that was there its bytes, and takes requests.
#[test]
fn what_a_repair_leaves() {
    let free = u32::MAX;
    let cases: [(&[u32], u32, usize, &[u32]); 7] = [
        (&[0, 1, free], 1, 2, &[0, 1, free]),
        (&[0, 0, 1], 3, 2, &[0, 2, 1]),
        (&[0, 0, 0], 3, 1, &[0, 1, 2]),
        (&[2, 3, free], 1, 3, &[0, free, free]),
        (&[7, 7, 9], 1, 0, &[free, free, free]),
        // Places that nothing refers to: the last blocks go there.
        (&[2, free, 1], 3, 3, &[0, free, 1]),
        (&[2, 2, 0xffff_fffe], 9, 3, &[1, 0, 0xffff_fffe]),
    ];
    let (qemu, fixture) = (Qemu::find(), Fixture::new());
    for (entries, allocated, blocks, expected) in cases {
        let mut bytes = with_map(entries, allocated, blocks);
        for number in 0..blocks {
            bytes[1024 + (number << 20)..][..1 << 20].fill(number as u8 + 1);
        }
        let storage = memory(&bytes);
        let layer = open(Arc::clone(&storage)).unwrap();
        let check = layer.as_checkable().unwrap();
        let before = check.check(10, &Job::new()).unwrap();
        let report = check.repair(Repair::All, 10, &Job::new()).unwrap();
        assert_eq!((report.corruptions, report.corruptions_fixed), (0, before.corruptions), "{entries:?}");
        let repaired = bytes_of(&*storage);
        let map = |bytes: &[u8]| -> Vec<u32> {
            bytes[512..524].as_chunks::<4>().0.iter().map(|entry| u32::from_le_bytes(*entry)).collect()
        };
        assert_eq!(map(&repaired), expected, "{entries:?}");
        let places = expected.iter().filter(|entry| **entry < 3).count();
        assert_eq!((repaired[0x184], repaired.len()), (places as u8, 1024 + (places << 20)), "{entries:?}");
        let report = open(memory(&repaired)).unwrap().as_checkable().unwrap().check(10, &Job::new()).unwrap();
        assert!(report.is_clean(), "{entries:?}: {report:?}");
        let found = read(vec![open(memory(&repaired)).unwrap()]).unwrap();
        for (block, entry) in entries.iter().enumerate() {
            let byte = if (*entry as usize) < blocks { *entry as u8 + 1 } else { 0 };
            assert!(found[block << 20..][..1 << 20].iter().all(|found| *found == byte), "{entries:?}");
        }
        let disk = image(memory(&repaired), true);
        disk.write_at(Mem::from(&[9; 3 << 20][..]), 0).unwrap();
        disk.close().unwrap();
        if let Some(qemu) = &qemu {
            let path = fixture.file("repaired", &repaired);
            assert!(qemu.guest_bytes(&path, "vdi", &[]) == found, "{entries:?}");
            let theirs = qemu.img(&["check", "-f", "vdi", path.to_str().unwrap()]);
            assert!(theirs.stderr.is_empty(), "{theirs:?}");
        }
    }
    let path = fixture.file("read-only", &with_map(&[0, 0, 1], 3, 2));
    let layer = open(Arc::new(FileStorage::open(&path, Access::ReadOnly).unwrap())).unwrap();
    let error = layer.as_checkable().unwrap().repair(Repair::All, 10, &Job::new()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ReadOnly);
}

/// What each block of a damaged image reads as; `None` for one that nothing in the file has.
fn blocks_of(storage: Arc<dyn Storage>) -> Vec<Option<Vec<u8>>> {
    let image = image(storage, false);
    let blocks = 0..image.virtual_size() / 4096;
    let read = |block| {
        let mut found = vec![0; 4096];
        image.read_at(qcow2_core::MemMut::from(&mut found[..]), block * 4096).ok().map(|()| found)
    };
    blocks.map(read).collect()
}

#[test]
fn a_repair_that_the_power_ends_is_mended_by_another_one() {
    let free = u32::MAX;
    // Places behind the header's count, shared ones, one that is in no file, one too large for the image; more entries than the count.
    for (entries, count) in [
        ([9, 0, 7, 0, 14, 99, free, 7], 2),
        ([0, 1, 2, 3, 4, 5, 6, 6], 16),
        ([11, 10, 9, 8, free, free, free, 0], 9),
    ] {
        let mut bytes = forged(16, 4096, 0);
        for (index, entry) in entries.iter().enumerate() {
            bytes[512 + 4 * index..][..4].copy_from_slice(&u32::to_le_bytes(*entry));
        }
        bytes[0x184..0x188].copy_from_slice(&u32::to_le_bytes(count));
        for place in 0..12 {
            bytes.extend(stamped(place * 4096, 4096, 1_000_000));
        }
        let before = blocks_of(memory(&bytes));
        let mut file = Sparse::new(bytes.len() as u64);
        file.write(0, &bytes);
        let (mut session, files) = Session::new(vec![file], Durability::Flush);
        let mend = |storage: Arc<dyn Storage>| {
            open(storage).unwrap().as_checkable().unwrap().repair(Repair::All, 50, &Job::new()).unwrap()
        };
        assert!(mend(files[0].clone()).corruptions_fixed > 0);
        let mut states = 0;
        for state in session.states(7, 400) {
            let what = format!("{entries:?}, cut {}, {:?}", state.cut, state.shape);
            let host: Arc<dyn Storage> = Arc::new(RecordingStorage::plain(state.files[0].clone()));
            for round in 0..2 {
                for (block, (was, is)) in before.iter().zip(blocks_of(Arc::clone(&host))).enumerate() {
                    // A block that the file did not have is zero when that is mended.
                    let zero = was.is_none() && is.as_deref().is_none_or(|found| found == [0; 4096]);
                    assert!(zero || *was == is, "{what}: block {block}, round {round}");
                }
                mend(Arc::clone(&host));
            }
            let layer = open(Arc::clone(&host)).unwrap();
            let report = layer.as_checkable().unwrap().check(50, &Job::new()).unwrap();
            assert!(report.is_clean(), "{what}: {report:?}");
            states += 1;
        }
        assert!(states > 100, "{states}");
    }
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
    // The format has no file names.
    let backing = open(memory(&child)).unwrap().references().backing.unwrap();
    assert_eq!(backing.filename, b"uuid:01010101-0101-0101-0101-010101010101");
    // Alone, as a layer: what the parent has is not there.
    let alone = read(vec![open(memory(&child)).unwrap()]).unwrap();
    assert!(alone[..3 * 4096].iter().all(|byte| *byte == 0) && alone[3 * 4096..4 * 4096] == [0xbb; 4096]);
    // Another image, the parent after a change, and what is no VDI image.
    for at in [0x188, 0x198] {
        let mut other = parent.clone();
        other[at] = 9;
        let error = read(vec![open(memory(&child)).unwrap(), open(memory(&other)).unwrap()]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Chain);
    }
    let raw: Box<dyn Layer> = Box::new(qcow2_core::Raw::new(memory(&below)).unwrap());
    assert_eq!(read(vec![open(memory(&child)).unwrap(), raw]).unwrap_err().kind(), ErrorKind::Chain);
}

#[test]
fn a_new_child_has_the_identities_of_its_parent() {
    let parent = new((3 << 20) + 512, false);
    let id = ParentId::of(&Header::parse(&parent).unwrap());
    assert_eq!(ParentId::parse(&id.to_string()), Some(id));
    let child = made(&NewVdi::child(id.size, false, Preallocation::Off, id).unwrap());
    // As VirtualBox's header has them: the type, the UUIDs of the parent, none of them its own.
    assert_eq!((child[0x4c], &child[0x1a8..0x1c8]), (4, &parent[0x188..0x1a8]));
    assert!(child[0x188..0x198] != parent[0x188..0x198] && child[0x188..0x198] != [0; 16]);
    assert_eq!(
        read(vec![open(memory(&child)).unwrap(), open(memory(&parent)).unwrap()]).unwrap().len() as u64,
        id.size
    );
    let refused = |size, is_static, preallocation| {
        NewVdi::child(size, is_static, preallocation, id).unwrap_err().field()
    };
    assert_eq!(refused(id.size + 512, false, Preallocation::Off), Some("size"));
    assert_eq!(refused(id.size, true, Preallocation::Off), Some("static"));
    assert_eq!(refused(id.size, false, Preallocation::Full), Some("preallocation"));
}

#[test]
fn children_keep_the_contract_of_children() {
    let storage = memory(&forged(24, 4096, 512));
    let disk = image(Arc::clone(&storage), true);
    for (offset, length) in [(0, 9 * 512), (20_480, 4096), (50_176, 30_720)] {
        disk.write_at(Mem::from(&stamped(offset, length, 1_000_000)[..]), offset).unwrap();
    }
    disk.close().unwrap();
    let parent = bytes_of(&*storage);
    let mut child = forged(24, 4096, 512);
    child[0x4c] = 4;
    child[0x1a8..0x1c8].copy_from_slice(&parent[0x188..0x1a8]);
    let sound = |storage: Arc<dyn Storage>| {
        let layer = open(storage).unwrap();
        let report = layer.as_checkable().unwrap().check(10, &Job::new()).unwrap();
        // Places that nothing refers to are counted by the header.
        assert!(report.findings.iter().all(|finding| finding.code == FindingCode::Header), "{report:?}");
    };
    ChildContract { name: "vdi", child: &child, parent: &parent, open: &open, unit: 4096, sound: &sound }
        .check();
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
