//! The engine writes, QEMU judges: images that QEMU wrote, and the raw disks they hold, converted to every geometry
//! are clean, identical, and do not depend on the number of threads.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use qcow2_engine::convert::{Compression, ConvertOptions, ConvertResult, ConvertTarget, Delta, convert};
use qcow2_engine::create::{Backing, CreateOptions, DataFile, NewTarget, Preallocation};
use qcow2_engine::format::CompressionType;
use qcow2_engine::storage::{NewFile, Overwrite};
use qcow2_engine::{ErrorKind, Image, Job, OpenOptions, Qcow2, Result};
use qcow2_testkit::matrix::{self, Case, DataFile as Where, Geometry, geometries, sample, seed_or};
use qcow2_testkit::model::assert_same;
use qcow2_testkit::reader::SlowReader;
use qcow2_testkit::{Disk, Fixture, Forge, Qemu, Rng, chain, malformed};

/// The target of a geometry, with its data file beside it.
fn create_options(geometry: &Geometry, path: &Path) -> CreateOptions {
    let data_file = (geometry.data_file != Where::Internal).then(|| DataFile {
        filename: data_path(path).to_str().unwrap().into(),
        raw: geometry.data_file == Where::ExternalRaw,
    });
    CreateOptions {
        version: geometry.version,
        cluster_size: geometry.cluster_size,
        refcount_bits: geometry.refcount_bits,
        extended_l2: geometry.extended_l2,
        compression_type: if geometry.zstd { CompressionType::Zstd } else { CompressionType::Zlib },
        data_file,
        ..CreateOptions::default()
    }
}

fn data_path(path: &Path) -> PathBuf {
    path.with_extension("data")
}

fn to_qcow2(
    source: &Image,
    path: &Path,
    create: CreateOptions,
    options: &ConvertOptions,
) -> Result<ConvertResult> {
    let new = NewFile::create(path, Overwrite::Replace, &[])?;
    let data = match &create.data_file {
        Some(_) => Some(NewFile::create(data_path(path), Overwrite::Replace, &[])?),
        None => None,
    };
    let target = ConvertTarget::New(NewTarget::Qcow2 {
        storage: new.storage(),
        data_file: data.as_ref().map(NewFile::storage),
        create: Box::new(create),
    });
    let result = convert(source, target, options, &Job::new())?;
    data.map_or(Ok(()), NewFile::commit)?;
    new.commit()?;
    Ok(result)
}

fn to_raw(source: &Image, path: &Path, options: &ConvertOptions) -> Result<ConvertResult> {
    let new = NewFile::create(path, Overwrite::Replace, &[])?;
    let storage = new.storage();
    let target =
        ConvertTarget::New(NewTarget::Raw { storage, preallocation: Preallocation::Off, keep: false });
    let result = convert(source, target, options, &Job::new())?;
    new.commit()?;
    Ok(result)
}

fn threads(count: usize) -> Option<NonZeroUsize> {
    NonZeroUsize::new(count)
}

fn open(path: &Path, format: &str) -> Image {
    chain::open(path, format, &OpenOptions::default()).unwrap()
}

/// Converts to one geometry with one and with three threads, judges the target, and converts it back to raw.
fn judge(qemu: &Qemu, source: &Path, format: &str, geometry: &Geometry, compression: bool, expected: &[u8]) {
    let what = format!("{} to {}, compressed: {compression}", source.display(), geometry.name());
    let fixture = Fixture::new();
    let compression = compression.then(Compression::default);
    let image = open(source, format);
    let written = [1, 3].map(|count| {
        let path = fixture.path(&format!("target{count}.qcow2"));
        let options =
            ConvertOptions { concurrency: threads(count), compression, ..ConvertOptions::default() };
        let mut create = create_options(geometry, &path);
        if let Some(data_file) = &mut create.data_file {
            // One name, so that the two files can be equal.
            data_file.filename = fixture.path("target3.data").to_str().unwrap().into();
        }
        let result = to_qcow2(&image, &path, create, &options).unwrap_or_else(|e| panic!("{what}: {e}"));
        assert_eq!(result.virtual_size, expected.len() as u64, "{what}");
        path
    });
    let bytes = written.each_ref().map(|path| std::fs::read(path).unwrap());
    assert!(bytes[0] == bytes[1], "{what}: the target depends on the number of threads");
    let target = &written[1];
    qemu.assert_clean(target);
    qemu.assert_identical(source, format, target, "qcow2");
    let ours = open(target, "qcow2");
    assert_same(expected, &chain::read(&ours, 0, expected.len()).unwrap(), 0, &what);
    let back = fixture.path("back.raw");
    to_raw(&ours, &back, &ConvertOptions { concurrency: threads(2), ..ConvertOptions::default() }).unwrap();
    assert_same(expected, &std::fs::read(&back).unwrap(), 0, &format!("{what}, and back to raw"));
    if geometry.data_file == Where::ExternalRaw {
        let data = std::fs::read(data_path(target)).unwrap();
        assert_same(expected, &data[..expected.len()], 0, &format!("{what}: the raw data file"));
    }
}

/// Text, noise, runs of zeroes of every length, a hole, and an end inside a cluster.
fn mixed_disk(size: u64) -> Disk {
    let mut disk = Disk::new(size);
    let mut rng = Rng::new(seed_or(size));
    let mut at = 0;
    while at < size {
        let len = (1 + rng.below(150_000)).min(size - at);
        match rng.below(4) {
            0 => disk.write(at, &rng.bytes(len as usize)),
            1 => disk.write(at, &rng.text(len as usize)),
            // Zeroes by the sector between data: shorter and longer than what is left out.
            2 => {
                let step = 512 << rng.below(6);
                for part in (at..at + len).step_by(step) {
                    disk.write(part, &[7; 100][..100.min((size - part) as usize)]);
                }
            }
            _ => {}
        }
        at += len;
    }
    disk
}

fn every_target(part: usize) {
    let Some(qemu) = Qemu::find() else { return };
    let fixture = Fixture::new();
    let raw_size = (3 << 20) + 512 * 3;
    let raw_disk = mixed_disk(raw_size);
    let raw = fixture.file("source.raw", &raw_disk.read(0, raw_size as usize));
    let images: Vec<_> =
        sample().into_iter().map(|geometry| Case { geometry, seed: seed_or(7) }.build(&qemu)).collect();
    let targets = geometries().into_iter().filter(|g| g.backing == matrix::Backing::None);
    for (index, geometry) in targets.enumerate().filter(|(index, _)| index % 2 == part) {
        let compressed = geometry.compression();
        judge(&qemu, &raw, "raw", &geometry, compressed, &raw_disk.read(0, raw_size as usize));
        let image = &images[index % images.len()];
        let size = image.disk.size() as usize;
        judge(&qemu, &image.path, "qcow2", &geometry, false, &image.disk.read(0, size));
    }
}

#[test]
fn every_geometry_is_written_clean_and_identical_part_1() {
    every_target(0);
}

#[test]
fn every_geometry_is_written_clean_and_identical_part_2() {
    every_target(1);
}

#[test]
fn snapshots_are_converted_as_they_were() {
    let Some(qemu) = Qemu::find() else { return };
    for geometry in sample().into_iter().filter(Geometry::snapshots) {
        let image = Case { geometry, seed: seed_or(3) }.build(&qemu);
        for frozen in &image.snapshots {
            let options =
                OpenOptions { snapshot: Some(frozen.name.clone().into()), ..OpenOptions::default() };
            let view = chain::open(&image.path, "qcow2", &options).unwrap();
            let target = image.fixture.path("snapshot.qcow2");
            let compress =
                ConvertOptions { compression: Some(Compression::default()), ..ConvertOptions::default() };
            to_qcow2(&view, &target, CreateOptions::default(), &compress).unwrap();
            qemu.assert_clean(&target);
            let read = qemu.guest_bytes(&target, "qcow2", &[]);
            frozen.disk.assert_eq_at(0, &read, &frozen.name);
        }
    }
}

/// A backup on a base: what the overlay has, and nothing of what the base has, also where the overlay says zero.
#[test]
fn a_chain_is_converted_onto_its_base() {
    let Some(qemu) = Qemu::find() else { return };
    for backing in [matrix::Backing::ShorterRaw, matrix::Backing::EqualQcow2, matrix::Backing::LongerQcow2] {
        for extended_l2 in [false, true] {
            let geometry = Geometry { backing, extended_l2, ..Geometry::plain(16384) };
            let what = geometry.name();
            let source = Case { geometry, seed: seed_or(4) }.build(&qemu);
            let image = open(&source.path, "qcow2");
            let base = &image.layers()[1];
            let format = base.format();
            let name = base.storage().path().unwrap().file_name().unwrap().to_str().unwrap().to_owned();
            let delta = Delta { layers: 1, base_size: base.virtual_size() };
            for compression in [None, Some(Compression::default())] {
                let target = source.fixture.path("delta.qcow2");
                let create = CreateOptions {
                    backing: Some(Backing { filename: name.clone().into(), format: Some(format.into()) }),
                    cluster_size: 4096,
                    ..CreateOptions::default()
                };
                let options = ConvertOptions { compression, delta: Some(delta), ..ConvertOptions::default() };
                to_qcow2(&image, &target, create, &options).unwrap_or_else(|e| panic!("{what}: {e}"));
                qemu.assert_clean(&target);
                qemu.assert_identical(&source.path, "qcow2", &target, "qcow2");
                source.disk.assert_eq_at(0, &qemu.guest_bytes(&target, "qcow2", &[]), &what);
                assert_eq!(open(&target, "qcow2").layers().len(), 2, "{what}");
            }
        }
    }
}

/// The slow reader agrees too: an opinion on the bytes of the file that is neither the engine's nor QEMU's.
#[test]
fn compressed_targets_read_alike_for_every_reader() {
    let Some(qemu) = Qemu::find() else { return };
    let size = (2 << 20) + 1024;
    let disk = mixed_disk(size);
    let fixture = Fixture::new();
    let raw = fixture.file("source.raw", &disk.read(0, size as usize));
    for (cluster_size, zstd, level) in [
        (512, false, Some(12)),
        (4096, true, Some(1)),
        (65536, false, Some(1)),
        (65536, true, Some(19)),
        (2 << 20, false, None),
    ] {
        let geometry = Geometry { zstd, ..Geometry::plain(cluster_size) };
        let what = format!("{}, level {level:?}", geometry.name());
        let path = fixture.path("target.qcow2");
        let compression = Some(Compression { level, ..Compression::default() });
        let options = ConvertOptions { compression, ..ConvertOptions::default() };
        to_qcow2(&open(&raw, "raw"), &path, create_options(&geometry, &path), &options).unwrap();
        qemu.assert_clean(&path);
        qemu.assert_identical(&raw, "raw", &path, "qcow2");
        let slow = SlowReader::open(&path, "qcow2");
        disk.assert_eq_at(0, &slow.read(0, size as usize), &what);
    }
}

/// A disk of 8 TiB with little in it is converted in seconds, in both directions: holes are not read.
#[test]
fn huge_sparse_disks_are_converted_without_reading_their_holes() {
    let Some(qemu) = Qemu::find() else { return };
    let fixture = Fixture::new();
    let size = (8u64 << 40) + 512;
    let mut forge = Forge::new(3, 16, size);
    let places: Vec<u64> = (0..40).map(|i| i * (size >> 16) / 40).collect();
    for &cluster in &places {
        forge.data(cluster, &cluster.to_be_bytes());
    }
    forge.data(size >> 16, b"the last sector");
    let source = fixture.path("source.qcow2");
    forge.build().bytes.write_to(&source);
    let target = fixture.path("target.qcow2");
    let geometry = Geometry::plain(2 << 20);
    let options = ConvertOptions { compression: Some(Compression::default()), ..ConvertOptions::default() };
    let start = std::time::Instant::now();
    let result =
        to_qcow2(&open(&source, "qcow2"), &target, create_options(&geometry, &target), &options).unwrap();
    assert!(result.bytes_read <= 42 << 21, "{} bytes read", result.bytes_read);
    let raw = fixture.path("target.raw");
    // Not every file system has files of 8 TiB.
    let has_raw = to_raw(&open(&target, "qcow2"), &raw, &ConvertOptions::default()).is_ok();
    assert!(start.elapsed().as_secs() < 60, "{:?}", start.elapsed());
    qemu.assert_clean(&target);
    let written = open(&target, "qcow2");
    for &cluster in &places {
        assert_eq!(chain::read(&written, cluster << 16, 8).unwrap(), cluster.to_be_bytes());
        if has_raw {
            assert_eq!(chain::read(&open(&raw, "raw"), cluster << 16, 8).unwrap(), cluster.to_be_bytes());
        }
    }
    assert_eq!(chain::read(&written, size - 512, 15).unwrap(), b"the last sector");
}

/// A broken source ends the convert with its own error, and no target appears.
#[test]
fn a_broken_source_leaves_no_target() {
    for case in malformed::all() {
        let malformed::Stage::Read(_) = case.stage else { continue };
        if !case.built.data_file.is_empty() {
            continue;
        }
        let fixture = Fixture::new();
        let source = fixture.path("broken.qcow2");
        case.built.bytes.write_to(&source);
        for count in [1, 4] {
            let options = ConvertOptions { concurrency: threads(count), ..ConvertOptions::default() };
            let image = open(&source, "qcow2");
            let errors = [
                to_raw(&image, &fixture.path("out.raw"), &options).expect_err(case.name),
                to_qcow2(&image, &fixture.path("out.qcow2"), CreateOptions::default(), &options)
                    .expect_err(case.name),
            ];
            for error in errors {
                assert_eq!(error.kind().code(), case.code, "{}: {error}", case.name);
                assert_eq!(error.path(), Some(source.as_path()), "{}: {error}", case.name);
            }
        }
        assert_eq!(std::fs::read_dir(fixture.dir()).unwrap().count(), 1, "{}: something was left", case.name);
    }
}

/// An image opened without its data file is not converted as if its own bytes were the guest's.
#[test]
fn a_missing_data_file_is_an_error() {
    let mut forge = Forge::new(3, 16, 4 << 16).external("elsewhere.raw", false);
    forge.data(0, b"stored elsewhere");
    let fixture = Fixture::new();
    let source = fixture.path("source.qcow2");
    forge.build().bytes.write_to(&source);
    let qcow2 = Qcow2::open(chain::file(&source).unwrap(), &OpenOptions::default()).unwrap();
    let image = Image::new(vec![Box::new(qcow2)]).unwrap();
    let error = to_raw(&image, &fixture.path("out.raw"), &ConvertOptions::default()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ReferenceDenied, "{error}");
    assert!(!fixture.path("out.raw").exists());
}
