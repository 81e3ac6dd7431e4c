//! What the installation of a system costs in calls of the host, on qcow2 against raw. Calls do not vary from run to
//! run, so they can be a test.

use std::sync::Arc;

use qcow2_engine::{Discard, Image, Layer, Raw, Storage, WriteOptions};
use qcow2_testkit::audit::audit;
use qcow2_testkit::disk_model::{Opening, Rig};
use qcow2_testkit::matrix::Geometry;
use qcow2_testkit::ops::Op;
use qcow2_testkit::recorder::RecordingStorage;
use qcow2_testkit::storage::{CountingStorage, Door, Op as Call};
use qcow2_testkit::trace::{self, Expected};
use qcow2_testkit::{Forge, Sparse};

/// An image, its file, and the counter between them.
struct Counted {
    image: Image,
    file: Arc<RecordingStorage>,
    calls: Arc<CountingStorage>,
}

fn raw(flush_each: bool) -> Counted {
    let file = Arc::new(RecordingStorage::plain(Sparse::new(trace::DISK)));
    let calls = Arc::new(CountingStorage::new(file.clone()));
    let write = WriteOptions { discard: Discard::Unmap, flush_each, ..WriteOptions::default() };
    let layer = Box::new(Raw::new(calls.clone()).unwrap().with_write_options(&write)) as Box<dyn Layer>;
    let image = Image::new(vec![layer]).unwrap();
    Counted { image, file, calls }
}

fn rig(door: Door) -> Rig {
    Rig {
        geometry: Geometry { size: trace::DISK, door, ..Geometry::plain(65536) },
        image: Forge::new(3, 16, trace::DISK).behind(door).build().bytes,
        data_file: None,
        backing: None,
    }
}

fn qcow2(flush_each: bool, door: Door) -> Counted {
    let rig = rig(door);
    let file = Arc::new(RecordingStorage::plain(rig.image.clone()));
    open(&rig, file, flush_each)
}

fn open(rig: &Rig, file: Arc<RecordingStorage>, flush_each: bool) -> Counted {
    let calls = Arc::new(CountingStorage::new(file.clone()));
    let write = WriteOptions { discard: Discard::Unmap, flush_each, ..WriteOptions::default() };
    let opening = Opening { write: Some(write), ..Opening::default() };
    let image = rig.open(&[calls.clone() as Arc<dyn Storage>], &opening).unwrap();
    Counted { image, file, calls }
}

fn counts(disk: &Counted) -> [u64; 5] {
    [Call::Sync, Call::Write, Call::Zero, Call::Discard, Call::Allocate].map(|call| disk.calls.of(call).calls)
}

#[test]
fn qcow2_costs_hardly_more_calls_than_raw() {
    let Some(requests) = trace::load() else { return };
    let (raw, qcow2) = (raw(false), qcow2(false, Door::None));
    for disk in [&raw, &qcow2] {
        disk.calls.reset();
        trace::replay(&disk.image, &requests).unwrap();
    }
    let before_close = counts(&qcow2);
    qcow2.image.close().unwrap();
    // The same once more, where all clusters are in the file: it begins with a discard of everything.
    let qcow2 = open(&rig(Door::None), qcow2.file, false);
    trace::replay(&qcow2.image, &requests).unwrap();
    let rewritten = counts(&qcow2);
    qcow2.image.close().unwrap();
    let [raw_syncs, raw_writes, ..] = counts(&raw);
    eprintln!(
        "fdatasync, pwrite, fallocate to zeroes, to holes, reserving: raw {:?}, qcow2 {before_close:?}, once more {rewritten:?}",
        counts(&raw),
    );
    let expected = Expected::after(&requests);
    expected.verify(&qcow2.image);
    let findings = audit(&qcow2.file.snapshot());
    assert!(findings.is_clean(), "{findings:#?}");
    assert!(raw.file.snapshot().len() == trace::DISK);
    for [syncs, writes, ..] in [before_close, rewritten] {
        assert!(syncs * 100 <= raw_syncs * 101, "{syncs} syncs, raw {raw_syncs}");
        assert!(writes * 100 <= raw_writes * 112, "{writes} writes, raw {raw_writes}");
    }
}

/// With every write durable at once, qcow2 needs no more syncs than raw.
#[test]
fn writethrough_costs_hardly_more_syncs_than_raw() {
    let Some(requests) = trace::load() else { return };
    // A part is enough: every request is a flush.
    let requests: Vec<Op> = requests.into_iter().take(6000).collect();
    let (raw, qcow2) = (raw(true), qcow2(true, Door::None));
    raw.calls.reset();
    trace::replay(&raw.image, &requests).unwrap();
    qcow2.calls.reset();
    trace::replay(&qcow2.image, &requests).unwrap();
    eprintln!("writethrough: raw {:?}, qcow2 {:?}", counts(&raw), counts(&qcow2));
    let (raw_syncs, syncs) = (raw.calls.of(Call::Sync).calls, qcow2.calls.of(Call::Sync).calls);
    assert!(syncs * 100 <= raw_syncs * 101, "{syncs} syncs, raw {raw_syncs}");
    qcow2.image.close().unwrap();
    let findings = audit(&qcow2.file.snapshot());
    assert!(findings.is_clean(), "{findings:#?}");
}

/// Behind a door a new cluster does not read as zeroes before it is written, so that its bytes must be durable before its entry is: a
/// flush behind an allocation costs a sync more than in a plain image. Nothing else does.
#[test]
fn encryption_costs_a_sync_for_a_flush_behind_an_allocation() {
    let Some(requests) = trace::load() else { return };
    // A part is enough, and what ciphers make does not become small in memory.
    let requests: Vec<Op> = requests.into_iter().take(2000).collect();
    let found = [Door::None, Door::Xts].map(|door| {
        let disk = qcow2(false, door);
        disk.calls.reset();
        trace::replay(&disk.image, &requests).unwrap();
        Expected::after(&requests).verify(&disk.image);
        disk.image.close().unwrap();
        counts(&disk)
    });
    eprintln!("fdatasync, pwrite, fallocate to zeroes, to holes, reserving: plain, xts: {found:?}");
    let [[syncs, writes, ..], [more_syncs, more_writes, ..]] = found;
    assert!(more_syncs * 100 <= syncs * 130, "{more_syncs} syncs, plain {syncs}");
    assert!(more_writes * 100 <= writes * 106, "{more_writes} writes, plain {writes}");
}
