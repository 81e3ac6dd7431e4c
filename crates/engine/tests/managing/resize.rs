//! Shrinking and growing, on every kind of image: what stays, what is freed, what is refused; QEMU does the same and
//! judges; power cuts.

use crate::contents;

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use contents::{Contents, assert_clean, bytes, explore, geometries, snapshot_of, writable};
use qcow2_engine::create::Preallocation;
use qcow2_engine::storage::{Access, FileStorage};
use qcow2_engine::{ErrorKind, ReadStorage, ResizeOptions, Storage, StorageExt};
use qcow2_testkit::audit::audit;
use qcow2_testkit::disk_model::{Rig, open_file};
use qcow2_testkit::matrix::{Backing, DataFile, Geometry};
use qcow2_testkit::ops::Target;
use qcow2_testkit::recorder::RecordingStorage;
use qcow2_testkit::storage::{Door, Fault, FaultStorage, Hooked, Op};
use qcow2_testkit::{Fixture, Qemu, Sparse};

const SHRINK: ResizeOptions = ResizeOptions { shrink: true, preallocation: Preallocation::Off };

/// Rigs that can be resized: version 2 cannot with snapshots, so its rig has none.
fn rig(geometry: &Geometry, seed: u64) -> Rig {
    let geometry = match geometry.version {
        // Narrow enough that the rig makes no snapshot; version 2 has 16 bits in any case.
        2 => Geometry { data_file: DataFile::Internal, refcount_bits: 16, ..geometry.clone() },
        _ => geometry.clone(),
    };
    Rig::forge(&geometry, seed)
}

fn sizes(geometry: &Geometry) -> Vec<u64> {
    let (c, size) = (geometry.cluster_size, geometry.size / 512 * 512);
    let aligned = |n: u64| n / c * c;
    let mut sizes = vec![aligned(size / 2), aligned(size / 3) + 512, 512, size - 512];
    sizes.retain(|s| *s < size && *s > 0);
    sizes
}

fn has_snapshots(rig: &Rig) -> bool {
    rig.geometry.version < 3 && rig.geometry.snapshots()
}

#[test]
fn shrinking_keeps_the_front_and_frees_the_rest() {
    for geometry in geometries() {
        for (seed, size) in sizes(&geometry).into_iter().enumerate() {
            let rig = rig(&geometry, seed as u64);
            let what = format!("{} to {size}", geometry.name());
            let files: Vec<_> = rig.files().into_iter().map(RecordingStorage::plain).map(Arc::new).collect();
            let storages: Vec<_> = files.iter().map(|f| f.clone() as Arc<dyn Storage>).collect();
            let before = Contents::of(&rig, &rig.files());
            let image = rig.open(&storages, &writable()).unwrap();
            if has_snapshots(&rig) {
                let error = image.resize_with(size, SHRINK).unwrap_err();
                assert_eq!(error.kind(), ErrorKind::UnsupportedFeature, "{what}");
                continue;
            }
            assert_eq!(image.resize(size).unwrap_err().kind(), ErrorKind::DataLoss, "{what}");
            image.resize_with(size, SHRINK).unwrap_or_else(|e| panic!("{what}: {e:?}"));
            assert!(bytes(&image) == before.active[..size as usize], "{what}: while open");
            image.resize(before.active.len() as u64 / 512 * 512).unwrap();
            let grown = bytes(&image);
            assert!(grown[..size as usize] == before.active[..size as usize], "{what}: grown");
            assert!(grown[size as usize..].iter().all(|b| *b == 0), "{what}: the new part is not zero");
            image.resize_with(size, SHRINK).unwrap();
            image.close().unwrap();
            let now: Vec<_> = files.iter().map(|f| snapshot_of(&**f)).collect();
            assert_clean(&now, &what);
            let after = Contents::of(&rig, &now);
            assert!(after.active == before.active[..size as usize], "{what}: the active disk");
            assert!(after.snapshots == before.snapshots, "{what}: a snapshot");
            assert!(
                rig.geometry.data_file == DataFile::Internal || now[1].len() == size,
                "{what}: data file"
            );
        }
    }
}

/// What is preallocated is there before it is mapped, and reads as zeroes, however the file says so.
#[test]
fn no_power_cut_while_a_disk_grows_preallocated_leaves_anything_between() {
    let plain = Geometry { size: 64 * 4096, ..Geometry::plain(4096) };
    let door = Geometry { door: Door::Xts, ..plain.clone() };
    for geometry in [
        Geometry { extended_l2: true, size: 40 * 16384, door: Door::Scrambling, ..Geometry::plain(16384) },
        Geometry {
            extended_l2: true,
            size: 40 * 16384,
            door: Door::LegacyAes,
            backing: Backing::LongerQcow2,
            ..Geometry::plain(16384)
        },
        Geometry { data_file: DataFile::External, ..door.clone() },
        Geometry { backing: Backing::LongerQcow2, ..door.clone() },
        plain,
        door,
    ] {
        let rig = Rig::forge(&geometry, 3);
        let before = Contents::of(&rig, &rig.files());
        for preallocation in [Preallocation::Metadata, Preallocation::Falloc, Preallocation::Full] {
            let what = format!("{} {preallocation:?}", geometry.name());
            let size = before.active.len() as u64 + 9 * geometry.cluster_size + 512;
            let options = ResizeOptions { shrink: false, preallocation };
            let files = explore(&rig, 4, 30, &what, |image| image.resize_with(size, options));
            let after = Contents::of(&rig, &files);
            let zero = after.active[before.active.len()..].iter().all(|byte| *byte == 0);
            assert!(after.active.len() as u64 == size && zero, "{what}");
        }
    }
}

/// Whoever lets the disk grow again, what was on it is gone.
#[test]
fn a_disk_cut_to_nothing_keeps_nothing() {
    let Some(qemu) = Qemu::find() else { return };
    for options in ["cluster_size=512", "compat=0.10", "cluster_size=16k,extended_l2=on"] {
        let fixture = Fixture::new();
        let path = fixture.path("a.qcow2");
        qemu.create(&path, options, Some(1 << 20));
        qemu.io(&path, "qcow2", &["write -q -P 7 0 1M".to_owned()]);
        let geometry = Geometry { size: 1 << 20, ..Geometry::plain(65536) };
        let rig = Rig { geometry, image: Sparse::new(0), data_file: None, backing: None };
        let file = Arc::new(FileStorage::open(&path, Access::ReadWrite).unwrap());
        let image = rig.open(&[file as Arc<dyn Storage>], &writable()).unwrap();
        image.resize_with(0, SHRINK).unwrap();
        image.close().unwrap();
        qemu.assert_clean(&path);
        qemu.img(&["resize", "-q", "-f", "qcow2", path.to_str().unwrap(), "1M"]).ok();
        assert!(qemu.guest_bytes(&path, "qcow2", &[]).iter().all(|b| *b == 0), "{options}: it is back");
    }
}

#[test]
fn no_power_cut_during_a_shrink_leaves_anything_between() {
    // Every second one, unless more time was asked for (see .ci/crash).
    let step = if std::env::var_os("QCOW2_CRASH_STATES").is_some() { 1 } else { 2 };
    for geometry in geometries().into_iter().step_by(step) {
        let mut rig = rig(&geometry, 7);
        if has_snapshots(&rig) {
            continue;
        }
        let sizes = sizes(&geometry);
        let random = if geometry.cluster_size > 65536 { 8 } else { 30 };
        for size in [sizes[0], sizes[1]] {
            let what = format!("{} to {size}", geometry.name());
            let files = explore(&rig, 1, random, &what, |image| image.resize_with(size, SHRINK));
            assert_clean(&files, &what);
        }
        let size = sizes[0];
        rig.image = explore(&rig, 2, 10, "a shrink", |image| image.resize_with(size, SHRINK))[0].clone();
        let what = format!("{}: back", geometry.name());
        explore(&rig, 3, random, &what, |image| image.resize(geometry.size / 512 * 512));
    }
}

/// Refcount blocks by their index in the table, and those of them that count nothing but themselves.
fn refcount_blocks(file: &Sparse) -> (usize, Vec<u64>) {
    let (table, clusters, size) = (file.u64(48), u64::from(file.u32(56)), 1u64 << file.u32(20));
    let bits = 1u64 << file.u32(96);
    let (mut blocks, mut empty) = (0, Vec::new());
    for index in 0..clusters * size / 8 {
        let offset = file.u64(table + index * 8);
        if offset == 0 {
            continue;
        }
        blocks += 1;
        let mut bytes = file.get(offset, size as usize);
        let own = (offset / size).checked_sub(index * (size * 8 / bits)).map(|own| (own * bits / 8) as usize);
        if let Some(own) = own.and_then(|own| bytes.get_mut(own..own + (bits / 8) as usize)) {
            own.fill(0);
        }
        if bytes.iter().all(|byte| *byte == 0) {
            empty.push(index);
        }
    }
    (blocks, empty)
}

/// A disk of which all is written, over many refcount blocks.
fn filled(path: &std::path::Path, qemu: &Qemu) -> Sparse {
    qemu.create(path, "cluster_size=512,refcount_bits=64", Some(192 << 10));
    // As a guest writes that fills its disk bit by bit, and the front last.
    let writes: Vec<String> =
        (0..6).rev().map(|n| format!("write -q -P {} {}k 32k", n + 1, n * 32)).collect();
    qemu.io(path, "qcow2", &writes);
    snapshot_of(&FileStorage::open(path, Access::ReadOnly).unwrap())
}

#[test]
fn a_smaller_disk_gives_refcount_blocks_back() {
    let Some(qemu) = Qemu::find() else { return };
    let fixture = Fixture::new();
    let [ours, theirs] = ["ours", "theirs"].map(|name| fixture.path(name));
    let before = refcount_blocks(&filled(&theirs, &qemu));
    std::fs::copy(&theirs, &ours).unwrap();
    let image = open_file(&ours, &writable()).unwrap();
    image.resize_with(32 << 10, SHRINK).unwrap();
    // The image goes on: blocks come back where clusters need them.
    image.write(0, &[9; 512]).unwrap();
    image.close().unwrap();
    let (blocks, empty) = refcount_blocks(&snapshot_of(&FileStorage::open(&ours, Access::ReadOnly).unwrap()));
    assert!(empty.is_empty() && blocks < before.0, "{before:?}, then {blocks}, and of these {empty:?}");
    qemu.img(&["resize", "-q", "--shrink", theirs.to_str().unwrap(), "32k"]).ok();
    let [length, most] = [&ours, &theirs].map(|path| std::fs::metadata(path).unwrap().len());
    assert!(length <= most, "{length} bytes, QEMU's has {most}");
    qemu.assert_clean(&ours);
    qemu.img(&["resize", "-q", ours.to_str().unwrap(), "192k"]).ok();
    qemu.io(&ours, "qcow2", &["write -q -P 3 32k 160k"]);
    qemu.assert_clean(&ours);
}

#[test]
fn no_power_cut_while_refcount_blocks_go_leaves_more_than_leaks() {
    let Some(qemu) = Qemu::find() else { return };
    let fixture = Fixture::new();
    let image = filled(&fixture.path("a"), &qemu);
    let geometry = Geometry { refcount_bits: 64, size: 192 << 10, ..Geometry::plain(512) };
    let rig = Rig { geometry, image, data_file: None, backing: None };
    let blocks = refcount_blocks(&rig.image).0;
    for (seed, size) in [(1, 32 << 10), (2, 512), (3, (100 << 10) + 512)] {
        let what = format!("to {size}");
        let files = explore(&rig, seed, 60, &what, |image| image.resize_with(size, SHRINK));
        assert_clean(&files, &what);
        let (left, empty) = refcount_blocks(&files[0]);
        assert!(left < blocks && empty.is_empty(), "{what}: {left} of {blocks} blocks, {empty:?}");
    }
}

/// A table is as long as the disk needs it to be, and an L2 table has its space, whatever it maps: a guest may fill it when the
/// file system is full.
#[test]
fn an_l2_table_that_is_cut_keeps_its_space() {
    let Some(qemu) = Qemu::find() else { return };
    let fixture = Fixture::new();
    let path = fixture.path("a");
    qemu.create(&path, "cluster_size=1M,preallocation=metadata", Some(100 << 20));
    let image = open_file(&path, &writable()).unwrap();
    image.resize_with(5 << 20, SHRINK).unwrap();
    image.close().unwrap();
    qemu.assert_clean(&path);
    let file = FileStorage::open(&path, Access::ReadOnly).unwrap();
    let header = snapshot_of(&file);
    let l2 = header.u64(header.u64(40)) & 0x00ff_ffff_ffff_fe00;
    let run = file.run(l2..l2 + (1 << 20)).unwrap();
    assert!(run.data && run.end >= l2 + (1 << 20), "{run:?}");
}

#[test]
fn what_would_be_lost_is_told() {
    let Some(qemu) = Qemu::find() else { return };
    let fixture = Fixture::new();
    let path = fixture.path("a.qcow2");
    qemu.create(&path, "", Some(8 << 20));
    qemu.io(&path, "qcow2", &["write -P 5 0 1M", "write -P 6 4M 192k", "write -z 6M 1M"]);
    let image = open_file(&path, &writable()).unwrap();
    let error = image.resize(1 << 20).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::DataLoss);
    assert!(error.to_string().contains("196608 bytes of data"), "{error}");
    let error = image.resize(5 << 20).unwrap_err();
    assert!(error.to_string().contains(" 0 bytes of data"), "{error}");
    let both = ResizeOptions { shrink: true, preallocation: Preallocation::Full };
    assert_eq!(image.resize_with(1 << 20, both).unwrap_err().kind(), ErrorKind::InvalidArgument);
    assert_eq!(image.resize_with(1000, SHRINK).unwrap_err().kind(), ErrorKind::InvalidArgument);
    image.close().unwrap();
    assert_eq!(qemu.info_json(&path)["virtual-size"], 8 << 20);
}

#[test]
fn preallocated_growth_reads_as_zeroes_and_has_its_clusters() {
    let Some(qemu) = Qemu::find() else { return };
    for options in [
        "cluster_size=64k",
        "cluster_size=512",
        "compat=0.10,cluster_size=4k",
        "extended_l2=on,cluster_size=16k",
        "refcount_bits=1,cluster_size=2M",
        "BACKING",
        "BACKING,extended_l2=on",
        "data_file=DATA",
        "data_file=DATA,data_file_raw=on",
    ] {
        for mode in [Preallocation::Metadata, Preallocation::Falloc, Preallocation::Full] {
            let fixture = Fixture::new();
            let path = fixture.path("a.qcow2");
            qemu.create(&fixture.path("base.qcow2"), "", Some(8 << 20));
            qemu.io(&fixture.path("base.qcow2"), "qcow2", &["write -P 9 0 8M"]);
            let full = options.replace("DATA", fixture.path("data.raw").to_str().unwrap()).replace(
                "BACKING",
                &format!("backing_fmt=qcow2,backing_file={}", fixture.path("base.qcow2").display()),
            );
            qemu.create(&path, &full, Some((1 << 20) + 512));
            qemu.io(&path, "qcow2", &["write -P 5 100k 300k"]);
            let what = format!("{options} {mode:?}");
            let theirs = fixture.path("theirs.qcow2");
            std::fs::copy(&path, &theirs).unwrap();
            let image = open_file(&path, &writable()).unwrap();
            let before = bytes(&image);
            let size = (3 << 20) + 1024;
            let grow = ResizeOptions { shrink: false, preallocation: mode };
            image.resize_with(size, grow).unwrap_or_else(|e| panic!("{what}: {e:?}"));
            let now = bytes(&image);
            assert!(now[..before.len()] == before, "{what}: what was there");
            assert!(now[before.len()..].iter().all(|b| *b == 0), "{what}: the new part");
            image.close().unwrap();
            qemu.assert_clean(&path);
            assert!(qemu.guest_bytes(&path, "qcow2", &[]) == now, "{what}: as QEMU reads it");
            let allocated = |path: &std::path::Path| {
                let check = qemu.img(&["check", "--output=json", path.to_str().unwrap()]).stdout;
                let check: serde_json::Value = serde_json::from_str(&check).unwrap();
                check["allocated-clusters"].as_u64().unwrap()
            };
            let cluster = qemu.info_json(&path)["cluster-size"].as_u64().unwrap();
            // The last cluster of the old size, which is part of the new one, too.
            let wanted = size.div_ceil(cluster) - before.len() as u64 / cluster;
            assert!(allocated(&path) >= wanted, "{what}: {}", allocated(&path));
            if !options.contains("DATA") {
                let preallocation = format!("--preallocation={mode:?}").to_lowercase();
                let args = ["resize", "-q", &preallocation, theirs.to_str().unwrap(), &size.to_string()];
                qemu.img(&args).ok();
                assert_eq!(allocated(&path), allocated(&theirs), "{what}");
            }
            if mode != Preallocation::Metadata {
                let file = if options.contains("DATA") { fixture.path("data.raw") } else { path.clone() };
                let used = qcow2_testkit::at::space(&file).unwrap();
                assert!(used >= 2 << 20, "{what}: only {used} bytes are reserved");
            }
            // QEMU takes it from there, and back.
            qemu.io(&path, "qcow2", &["write -P 7 2M 64k"]);
            qemu.img(&["resize", "-q", "--shrink", path.to_str().unwrap(), "1M"]).ok();
            qemu.assert_clean(&path);
        }
    }
}

/// Any call fails: the disk is the old one or the new one, with leaks at worst.
#[test]
fn any_call_may_fail_during_a_shrink() {
    let mut failed = 0;
    for geometry in geometries().into_iter().filter(|g| g.cluster_size <= 65536 && g.version >= 3) {
        let rig = rig(&geometry, 21);
        let size = sizes(&geometry)[1];
        let before = Contents::of(&rig, &rig.files());
        for n in 0..40 {
            let what = format!("{} call {n}", geometry.name());
            let files: Vec<_> = rig.files().into_iter().map(RecordingStorage::plain).map(Arc::new).collect();
            let mut storages: Vec<_> = files.iter().map(|f| f.clone() as Arc<dyn Storage>).collect();
            let errno = if n % 2 == 0 { 28 } else { 5 };
            storages[0] = Arc::new(FaultStorage::new(storages[0].clone(), Fault::nth(10 + n, errno)));
            let Ok(image) = rig.open(&storages, &writable()) else { continue };
            let done = image.resize_with(size, SHRINK);
            let _ = image.close();
            failed += u64::from(done.is_err());
            let now: Vec<_> = files.iter().map(|f| snapshot_of(&**f)).collect();
            let findings = qcow2_testkit::audit::audit(&now[0]);
            assert!(findings.is_sound(), "{what}, {done:?}: {:#?}", findings.corruptions);
            let mut after = Contents::of(&rig, &now);
            assert!(done.is_err() || after.active.len() as u64 == size, "{what}");
            if after.active.len() as u64 == size {
                after.active.extend_from_slice(&before.active[size as usize..]);
            }
            let difference = before.difference(&after);
            assert!(difference.is_none(), "{what}, {done:?}: {difference:?}");
        }
    }
    assert!(failed > 50, "only {failed} failed");
}

/// The new L1 table is longer than one refcount block covers, and the refcount table has to grow for it.
#[test]
fn a_disk_of_small_clusters_grows_far() {
    for refcount_bits in [16, 64] {
        let geometry = Geometry { refcount_bits, size: 1 << 20, ..Geometry::plain(512) };
        let rig = Rig::forge(&geometry, 3);
        let files: Vec<_> = rig.files().into_iter().map(RecordingStorage::plain).map(Arc::new).collect();
        let storages: Vec<_> = files.iter().map(|f| f.clone() as Arc<dyn Storage>).collect();
        let before = Contents::of(&rig, &rig.files());
        let image = rig.open(&storages, &writable()).unwrap();
        let size = 2u64 << 30;
        image.resize(size).unwrap();
        image.write(size - 512, &[7; 512]).unwrap();
        image.close().unwrap();
        let file = snapshot_of(&*files[0]);
        assert!(audit(&file).is_clean(), "{refcount_bits} bits");
        assert!(file.len() < 8 << 20, "{refcount_bits} bits: {} bytes", file.len());
        let image = rig.open(&storages, &writable()).unwrap();
        let mut front = vec![0; before.active.len()];
        image.read(0, &mut front).unwrap();
        assert!(front == before.active, "{refcount_bits} bits");
    }
}

/// A disk that becomes so large that its L1 table needs refcount blocks, and these a longer refcount table.
fn grows_far() -> (Rig, u64) {
    (Rig::forge(&Geometry { refcount_bits: 64, size: 1 << 19, ..Geometry::plain(512) }, 4), 160 << 20)
}

#[test]
fn any_call_may_fail_while_a_table_grows_far() {
    let (rig, size) = grows_far();
    let before = Contents::of(&rig, &rig.files());
    let same = |file: &Sparse, what: &str| {
        let findings = audit(file);
        assert!(findings.is_sound(), "{what}: {:#?}", findings.corruptions);
        let mut after = Contents::of(&rig, std::slice::from_ref(file));
        after.active.truncate(before.active.len());
        assert_eq!(before.difference(&after), None, "{what}");
    };
    let mut failed = 0;
    for n in 0..40 {
        let file = Arc::new(RecordingStorage::plain(rig.image.clone()));
        let faulty = Arc::new(FaultStorage::new(file.clone(), Fault::nth(5 + n, 5)));
        let Ok(image) = rig.open(&[faulty as Arc<dyn Storage>], &writable()) else { continue };
        let grown = image.resize(size);
        failed += u64::from(grown.is_err());
        let _ = image.close();
        same(&snapshot_of(&*file), &format!("call {n}: {grown:?}"));
    }
    assert!(failed > 10, "{failed}");
}

/// It harms nothing: the disk grows when there is room.
#[test]
fn a_file_system_may_be_full_while_a_table_grows_far() {
    let (rig, size) = grows_far();
    let before = Contents::of(&rig, &rig.files());
    for n in 0.. {
        let file = Arc::new(RecordingStorage::plain(rig.image.clone()));
        let (end, calls) = (rig.image.len(), AtomicU64::new(0));
        let full = Hooked::with(file.clone(), move |op, range: Range<u64>| {
            let takes_space = matches!(op, Op::Write | Op::Zero | Op::Allocate) && range.end > end;
            match takes_space && calls.fetch_add(1, Ordering::Relaxed) == n {
                true => Err(std::io::Error::from_raw_os_error(28)),
                false => Ok(()),
            }
        });
        let image = rig.open(&[Arc::new(full) as Arc<dyn Storage>], &writable()).unwrap();
        let grown = image.resize(size);
        if grown.is_ok() {
            assert!(n >= 3, "{n}");
            break;
        }
        let what = format!("write {n}: {grown:?}");
        assert!(grown.unwrap_err().is_no_space(), "{what}");
        image.resize(size).unwrap_or_else(|e| panic!("{what}, again: {e}"));
        image.write(size - 512, &[7; 512]).unwrap_or_else(|e| panic!("{what}: {e}"));
        image.close().unwrap_or_else(|e| panic!("{what}: {e}"));
        let now = snapshot_of(&*file);
        assert!(audit(&now).is_clean(), "{what}: {:#?}", audit(&now));
        let mut after = Contents::of(&rig, &[now]);
        after.active.truncate(before.active.len());
        assert_eq!(before.difference(&after), None, "{what}");
    }
}

#[test]
fn no_power_cut_while_a_table_grows_far_leaves_more_than_leaks() {
    let (rig, size) = grows_far();
    let files = explore(&rig, 5, 30, "a table longer than a block covers", |image| image.resize(size));
    assert_clean(&files, "a table longer than a block covers");
}

/// The rest of the cluster in which a disk ended before is part of what is preallocated.
#[test]
fn the_cluster_of_the_old_end_gets_its_space_too() {
    let Some(qemu) = Qemu::find() else { return };
    let fixture = Fixture::new();
    for (options, name) in [("cluster_size=64k", "plain"), ("cluster_size=64k,extended_l2=on", "extended")] {
        for mode in [Preallocation::Falloc, Preallocation::Full] {
            for written in ["", "write -P 5 0 512", "write -P 5 128k 512", "write -z 128k 1k"] {
                let what = format!("{name} {mode:?} '{written}'");
                let [ours, theirs] = ["ours", "theirs"].map(|name| fixture.path(name));
                qemu.create(&theirs, options, Some((128 << 10) + 4096));
                if !written.is_empty() {
                    qemu.io(&theirs, "qcow2", &[written]);
                }
                std::fs::copy(&theirs, &ours).unwrap();
                let size = (448 << 10) + 512;
                let image = open_file(&ours, &writable()).unwrap();
                let grow = ResizeOptions { shrink: false, preallocation: mode };
                image.resize_with(size, grow).unwrap();
                image.close().unwrap();
                let preallocation = format!("--preallocation={mode:?}").to_lowercase();
                qemu.img(&["resize", "-q", &preallocation, theirs.to_str().unwrap(), &size.to_string()]).ok();
                let map = qemu.map_json(&ours, "qcow2");
                let stored =
                    map.as_array().unwrap().iter().filter(|e| e["start"].as_u64().unwrap() >= 128 << 10);
                assert!(stored.clone().all(|e| e.get("offset").is_some()), "{what}: {map}");
                qemu.assert_clean(&ours);
                qemu.assert_identical(&ours, "qcow2", &theirs, "qcow2");
                // What has its space already takes no more of it.
                let file = FileStorage::open(&ours, Access::ReadWrite).unwrap();
                let held = file.allocated_bytes().unwrap();
                for extent in stored {
                    let [offset, length] = ["offset", "length"].map(|name| extent[name].as_u64().unwrap());
                    let start = offset - offset % (64 << 10);
                    file.reserve(start, (offset + length).next_multiple_of(64 << 10) - start).unwrap();
                }
                assert_eq!(file.allocated_bytes().unwrap(), held, "{what}: {map}");
            }
        }
    }
}
