//! Images whose snapshot table, bitmap directory or L1 table is damaged: the active disk is read as QEMU reads it, a check
//! finds it, and a repair leaves an image that both find clean, with everything that was whole.

#[allow(dead_code, reason = "other tests use the rest")]
use crate::damage;
#[allow(dead_code, reason = "other tests use the rest")]
use crate::repairing;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use qcow2_engine::check::Repair;
use qcow2_engine::storage::{Access, FileStorage};
use qcow2_engine::{ErrorKind, OpenOptions, Qcow2, Storage, WriteOptions};
use qcow2_testkit::{Fixture, Qemu};

use damage::{Rng, be64, image, poke};
use repairing::{disks_of, fix, look, open};

const CLUSTER: u64 = 65536;
const FAR: u64 = 1 << 40;

fn bytes(path: &Path) -> Vec<u8> {
    std::fs::read(path).unwrap()
}

fn set_len(path: &Path, length: u64) {
    std::fs::File::options().write(true).open(path).unwrap().set_len(length).unwrap();
}

/// Offset of entry `index` of the snapshot table.
fn entry(path: &Path, index: u64) -> u64 {
    let bytes = bytes(path);
    let half =
        |at: u64| u64::from(u16::from_be_bytes(bytes[at as usize..at as usize + 2].try_into().unwrap()));
    let mut at = be64(&bytes, 64);
    for _ in 0..index {
        at = (at + 40 + half(at + 12) + half(at + 14) + half(at + 38)).next_multiple_of(8);
    }
    at
}

/// Moves the snapshot table to the end of the file, and cuts `missing` of its bytes off.
fn table_at_end(path: &Path, missing: u64) {
    let (from, to) = (entry(path, 0), entry(path, 2));
    let mut old = bytes(path);
    let end = (old.len() as u64).next_multiple_of(CLUSTER);
    // The last entry of a file may end without its padding.
    old.resize(old.len().max(to as usize), 0);
    poke(path, end, &old[from as usize..to as usize]);
    poke(path, 64, &end.to_be_bytes());
    set_len(path, end + (to - from) - missing);
}

/// What the bitmaps extension's data begins at.
fn extension(path: &Path) -> u64 {
    let bytes = bytes(path);
    let at = bytes.windows(8).position(|w| w == [0x23, 0x85, 0x28, 0x75, 0, 0, 0, 24]).unwrap();
    at as u64 + 8
}

type Damage = fn(&Path);

/// Damage, and the snapshots that are left of "one" and "two".
const SNAPSHOTS: [(&str, Damage, &[&str]); 13] = [
    ("cut in the last name", |p| table_at_end(p, 6), &["one", "t"]),
    ("cut in the first entry", |p| table_at_end(p, 2 * 72 - 30), &[]),
    ("at the end of the file", |p| table_at_end(p, 144), &[]),
    ("far behind the file", |p| poke(p, 64, &FAR.to_be_bytes()), &[]),
    ("behind what an offset can be", |p| poke(p, 64, &(1u64 << 63 | CLUSTER).to_be_bytes()), &[]),
    ("not aligned", |p| poke(p, 64, &(entry(p, 0) + 8).to_be_bytes()), &[]),
    ("over the header", |p| poke(p, 64, &[0; 8]), &[]),
    ("an L1 table that is not aligned", |p| poke(p, entry(p, 1), &(CLUSTER + 8).to_be_bytes()), &["one"]),
    ("an L1 table behind the file", |p| poke(p, entry(p, 0), &FAR.to_be_bytes()), &["two"]),
    ("an L1 table behind any file", |p| poke(p, entry(p, 1), &(1u64 << 63).to_be_bytes()), &["one"]),
    ("an L1 table that is too large", |p| poke(p, entry(p, 1) + 8, &[0x7f; 4]), &["one", "two"]),
    ("an L1 table longer than the file", |p| poke(p, entry(p, 1) + 8, &[0, 0x30, 0, 0]), &["one", "two"]),
    ("extra data without end", |p| poke(p, entry(p, 1) + 36, &[0x7f; 4]), &["one"]),
];

/// Names in the table, without what has none.
fn names(path: &Path) -> Vec<String> {
    let storage: Arc<dyn Storage> = Arc::new(FileStorage::open(path, Access::ReadOnly).unwrap());
    let image = Qcow2::open(storage, &OpenOptions::default()).unwrap();
    assert!(image.snapshot_error().is_none());
    let names = image
        .snapshots()
        .iter()
        .map(|s| String::from_utf8_lossy(s.name_text()).into_owned())
        .collect::<Vec<_>>();
    names.into_iter().filter(|name| !name.is_empty()).collect()
}

fn sound(qemu: &Qemu, dir: &Fixture, features: &[&str]) -> (PathBuf, Vec<Vec<u8>>) {
    let path = image(qemu, dir, "image", CLUSTER, "", features);
    let before = disks_of(&path).into_iter().map(Result::unwrap).collect();
    (path, before)
}

#[test]
fn a_damaged_snapshot_table_costs_no_more_than_the_snapshots_that_it_had() {
    let Some(qemu) = Qemu::find() else { return };
    let dir = Fixture::new();
    let (path, before) = sound(&qemu, &dir, &["snapshots"]);
    let whole = bytes(&path);
    for (what, damage, left) in SNAPSHOTS {
        std::fs::write(&path, &whole).unwrap();
        damage(&path);
        assert!(disks_of(&path)[0].as_ref().unwrap() == &before[0], "{what}: the active disk");
        let found = look(&open(&path)).unwrap();
        assert!(!found.is_clean(), "{what}: not found");
        let report = fix(&open(&path), Repair::All).unwrap();
        let clean = look(&open(&path)).unwrap();
        assert!(clean.is_clean(), "{what}: {report:#?}\n{clean:#?}");
        qemu.assert_clean(&path);
        assert_eq!(names(&path), left, "{what}");
        let after: Vec<_> = disks_of(&path).into_iter().map(Result::unwrap).collect();
        assert!(after[0] == before[0], "{what}: the active disk behind the repair");
        for (name, disk) in [("one", &before[1]), ("two", &before[2])] {
            let kept = !left.iter().any(|kept| name.starts_with(kept)) || after[1..].contains(disk);
            assert!(kept, "{what}: snapshot {name}");
        }
    }
}

#[test]
fn an_image_with_a_damaged_snapshot_table_is_not_written_to() {
    let Some(qemu) = Qemu::find() else { return };
    let dir = Fixture::new();
    let (path, _) = sound(&qemu, &dir, &["snapshots"]);
    table_at_end(&path, 6);
    let damaged = bytes(&path);
    let storage: Arc<dyn Storage> = Arc::new(open(&path));
    let mut image = Qcow2::open(Arc::clone(&storage), &OpenOptions::default()).unwrap();
    assert_eq!(image.snapshot_error().unwrap().kind(), ErrorKind::Corrupt);
    let error = image.enable_writing(WriteOptions::default()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert!(error.message().contains("repair"), "{error}");
    // What is in front of the damage can be viewed; what is not there may be behind it.
    let view = |name: &str| {
        Qcow2::open(
            Arc::clone(&storage),
            &OpenOptions { snapshot: Some(name.into()), ..OpenOptions::default() },
        )
    };
    assert_eq!(view("one").unwrap().viewed_snapshot().unwrap().name_text(), b"one");
    assert_eq!(view("two").unwrap_err().kind(), ErrorKind::Corrupt);
    assert!(bytes(&path) == damaged);
}

#[test]
fn an_image_that_was_not_closed_cleanly_loses_no_snapshot_by_being_opened() {
    let Some(qemu) = Qemu::find() else { return };
    let dir = Fixture::new();
    let (path, _) = sound(&qemu, &dir, &["snapshots"]);
    poke(&path, entry(&path, 1), &FAR.to_be_bytes());
    poke(&path, 79, &[1]);
    let damaged = bytes(&path);
    let mut image = Qcow2::open(Arc::new(open(&path)), &OpenOptions::default()).unwrap();
    let error = image.enable_writing(WriteOptions::default()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
    assert!(bytes(&path) == damaged);
}

#[test]
fn damaged_bitmaps_are_given_up_and_nothing_else() {
    let Some(qemu) = Qemu::find() else { return };
    let dir = Fixture::new();
    let (path, before) = sound(&qemu, &dir, &["snapshots", "bitmaps"]);
    let whole = bytes(&path);
    let at = extension(&path);
    let directory = be64(&whole, at + 16);
    let table = be64(&whole, directory);
    let pokes: [(&str, u64, &[u8]); 9] = [
        ("the directory is behind the file", at + 16, &FAR.to_be_bytes()),
        ("the directory is too long", at + 8, &FAR.to_be_bytes()),
        ("no bitmaps", at, &[0; 4]),
        ("too many bitmaps", at, &[0, 0, 0, 9]),
        ("the reserved field", at + 4, &[1; 4]),
        ("a zeroed directory", directory, &[0; 64]),
        ("a table behind the file", directory, &FAR.to_be_bytes()),
        ("a table that is not aligned", directory, &(table + 8).to_be_bytes()),
        ("an entry that cannot be", table, &0x7000_0000_0000_0200u64.to_be_bytes()),
    ];
    for (what, at, new) in pokes {
        std::fs::write(&path, &whole).unwrap();
        poke(&path, at, new);
        assert!(!look(&open(&path)).unwrap().is_clean(), "{what}: not found");
        let report = fix(&open(&path), Repair::All).unwrap();
        let clean = look(&open(&path)).unwrap();
        assert!(clean.is_clean(), "{what}: {report:#?}\n{clean:#?}");
        qemu.assert_clean(&path);
        let after: Vec<_> = disks_of(&path).into_iter().map(Result::unwrap).collect();
        assert!(after == before, "{what}");
    }
}

#[test]
fn a_cut_l1_table_is_salvaged_and_repaired() {
    let Some(qemu) = Qemu::find() else { return };
    let dir = Fixture::new();
    let (path, before) = sound(&qemu, &dir, &["snapshots"]);
    let old = bytes(&path);
    let (entries, from) = (be64(&old, 32) & 0xffff_ffff, be64(&old, 40));
    let end = (old.len() as u64).next_multiple_of(CLUSTER);
    poke(&path, end, &old[from as usize..(from + entries * 8) as usize]);
    poke(&path, 40, &end.to_be_bytes());
    // Two bytes of the last entry: they are 0 in any case.
    set_len(&path, end + entries * 8 - 2);
    let storage: Arc<dyn Storage> = Arc::new(open(&path));
    assert_eq!(
        Qcow2::open(Arc::clone(&storage), &OpenOptions::default()).unwrap_err().kind(),
        ErrorKind::Corrupt
    );
    let salvage = OpenOptions { salvage: true, ..OpenOptions::default() };
    assert_eq!(Qcow2::open(Arc::clone(&storage), &salvage).unwrap().l1().len() as u64, entries);
    assert!(!look(&*storage).unwrap().is_clean());
    let report = fix(&*storage, Repair::All).unwrap();
    assert!(look(&*storage).unwrap().is_clean(), "{report:#?}");
    qemu.assert_clean(&path);
    assert!(disks_of(&path).into_iter().map(Result::unwrap).collect::<Vec<_>>() == before);
}

#[test]
fn what_a_rebuild_replaced_is_freed_beside_an_error_that_stays() {
    let Some(qemu) = Qemu::find() else { return };
    let dir = Fixture::new();
    let path = dir.path("extended");
    qemu.create(&path, "extended_l2=on", Some(1 << 20));
    qemu.io(&path, "qcow2", &["write -P 1 0 64k"]);
    let bytes = bytes(&path);
    let l2 = be64(&bytes, be64(&bytes, 40)) & 0x00ff_ffff_ffff_fe00;
    poke(&path, l2 + 6, &[2]);
    let theirs = dir.path("theirs");
    std::fs::copy(&path, &theirs).unwrap();
    let expected = qemu.img(&["check", "-r", "all", theirs.to_str().unwrap()]);
    let report = fix(&open(&path), Repair::All).unwrap();
    let judged = |path: &Path| qemu.img(&["check", path.to_str().unwrap()]).stdout;
    assert!(report.corruptions > 0, "{report:#?}");
    assert_eq!(report.leaks, 0, "{report:#?}\n{}", expected.stderr);
    assert!(!judged(&path).contains("leaked"), "{}", judged(&path));
}

/// Truncations and pokes anywhere: what our repair calls clean, QEMU does too, and the disk that QEMU read before is the
/// disk that it reads behind it.
#[test]
fn random_damage_of_tables_is_repaired_without_loss() {
    let Some(qemu) = Qemu::find() else { return };
    let dir = Fixture::new();
    let (path, _) = sound(&qemu, &dir, &["snapshots", "bitmaps"]);
    let whole = bytes(&path);
    let at = extension(&path);
    // Where tables are: the header's fields, the snapshot table, the bitmap directory and its tables.
    let directory = be64(&whole, at + 16);
    let places = [(60, 12), (entry(&path, 0), 144), (at, 24), (directory, 80), (be64(&whole, directory), 8)];
    let mut rng = Rng(0x7ab1_e5ee_d000_0001);
    let (raw, after) = (dir.path("before.raw"), dir.path("after.raw"));
    let convert = |to: &Path| {
        let _ = std::fs::remove_file(to);
        let arguments = ["convert", "-f", "qcow2", "-O", "raw", path.to_str().unwrap(), to.to_str().unwrap()];
        (qemu.img(&arguments).code == 0).then(|| bytes(to))
    };
    let mut clean = 0;
    for round in 0..40 {
        std::fs::write(&path, &whole).unwrap();
        let mut text = String::new();
        for _ in 0..1 + rng.below(3) {
            let (start, length) = places[rng.below(places.len() as u64) as usize];
            let (place, byte) = (start + rng.below(length), [0, 1, 0x7f, 0x80, 0xff][rng.below(5) as usize]);
            poke(&path, place, &[byte]);
            text += &format!(" {place:#x}={byte:#x}");
        }
        if rng.below(4) == 0 {
            let length = whole.len() as u64 - rng.below(3 * CLUSTER);
            set_len(&path, length);
            text += &format!(" cut to {length:#x}");
        }
        let Some(before) = convert(&raw) else { continue };
        if fix(&open(&path), Repair::All).is_err() || !look(&open(&path)).unwrap().is_clean() {
            continue;
        }
        clean += 1;
        qemu.assert_clean(&path);
        assert!(convert(&after) == Some(before), "round {round}:{text}");
    }
    assert!(clean > 10, "only {clean} of the images could be repaired");
}
