//! Snapshots beside the image: what they cost, what an error before the switch leaves, and tables of every size.

use std::sync::Arc;

use qcow2_engine::maintenance::Plan;
use qcow2_engine::storage::{Access, FileStorage};
use qcow2_engine::{Image, Mem, MemMut, OpenOptions, Qcow2, Storage, WriteOptions};
use qcow2_testkit::audit::audit;
use qcow2_testkit::disk_model::{Opening, Rig};
use qcow2_testkit::matrix::Geometry;
use qcow2_testkit::ops::{Target, stamped};
use qcow2_testkit::plans::Table;
use qcow2_testkit::recorder::RecordingStorage;
use qcow2_testkit::storage::{CountingStorage, Fault, FaultStorage, Op as Call};
use qcow2_testkit::{Fixture, Qemu};

const COPIED: u64 = 1 << 63;

fn open(storage: Arc<dyn Storage>) -> Image {
    let mut image = Qcow2::open(storage, &OpenOptions::default()).unwrap();
    image.enable_writing(WriteOptions::default()).unwrap();
    Image::new(vec![Box::new(image)]).unwrap()
}

fn read(image: &Image, offset: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0u8; length];
    image.read_at(MemMut::from(&mut bytes[..]), offset).unwrap();
    bytes
}

fn all(image: &Image) -> Vec<u8> {
    read(image, 0, image.virtual_size() as usize)
}

fn l1(image: &Image) -> Vec<u64> {
    image.top_qcow2().unwrap().l1()
}

/// An image with two snapshots and an active disk of its own.
fn forged(cluster_size: u64) -> Rig {
    let clusters = if cluster_size == 512 { 300 } else { 40 };
    let mut rig = Rig::forge(&Geometry { size: clusters * cluster_size, ..Geometry::plain(cluster_size) }, 5);
    let storage = Arc::new(RecordingStorage::plain(rig.image.clone()));
    let image = open(storage.clone());
    while Table::of(&image).count > 0 {
        image.execute(&Table::of(&image).delete(0)).unwrap();
    }
    for (number, id) in (1..).zip(["1", "2"]) {
        image.execute(&Table::of(&image).create(id, "made")).unwrap();
        image.write(number * 4096, &stamped(number * 4096, 8192, number as u32)).unwrap();
    }
    image.close().unwrap();
    rig.image = storage.snapshot();
    rig
}

fn plans(image: &Image) -> [(&'static str, Plan); 3] {
    let table = Table::of(image);
    [("create", table.create("9", "new")), ("apply", table.apply(0)), ("delete", table.delete(1))]
}

/// A write that fails before the switch harms nothing: the handle goes on, and the operation works when it is tried
/// again. The header's own write, and what comes behind it, poisons.
#[test]
fn a_failed_write_before_the_switch_changes_nothing() {
    for (cluster_size, errno) in [(65536, 28), (65536, 5), (512, 28), (512, 5)] {
        let rig = forged(cluster_size);
        for number in 0..3 {
            let attempt = |after: u64| {
                let recording = Arc::new(RecordingStorage::plain(rig.image.clone()));
                let fault = Fault { ops: vec![Call::Write], after, once: true, errno };
                let faulty = Arc::new(FaultStorage::new(recording.clone(), fault));
                let image = open(faulty.clone());
                let (name, plan) = plans(&image)[number].clone();
                let before = (all(&image), faulty.calls());
                let done = image.execute(&plan);
                (recording, faulty, image, name, before, done)
            };
            let (_, dry, _, _, before, _) = attempt(u64::MAX);
            let total = dry.calls() - before.1;
            let mut harmless = 0;
            for after in 0..total {
                let (recording, _, image, name, (old, _), done) = attempt(before.1 + after);
                let what = format!("{name}, {cluster_size}, write {after} of {total}");
                if (name, errno) == ("delete", 28) {
                    // Without space a snapshot is deleted in place, unless it is the header's write that failed.
                    if done.is_err() {
                        continue;
                    }
                } else {
                    assert!(done.is_err(), "{what}");
                    if image.execute(&plans(&image)[number].1).is_err() {
                        continue;
                    }
                }
                harmless += 1;
                let now = all(&image);
                assert!(number == 1 || now == old, "{what}");
                image.write(0, &stamped(0, 4096, 77)).unwrap();
                let end = all(&image);
                image.close().unwrap();
                let file = recording.snapshot();
                let findings = audit(&file);
                assert!(findings.is_clean(), "{what}: {findings:?}");
                assert!(all(&rig.open_state(&[file], &Opening::default()).unwrap()) == end, "{what}");
            }
            // The header, and at most one flush of what it frees.
            assert!(harmless >= 3 && harmless + 2 >= total, "{number}: {harmless} of {total} harmless");
        }
    }
}

#[test]
fn tables_without_flags_are_shared() {
    let rig = forged(65536);
    let storage = Arc::new(RecordingStorage::plain(rig.image));
    let image = open(storage.clone());
    let first = l1(&image);
    assert!(first[0] & COPIED != 0);
    image.execute(&Table::of(&image).create("3", "third")).unwrap();
    let third = l1(&image);
    assert!(third[0] & COPIED != 0 && third[0] != first[0], "the snapshot has the disk's table");
    image.execute(&Table::of(&image).create("4", "fourth")).unwrap();
    assert_eq!(l1(&image)[0], third[0] & !COPIED, "nothing was written since");
    let disk = all(&image);
    for index in [3, 0, 1, 0] {
        image.execute(&Table::of(&image).delete(index)).unwrap();
    }
    assert!(l1(&image)[0] & COPIED != 0);
    assert!(all(&image) == disk);
    image.close().unwrap();
    let findings = audit(&storage.snapshot());
    assert!(findings.is_clean(), "{findings:?}");
}

/// One sync for what is written beside, one for the switch.
#[test]
fn a_snapshot_takes_few_syncs() {
    let rig = forged(65536);
    for (number, most) in [(0, 4), (1, 4), (2, 4)] {
        let counting = Arc::new(CountingStorage::new(Arc::new(RecordingStorage::plain(rig.image.clone()))));
        let image = open(counting.clone());
        let (name, plan) = plans(&image)[number].clone();
        counting.reset();
        image.execute(&plan).unwrap();
        let syncs = counting.of(Call::Sync).calls;
        assert!(syncs <= most, "{name}: {syncs} syncs");
    }
}

/// Tables longer than what one refcount block counts, and a refcount table that grows.
#[test]
fn long_tables_of_small_clusters() {
    let Some(qemu) = Qemu::find() else { return };
    let fixture = Fixture::new();
    let path = fixture.path("a.qcow2");
    qemu.create(&path, "cluster_size=512", Some(600 << 20));
    qemu.io(&path, "qcow2", &["write -P 5 0 300k", "write -P 6 599M 1M", "write -P 7 300M 100k"]);
    let file = || Arc::new(FileStorage::open(&path, Access::ReadWrite).unwrap());
    let places = |image: &Image| [0, 300 << 20, 599 << 20].map(|at| read(image, at, 400 << 10));
    let image = open(file());
    let old = places(&image);
    image.execute(&Table::of(&image).create("1", "first")).unwrap();
    image.close().unwrap();
    qemu.assert_clean(&path);
    let image = open(file());
    image.write_at(Mem::from(&[9u8; 5000][..]), 300 << 20).unwrap();
    image.close().unwrap();
    let image = open(file());
    assert!(places(&image) != old);
    image.execute(&Table::of(&image).apply(0)).unwrap();
    assert!(places(&image) == old);
    image.close().unwrap();
    qemu.assert_clean(&path);
    let image = open(file());
    image.execute(&Table::of(&image).delete(0)).unwrap();
    assert!(places(&image) == old);
    image.close().unwrap();
    qemu.assert_clean(&path);
}

#[test]
fn an_empty_disk_has_snapshots() {
    let Some(qemu) = Qemu::find() else { return };
    let fixture = Fixture::new();
    let path = fixture.path("a.qcow2");
    qemu.create(&path, "", Some(0));
    let image = open(Arc::new(FileStorage::open(&path, Access::ReadWrite).unwrap()));
    image.execute(&Table::of(&image).create("1", "empty")).unwrap();
    image.grow(1 << 20).unwrap();
    image.write(0, &stamped(0, 65536, 1)).unwrap();
    image.execute(&Table::of(&image).create("2", "not empty")).unwrap();
    image.execute(&Table::of(&image).apply(0)).unwrap();
    assert_eq!(image.virtual_size(), 0);
    image.execute(&Table::of(&image).apply(1)).unwrap();
    assert!(all(&image)[..65536] == stamped(0, 65536, 1));
    image.execute(&Table::of(&image).delete(0)).unwrap();
    image.close().unwrap();
    qemu.assert_clean(&path);
}
