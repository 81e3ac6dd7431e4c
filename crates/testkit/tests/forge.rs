//! The forge's sound images are sound in QEMU's opinion, and contain what they should.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use qcow2_testkit::forge::{Built, codec};
use qcow2_testkit::matrix::{Case, geometries};
use qcow2_testkit::model::assert_same;
use qcow2_testkit::reader::SlowReader;
use qcow2_testkit::{Fixture, Forge, Qemu, Rng};

fn judge(qemu: &Qemu, name: &str, built: &Built, clean: bool) {
    judge_in(&Fixture::new(), qemu, name, built, clean);
}

fn judge_in(fixture: &Fixture, qemu: &Qemu, name: &str, built: &Built, clean: bool) {
    let path = fixture.path("forged.qcow2");
    built.bytes.write_to(&path);
    if !built.data_file.is_empty() {
        built.data_file.write_to(&fixture.path("data.raw"));
    }
    if clean {
        qemu.assert_clean(&path);
    }
    let expected = qemu.guest_bytes(&path, "qcow2", &[]);
    let slow = SlowReader::open(&path, "qcow2");
    assert_same(&expected, &slow.read(0, expected.len()), 0, name);
}

/// Every kind of cluster: data, both zeroes, packed and spanning compressed ones of every shape.
fn every_kind(mut forge: Forge, zstd: bool) -> Built {
    let c = forge.cluster_size() as usize;
    let mut rng = Rng::new(3);
    forge.data(0, &rng.bytes(c));
    forge.zero_plain(1);
    forge.zero_allocated(2, &rng.bytes(c));
    type Shape<'a> = &'a dyn Fn(&[u8]) -> Vec<u8>;
    let shapes: [Shape<'_>; 4] = if zstd {
        [&|d| codec::zstd(d, 1), &|d| codec::zstd(d, 2), &|d| codec::zstd(d, 5), &|d| codec::zstd(d, 1)]
    } else {
        [&codec::deflate, &codec::deflate_without_end, &codec::deflate, &codec::deflate]
    };
    for (i, shape) in shapes.iter().enumerate() {
        forge.compressed(3 + i as u64, &shape(&rng.text(c)));
    }
    // One that spans two host clusters.
    forge.pack_from(c as u64 - 100);
    forge.compressed(7, &shapes[0](&rng.text(c)));
    forge.build()
}

#[test]
fn forged_images_are_clean_and_read_alike() {
    let Some(qemu) = Qemu::find() else { return };
    for bits in [9, 12, 16, 21] {
        let size = (20 << bits) + 512;
        judge(&qemu, "v3 deflate", &every_kind(Forge::new(3, bits, size), false), true);
        judge(&qemu, "v3 zstd", &every_kind(Forge::new(3, bits, size).zstd(), true), true);
        judge(
            &qemu,
            "refcounts of 4 bits",
            &every_kind(Forge::new(3, bits, size).refcount_order(2), false),
            true,
        );
        if bits >= 14 {
            judge(&qemu, "extended", &every_kind(Forge::new(3, bits, size).extended_l2(), false), true);
        }
    }
}

#[test]
fn forged_snapshots_bitmaps_and_data_files_are_clean() {
    let Some(qemu) = Qemu::find() else { return };
    let mut forge = Forge::new(3, 16, 10 << 16);
    forge.data(0, b"before the snapshot");
    forge.snapshot("1", "old", 10 << 16);
    forge.data(0, b"after it");
    forge.bitmap("dirty", 2, 16, &[0xff, 1]);
    judge(&qemu, "snapshot and bitmap", &forge.build(), true);

    // QEMU looks for a relative data file in its own working directory: give it an absolute name.
    let fixture = Fixture::new();
    let name = fixture.path("data.raw");
    let mut forge = Forge::new(3, 16, 10 << 16).external(name.to_str().unwrap(), false);
    forge.data(0, b"guest cluster 0 at host offset 0");
    forge.data(5, b"five");
    judge_in(&fixture, &qemu, "external data", &forge.build(), false);
}

#[test]
fn the_model_and_two_readers_agree_over_the_whole_matrix() {
    let Some(qemu) = Qemu::find() else { return };
    for (seed, geometry) in geometries().into_iter().enumerate() {
        let name = geometry.name();
        let image = Case { geometry, seed: seed as u64 }.build(&qemu);
        let read = qemu.guest_bytes(&image.path, "qcow2", &[]);
        image.disk.assert_eq_at(0, &read, &name);
        let slow = SlowReader::open(&image.path, "qcow2");
        assert_same(&read, &slow.read(0, read.len()), 0, &name);
    }
}
