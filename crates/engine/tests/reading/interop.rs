//! QEMU writes, the engine reads: byte for byte, whatever the split of requests, the caches and the threads;
//! and the same extents as `qemu-img map`.

use std::io::{Seek, SeekFrom, Write};
use std::sync::Arc;

use qcow2_engine::storage::{Access, FileStorage};
use qcow2_engine::{ExtentKind, GuestSource, Image, Job, Mem, OpenOptions, Qcow2, WriteOptions};
use qcow2_testkit::matrix::{Case, Geometry, geometries, seed_or};
use qcow2_testkit::model::assert_same;
use qcow2_testkit::plans::Table;
use qcow2_testkit::{Fixture, Qemu, Rng, chain};
use serde_json::Value;

/// Reads the whole disk and random parts of it, and compares every byte.
fn compare_reads(image: &Image, expected: &[u8], what: &str, seed: u64) {
    assert_eq!(image.virtual_size(), expected.len() as u64, "{what}: virtual size");
    let whole = chain::read(image, 0, expected.len()).unwrap_or_else(|e| panic!("{what}: {e}"));
    assert_same(expected, &whole, 0, what);
    let mut rng = Rng::new(seed);
    for _ in 0..40 {
        let at = rng.below(expected.len() as u64) as usize;
        let len = match rng.below(3) {
            0 => 1 + rng.below(600),
            1 => 1 + rng.below(70_000),
            _ => 1 + rng.below(3 << 20),
        };
        let len = (len as usize).min(expected.len() - at);
        let part = chain::read(image, at as u64, len).unwrap_or_else(|e| panic!("{what}: {e}"));
        assert_same(&expected[at..at + len], &part, at as u64, what);
    }
}

/// From end to start in steps that divide nothing.
fn read_backwards(image: &Image, step: usize) -> Vec<u8> {
    let mut end = image.virtual_size() as usize;
    let mut parts = Vec::new();
    while end > 0 {
        let start = end.saturating_sub(step);
        parts.push(chain::read(image, start as u64, end - start).unwrap());
        end = start;
    }
    parts.reverse();
    parts.concat()
}

fn smallest_caches() -> OpenOptions {
    OpenOptions { l2_cache_bytes: Some(0), inflated_cache_bytes: Some(0), ..OpenOptions::default() }
}

/// Extents in the words of `qemu-img map`; neighbours merged as it merges them.
fn map_of(image: &Image) -> Vec<Value> {
    let mut extents = Vec::new();
    image.extents(0, image.virtual_size(), &Job::new(), &mut extents).unwrap();
    extents
        .iter()
        .map(|e| {
            let mut entry = serde_json::json!({
                "start": e.start,
                "length": e.length,
                "depth": e.depth,
                "present": e.kind != ExtentKind::Unallocated,
                "zero": e.zero,
                "data": matches!(e.kind, ExtentKind::Data | ExtentKind::Compressed),
                "compressed": e.kind == ExtentKind::Compressed,
            });
            if let Some((_, offset)) = &e.host {
                entry["offset"] = (*offset).into();
            }
            entry
        })
        .collect()
}

fn assert_same_map(qemu: &Value, ours: &[Value], what: &str) {
    let theirs = qemu.as_array().unwrap();
    for (i, (a, b)) in theirs.iter().zip(ours).enumerate() {
        assert_eq!(a, b, "{what}: extent {i}: qemu-img map (left), engine (right)");
    }
    assert_eq!(theirs.len(), ours.len(), "{what}: number of extents");
}

fn check(qemu: &Qemu, geometry: Geometry, seed: u64) {
    let name = geometry.name();
    let image = Case { geometry, seed }.build(qemu);
    let expected = qemu.guest_bytes(&image.path, "qcow2", &[]);
    image.disk.assert_eq_at(0, &expected, &name);
    let default = chain::open(&image.path, "qcow2", &OpenOptions::default()).unwrap();
    compare_reads(&default, &expected, &name, seed);
    let uncached = chain::open(&image.path, "qcow2", &smallest_caches()).unwrap();
    compare_reads(&uncached, &expected, &format!("{name}, smallest caches"), seed + 1);
    let step = 4099 + (expected.len() / 50);
    assert_same(&expected, &read_backwards(&uncached, step), 0, &format!("{name}, backwards"));
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let (expected, uncached, name) = (&expected, &uncached, &name);
            scope.spawn(move || {
                compare_reads(uncached, expected, &format!("{name}, thread {thread}"), seed + thread)
            });
        }
    });
    assert_same_map(&qemu.map_json(&image.path, "qcow2"), &map_of(&default), &name);
    for frozen in &image.snapshots {
        let what = format!("{name}, snapshot {}", frozen.name);
        let expected = qemu.guest_bytes(&image.path, "qcow2", &["-l", &frozen.name]);
        frozen.disk.assert_eq_at(0, &expected, &what);
        let options = OpenOptions { snapshot: Some(frozen.name.clone().into()), ..OpenOptions::default() };
        let view = chain::open(&image.path, "qcow2", &options).unwrap();
        compare_reads(&view, &expected, &what, seed);
    }
}

/// The matrix in parts, so that they run in parallel.
fn check_part(part: usize, parts: usize) {
    let Some(qemu) = Qemu::find() else { return };
    let seed = seed_or(1000);
    for (index, geometry) in geometries().into_iter().enumerate().skip(part).step_by(parts) {
        check(&qemu, geometry, seed + index as u64);
    }
}

#[test]
fn every_geometry_reads_and_maps_as_qemu_does_part_1() {
    check_part(0, 3);
}

#[test]
fn every_geometry_reads_and_maps_as_qemu_does_part_2() {
    check_part(1, 3);
}

#[test]
fn every_geometry_reads_and_maps_as_qemu_does_part_3() {
    check_part(2, 3);
}

/// Preallocated clusters are mapped, and may be holes of the file: `qemu-img map` looks there only if the image seems
/// to have preallocated metadata.
#[test]
fn preallocated_images_read_and_map_as_qemu_does() {
    let Some(qemu) = Qemu::find() else { return };
    for preallocation in ["metadata", "falloc", "full"] {
        for (cluster_size, extended_l2) in [(4096, "off"), (65536, "off"), (65536, "on"), (2 << 20, "off")] {
            let fixture = Fixture::new();
            let path = fixture.path("preallocated.qcow2");
            let what = format!(
                "preallocation {preallocation}, clusters of {cluster_size}, subclusters {extended_l2}"
            );
            let options = format!(
                "preallocation={preallocation},cluster_size={cluster_size},extended_l2={extended_l2}"
            );
            qemu.create(&path, &options, Some((8 << 20) + 512));
            let untouched = chain::open(&path, "qcow2", &OpenOptions::default()).unwrap();
            assert_same_map(&qemu.map_json(&path, "qcow2"), &map_of(&untouched), &what);
            let pattern = fixture.file("pattern", &Rng::new(8).bytes(5000));
            let write = |flags: &str, at: u64, len: u64| format!("write -q {flags} {at} {len}");
            let random = format!("-s {}", pattern.display());
            let commands = [
                write(&random, 100_000, 300_000),
                write("-z", 200_000, 70_000),
                write("-z -u", 3 << 20, 1 << 20),
                write(&random, (8 << 20) - 700, 1212),
            ];
            qemu.io(&path, "qcow2", &commands);
            let written = chain::open(&path, "qcow2", &OpenOptions::default()).unwrap();
            assert_same_map(&qemu.map_json(&path, "qcow2"), &map_of(&written), &what);
            compare_reads(&written, &qemu.guest_bytes(&path, "qcow2", &[]), &what, 1);
        }
    }
}

/// A snapshot moves the refcount table, and what was the table's before is guest data then, which no map may follow.
#[test]
fn a_preallocated_image_maps_as_before_after_its_refcount_table_moved() {
    let Some(qemu) = Qemu::find() else { return };
    let fixture = Fixture::new();
    let path = fixture.path("preallocated.qcow2");
    qemu.create(&path, "preallocation=metadata,cluster_size=512", Some(1 << 20));
    let storage = Arc::new(FileStorage::open(&path, Access::ReadWrite).unwrap());
    let mut qcow2 = Qcow2::open(storage, &OpenOptions::default()).unwrap();
    qcow2.enable_writing(WriteOptions::default()).unwrap();
    let image = Image::new(vec![Box::new(qcow2)]).unwrap();
    image.execute(&Table::of(&image).create("1", "s")).unwrap();
    // As a refcount table it would lead far behind the end of any file.
    let data = [0x7e, 0, 0, 0, 0, 0, 0, 0].repeat(1 << 12);
    for at in (0..8).map(|n| n << 16) {
        image.write_at(Mem::from(&data[..]), at).unwrap();
    }
    image.flush().unwrap();
    let map = map_of(&image);
    image.close().unwrap();
    assert_same_map(&qemu.map_json(&path, "qcow2"), &map, "after a snapshot");
}

/// The holes of a data file, where the image's own file has fewer clusters than it counts.
#[test]
fn data_files_with_holes_map_as_qemu_does() {
    let Some(qemu) = Qemu::find() else { return };
    for (cluster_size, raw) in [(4096, "off"), (65536, "off"), (65536, "on"), (2 << 20, "on")] {
        let fixture = Fixture::new();
        let path = fixture.path("image.qcow2");
        let data = fixture.path("data");
        let options = format!(
            "cluster_size={cluster_size},data_file={},data_file_raw={raw},preallocation=metadata",
            data.display()
        );
        qemu.create(&path, &options, Some(8 << 20));
        qemu.io(&path, "qcow2", &["write -q -P 7 1M 2M", "write -q -z -u 2M 1M"].map(str::to_owned));
        // Tables that are mostly zeroes take less space than QEMU gives them.
        let bytes = std::fs::read(&path).unwrap();
        let mut file = std::fs::File::create(&path).unwrap();
        file.set_len(bytes.len() as u64).unwrap();
        for (page, at) in
            bytes.chunks(4096).zip((0..).step_by(4096)).filter(|(page, _)| page.iter().any(|&b| b != 0))
        {
            file.seek(SeekFrom::Start(at)).unwrap();
            file.write_all(page).unwrap();
        }
        let image = chain::open(&path, "qcow2", &OpenOptions::default()).unwrap();
        let what = format!("clusters of {cluster_size}, raw {raw}");
        assert_same_map(&qemu.map_json(&path, "qcow2"), &map_of(&image), &what);
    }
}

/// Four layers that QEMU wrote, of different geometry and size: what each of them hides and shows.
#[test]
fn chains_read_and_map_as_qemu_does() {
    let Some(qemu) = Qemu::find() else { return };
    for seed in (0..4).map(|n| seed_or(1) + n) {
        let mut rng = Rng::new(seed);
        let fixture = Fixture::new();
        let mut below = (fixture.file("base.raw", &rng.text(3_000_001)), "raw");
        for (depth, options) in [
            "cluster_size=512",
            "cluster_size=65536,extended_l2=on",
            "cluster_size=4096,compat=0.10",
            "cluster_size=16384,extended_l2=on,compression_type=zstd",
        ]
        .iter()
        .enumerate()
        {
            let path = fixture.path(&format!("layer{depth}.qcow2"));
            let size = (2 << 20) + rng.below(4000) * 512;
            let options = format!("{options},backing_file={},backing_fmt={}", below.0.display(), below.1);
            qemu.create(&path, &options, Some(size));
            let commands: Vec<String> = (0..12)
                .map(|i| {
                    let at = rng.below(size - 1);
                    let len = (1 + rng.below(150_000)).min(size - at);
                    let pattern = fixture.file(&format!("pattern{depth}-{i}"), &rng.bytes(4000));
                    match rng.below(4) {
                        0 => format!("write -q -z {at} {len}"),
                        1 => format!("write -q -z -u {at} {len}"),
                        _ => format!("write -q -s {} {at} {len}", pattern.display()),
                    }
                })
                .collect();
            qemu.io(&path, "qcow2", &commands);
            let what = format!("seed {seed}, layer {depth}");
            let image = chain::open(&path, "qcow2", &OpenOptions::default()).unwrap();
            assert_eq!(image.layers().len(), depth + 2);
            compare_reads(&image, &qemu.guest_bytes(&path, "qcow2", &[]), &what, seed);
            assert_same_map(&qemu.map_json(&path, "qcow2"), &map_of(&image), &what);
            below = (path, "qcow2");
        }
    }
}
