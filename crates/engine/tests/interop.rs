//! QEMU writes, the engine reads: byte for byte, whatever the split of requests, the caches and the threads;
//! and the same extents as `qemu-img map`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, reason = "tests")]

use qcow2_engine::{ExtentKind, GuestSource, Image, Job, OpenOptions};
use qcow2_testkit::matrix::{Case, Geometry, geometries};
use qcow2_testkit::model::assert_same;
use qcow2_testkit::{Qemu, Rng, chain};
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
        let options = OpenOptions { snapshot: Some(frozen.name.clone()), ..OpenOptions::default() };
        let view = chain::open(&image.path, "qcow2", &options).unwrap();
        compare_reads(&view, &expected, &what, seed);
    }
}

/// The matrix in parts, so that they run in parallel.
fn check_part(part: usize, parts: usize) {
    let Some(qemu) = Qemu::find() else { return };
    for (seed, geometry) in geometries().into_iter().enumerate().skip(part).step_by(parts) {
        check(&qemu, geometry, 1000 + seed as u64);
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
