//! What holds behind a door: what an image hands out, what is refused, what its header keeps, when space is given back.

use crate::watched;

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use qcow2_engine::amend::{AmendOptions, amend};
use qcow2_engine::backing::Backing;
use qcow2_engine::check::CheckOptions;
use qcow2_engine::clone::CloneTarget;
use qcow2_engine::compact::CompactOptions;
use qcow2_engine::convert::{Compression, ConvertOptions, ConvertTarget, convert};
use qcow2_engine::create::{CreateOptions, DataFile, NewTarget, Preallocation};
use qcow2_engine::image::SegmentKind;
use qcow2_engine::{
    Discard, ErrorKind, ExtentKind, GuestSource, Image, Job, Layer, Mem, MemMut, OpenOptions, Qcow2, Raw,
    ReadStorage, ResizeOptions, Result, WriteOptions,
};
use qcow2_testkit::Forge;
use qcow2_testkit::contract::LayerContract;
use qcow2_testkit::forge::field;
use qcow2_testkit::plans::Table;
use qcow2_testkit::recorder::{self, Journal, RecordingStorage};
use qcow2_testkit::storage::{Door, Hooked, Op, Scrambling, scramble};

use watched::{MIB, REWRITE, Run, Watched, marks};

/// What is mapped before anything is written to it has a flag, and takes no writes.
#[test]
fn preallocated_clusters_are_flagged_and_not_written() {
    let data_file = Some(DataFile { filename: b"data".to_vec(), raw: false });
    for (data_file, extended_l2) in [(None, false), (None, true), (data_file, false)] {
        let preallocation = Preallocation::Metadata;
        let data_door = Scrambling::door();
        let options = CreateOptions {
            size: 64 * MIB,
            preallocation,
            data_door,
            data_file,
            extended_l2,
            ..CreateOptions::default()
        };
        let made = Watched::create(&options);
        let image = made.open();
        image.resize_with(128 * MIB, ResizeOptions { shrink: false, preallocation }).unwrap();
        image.close().unwrap();
        let changes = made.journal.take().1.into_iter().map(|entry| match entry.change {
            recorder::Change::Write { data, .. } => data.len() as u64,
            _ => 0,
        });
        let written: u64 = changes.sum();
        assert!(written < MIB, "{options:?}: {written} bytes written");
        made.assert_holds(&vec![0; 128 * MIB as usize], "preallocated");
        let length: u64 = made.files.iter().map(|file| file.len().unwrap()).sum();
        assert!(length > 128 * MIB, "{options:?}: all has its place");
        let mut segments = Vec::new();
        let top = made.open();
        top.top_qcow2().unwrap().plan_read(0..128 * MIB, &mut segments).unwrap();
        let placed = |kind| match extended_l2 {
            true => matches!(kind, SegmentKind::Unallocated(Some(_))),
            false => matches!(kind, SegmentKind::Zero(Some(_))),
        };
        assert!(segments.iter().all(|segment| placed(segment.kind)), "{segments:?}");
    }
}

/// Nothing about the file says anything about the disk, and clusters without bytes stay without.
#[test]
fn a_layer_behind_a_door_hands_out_no_file() {
    let options = CreateOptions { size: 2 * MIB, data_door: Scrambling::door(), ..CreateOptions::default() };
    let made = Watched::create(&options);
    let mut run = Run { what: "layer".to_owned(), image: made.open(), disk: vec![0; 2 * MIB as usize] };
    run.mark(0, 200_000);
    run.zero(65536, 65536, false);
    run.image.close().unwrap();
    let layer = made.layer(false);
    assert!(layer.file(0).is_none());
    let image = Image::new(vec![layer.reopen().unwrap()]).unwrap();
    let mut extents = Vec::new();
    image.extents(0, 2 * MIB, &Job::new(), &mut extents).unwrap();
    assert!(extents.iter().all(|extent| extent.host.is_none()), "{extents:?}");
    let kinds: Vec<_> = extents.iter().map(|extent| (extent.start, extent.kind)).collect();
    let expected = [
        (0, ExtentKind::Data),
        (65536, ExtentKind::Zero),
        (131072, ExtentKind::Data),
        (262144, ExtentKind::Unallocated),
    ];
    assert_eq!(kinds, expected);
    // What has no bytes is read without a request.
    let reads = Arc::new(Mutex::new(Vec::new()));
    let log = Arc::clone(&reads);
    let hooked = Hooked::with(made.storage(), move |op: Op, range: Range<u64>| {
        log.lock().unwrap().push((op, range));
        Ok(())
    });
    let open = OpenOptions { data_door: Scrambling::door(), ..OpenOptions::default() };
    let qcow2 = Qcow2::open(Arc::new(hooked), &open).unwrap();
    let image = Image::new(vec![Box::new(qcow2)]).unwrap();
    let mut bytes = [1; 512];
    image.read_at(MemMut::from(&mut bytes[..]), 70_000).unwrap();
    reads.lock().unwrap().clear();
    image.read_at(MemMut::from(&mut bytes[..]), 80_000).unwrap();
    image.read_at(MemMut::from(&mut bytes[..]), MIB).unwrap();
    assert!(reads.lock().unwrap().is_empty() && bytes == [0; 512]);
    let file = made.files[0].snapshot().to_vec();
    let open = |storage| -> Result<Box<dyn Layer>> {
        let options = OpenOptions { data_door: Scrambling::door(), ..OpenOptions::default() };
        Ok(Box::new(Qcow2::open(storage, &options)?))
    };
    LayerContract { name: "door", file: &file, open: &open, expected: &run.disk, below: None }.check();
}

/// An image that says it is encrypted is written to behind a door, and goes on saying so.
#[test]
fn a_header_keeps_its_encryption_method() {
    const CLUSTER: u64 = 4096;
    let mut forge = Forge::new(3, 12, 64 * CLUSTER).crypt_method(1).behind(Door::LegacyAes);
    forge.data(3, &marks(CLUSTER));
    let made = Watched {
        journal: Journal::new(),
        files: vec![Arc::new(RecordingStorage::plain(forge.build().bytes))],
        door: Door::LegacyAes.open(),
    };
    let method = || made.files[0].snapshot().u32(field::CRYPT_METHOD);
    let mut disk = vec![0; 64 * CLUSTER as usize];
    disk[3 * CLUSTER as usize..4 * CLUSTER as usize].copy_from_slice(&marks(CLUSTER));
    let mut run = Run { what: "method".to_owned(), image: made.open(), disk };
    run.check("opened");
    type Change<'a> = (&'a str, &'a dyn Fn(&mut Run));
    let changes: [Change<'_>; 6] = [
        ("create", &|run| run.image.execute(&Table::of(&run.image).create("1", "one")).unwrap()),
        ("grow", &|run| run.resize(1 << 22, Preallocation::Off)),
        ("write", &|run| run.mark(40 * CLUSTER, 600)),
        ("shrink", &|run| run.resize(50 * CLUSTER + 512, Preallocation::Off)),
        ("compact", &|run| run.image.compact(REWRITE, &Job::new()).map(|_| ()).unwrap()),
        ("delete", &|run| run.image.execute(&Table::of(&run.image).delete(0)).unwrap()),
    ];
    for (what, change) in changes {
        change(&mut run);
        run.image.flush().unwrap();
        assert_eq!(method(), 1, "{what}");
        run.check(what);
    }
    run.image.close().unwrap();
    assert_eq!(method(), 1);
    // Behind a weak door it is only written to where that is allowed.
    let open = OpenOptions { data_door: Door::LegacyAes.open(), ..OpenOptions::default() };
    let mut weak = Qcow2::open(made.storage(), &open).unwrap();
    let error = weak.enable_writing(WriteOptions::default()).unwrap_err();
    assert_eq!((error.kind(), error.field()), (ErrorKind::UnsupportedFeature, Some("crypt_method")));
    weak.allow_weak();
    weak.enable_writing(WriteOptions::default()).unwrap();
    drop(weak);
    // Without a door its data is not read, not written to, and not judged by its bytes.
    let mut plain = Qcow2::open(made.storage(), &OpenOptions::default()).unwrap();
    plain.enable_writing(WriteOptions::default()).unwrap();
    let plain = Image::new(vec![Box::new(plain)]).unwrap();
    for write in
        [plain.write_at(Mem::from(&[1; 512][..]), 3 * CLUSTER), plain.write_zeroes(3 * CLUSTER + 5, 5, false)]
    {
        let error = write.unwrap_err();
        assert_eq!((error.kind(), error.field()), (ErrorKind::BadSecret, Some("secret")));
    }
    let mut bytes = [0; 512];
    let error = plain.read_at(MemMut::from(&mut bytes[..]), 3 * CLUSTER).unwrap_err();
    assert_eq!((error.kind(), error.field()), (ErrorKind::BadSecret, Some("secret")));
    let error = plain.compact(CompactOptions { dry_run: true, ..REWRITE }, &Job::new()).unwrap_err();
    assert_eq!(error.field(), Some("secret"));
}

#[test]
fn zero_clusters_of_an_encrypted_image_are_not_expanded_in_clear() {
    let mut forge = Forge::new(3, 12, 8 << 12).crypt_method(1).backing("base", "raw");
    forge.zero_plain(1);
    let storage = RecordingStorage::plain(forge.build().bytes);
    let before = storage.snapshot().to_vec();
    let old = AmendOptions { version: Some(2), refcount_bits: Some(16), ..AmendOptions::default() };
    let error = amend(&storage, &old, &CheckOptions::default(), &Job::new()).unwrap_err();
    assert_eq!(
        (error.kind(), error.field()),
        (ErrorKind::UnsupportedFeature, Some("crypt_method")),
        "{error}"
    );
    assert!(storage.snapshot().to_vec() == before);
}

#[test]
fn what_cannot_be_behind_a_door_is_refused() {
    let door = Scrambling::door;
    let raw = Some(DataFile { filename: b"data".to_vec(), raw: true });
    let options =
        CreateOptions { size: MIB, data_door: door(), data_file: raw.clone(), ..CreateOptions::default() };
    assert_eq!(options.validate().unwrap_err().field(), Some("data_file_raw"));
    let kept = CreateOptions {
        data_file: raw.clone().map(|data_file| DataFile { raw: false, ..data_file }),
        keep_data_file: true,
        preallocation: Preallocation::Metadata,
        ..options
    };
    assert_eq!(kept.validate().unwrap_err().field(), Some("keep_data_file"));
    let made = Watched::create(&CreateOptions { size: MIB, data_file: raw, ..CreateOptions::default() });
    let open = OpenOptions { data_door: door(), ..OpenOptions::default() };
    let error = Qcow2::open(made.storage(), &open).unwrap_err();
    assert_eq!((error.kind(), error.field()), (ErrorKind::InvalidArgument, Some("data_file_raw")));
    let create = CreateOptions { size: MIB, data_door: door(), ..CreateOptions::default() };
    let made = Watched::create(&create);
    let image = made.open();
    let error = image.write_compressed_at(Mem::from(&[1; 65536][..]), 0).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::UnsupportedFeature, "{error}");
    let source = Image::new(vec![Box::new(Raw::new(Watched::files(&create).storage()).unwrap())]).unwrap();
    let compressed =
        ConvertOptions { compression: Some(Compression::default()), ..ConvertOptions::default() };
    for target in [
        ConvertTarget::Existing(&image),
        ConvertTarget::New(NewTarget::Qcow2 {
            storage: made.storage(),
            data_file: None,
            create: Box::new(create.clone()),
        }),
    ] {
        let error = convert(&source, target, &compressed, &Job::new()).unwrap_err();
        assert_eq!((error.kind(), error.field()), (ErrorKind::InvalidArgument, Some("compress")));
    }
    let target = CloneTarget {
        disk: NewTarget::Qcow2 { storage: made.storage(), data_file: None, create: Box::new(create) },
        compression: Some(Compression::default()),
    };
    assert_eq!(image.begin_clone(target, &Job::new()).unwrap_err().field(), Some("compress"));
}

/// An image on top has a door of its own, or none; those below keep theirs.
#[test]
fn an_overlay_has_its_own_door() {
    let options = CreateOptions { size: MIB, data_door: Scrambling::door(), ..CreateOptions::default() };
    let base = Watched::create(&options);
    let mut run = Run { what: "overlay".to_owned(), image: base.open(), disk: vec![0; MIB as usize] };
    run.mark(0, 100_000);
    let backing = Some(Backing { filename: b"base".to_vec(), format: Some(b"qcow2".to_vec()) });
    let top = Watched::create(&CreateOptions { size: MIB, backing, ..CreateOptions::default() });
    assert!(run.image.top_qcow2().unwrap().open_options().for_another().data_door.is_none());
    run.image = run.image.put_overlay(|| Ok(top.layer(true))).unwrap();
    run.check("put on");
    run.mark(500, 9000);
    run.check("written to");
    run.image.close().unwrap();
    assert!(top.has_marks() && !base.has_marks());
}

/// Space of a data file becomes a hole when no read can find it any more that planned before it was given up: by the guest, or by a
/// compaction that found nothing but zeroes there.
#[test]
fn space_behind_a_door_is_given_back_when_reads_are_over() {
    for zeroes in [false, true] {
        give_back(CompactOptions { zeroes, ..CompactOptions::default() });
    }
}

fn give_back(compact: CompactOptions) {
    const CLUSTER: u64 = 4096;
    let options = CreateOptions {
        size: MIB,
        cluster_size: CLUSTER,
        data_door: Scrambling::door(),
        data_file: Some(DataFile { filename: b"data".to_vec(), raw: false }),
        ..CreateOptions::default()
    };
    let made = Watched::create(&options);
    let (held, is_held) = sync_channel(1);
    let (go, goes) = sync_channel::<()>(1);
    let (goes, armed) = (Mutex::new(goes), Arc::new(AtomicBool::new(false)));
    let arms = Arc::clone(&armed);
    let zeroed = Arc::new(Mutex::new(Vec::new()));
    let log = Arc::clone(&zeroed);
    let hook = move |op: Op, range: Range<u64>| {
        match op {
            Op::Read if arms.swap(false, Ordering::AcqRel) => {
                held.send(()).unwrap();
                goes.lock().unwrap().recv().unwrap();
            }
            Op::Zero | Op::Discard => log.lock().unwrap().push(range),
            _ => {}
        }
        Ok(())
    };
    let open = OpenOptions { data_door: Scrambling::door(), ..OpenOptions::default() };
    let mut qcow2 = Qcow2::open(made.storage(), &open).unwrap();
    qcow2.set_data_file(Arc::new(Hooked::with(made.data_file().unwrap(), hook)));
    qcow2.enable_writing(WriteOptions { discard: Discard::Unmap, ..WriteOptions::default() }).unwrap();
    let image = Image::new(vec![Box::new(qcow2)]).unwrap();
    let mut run = Run { what: format!("{compact:?}"), image, disk: vec![0; MIB as usize] };
    run.mark(0, 20 * CLUSTER);
    if compact.zeroes {
        run.write(3 * CLUSTER, &vec![0; 6 * CLUSTER as usize]);
    }
    run.image.flush().unwrap();
    let expected = run.disk[5 * CLUSTER as usize..6 * CLUSTER as usize].to_vec();
    let image = &run.image;
    let (early, read) = std::thread::scope(|scope| {
        armed.store(true, Ordering::Release);
        let reader = scope.spawn(|| {
            let mut bytes = vec![0xa5; CLUSTER as usize];
            image.read_at(MemMut::from(&mut bytes[..]), 5 * CLUSTER).map(|()| bytes)
        });
        is_held.recv().unwrap();
        // A guest's request does not wait for a read.
        let zeroes = compact.zeroes;
        let guest = scope.spawn(move || {
            let discarded = if zeroes { Ok(()) } else { image.discard(3 * CLUSTER, 6 * CLUSTER) };
            discarded.and_then(|()| image.flush())
        });
        let begun = Instant::now();
        while !guest.is_finished() && begun.elapsed() < Duration::from_secs(20) {
            std::thread::sleep(Duration::from_millis(1));
        }
        let mut early = !guest.is_finished();
        let compacting = scope.spawn(|| image.compact(compact, &Job::new()));
        std::thread::sleep(Duration::from_millis(100));
        early |= compacting.is_finished() || !zeroed.lock().unwrap().is_empty();
        go.send(()).unwrap();
        let read = reader.join().unwrap().unwrap();
        guest.join().unwrap().and_then(|()| compacting.join().unwrap()).unwrap();
        (early, read)
    });
    assert!(!early, "{}: waited for a read, or gave back under it", run.what);
    assert!(read == expected, "{}: the bytes before", run.what);
    let freed: u64 = zeroed.lock().unwrap().iter().map(|range| range.end - range.start).sum();
    assert!(freed >= MIB - 14 * CLUSTER, "{}: all but what is still there, not {freed}", run.what);
    run.disk[3 * CLUSTER as usize..9 * CLUSTER as usize].fill(0);
    run.check("compacted");
    run.mark(4 * CLUSTER + 100, 10);
    run.check("written again");
    run.image.close().unwrap();
    made.assert_holds(&run.disk, &run.what);
}

/// What other sectors are scrambled to is garbage: the tests above would see a byte at a wrong place.
#[test]
fn a_sector_at_another_place_is_garbage() {
    let (mut here, mut there) = (marks(512), marks(512));
    scramble(&mut here, 0);
    scramble(&mut there, 512);
    assert!(here.iter().zip(&there).filter(|(a, b)| a == b).count() < 50);
}
