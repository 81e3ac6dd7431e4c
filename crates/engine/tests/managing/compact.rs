//! Compaction on every kind of image: the disk and its snapshots read the same, both checkers find nothing, the file is
//! smaller; at every power cut in between, too.

use crate::contents;

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use contents::{Contents, KEPT, assert_clean, explore, geometries, snapshot_of, writable};
use qcow2_engine::compact::{CompactOptions, CompactResult};
use qcow2_engine::convert::{Compression, ConvertOptions, ConvertTarget, convert};
use qcow2_engine::create::{CreateOptions, NewTarget};
use qcow2_engine::storage::MemoryStorage;
use qcow2_engine::{Image, Job, Mem, MemMut, Raw, Storage};
use qcow2_testkit::audit::audit;
use qcow2_testkit::disk_model::{Opening, Rig, open_file};
use qcow2_testkit::forge::codec::{deflate, deflate_stored};
use qcow2_testkit::matrix::Geometry;
use qcow2_testkit::recorder::RecordingStorage;
use qcow2_testkit::storage::{Fault, FaultStorage, Hooked, Op};
use qcow2_testkit::{Fixture, Forge, Qemu, Rng, Sparse};

const IN_PLACE: CompactOptions = CompactOptions { rewrite: false, zeroes: false, dry_run: false };
const ZEROES: CompactOptions = CompactOptions { zeroes: true, ..IN_PLACE };
const REWRITE: CompactOptions = CompactOptions { rewrite: true, ..IN_PLACE };

/// An image that was used and not closed: with discarded and overwritten clusters, clusters of zeroes, and leaks.
fn used(geometry: &Geometry, seed: u64) -> Rig {
    let mut rig = Rig::forge(geometry, seed);
    let files: Vec<_> = rig.files().into_iter().map(RecordingStorage::plain).map(Arc::new).collect();
    let storages: Vec<_> = files.iter().map(|f| f.clone() as Arc<dyn Storage>).collect();
    let image = rig.open(&storages, &writable()).unwrap();
    let (c, size) = (geometry.cluster_size, geometry.size / 512 * 512);
    let clusters = size / c;
    let mut rng = Rng::new(seed ^ 77);
    for n in 0..clusters {
        let at = rng.below(clusters) * c;
        match n % 4 {
            0 => image.write_at(Mem::from(&vec![0u8; c as usize][..]), at).unwrap(),
            1 => image.discard(at, c).unwrap(),
            2 if rig.menu().compression => {
                let mut bytes = vec![n as u8; c as usize];
                bytes[..c as usize / 3].copy_from_slice(&rng.bytes(c as usize)[..c as usize / 3]);
                if n % 8 == 6 {
                    bytes.fill(0);
                }
                image.write_compressed_at(Mem::from(&bytes[..]), at).unwrap();
            }
            _ => image.write_at(Mem::from(&rng.bytes(c as usize)[..]), at).unwrap(),
        }
    }
    if geometry.version >= 3 {
        image.add_bitmap("recording", None, true).unwrap();
        image.add_bitmap(KEPT, Some(9), true).unwrap();
    }
    for n in 0..clusters / 3 {
        image.discard((n * 2) * c, c).unwrap();
    }
    if geometry.version >= 3 {
        image.enable_bitmap(KEPT, false).unwrap();
    }
    image.flush().unwrap();
    rig.image = snapshot_of(&*files[0]);
    rig.data_file = files.get(1).map(|f| snapshot_of(&**f));
    rig
}

fn compact(rig: &Rig, options: CompactOptions) -> (Vec<Sparse>, CompactResult) {
    let files: Vec<_> = rig.files().into_iter().map(RecordingStorage::plain).map(Arc::new).collect();
    let storages: Vec<_> = files.iter().map(|f| f.clone() as Arc<dyn Storage>).collect();
    let opening = if options.dry_run { Opening::default() } else { writable() };
    let image = rig.open(&storages, &opening).unwrap();
    let job = Job::new();
    let result = image.compact(options, &job).unwrap();
    let (current, total) = job.progress();
    assert!(
        current <= total + total / 100 && (options.dry_run || current > 0),
        "progress: {current} of {total}"
    );
    image.close().unwrap();
    (files.iter().map(|f| snapshot_of(&**f)).collect(), result)
}

#[test]
fn in_place_frees_leaks_and_zeroes_and_cuts_the_file() {
    for geometry in geometries() {
        let rig = used(&geometry, 3);
        let what = geometry.name();
        let leaks = rig.data_file.is_none();
        assert!(!leaks || !audit(&rig.image).is_clean(), "{what}: nothing leaked to begin with");
        let before = Contents::of(&rig, &rig.files());
        for options in [IN_PLACE, ZEROES] {
            let (same, told) = compact(&rig, CompactOptions { dry_run: true, ..options });
            assert!(same[0].len() == rig.image.len(), "{what}: a dry run changed the file");
            let (files, result) = compact(&rig, options);
            assert_clean(&files, &what);
            let difference = before.difference(&Contents::of(&rig, &files));
            assert!(difference.is_none(), "{what}: {difference:?}");
            assert!(!leaks || result.leaked_clusters > 0, "{what}: {result:?}");
            assert_eq!(result.leaked_clusters, told.leaked_clusters, "{what}");
            assert_eq!(result.zero_clusters, told.zero_clusters, "{what}");
            if options.zeroes && !(geometry.version < 3 && rig.backing.is_some()) {
                assert!(result.zero_clusters > 0, "{what}: {result:?}");
            }
            assert!(result.length_after <= result.length_before, "{what}: {result:?}");
            assert_eq!(result.length_after, files[0].len(), "{what}");
        }
    }
}

/// Clusters with a refcount.
fn in_use(file: &Sparse, geometry: &Geometry) -> u64 {
    let storage = RecordingStorage::plain(file.clone());
    let header = qcow2_engine::image::read_header(&storage).unwrap();
    let report = qcow2_engine::check::check(&storage, &header, &Default::default(), &Job::new()).unwrap();
    assert_eq!((report.corruptions, report.leaks, report.check_errors), (0, 0, 0), "{report:#?}");
    let (c, mut used) = (geometry.cluster_size, 0);
    let table = header.refcount_table_offset.get();
    for index in 0..u64::from(header.refcount_table_clusters) * c / 8 {
        let block = file.u64(table + index * 8);
        if block == 0 {
            continue;
        }
        let bytes = file.get(block, c as usize);
        let order = header.geometry.refcount_order();
        let entries = header.geometry.refcount_block_entries() as usize;
        used += (0..entries)
            .filter(|i| qcow2_engine::format::refcount::get(&bytes, *i, order).unwrap() > 0)
            .count() as u64;
    }
    used
}

#[test]
fn rewriting_makes_the_file_short() {
    for (number, geometry) in geometries().into_iter().enumerate() {
        let rig = used(&geometry, 30 + number as u64);
        let what = geometry.name();
        let before = Contents::of(&rig, &rig.files());
        for options in [REWRITE, CompactOptions { zeroes: true, ..REWRITE }] {
            let (files, result) = compact(&rig, options);
            assert_clean(&files, &what);
            let difference = before.difference(&Contents::of(&rig, &files));
            assert!(difference.is_none(), "{what}: {difference:?}");
            let (used, length) = (in_use(&files[0], &geometry), files[0].len() / geometry.cluster_size);
            assert!(length <= used + 3 + used / 20, "{what}: {used} clusters in use of {length}: {result:?}");
            // Beside an external data file, all but a few tables are elsewhere.
            let shorter = result.length_after < result.length_before;
            assert!(shorter || rig.data_file.is_some(), "{what}: {result:?}");
        }
    }
}

/// An image that a convert packed with compressed data of all lengths.
fn packed(geometry: &Geometry, seed: u64) -> Rig {
    let cluster = geometry.cluster_size as usize;
    let mut rng = Rng::new(seed);
    let mut bytes = vec![0; geometry.size as usize];
    for cluster in bytes.chunks_exact_mut(cluster) {
        let random = 1 + rng.below(cluster.len() as u64 * 9 / 10) as usize;
        cluster[..random].copy_from_slice(&rng.bytes(random));
    }
    let raw = Raw::new(Arc::new(MemoryStorage::from_bytes(&bytes))).unwrap();
    let source = Image::new(vec![Box::new(raw)]).unwrap();
    let storage = Arc::new(RecordingStorage::plain(Sparse::new(0)));
    let create = CreateOptions { cluster_size: geometry.cluster_size, ..CreateOptions::default() };
    let target = ConvertTarget::New(NewTarget::Qcow2 {
        storage: storage.clone(),
        data_file: None,
        create: Box::new(create),
    });
    let options = ConvertOptions { compression: Some(Compression::default()), ..ConvertOptions::default() };
    convert(&source, target, &options, &Job::new()).unwrap();
    Rig { geometry: geometry.clone(), image: snapshot_of(&*storage), data_file: None, backing: None }
}

#[test]
fn compressed_data_of_any_length_finds_a_place() {
    for (cluster_size, seed) in [512, 512, 512, 1024, 4096].into_iter().zip(1..) {
        let geometry = Geometry { size: 1000 * cluster_size, ..Geometry::plain(cluster_size) };
        let what = format!("{cluster_size}, {seed}");
        let mut rig = packed(&geometry, seed);
        let file = Arc::new(RecordingStorage::plain(rig.image.clone()));
        let storages = [file.clone() as Arc<dyn Storage>];
        let image = rig.open(&storages, &writable()).unwrap();
        let mut rng = Rng::new(seed);
        for cluster in (0..1000).filter(|_| rng.below(8) > 0) {
            image.discard(cluster * cluster_size, cluster_size).unwrap();
        }
        image.close().unwrap();
        rig.image = snapshot_of(&*file);
        let before = Contents::of(&rig, &rig.files());
        let (files, result) = compact(&rig, REWRITE);
        assert_clean(&files, &what);
        let difference = before.difference(&Contents::of(&rig, &files));
        assert!(difference.is_none(), "{what}: {difference:?}");
        assert!(result.length_after * 2 < result.length_before, "{what}: {result:?}");
    }
}

#[test]
fn compressed_data_longer_than_its_cluster_finds_a_place() {
    let (size, count) = (512usize, 60);
    let mut rng = Rng::new(5);
    let mut forge = Forge::new(3, 9, 2 * count * size as u64);
    for cluster in count..2 * count {
        forge.data(cluster, &[1]);
    }
    // Sectors that hardly anything is left of before, and data that fills two of them but for a few bytes.
    for cluster in 0..count {
        let host = forge.alloc(2);
        match cluster % 2 {
            0 => forge.compressed_at(cluster, host, &deflate(&vec![cluster as u8; size])),
            _ => forge.compressed_at(cluster, host + 400, &deflate_stored(&rng.bytes(size))),
        }
    }
    let image = forge.build().bytes;
    let geometry = Geometry { size: 2 * count * size as u64, ..Geometry::plain(size as u64) };
    let mut rig = Rig { geometry, image, data_file: None, backing: None };
    let file = Arc::new(RecordingStorage::plain(rig.image.clone()));
    let image = rig.open(&[file.clone() as Arc<dyn Storage>], &writable()).unwrap();
    image.discard(count * size as u64, count * size as u64).unwrap();
    image.close().unwrap();
    rig.image = snapshot_of(&*file);
    let before = Contents::of(&rig, &rig.files());
    let (files, result) = compact(&rig, REWRITE);
    assert_clean(&files, "long data");
    let difference = before.difference(&Contents::of(&rig, &files));
    assert!(difference.is_none(), "{difference:?}");
    assert!(result.length_after < result.length_before, "{result:?}");
}

/// What moves has no more space than it had before.
#[test]
fn holes_of_what_moves_stay_holes() {
    const CLUSTER: u64 = 2 << 20;
    let Some(qemu) = Qemu::find() else { return };
    let fixture = Fixture::new();
    let path = fixture.path("a.qcow2");
    qemu.create(&path, "cluster_size=2M", Some(64 * CLUSTER));
    let image = open_file(&path, &writable()).unwrap();
    for cluster in 0..20 {
        image.write_at(Mem::from(&[7; 4096][..]), cluster * CLUSTER).unwrap();
    }
    image.discard(0, 16 * CLUSTER).unwrap();
    image.flush().unwrap();
    let result = image.compact(REWRITE, &Job::new()).unwrap();
    image.close().unwrap();
    qemu.assert_clean(&path);
    assert!(result.moved_clusters >= 4, "{result:?}");
    // Four clusters with 4 KiB each; header, refcounts and the L2 table may have all of theirs.
    let used = qcow2_testkit::at::space(&path).unwrap();
    assert!(used < 4 * CLUSTER + CLUSTER / 2, "{used} bytes in use: {result:?}");
    let bytes = qemu.guest_bytes(&path, "qcow2", &[]);
    for (number, cluster) in (0..).zip(bytes.chunks(CLUSTER as usize)) {
        let written = if (16..20).contains(&number) { 4096 } else { 0 };
        let sound = cluster.iter().enumerate().all(|(at, byte)| *byte == if at < written { 7 } else { 0 });
        assert!(sound, "cluster {number}");
    }
}

#[test]
fn no_power_cut_during_a_compaction_changes_what_is_read() {
    // Every second one, unless more time was asked for (see .ci/crash).
    let step = if std::env::var_os("QCOW2_CRASH_STATES").is_some() { 1 } else { 2 };
    for (number, geometry) in geometries().into_iter().enumerate().step_by(step) {
        let random = if geometry.cluster_size > 65536 { 3 } else { 10 };
        let rig = used(&geometry, number as u64);
        if number % 4 == 0 {
            let what = format!("{} in place", geometry.name());
            let files = explore(&rig, 1, random, &what, |image| image.compact(ZEROES, &Job::new()).map(drop));
            assert_clean(&files, &what);
        }
        let what = format!("{} rewriting", geometry.name());
        let options = CompactOptions { zeroes: number / 2 % 2 == 0, ..REWRITE };
        let files = explore(&rig, 2, random, &what, |image| image.compact(options, &Job::new()).map(drop));
        assert_clean(&files, &what);
    }
}

/// An image that QEMU made, used and managed: with holes everywhere, snapshots, one of them deleted, and bitmaps.
fn used_by_qemu(qemu: &Qemu, fixture: &Fixture, options: &str, seed: u64) -> std::path::PathBuf {
    let (path, size) = (fixture.path("a.qcow2"), 24u64 << 20);
    let version_2 = options.contains("compat=0.10");
    let snapshots = !options.contains("refcount_bits=1");
    qemu.create(&path, options, Some(size));
    let name = path.to_str().unwrap();
    if !version_2 {
        qemu.img(&["bitmap", "--add", "-g", "512", name, "fine"]).ok();
        qemu.img(&["bitmap", "--add", "--disable", "-g", "64k", name, "coarse"]).ok();
    }
    let mut rng = Rng::new(seed);
    for round in 0..4 {
        let mut commands = Vec::new();
        if round == 0 {
            // QEMU compresses only what was never written.
            commands.extend([0, 4, 10, 12, 18].map(|at| format!("write -c -P {} {at}M 2M", 200 + at)));
            commands.push("write -c -P 0 20M 2M".to_owned());
        }
        for n in 0..40 {
            let (at, len) = (rng.below(size / 512) * 512, (1 + rng.below(500)) * 512);
            let len = len.min(size - at);
            commands.push(match n % 5 {
                0 => format!("write -z -u {at} {len}"),
                1 => format!("write -P 0 {at} {len}"),
                _ => format!("write -P {} {at} {len}", 1 + (round * 40 + n) % 250),
            });
        }
        qemu.io(&path, "qcow2", &commands);
        if snapshots {
            let made = qemu.img(&["snapshot", "-c", &format!("s{round}"), name]);
            assert!(made.code == 0, "{options}: {made:?}");
        }
    }
    if snapshots {
        qemu.img(&["snapshot", "-d", "s0", name]).ok();
        qemu.img(&["snapshot", "-d", "s2", name]).ok();
    }
    path
}

#[test]
fn what_qemu_made_is_compacted_and_goes_on_with_qemu() {
    let Some(qemu) = Qemu::find() else { return };
    for (seed, options) in [
        "cluster_size=64k",
        "cluster_size=512",
        "cluster_size=4k,refcount_bits=64",
        "cluster_size=2k,refcount_bits=32",
        "cluster_size=16k,extended_l2=on,compression_type=zstd",
        "cluster_size=2M",
        "cluster_size=1k,refcount_bits=1",
        "compat=0.10,cluster_size=8k",
        "cluster_size=32k,lazy_refcounts=on",
    ]
    .iter()
    .enumerate()
    {
        let fixture = Fixture::new();
        let path = used_by_qemu(&qemu, &fixture, options, seed as u64);
        let snapshots = !options.contains("refcount_bits=1");
        let views: &[&[&str]] = if snapshots { &[&[], &["-l", "s1"], &["-l", "s3"]] } else { &[&[]] };
        let read = || views.iter().map(|view| qemu.guest_bytes(&path, "qcow2", view)).collect::<Vec<_>>();
        let before = read();
        let bitmaps = |image: &qcow2_engine::Image| {
            let names = if options.contains("compat") { vec![] } else { vec!["fine", "coarse"] };
            names.into_iter().map(|name| image.bitmap_extents(name).unwrap()).collect::<Vec<_>>()
        };
        let dirty = bitmaps(&open_file(&path, &Opening::default()).unwrap());
        for options in [CompactOptions { zeroes: true, ..REWRITE }, REWRITE] {
            let image = open_file(&path, &writable()).unwrap();
            let result = image.compact(options, &Job::new()).unwrap_or_else(|e| panic!("{options:?}: {e:?}"));
            assert!(bitmaps(&image) == dirty, "{options:?}: bitmaps while open");
            image.close().unwrap();
            qemu.assert_clean(&path);
            assert!(read() == before, "{options:?}: {result:?}");
            assert!(
                bitmaps(&open_file(&path, &Opening::default()).unwrap()) == dirty,
                "{options:?}: bitmaps"
            );
        }
        let length = std::fs::metadata(&path).unwrap().len();
        let mut file = Sparse::new(length);
        file.write(0, &std::fs::read(&path).unwrap());
        let storage = RecordingStorage::plain(file.clone());
        let g = qcow2_engine::image::read_header(&storage).unwrap().geometry;
        let used = in_use(&file, &Geometry::plain(g.cluster_size()));
        let clusters = length / g.cluster_size();
        assert!(clusters <= used + 2 + used / 50, "{options}: {used} clusters in use of {clusters}");
        let name = path.to_str().unwrap();
        if snapshots {
            if !options.contains("compat") {
                qemu.img(&["bitmap", "--remove", name, "fine"]).ok();
                qemu.img(&["bitmap", "--remove", name, "coarse"]).ok();
            }
            qemu.img(&["snapshot", "-a", "s1", name]).ok();
            assert!(qemu.guest_bytes(&path, "qcow2", &[]) == before[1], "{options}: applied");
            qemu.img(&["snapshot", "-d", "s3", name]).ok();
        }
        qemu.io(&path, "qcow2", &["write -P 77 1M 9M", "write -z -u 3M 1M"]);
        qemu.assert_clean(&path);
    }
}

#[test]
fn compressed_clusters_of_zeroes_are_given_up() {
    let Some(qemu) = Qemu::find() else { return };
    // With small clusters, one of the two tables with zeroes is shared with the snapshot.
    for (options, zeroes) in [
        ("", 64 + 64),
        ("compression_type=zstd,extended_l2=on", 64 + 64),
        ("cluster_size=4k,compat=0.10", 3 * 512),
    ] {
        let fixture = Fixture::new();
        let path = fixture.path("a.qcow2");
        qemu.create(&path, options, Some(16 << 20));
        qemu.io(&path, "qcow2", &["write -c -P 3 0 2M", "write -c -P 0 2M 4M", "write -c -P 4 6M 1M"]);
        qemu.img(&["snapshot", "-c", "one", path.to_str().unwrap()]).ok();
        // Entries whose neighbours in the same host cluster stay, of the disk and of the snapshot.
        qemu.io(&path, "qcow2", &["write -P 5 1M 64k", "write -P 0 3M 64k"]);
        let read = || [&[][..], &["-l", "one"]].map(|view| qemu.guest_bytes(&path, "qcow2", view));
        let before = read();
        let told = {
            let image = open_file(&path, &Opening::default()).unwrap();
            image.compact(CompactOptions { dry_run: true, ..ZEROES }, &Job::new()).unwrap()
        };
        let image = open_file(&path, &writable()).unwrap();
        let result = image.compact(ZEROES, &Job::new()).unwrap();
        let again = image.compact(ZEROES, &Job::new()).unwrap();
        image.close().unwrap();
        assert_eq!(result.zero_clusters, zeroes, "{options}: {result:?}");
        assert_eq!((told.zero_clusters, again.zero_clusters), (result.zero_clusters, 0), "{options}");
        assert!(result.length_after <= told.length_after, "{options}: {result:?}, {told:?}");
        qemu.assert_clean(&path);
        assert!(read() == before, "{options}");
        let map = qemu.img(&["map", "--output=json", path.to_str().unwrap()]).ok().to_owned();
        assert!(
            map.lines().all(|line| !line.contains("\"start\": 2097152") || line.contains("\"data\": false")),
            "{map}"
        );
    }
}

#[test]
fn space_of_a_data_file_that_nothing_refers_to_is_given_back() {
    let Some(qemu) = Qemu::find() else { return };
    for (options, raw) in
        [("", false), ("cluster_size=4k,extended_l2=off", false), (",data_file_raw=on", true)]
    {
        let fixture = Fixture::new();
        let (path, data) = (fixture.path("a.qcow2"), fixture.path("data"));
        let options = format!("data_file={},{}", data.display(), options.trim_start_matches(','));
        qemu.create(&path, options.trim_end_matches(','), Some(8 << 20));
        qemu.io(&path, "qcow2", &["write -P 3 0 4M"]);
        let bytes = std::fs::read(&path).unwrap();
        let word = |at: u64| u64::from_be_bytes(bytes[at as usize..][..8].try_into().unwrap()) & !(1 << 63);
        // Entries that another program dropped without freeing what they referred to: all but one of the second MiB.
        let cluster = 1u64 << u32::from_be_bytes(bytes[20..24].try_into().unwrap());
        let count = (1 << 20) / cluster;
        let file = std::fs::File::options().write(true).open(&path).unwrap();
        let l2 = word(word(40));
        qcow2_testkit::at::write_all_at(&file, &vec![0; 8 * (count as usize - 1)], l2 + 8 * count).unwrap();
        let used = || qcow2_testkit::at::space(&data).unwrap();
        let before = (std::fs::read(&data).unwrap(), used());
        let image = open_file(&path, &Opening::default()).unwrap();
        let disk = bytes_of(&image);
        let told = image.compact(CompactOptions { dry_run: true, ..IN_PLACE }, &Job::new()).unwrap();
        drop(image);
        let image = open_file(&path, &writable()).unwrap();
        let result = image.compact(IN_PLACE, &Job::new()).unwrap();
        assert!(bytes_of(&image) == disk, "{options}");
        image.close().unwrap();
        qemu.assert_clean(&path);
        let after = std::fs::read(&data).unwrap();
        assert_eq!(after.len(), before.0.len(), "{options}");
        if raw {
            assert!(after == before.0 && used() == before.1, "{options}: {result:?}");
            continue;
        }
        let stale = (1 << 20) - cluster;
        assert_eq!(before.1 - used(), stale, "{options}: {result:?}");
        assert!(result.reclaimed() >= stale && told.reclaimed() >= stale, "{options}: {told:?}, {result:?}");
    }
}

/// What the disk reads as.
fn bytes_of(image: &Image) -> Vec<u8> {
    let mut bytes = vec![0; image.layers()[0].virtual_size() as usize];
    image.read_at(MemMut::from(&mut bytes[..]), 0).unwrap();
    bytes
}

/// A snapshot with the state of a machine, as far as a disk image knows of it: clusters behind the end of the disk.
fn with_vm_state(qemu: &Qemu, path: &std::path::Path, state: u64) {
    let name = path.to_str().unwrap();
    qemu.io(
        path,
        "qcow2",
        &[&format!("write -b -P 99 0 {state}")[..], &format!("write -b -P 0 {state} 256k")],
    );
    qemu.img(&["snapshot", "-c", "running", name]).ok();
    let bytes = std::fs::read(path).unwrap();
    let table = u64::from_be_bytes(bytes[64..72].try_into().unwrap());
    let file = std::fs::File::options().write(true).open(path).unwrap();
    qcow2_testkit::at::write_all_at(&file, &(state as u32).to_be_bytes(), table + 32).unwrap();
    qcow2_testkit::at::write_all_at(&file, &state.to_be_bytes(), table + 40).unwrap();
    qemu.io(path, "qcow2", &[format!("write -b -P 98 0 {}", state / 2)]);
}

#[test]
fn the_state_of_machines_is_kept() {
    let Some(qemu) = Qemu::find() else { return };
    for (options, state) in [("", 1 << 20), ("cluster_size=512", 100 << 10), ("extended_l2=on", 3 << 20)] {
        let fixture = Fixture::new();
        let path = fixture.path("a.qcow2");
        qemu.create(&path, options, Some(8 << 20));
        // What is freed again leaves room in front of the state.
        qemu.io(&path, "qcow2", &["write -P 1 0 6M"]);
        with_vm_state(&qemu, &path, state);
        qemu.io(&path, "qcow2", &["write -P 2 1M 1M", "discard 2M 1M"]);
        let before = [&[][..], &["-l", "running"]].map(|view| qemu.guest_bytes(&path, "qcow2", view));
        for options in [CompactOptions { zeroes: true, ..REWRITE }, REWRITE] {
            let image = open_file(&path, &writable()).unwrap();
            let result = image.compact(options, &Job::new()).unwrap();
            assert!(!options.zeroes || result.zero_clusters > 0, "{result:?}");
            image.close().unwrap();
            qemu.assert_clean(&path);
        }
        assert!([&[][..], &["-l", "running"]].map(|view| qemu.guest_bytes(&path, "qcow2", view)) == before);
        let current = format!("read -b -P 98 0 {}", state / 2);
        qemu.io(&path, "qcow2", &[current]);
        let list = qemu.img(&["snapshot", "-l", path.to_str().unwrap()]).ok().to_owned();
        assert!(list.contains("running") && (list.contains(" MiB") || list.contains(" KiB")), "{list}");
        qemu.img(&["snapshot", "-a", "running", path.to_str().unwrap()]).ok();
        qemu.io(&path, "qcow2", &[format!("read -b -P 99 0 {state}"), format!("read -b -P 0 {state} 256k")]);
        qemu.assert_clean(&path);
    }
}

/// Any call fails: what is read stays, nothing worse than leaks is left, and where the image goes on, it is right.
#[test]
fn any_call_may_fail_during_a_compaction() {
    let mut failed = 0;
    for (number, geometry) in geometries().into_iter().enumerate().filter(|(_, g)| g.cluster_size <= 16384) {
        let rig = used(&geometry, 50 + number as u64);
        let before = Contents::of(&rig, &rig.files());
        for n in 0..40u64 {
            let n = n * n / 2;
            let what = format!("{} call {n}", geometry.name());
            let files: Vec<_> = rig.files().into_iter().map(RecordingStorage::plain).map(Arc::new).collect();
            let errno = if n % 2 == 0 { 28 } else { 5 };
            let faulty = Arc::new(FaultStorage::new(files[0].clone(), Fault::nth(200 + n, errno)));
            let mut storages: Vec<_> = files.iter().map(|f| f.clone() as Arc<dyn Storage>).collect();
            storages[0] = faulty.clone();
            let Ok(image) = rig.open(&storages, &writable()) else { continue };
            let done = image.compact(CompactOptions { zeroes: n % 3 == 0, ..REWRITE }, &Job::new());
            let closed = image.close();
            failed += u64::from(done.is_err());
            let now: Vec<_> = files.iter().map(|f| snapshot_of(&**f)).collect();
            let findings = audit(&now[0]);
            assert!(findings.is_sound(), "{what}, {done:?}, {closed:?}: {:#?}", findings.corruptions);
            let difference = before.difference(&Contents::of(&rig, &now));
            assert!(difference.is_none(), "{what}, {done:?}: {difference:?}");
        }
    }
    assert!(failed > 20, "only {failed} compactions failed");
}

/// A cancelled compaction leaves no leak: what began is completed.
#[test]
fn a_cancelled_compaction_leaves_a_clean_image() {
    let (mut cancelled, mut completed) = (0, 0);
    for (number, geometry) in geometries().into_iter().enumerate().filter(|(_, g)| g.cluster_size <= 4096) {
        let rig = used(&geometry, 90 + number as u64);
        let before = Contents::of(&rig, &rig.files());
        let leaks = audit(&rig.image).leaks;
        for calls in (0..1200).step_by(75) {
            let files: Vec<_> = rig.files().into_iter().map(RecordingStorage::plain).map(Arc::new).collect();
            let job = Arc::new(Job::new());
            let cancel = Arc::clone(&job);
            let left = AtomicI64::new(50 + calls);
            let cancelling = Hooked::with(files[0].clone(), move |_, _| {
                if left.fetch_sub(1, Ordering::Relaxed) == 0 {
                    cancel.cancel();
                }
                Ok(())
            });
            let mut storages: Vec<_> = files.iter().map(|f| f.clone() as Arc<dyn Storage>).collect();
            storages[0] = Arc::new(cancelling);
            let image = rig.open(&storages, &writable()).unwrap();
            let result = image.compact(REWRITE, &job);
            let what = format!("{} after {calls} calls: {result:?}", geometry.name());
            match result {
                Ok(_) => completed += 1,
                Err(error) => {
                    assert_eq!(error.kind(), qcow2_engine::ErrorKind::Aborted, "{what}");
                    cancelled += 1;
                }
            }
            image.write_at(Mem::from(&[0u8; 512][..]), 0).unwrap();
            image.close().unwrap();
            let now: Vec<_> = files.iter().map(|f| snapshot_of(&**f)).collect();
            let findings = audit(&now[0]);
            assert!(findings.is_sound(), "{what}: {findings:#?}");
            let mut contents = Contents::of(&rig, &now);
            contents.active[..512].copy_from_slice(&before.active[..512]);
            let difference = before.difference(&contents);
            assert!(difference.is_none(), "{what}: {difference:?}");
            let storage = RecordingStorage::plain(now[0].clone());
            let header = qcow2_engine::image::read_header(&storage).unwrap();
            let report =
                qcow2_engine::check::check(&storage, &header, &Default::default(), &Job::new()).unwrap();
            assert_eq!(report.corruptions, 0, "{what}: {report:#?}");
            assert!(report.leaks <= leaks, "{what}: {report:#?}");
        }
    }
    assert!(cancelled > 10, "{cancelled} cancelled, {completed} completed");
}

/// Little memory for what is shared: clusters move in several passes, or stay; nothing else changes. The counters of a check come in pieces
/// of 64 KiB.
#[test]
fn a_bound_on_memory_is_kept() {
    let geometry = Geometry { refcount_bits: 8, ..Geometry::plain(512) };
    let rig = used(&geometry, 5);
    let before = Contents::of(&rig, &rig.files());
    let (_, plenty) = compact(&rig, REWRITE);
    for max_memory in [1 << 10, 68 << 10, 88 << 10] {
        let files: Vec<_> = rig.files().into_iter().map(RecordingStorage::plain).map(Arc::new).collect();
        let storages: Vec<_> = files.iter().map(|f| f.clone() as Arc<dyn Storage>).collect();
        let mut opening = writable();
        opening.read.limits.max_memory = max_memory;
        let image = rig.open(&storages, &opening).unwrap();
        let result = image.compact(REWRITE, &Job::new());
        image.close().unwrap();
        let now: Vec<_> = files.iter().map(|f| snapshot_of(&**f)).collect();
        let difference = before.difference(&Contents::of(&rig, &now));
        assert!(difference.is_none(), "{max_memory}: {difference:?}");
        match result {
            Ok(result) => {
                assert_clean(&now, "little memory");
                assert!(max_memory > 10 << 10, "{max_memory} bytes are too few for the counters");
                assert!(
                    result.length_after < result.length_before,
                    "{result:?}, with more memory {plenty:?}"
                );
            }
            Err(error) => {
                assert_eq!(error.kind(), qcow2_engine::ErrorKind::Limit, "{error:?}");
                assert_eq!(max_memory, 1 << 10, "{error:?}");
            }
        }
    }
}

/// A read that planned before may still use what the disk gave up since: until it ends, nothing else is put there.
#[test]
fn what_a_read_still_uses_is_not_taken() {
    const CLUSTER: u64 = 4096;
    type Maintenance = (&'static str, fn(&Image));
    let maintenance: [Maintenance; 3] = [
        ("compact", |image| assert!(image.compact(REWRITE, &Job::new()).is_ok())),
        ("look", |image| {
            let told = image.compact(CompactOptions { dry_run: true, ..REWRITE }, &Job::new());
            assert_eq!(told.unwrap().leaked_clusters, 0, "what a read still uses is no leak");
        }),
        ("close", |image| image.close().unwrap()),
    ];
    for (what, maintain) in maintenance {
        let rig = Rig::forge(&Geometry { size: 64 * CLUSTER, ..Geometry::plain(CLUSTER) }, 9);
        let file = Arc::new(RecordingStorage::plain(rig.image.clone()));
        let (held, is_held) = sync_channel(1);
        let (go, goes) = sync_channel::<()>(1);
        let (goes, armed) = (Mutex::new(goes), Arc::new(AtomicBool::new(false)));
        let arms = Arc::clone(&armed);
        let hook = move |op: Op, range: Range<u64>| {
            let data = op == Op::Read && range.end - range.start == CLUSTER;
            if data && arms.swap(false, Ordering::AcqRel) {
                held.send(()).unwrap();
                goes.lock().unwrap().recv().unwrap();
            }
            Ok(())
        };
        let image = rig.open(&[Arc::new(Hooked::with(file.clone(), hook))], &writable()).unwrap();
        for n in 0..64u64 {
            image.write_at(Mem::from(&[n as u8 + 1; CLUSTER as usize][..]), n * CLUSTER).unwrap();
        }
        image.flush().unwrap();
        std::thread::scope(|scope| {
            armed.store(true, Ordering::Release);
            let reader = scope.spawn(|| {
                let mut bytes = [0; CLUSTER as usize];
                image.read_at(MemMut::from(&mut bytes[..]), 7 * CLUSTER).unwrap();
                bytes
            });
            is_held.recv().unwrap();
            image.discard(5 * CLUSTER, 6 * CLUSTER).unwrap();
            image.flush().unwrap();
            let maintained = scope.spawn(|| maintain(&image));
            // Long enough to begin.
            std::thread::sleep(Duration::from_millis(100));
            go.send(()).unwrap();
            assert_eq!(reader.join().unwrap(), [8; CLUSTER as usize], "{what}: the bytes before the discard");
            maintained.join().unwrap();
        });
        if what != "close" {
            image.write_at(Mem::from(&[99; 512][..]), 0).unwrap();
            image.close().unwrap();
        }
        let findings = audit(&snapshot_of(&*file));
        assert!(findings.is_clean(), "{what}: {findings:#?}");
    }
}
