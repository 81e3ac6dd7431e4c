//! Lazy refcounts: the image is dirty while it is open, refcounts are written late, and after a power cut a repair makes
//! them right; what guests flushed is there without it.

use std::sync::Arc;

use qcow2_engine::check::{CheckOptions, check};
use qcow2_engine::format::header::feature::Incompatible;
use qcow2_engine::image::read_header;
use qcow2_engine::{Discard, ErrorKind, Image, Job, Layer, LayerExt, Raw, Storage, WriteOptions};
use qcow2_testkit::audit::audit;
use qcow2_testkit::crash::{Durability, Scope, Session};
use qcow2_testkit::disk_model::{Opening, Rig};
use qcow2_testkit::matrix::{Backing, DataFile, Geometry};
use qcow2_testkit::ops::{Op, Target, stamped};
use qcow2_testkit::recorder::RecordingStorage;
use qcow2_testkit::{Fixture, Qemu, Sparse};

fn lazy() -> Opening {
    let write = WriteOptions { discard: Discard::Unmap, lazy_refcounts: true, ..WriteOptions::default() };
    Opening { write: Some(write), ..Opening::default() }
}

fn is_dirty(bytes: &Sparse) -> bool {
    let storage = RecordingStorage::plain(bytes.clone());
    read_header(&storage).unwrap().incompatible.contains(Incompatible::DIRTY)
}

fn files(storages: &[Arc<RecordingStorage>]) -> Vec<Arc<dyn Storage>> {
    storages.iter().map(|s| s.clone() as Arc<dyn Storage>).collect()
}

fn plain(rig: &Rig) -> Vec<Arc<RecordingStorage>> {
    rig.files().into_iter().map(|f| Arc::new(RecordingStorage::plain(f))).collect()
}

#[test]
fn refcounts_are_late_and_the_image_is_dirty_until_it_is_closed() {
    let rig = Rig::forge(&Geometry { size: 64 * 65536, ..Geometry::plain(65536) }, 2);
    let storages = plain(&rig);
    let image = rig.open(&files(&storages), &lazy()).unwrap();
    assert!(storages[0].snapshot().to_vec() == rig.image.to_vec(), "opening changes nothing");
    for n in 0..40u64 {
        image.write(n << 16, &stamped(n << 16, 65536, 30)).unwrap();
        image.flush().unwrap();
    }
    let open = storages[0].snapshot();
    assert!(is_dirty(&open));
    // A dirty image's refcounts are not believed; as if it were not:
    let mut believed = open.clone();
    believed.put_u64(72, open.u64(72) & !Incompatible::DIRTY.bits());
    assert!(!audit(&believed).is_sound(), "the refcounts were written at once");
    image.close().unwrap();
    let closed = storages[0].snapshot();
    assert!(!is_dirty(&closed));
    assert!(audit(&closed).is_clean());
    // Without a change, nothing is marked.
    let image = rig.open(&files(&storages), &lazy()).unwrap();
    image.read(0, &mut [0; 512]).unwrap();
    image.flush().unwrap();
    image.close().unwrap();
    assert!(storages[0].snapshot().to_vec() == closed.to_vec());
}

#[test]
fn they_need_version_3_and_refcounts() {
    let rig = Rig::forge(&Geometry { version: 2, ..Geometry::plain(4096) }, 2);
    let storages = plain(&rig);
    let error = rig.open(&files(&storages), &lazy()).unwrap_err();
    assert_eq!((error.kind(), error.field()), (ErrorKind::InvalidArgument, Some("lazy_refcounts")));
    assert!(storages[0].snapshot().to_vec() == rig.image.to_vec());
    let raw = Raw::new(Arc::new(RecordingStorage::plain(Sparse::new(4096)))).unwrap();
    let error = (Box::new(raw) as Box<dyn Layer>).enable_writing(lazy().write.unwrap()).unwrap_err();
    assert_eq!((error.kind(), error.field()), (ErrorKind::InvalidArgument, Some("lazy_refcounts")));
}

/// Whoever needs the refcounts in the file, finds them there: snapshots, growing, a check of the open image.
#[test]
fn operations_that_need_refcounts_write_them() {
    let rig = Rig::forge(&Geometry { size: 20 * 4096, ..Geometry::plain(4096) }, 2);
    let storages = plain(&rig);
    let image = rig.open(&files(&storages), &lazy()).unwrap();
    image.write(0, &stamped(0, 20 * 4096, 30)).unwrap();
    image.flush().unwrap();
    let sound = || {
        image
            .settled(|| {
                let mut bytes = storages[0].snapshot();
                bytes.put_u64(72, bytes.u64(72) & !Incompatible::DIRTY.bits());
                let findings = audit(&bytes);
                assert!(findings.is_sound(), "{findings:#?}");
                Ok(())
            })
            .unwrap();
    };
    sound();
    image.grow(4000 * 4096).unwrap();
    sound();
    image.write(0, &stamped(0, 4096, 31)).unwrap();
    image.close().unwrap();
    let closed = storages[0].snapshot();
    assert!(audit(&closed).is_clean() && !is_dirty(&closed));
}

/// Every cut leaves what was flushed, readable at once, and an image that a repair makes clean.
#[test]
fn a_power_cut_leaves_what_was_flushed() {
    let plain = Geometry::plain;
    let geometries = [
        plain(65536),
        Geometry { backing: Backing::EqualQcow2, ..plain(4096) },
        Geometry { extended_l2: true, ..plain(16384) },
        Geometry { refcount_bits: 1, ..plain(512) },
        Geometry { data_file: DataFile::External, ..plain(4096) },
    ];
    let qemu = Qemu::find();
    let fixture = Fixture::new();
    let (mut judged, mut dirty) = (0u32, 0u32);
    for (seed, geometry) in (1..).zip(&geometries) {
        let rig = Rig::forge(geometry, seed);
        let (mut session, storages) = Session::new(rig.files(), Durability::Flush);
        let files = files(&storages);
        session.start(&rig.open(&files, &Opening::default()).unwrap());
        let open = || rig.open(&files, &lazy()).map(|image| Box::new(image) as Box<dyn Target>);
        let mut ops = rig.menu().sequence(seed, 60);
        ops.push(Op::Reopen);
        session.play(&open, &ops, false).expect("an image");
        let history = session.history();
        for state in session.sample_states(seed, 60) {
            let what = format!("{}, cut {}, {:?}", geometry.name(), state.cut, state.shape);
            judged += 1;
            match is_dirty(&state.files[0]) {
                true => dirty += 1,
                false => assert!(audit(&state.files[0]).is_sound(), "{what}"),
            }
            let image = rig.open_state(&state.files, &Opening::default()).unwrap();
            history.judge(&image, state.cut, &Scope::Whole).expect(&what);
            if judged % 10 == 0
                && geometry.backing == Backing::None
                && state.files.len() == 1
                && let Some(qemu) = &qemu
            {
                let path = fixture.path("state.qcow2");
                state.files[0].write_to(&path);
                let path = path.display().to_string();
                qemu.img(&["check", "-q", "-r", "all", &path]).ok();
            }
            recovers(&rig, &state.files, &what, |image| {
                history.judge(image, state.cut, &Scope::Whole).expect(&what);
            });
        }
    }
    assert!(judged > 150 && dirty > judged / 4, "{dirty} dirty of {judged}");
}

/// Opening for writing repairs; what was there is there, and the image is clean.
fn recovers(rig: &Rig, state: &[Sparse], what: &str, judge: impl Fn(&Image)) {
    let storages: Vec<_> = state.iter().map(|f| Arc::new(RecordingStorage::plain(f.clone()))).collect();
    let image = rig.open(&files(&storages), &lazy()).expect(what);
    judge(&image);
    image.write(0, &stamped(0, 512, 900)).expect(what);
    image.close().expect(what);
    let bytes = storages[0].snapshot();
    assert!(!is_dirty(&bytes), "{what}");
    assert!(audit(&bytes).is_sound(), "{what}: {:#?}", audit(&bytes).corruptions);
    let storage = RecordingStorage::plain(bytes);
    let header = read_header(&storage).unwrap();
    let report = check(&storage, &header, &CheckOptions::default(), &Job::new()).unwrap();
    assert_eq!((report.corruptions, report.check_errors), (0, 0), "{what}");
}
