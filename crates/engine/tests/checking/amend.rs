//! Amending images: what the options say afterwards, what the disks read as, and what a crash leaves.

use crate::damage;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use qcow2_engine::amend::{AmendOptions, amend};
use qcow2_engine::check::{CheckOptions, CheckReport, Repair, check, repair};
use qcow2_engine::image::read_header;
use qcow2_engine::storage::{Access, FileStorage};
use qcow2_engine::{
    Error, ErrorKind, Image, Job, Layer, Mem, MemMut, OpenOptions, Qcow2, Result, Storage, StorageExt,
};
use qcow2_testkit::crash::{Durability, Session};
use qcow2_testkit::recorder::RecordingStorage;
use qcow2_testkit::{Fixture, Qemu, Sparse};

use damage::{be64, image, poke};

fn run(storage: &dyn Storage, options: &AmendOptions) -> Result<()> {
    amend(storage, options, &CheckOptions::default(), &Job::new())
}

fn on(path: &Path, options: &AmendOptions) -> Result<()> {
    run(&FileStorage::open(path, Access::ReadWrite).unwrap(), options)
}

fn bits(bits: u32) -> AmendOptions {
    AmendOptions { refcount_bits: Some(bits), ..AmendOptions::default() }
}

fn version(version: u32) -> AmendOptions {
    AmendOptions { version: Some(version), ..AmendOptions::default() }
}

/// What the active disk and every snapshot read as, by our reader.
fn disks(storage: &Arc<dyn Storage>, backing: Option<&Arc<dyn Storage>>) -> Vec<Vec<u8>> {
    let top = Qcow2::open(storage.clone(), &OpenOptions::default()).unwrap();
    let ids = top.snapshots().iter().map(|s| Some(String::from_utf8_lossy(&s.id).into_owned())).collect();
    [vec![None], ids]
        .concat()
        .into_iter()
        .map(|snapshot| {
            let options = OpenOptions { snapshot: snapshot.map(Into::into), ..OpenOptions::default() };
            let layer = Qcow2::open(storage.clone(), &options).unwrap();
            let mut layers: Vec<Box<dyn Layer>> = vec![Box::new(layer)];
            if let Some(backing) = backing {
                let below = Qcow2::open(backing.clone(), &OpenOptions::default()).unwrap();
                layers.push(Box::new(below));
            }
            let size = layers[0].virtual_size();
            let image = Image::new(layers).unwrap();
            let mut bytes = vec![0; size as usize];
            image.read_at(MemMut::from(&mut bytes[..]), 0).unwrap();
            bytes
        })
        .collect()
}

fn disks_of(path: &Path, backing: Option<&Path>) -> Vec<Vec<u8>> {
    let open =
        |path: &Path| -> Arc<dyn Storage> { Arc::new(FileStorage::open(path, Access::ReadOnly).unwrap()) };
    disks(&open(path), backing.map(open).as_ref())
}

fn specific(qemu: &Qemu, path: &Path, field: &str) -> String {
    qemu.info_json(path)["format-specific"]["data"][field].to_string()
}

#[test]
fn refcounts_of_every_width() {
    let Some(qemu) = Qemu::find() else { return };
    let dir = Fixture::new();
    for (name, cluster, options, features) in [
        ("default", 65536, "", &["zero", "compressed", "snapshots", "bitmaps"][..]),
        ("small", 512, "", &["zero"]),
        ("extended", 16384, "extended_l2=on", &["subclusters", "snapshots"]),
    ] {
        let path = image(&qemu, &dir, name, cluster, options, features);
        let before = disks_of(&path, None);
        for width in [64, 8, 32, 1, 2, 16, 4, 16] {
            let old = specific(&qemu, &path, "refcount-bits");
            let shared = features.contains(&"snapshots") || features.contains(&"compressed");
            match on(&path, &bits(width)) {
                Ok(()) => {
                    assert!(width > 1 || !shared, "{name}: shared clusters need more than one bit");
                    assert_eq!(specific(&qemu, &path, "refcount-bits"), width.to_string(), "{name}");
                }
                Err(error) => {
                    assert!(width < 8 && shared, "{name} {width}: {error}");
                    assert_eq!((error.kind(), error.field()), (ErrorKind::Limit, Some("refcount_bits")));
                    assert_eq!(specific(&qemu, &path, "refcount-bits"), old, "{name}");
                }
            }
            qemu.assert_clean(&path);
            assert!(before == disks_of(&path, None), "{name} {width}");
        }
    }
}

#[test]
fn down_to_version_2_and_up_again() {
    let Some(qemu) = Qemu::find() else { return };
    let dir = Fixture::new();
    let path = image(&qemu, &dir, "image", 65536, "lazy_refcounts=on", &["zero", "compressed", "snapshots"]);
    // A zero cluster that keeps its host cluster, which a snapshot has with data in it.
    qemu.io(&path, "qcow2", &["write -P 5 8M 192k"]);
    qemu.img(&["snapshot", "-c", "three", path.to_str().unwrap()]).ok();
    qemu.io(&path, "qcow2", &["write -z 8M 128k", "write -P 6 9M 64k", "write -z 9M 64k"]);
    let before = disks_of(&path, None);
    assert!(before.iter().any(|disk| disk[8 << 20] == 5));
    on(&path, &version(2)).unwrap();
    assert_eq!(specific(&qemu, &path, "compat"), "\"0.10\"");
    qemu.assert_clean(&path);
    assert!(before == disks_of(&path, None));
    on(&path, &version(3)).unwrap();
    assert_eq!(specific(&qemu, &path, "compat"), "\"1.1\"");
    assert_eq!(specific(&qemu, &path, "lazy-refcounts"), "false");
    let header = read_header(&FileStorage::open(&path, Access::ReadOnly).unwrap()).unwrap();
    assert_eq!(header.feature_names().len(), 8);
    qemu.assert_clean(&path);
    assert!(before == disks_of(&path, None));
}

/// An overlay with zero clusters of every kind, over a backing file full of data.
fn overlay(qemu: &Qemu, dir: &Fixture) -> (PathBuf, PathBuf) {
    let (base, path) = (dir.path("base"), dir.path("overlay"));
    qemu.create(&base, "", Some(4 << 20));
    qemu.io(&base, "qcow2", &["write -P 1 0 4M"]);
    let options = format!("backing_file={},backing_fmt=qcow2", base.display());
    qemu.create(&path, &options, None);
    qemu.io(&path, "qcow2", &["write -P 2 0 1M", "write -z 64k 64k", "write -z -u 2M 256k"]);
    qemu.img(&["snapshot", "-c", "one", path.to_str().unwrap()]).ok();
    qemu.io(
        &path,
        "qcow2",
        &["write -z 256k 128k", "write -z -u 3M 64k", "write -P 3 512k 64k", "write -z 512k 64k"],
    );
    (base, path)
}

#[test]
fn zero_clusters_over_a_backing_file_become_clusters_of_zeroes() {
    let Some(qemu) = Qemu::find() else { return };
    let dir = Fixture::new();
    let (base, path) = overlay(&qemu, &dir);
    let before = disks_of(&path, Some(&base));
    on(&path, &version(2)).unwrap();
    assert_eq!(specific(&qemu, &path, "compat"), "\"0.10\"");
    qemu.assert_clean(&path);
    assert!(before == disks_of(&path, Some(&base)));
    assert!(qemu.guest_bytes(&path, "qcow2", &[]) == before[0]);
    assert!(qemu.guest_bytes(&path, "qcow2", &["-l", "one"]) == before[1]);
}

#[test]
fn snapshots_of_version_2_get_their_fields() {
    let Some(qemu) = Qemu::find() else { return };
    let dir = Fixture::new();
    let path = image(&qemu, &dir, "image", 4096, "compat=0.10", &["snapshots"]);
    let mut bytes = std::fs::read(&path).unwrap();
    let table = be64(&bytes, 64) as usize;
    let mut new = Vec::new();
    let mut at = table;
    for _ in 0..2 {
        let half = |at: usize| u16::from_be_bytes([bytes[at], bytes[at + 1]]) as usize;
        let (names, extra) = (half(at + 12) + half(at + 14), half(at + 38));
        new.extend_from_slice(&bytes[at..at + 36]);
        new.extend_from_slice(&[0; 4]);
        new.extend_from_slice(&bytes[at + 40 + extra..][..names]);
        new.resize(new.len().next_multiple_of(8), 0);
        at += (40 + extra + names).next_multiple_of(8);
    }
    bytes[table..table + new.len()].copy_from_slice(&new);
    std::fs::write(&path, &bytes).unwrap();
    let before = disks_of(&path, None);
    on(&path, &version(3)).unwrap();
    qemu.assert_clean(&path);
    assert!(before == disks_of(&path, None));
    let image =
        Qcow2::open(Arc::new(FileStorage::open(&path, Access::ReadOnly).unwrap()), &OpenOptions::default())
            .unwrap();
    assert!(image.snapshots().iter().all(|s| s.disk_size == Some(200 * 4096 + 512)));
}

#[test]
fn header_fields_change_alone_and_unknown_ones_stay() {
    let Some(qemu) = Qemu::find() else { return };
    let dir = Fixture::new();
    let path = dir.path("image");
    qemu.create(&path, "", Some(1 << 20));
    // An unknown extension, and unknown compatible bit.
    let storage = FileStorage::open(&path, Access::ReadWrite).unwrap();
    let mut header = read_header(&storage).unwrap();
    let unknown = qcow2_engine::format::header::extension::Extension::Unknown {
        magic: 0x1234_5678,
        data: b"keep me".to_vec(),
    };
    header.extensions.push(unknown.clone());
    storage.write_all_at(Mem::from(&header.encode().unwrap()[..]), 0).unwrap();
    drop(storage);
    let lazy = |on| AmendOptions { lazy_refcounts: Some(on), ..AmendOptions::default() };
    for (options, field, value) in [
        (lazy(true), "lazy-refcounts", "true"),
        (bits(64), "refcount-bits", "64"),
        (lazy(true), "lazy-refcounts", "true"),
        (lazy(false), "lazy-refcounts", "false"),
        (bits(16), "refcount-bits", "16"),
        (version(2), "compat", "\"0.10\""),
        (version(3), "compat", "\"1.1\""),
    ] {
        on(&path, &options).unwrap();
        assert_eq!(specific(&qemu, &path, field), value);
        let header = read_header(&FileStorage::open(&path, Access::ReadOnly).unwrap()).unwrap();
        assert!(header.extensions.contains(&unknown), "{options:?}");
        qemu.assert_clean(&path);
    }
    let bytes = std::fs::read(&path).unwrap();
    on(&path, &AmendOptions::default()).unwrap();
    assert!(bytes == std::fs::read(&path).unwrap(), "nothing to change");
}

#[test]
fn data_files() {
    let Some(qemu) = Qemu::find() else { return };
    let dir = Fixture::new();
    let path = dir.path("image");
    let data = dir.path("data");
    qemu.create(&path, &format!("data_file={},data_file_raw=on", data.display()), Some(1 << 20));
    let named = AmendOptions { data_file: Some(b"other".to_vec()), ..AmendOptions::default() };
    on(&path, &AmendOptions { data_file_raw: Some(false), ..named }).unwrap();
    let header = read_header(&FileStorage::open(&path, Access::ReadOnly).unwrap()).unwrap();
    assert!(!header.data_file_raw());
    assert_eq!(header.data_file(), Some(&b"other"[..]));
    let raw = AmendOptions { data_file_raw: Some(true), ..AmendOptions::default() };
    assert_eq!(on(&path, &raw).unwrap_err().field(), Some("data_file_raw"));
    assert_eq!(on(&path, &version(2)).unwrap_err().kind(), ErrorKind::InvalidArgument);
}

#[test]
fn refcounts_that_overflowed_get_room_and_can_be_repaired_then() {
    let Some(qemu) = Qemu::find() else { return };
    let dir = Fixture::new();
    let path = dir.path("image");
    qemu.create(&path, "refcount_bits=1", Some(1 << 20));
    qemu.io(&path, "qcow2", &["write -P 7 0 64k", "write -P 8 192k 64k"]);
    let bytes = std::fs::read(&path).unwrap();
    let l2 = be64(&bytes, be64(&bytes, 40)) & !(1 << 63);
    // Three guest clusters share one host cluster, which can be counted once.
    let first = be64(&bytes, l2).to_be_bytes();
    poke(&path, l2 + 8, &first);
    poke(&path, l2 + 16, &first);
    let guest = qemu.guest_bytes(&path, "qcow2", &[]);
    assert_eq!(fix(&path).corruptions, 2);
    let copy = dir.path("copy");
    for width in [2u32, 16, 64] {
        std::fs::copy(&path, &copy).unwrap();
        on(&copy, &bits(width)).unwrap();
        assert_eq!(qemu.info_json(&copy)["format-specific"]["data"]["refcount-bits"], width);
        let report = fix(&copy);
        assert_eq!((report.corruptions, report.check_errors), (0, 0), "{report:#?}");
        qemu.assert_clean(&copy);
        assert!(qemu.guest_bytes(&copy, "qcow2", &[]) == guest);
    }
    // Other damage is to be repaired first.
    poke(&path, l2 + 32, &((be64(&bytes, l2) & !(1 << 63)) + 512).to_be_bytes());
    assert_eq!(on(&path, &bits(2)).unwrap_err().kind(), ErrorKind::Corrupt);
}

/// Repairs all of the image at `path`.
fn fix(path: &Path) -> CheckReport {
    let storage = FileStorage::open(path, Access::ReadWrite).unwrap();
    repair(&storage, Repair::All, &CheckOptions::default(), &Job::new()).unwrap()
}

#[test]
fn what_is_refused_changes_nothing() {
    let Some(qemu) = Qemu::find() else { return };
    let dir = Fixture::new();
    let path = dir.path("image");
    let refuse = |create: &str, options: AmendOptions, field: &str| -> Error {
        qemu.create(&path, create, Some(1 << 20));
        let before = std::fs::read(&path).unwrap();
        let error = on(&path, &options).unwrap_err();
        assert_eq!(error.field(), Some(field), "{create} {options:?}: {error}");
        assert!(before == std::fs::read(&path).unwrap(), "{create} {options:?}");
        std::fs::remove_file(&path).unwrap();
        error
    };
    refuse("", bits(0), "refcount_bits");
    refuse("", bits(7), "refcount_bits");
    refuse("", bits(128), "refcount_bits");
    refuse("compat=0.10", bits(8), "refcount_bits");
    refuse("refcount_bits=8", version(2), "refcount_bits");
    refuse("", version(4), "version");
    refuse("", AmendOptions { version: Some(2), ..bits(8) }, "refcount_bits");
    refuse("extended_l2=on", version(2), "incompatible_features");
    let lazy = AmendOptions { lazy_refcounts: Some(true), ..AmendOptions::default() };
    refuse("compat=0.10", lazy, "lazy_refcounts");
    let backing = AmendOptions { backing_file: Some(b"x".to_vec()), ..AmendOptions::default() };
    refuse("", backing, "backing_file");
    let data = AmendOptions { data_file: Some(b"x".to_vec()), ..AmendOptions::default() };
    refuse("", data, "data_file");
    qemu.create(&path, "compression_type=zstd", Some(1 << 20));
    on(&path, &version(2)).unwrap();
    qemu.assert_clean(&path);
    std::fs::remove_file(&path).unwrap();
    qemu.create(&path, "compression_type=zstd", Some(1 << 20));
    qemu.io(&path, "qcow2", &["write -c -P 1 0 64k"]);
    assert_eq!(on(&path, &version(2)).unwrap_err().field(), Some("compression_type"));
}

#[test]
fn a_crash_at_any_point_leaves_the_old_image_or_the_new_one() {
    let Some(qemu) = Qemu::find() else { return };
    let dir = Fixture::new();
    let (base, path) = overlay(&qemu, &dir);
    let backing: Arc<dyn Storage> = Arc::new(FileStorage::open(&base, Access::ReadOnly).unwrap());
    let features = &["zero", "compressed", "snapshots"];
    let plain = image(&qemu, &dir, "plain", 4096, "", features);
    let old = image(&qemu, &dir, "old", 4096, "compat=0.10", &["snapshots"]);
    let mut states = 0;
    for (path, backing, options) in [
        (&path, Some(&backing), version(2)),
        (&path, Some(&backing), bits(64)),
        (&plain, None, version(2)),
        (&plain, None, bits(32)),
        (&plain, None, AmendOptions { lazy_refcounts: Some(true), ..AmendOptions::default() }),
        (&old, None, version(3)),
    ] {
        let bytes = std::fs::read(path).unwrap();
        let mut file = Sparse::new(bytes.len() as u64);
        file.write(0, &bytes);
        let (mut session, storages) = Session::new(vec![file], Durability::Flush);
        let storage: Arc<dyn Storage> = storages[0].clone();
        let before = disks(&storage, backing);
        run(&*storage, &options).unwrap();
        let after = read_header(&*storage).unwrap();
        for state in session.states(3, 60) {
            let storage: Arc<dyn Storage> = Arc::new(RecordingStorage::plain(state.files[0].clone()));
            let text = format!("{options:?}: cut {} {:?}", state.cut, state.shape);
            let header = read_header(&*storage).unwrap_or_else(|e| panic!("{text}: {e}"));
            let report = check(&*storage, &header, &CheckOptions::default(), &Job::new()).unwrap();
            assert_eq!((report.corruptions, report.check_errors), (0, 0), "{text} {report:#?}");
            assert!(before == disks(&storage, backing), "{text}");
            run(&*storage, &options).unwrap();
            assert_eq!(read_header(&*storage).unwrap().version, after.version);
            states += 1;
        }
    }
    assert!(states > 200, "{states}");
}
