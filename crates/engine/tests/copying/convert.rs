//! Converts in every direction, judged by QEMU and by the model.

use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::Arc;

use qcow2_engine::convert::{
    Compression, ConvertOptions, ConvertResult, ConvertTarget, Delta, Window, convert,
};
use qcow2_engine::create::{Backing, CreateOptions, DataFile, NewTarget, Preallocation};
use qcow2_engine::encryption::{Encryption, Secret};
use qcow2_engine::format::CompressionType;
use qcow2_engine::storage::{MemoryStorage, NewFile, Overwrite};
use qcow2_engine::{
    Error, ErrorKind, GuestSource, Image, Job, Mem, MemMut, OpenOptions, Raw, Result, Storage, StorageExt,
};
use qcow2_testkit::matrix::{self, Case, Geometry, geometries};
use qcow2_testkit::model::assert_same;
use qcow2_testkit::storage::{Device, Fault, FaultStorage, Op, ShortIo};
use qcow2_testkit::{Fixture, Qemu, Rng, chain};

/// LUKS that takes no time to open.
fn encryption() -> Encryption {
    Encryption { iter_time_ms: Some(1), ..Encryption::luks(Secret::new(b"secret".to_vec())) }
}

fn raw_image(storage: Arc<dyn Storage>) -> Image {
    Image::new(vec![Box::new(Raw::new(storage).unwrap())]).unwrap()
}

/// A disk with data, text, zeroes that are stored, and holes, in pieces of many sizes.
fn disk(size: usize, seed: u64) -> (Vec<u8>, Arc<MemoryStorage>) {
    let mut rng = Rng::new(seed);
    let storage = Arc::new(MemoryStorage::new());
    storage.resize(size as u64).unwrap();
    let mut bytes = vec![0; size];
    let mut at = 0;
    while at < size {
        let limit = [700, 5000, 70_000, 300_000][rng.below(4) as usize];
        let length = (1 + rng.below(limit) as usize).min(size - at);
        let piece = &mut bytes[at..at + length];
        match rng.below(5) {
            0 => piece.copy_from_slice(&rng.bytes(length)),
            1 | 2 => piece.copy_from_slice(&rng.text(length)),
            3 => {}
            _ => {
                at += length;
                continue;
            }
        }
        storage.write_all_at(Mem::from(&*piece), at as u64).unwrap();
        at += length;
    }
    (bytes, storage)
}

fn to_raw(source: &dyn GuestSource, options: &ConvertOptions) -> Result<(Vec<u8>, ConvertResult)> {
    let storage = Arc::new(MemoryStorage::new());
    let target = ConvertTarget::New(NewTarget::Raw {
        storage: storage.clone(),
        preallocation: Preallocation::Off,
        keep: false,
    });
    let result = convert(source, target, options, &Job::new())?;
    Ok((storage.to_vec(), result))
}

/// Converts to files that appear when complete, as the commands do.
fn to_qcow2(
    source: &dyn GuestSource,
    path: &Path,
    create: &CreateOptions,
    options: &ConvertOptions,
) -> Result<ConvertResult> {
    let new = NewFile::create(path, Overwrite::Replace, &[])?;
    let data = match &create.data_file {
        Some(file) => {
            Some(NewFile::create(std::str::from_utf8(&file.filename).unwrap(), Overwrite::Replace, &[])?)
        }
        None => None,
    };
    let target = ConvertTarget::New(NewTarget::Qcow2 {
        storage: new.storage(),
        data_file: data.as_ref().map(NewFile::storage),
        create: Box::new(create.clone()),
    });
    let result = convert(source, target, options, &Job::new())?;
    data.map_or(Ok(()), NewFile::commit)?;
    new.commit()?;
    Ok(result)
}

fn create_options(g: &Geometry, dir: &Fixture) -> CreateOptions {
    CreateOptions {
        version: g.version,
        cluster_size: g.cluster_size,
        refcount_bits: g.refcount_bits,
        extended_l2: g.extended_l2,
        compression_type: if g.zstd { CompressionType::Zstd } else { CompressionType::Zlib },
        data_file: (g.data_file != matrix::DataFile::Internal).then(|| DataFile {
            filename: dir.path("target-data").to_str().unwrap().into(),
            raw: g.data_file == matrix::DataFile::ExternalRaw,
        }),
        ..Default::default()
    }
}

fn compressed() -> ConvertOptions {
    ConvertOptions { compression: Some(Compression::default()), ..Default::default() }
}

#[track_caller]
fn assert_image(qemu: &Qemu, path: &Path, expected: &[u8], what: &str) {
    let out = qemu.img(&["check", "-f", "qcow2", path.to_str().unwrap()]);
    assert_eq!(out.code, 0, "{what}: {}{}", out.stdout, out.stderr);
    assert_same(expected, &qemu.guest_bytes(path, "qcow2", &[]), 0, what);
}

#[test]
fn every_image_of_qemu_becomes_raw_and_qcow2() {
    let Some(qemu) = Qemu::find() else { return };
    for (seed, geometry) in (0..).zip(geometries()) {
        let name = geometry.name();
        let image = Case { geometry: geometry.clone(), seed }.build(&qemu);
        let expected = image.disk.read(0, image.disk.size() as usize);
        let source = chain::open(&image.path, "qcow2", &OpenOptions::default()).unwrap();
        let (raw, _) = to_raw(&source, &ConvertOptions::default()).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_same(&expected, &raw, 0, &name);
        let out = image.fixture.path("out");
        let options = if seed % 2 == 0 { ConvertOptions::default() } else { compressed() };
        to_qcow2(&source, &out, &CreateOptions::default(), &options).unwrap();
        assert_image(&qemu, &out, &expected, &name);
        for frozen in &image.snapshots {
            let open = OpenOptions { snapshot: Some(frozen.name.clone().into()), ..Default::default() };
            let source = chain::open(&image.path, "qcow2", &open).unwrap();
            let (raw, _) = to_raw(&source, &ConvertOptions::default()).unwrap();
            assert_same(&frozen.disk.read(0, raw.len()), &raw, 0, &format!("{name} {}", frozen.name));
        }
    }
}

#[test]
fn every_target_geometry() {
    let Some(qemu) = Qemu::find() else { return };
    let (bytes, storage) = disk((5 << 20) + 512, 7);
    let source = raw_image(storage);
    for geometry in geometries() {
        if geometry.backing != matrix::Backing::None {
            continue;
        }
        let dir = Fixture::new();
        let path = dir.path("out");
        let create = create_options(&geometry, &dir);
        let name = geometry.name();
        to_qcow2(&source, &path, &create, &ConvertOptions::default())
            .unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_image(&qemu, &path, &bytes, &name);
        let every = ConvertOptions { sparse_size: 0, ..Default::default() };
        to_qcow2(&source, &path, &create, &every).unwrap();
        assert_image(&qemu, &path, &bytes, &format!("{name} -S 0"));
        if create.data_file.is_some() {
            if geometry.data_file == matrix::DataFile::ExternalRaw {
                assert_same(&bytes, &std::fs::read(dir.path("target-data")).unwrap(), 0, "raw data file");
            }
            continue;
        }
        to_qcow2(&source, &path, &create, &compressed()).unwrap();
        assert_image(&qemu, &path, &bytes, &format!("{name} -c"));
        for preallocation in [Preallocation::Metadata, Preallocation::Falloc, Preallocation::Full] {
            let create = CreateOptions { preallocation, ..create.clone() };
            to_qcow2(&source, &path, &create, &ConvertOptions::default()).unwrap();
            assert_image(&qemu, &path, &bytes, &format!("{name} {preallocation:?}"));
        }
    }
}

#[test]
fn compressed_is_smaller_and_levels_and_windows_differ() {
    let Some(qemu) = Qemu::find() else { return };
    let mut rng = Rng::new(3);
    let bytes = rng.text(4 << 20);
    let source = raw_image(Arc::new(MemoryStorage::from_bytes(&bytes)));
    let dir = Fixture::new();
    let path = dir.path("out");
    let mut sizes = Vec::new();
    for (compression_type, level, window) in [
        (CompressionType::Zlib, None, Window::Full),
        (CompressionType::Zlib, Some(1), Window::Full),
        (CompressionType::Zlib, Some(12), Window::Full),
        (CompressionType::Zlib, Some(6), Window::Qemu4KiB),
        (CompressionType::Zstd, None, Window::Full),
        (CompressionType::Zstd, Some(15), Window::Full),
    ] {
        let create = CreateOptions { compression_type, ..Default::default() };
        let options =
            ConvertOptions { compression: Some(Compression { level, window }), ..Default::default() };
        let result = to_qcow2(&source, &path, &create, &options).unwrap();
        assert_image(&qemu, &path, &bytes, &format!("{compression_type:?} {level:?} {window:?}"));
        let length = std::fs::metadata(&path).unwrap().len();
        // Packed byte by byte: header, tables and less than a cluster besides the data.
        assert!(length < result.bytes_written + 6 * 65536, "{length} {result:?}");
        sizes.push(result.bytes_written);
    }
    assert!(sizes[2] < sizes[0] && sizes[0] < sizes[1], "{sizes:?}");
    let bad = ConvertOptions {
        compression: Some(Compression { level: Some(99), window: Window::Full }),
        ..Default::default()
    };
    let error = to_qcow2(&source, &path, &CreateOptions::default(), &bad).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument);
}

/// The whole target file, for a number of workers.
fn qcow2_bytes(
    source: &dyn GuestSource,
    create: &CreateOptions,
    options: &ConvertOptions,
    workers: usize,
) -> Vec<u8> {
    let storage = Arc::new(MemoryStorage::new());
    let target = ConvertTarget::New(NewTarget::Qcow2 {
        storage: storage.clone(),
        data_file: None,
        create: Box::new(create.clone()),
    });
    let options = ConvertOptions { concurrency: NonZeroUsize::new(workers), ..options.clone() };
    convert(source, target, &options, &Job::new()).unwrap();
    storage.to_vec()
}

#[test]
fn the_target_does_not_depend_on_the_number_of_workers() {
    let (_, storage) = disk(24 << 20, 11);
    let source = raw_image(storage);
    let base = CreateOptions::default();
    let zstd = CreateOptions { compression_type: CompressionType::Zstd, refcount_bits: 2, ..base.clone() };
    let small = CreateOptions { cluster_size: 512, ..base.clone() };
    let extended = CreateOptions { extended_l2: true, ..base.clone() };
    let large = CreateOptions { cluster_size: 2 << 20, ..base.clone() };
    let plain = ConvertOptions::default();
    let cases = [(&base, &plain), (&small, &plain), (&extended, &plain), (&large, &plain)]
        .into_iter()
        .map(|(c, o)| (c, o.clone()));
    let packed = [&base, &zstd, &small, &extended, &large].map(|c| (c, compressed()));
    for (create, options) in cases.chain(packed) {
        let one = qcow2_bytes(&source, create, &options, 1);
        for workers in [2, 3, 9] {
            let many = qcow2_bytes(&source, create, &options, workers);
            assert!(one == many, "{workers} workers, {create:?}, {options:?}");
        }
    }
}

#[test]
fn raw_targets_are_sparse_as_asked() {
    let dir = Fixture::new();
    let mut bytes = vec![0u8; 8 << 20];
    bytes[1 << 20..(1 << 20) + 4096].fill(1);
    // A gap of zeroes that is shorter than 64 KiB.
    bytes[(4 << 20) + 100] = 1;
    bytes[(4 << 20) + 20_000] = 1;
    let source = raw_image(Arc::new(MemoryStorage::from_bytes(&bytes)));
    let used = |sparse_size, preallocation| {
        let new = NewFile::create(dir.path("raw"), Overwrite::Replace, &[]).unwrap();
        let target =
            ConvertTarget::New(NewTarget::Raw { storage: new.storage(), preallocation, keep: false });
        let options = ConvertOptions { sparse_size, ..Default::default() };
        convert(&source, target, &options, &Job::new()).unwrap();
        new.commit().unwrap();
        assert!(std::fs::read(dir.path("raw")).unwrap() == bytes);
        qcow2_testkit::at::space(&dir.path("raw")).unwrap()
    };
    // A file system may count a block of its own for the list of extents.
    let is = |used: u64, data: u64| assert!((data..=data + 16384).contains(&used), "{used} for {data}");
    is(used(4096, Preallocation::Off), 3 * 4096);
    is(used(65536, Preallocation::Off), 2 * 65536);
    is(used(0, Preallocation::Off), 8 << 20);
    is(used(4096, Preallocation::Falloc), 8 << 20);
    is(used(4096, Preallocation::Full), 8 << 20);
}

#[test]
fn only_what_differs_from_a_base() {
    let Some(qemu) = Qemu::find() else { return };
    for (seed, geometry) in (50..).zip(geometries()) {
        if geometry.backing == matrix::Backing::None {
            continue;
        }
        let name = geometry.name();
        let image = Case { geometry, seed }.build(&qemu);
        let expected = image.disk.read(0, image.disk.size() as usize);
        let source = chain::open(&image.path, "qcow2", &OpenOptions::default()).unwrap();
        let base = source.layers()[1].storage().path().unwrap().to_owned();
        let format = source.layers()[1].format();
        let delta = Delta { layers: 1, base_size: source.layers()[1].virtual_size() };
        let backing = Backing { filename: base.to_str().unwrap().into(), format: Some(format.into()) };
        for (version, cluster_size, extended_l2, preallocation) in [
            (3, 65536, false, Preallocation::Off),
            (2, 65536, false, Preallocation::Off),
            (3, 512, false, Preallocation::Off),
            (3, 16384, true, Preallocation::Off),
            (3, 65536, true, Preallocation::Off),
            (3, 65536, true, Preallocation::Metadata),
        ] {
            let create = CreateOptions {
                version,
                cluster_size,
                extended_l2,
                preallocation,
                backing: Some(backing.clone()),
                ..Default::default()
            };
            let out = image.fixture.path("delta");
            let what = format!("{name} -> v{version} {cluster_size} {extended_l2} {preallocation:?}");
            for options in [ConvertOptions::default(), compressed()] {
                if options.compression.is_some() && preallocation != Preallocation::Off {
                    continue;
                }
                let options = ConvertOptions { delta: Some(delta), ..options };
                to_qcow2(&source, &out, &create, &options).unwrap_or_else(|e| panic!("{what}: {e}"));
                assert_image(&qemu, &out, &expected, &what);
            }
        }
    }
}

#[test]
fn a_delta_holds_nothing_of_the_base() {
    let Some(qemu) = Qemu::find() else { return };
    let dir = Fixture::new();
    let (base, top, out) = (dir.path("base"), dir.path("top"), dir.path("out"));
    qemu.img(&["create", "-q", "-f", "raw", base.to_str().unwrap(), "8M"]).ok();
    qemu.io(&base, "raw", &["write -P 1 0 8M"]);
    qemu.create(
        &top,
        &format!("extended_l2=on,backing_file={},backing_fmt=raw", base.display()),
        Some(8 << 20),
    );
    qemu.io(
        &top,
        "qcow2",
        &["write -P 2 66k 2k", "write -z 1M 64k", "write -z 2050k 2k", "write -P 0 4M 2k"],
    );
    let source = chain::open(&top, "qcow2", &OpenOptions::default()).unwrap();
    let backing = Some(Backing { filename: base.to_str().unwrap().into(), format: Some(b"raw".to_vec()) });
    let create = CreateOptions { extended_l2: true, backing, ..Default::default() };
    let options = ConvertOptions {
        delta: Some(Delta { layers: 1, base_size: 8 << 20 }),
        sparse_size: 512,
        ..Default::default()
    };
    let result = to_qcow2(&source, &out, &create, &options).unwrap();
    assert_eq!(result.bytes_written, 2048);
    qemu.assert_identical(&top, "qcow2", &out, "qcow2");
    let parts = |path| {
        let map = qemu.map_json(path, "qcow2");
        let top = map.as_array().unwrap().iter().filter(|e| e["depth"] == 0);
        top.map(|e| {
            (e["start"].as_u64().unwrap(), e["length"].as_u64().unwrap(), e["zero"].as_bool().unwrap())
        })
        .collect::<Vec<_>>()
    };
    assert_eq!(
        parts(&out),
        [(67584, 2048, false), (1 << 20, 65536, true), (2050 << 10, 2048, true), (4 << 20, 2048, true)]
    );
}

#[test]
fn devices_are_zeroed_where_the_disk_is_zero() {
    let Some(qemu) = Qemu::find() else { return };
    let (bytes, storage) = disk(6 << 20, 23);
    let source = raw_image(storage);
    let device = Device::new((6 << 20) + 4096);
    let target = |device: &Arc<Device>| {
        ConvertTarget::New(NewTarget::Raw {
            storage: device.clone(),
            preallocation: Preallocation::Off,
            keep: false,
        })
    };
    convert(&source, target(&device), &ConvertOptions::default(), &Job::new()).unwrap();
    let after = device.to_vec();
    assert_same(&bytes, &after[..bytes.len()], 0, "device");
    assert!(after[bytes.len()..].iter().all(|b| *b == 0xee));

    let zeroed = ConvertOptions { target_is_zero: true, ..Default::default() };
    let device = Device::new(6 << 20);
    convert(&source, target(&device), &zeroed, &Job::new()).unwrap();
    assert!(device.to_vec() != bytes, "what is zero was left alone");

    let small = Device::new((6 << 20) - 512);
    let error = convert(&source, target(&small), &ConvertOptions::default(), &Job::new()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    assert!(small.to_vec().iter().all(|b| *b == 0xee));

    // qcow2 on a device: nothing old shows through, whatever is not written.
    let dir = Fixture::new();
    for preallocation in [Preallocation::Off, Preallocation::Metadata] {
        for (cluster_size, extended_l2) in [(512, false), (65536, false), (65536, true), (2 << 20, false)] {
            let device = Device::new(24 << 20);
            let create =
                Box::new(CreateOptions { cluster_size, extended_l2, preallocation, ..Default::default() });
            let target =
                ConvertTarget::New(NewTarget::Qcow2 { storage: device.clone(), data_file: None, create });
            convert(&source, target, &ConvertOptions::default(), &Job::new()).unwrap();
            let file = dir.file("image", &device.to_vec());
            assert_same(&bytes, &qemu.guest_bytes(&file, "qcow2", &[]), 0, "qcow2 on a device");
            let check = qemu.check_json(&file);
            assert!(check["corruptions"].is_null() && check["leaks"].is_null(), "{check}");
        }
    }
}

#[test]
fn contradictions_are_refused_before_anything_is_written() {
    let source = raw_image(Arc::new(MemoryStorage::from_bytes(&[1; 4096])));
    let refused = |target: ConvertTarget, options: &ConvertOptions| {
        let storage = match &target {
            ConvertTarget::New(NewTarget::Format { hosts, .. }) => hosts.own.clone(),
            ConvertTarget::New(NewTarget::Raw { storage, .. })
            | ConvertTarget::New(NewTarget::Qcow2 { storage, .. }) => storage.clone(),
            ConvertTarget::Existing(image) => image.layers()[0].storage().clone(),
        };
        storage.write_all_at(Mem::from(&b"precious"[..]), 0).unwrap();
        let error = convert(&source, target, options, &Job::new()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument);
        assert_eq!(storage.size().unwrap(), 8);
        error.field().unwrap()
    };
    let raw = |preallocation| {
        ConvertTarget::New(NewTarget::Raw {
            storage: Arc::new(MemoryStorage::new()),
            preallocation,
            keep: false,
        })
    };
    let qcow2 = |create: CreateOptions| {
        ConvertTarget::New(NewTarget::Qcow2 {
            storage: Arc::new(MemoryStorage::new()),
            data_file: None,
            create: Box::new(create),
        })
    };
    let luks = || {
        let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::new());
        let image = encryption().new_luks(4096, Preallocation::Off, &Job::new()).unwrap();
        ConvertTarget::New(NewTarget::Format { image: Arc::new(image), hosts: storage.into() })
    };
    let delta = ConvertOptions { delta: Some(Delta { layers: 1, base_size: 0 }), ..Default::default() };
    let plain = ConvertOptions::default();
    let backing = Some(Backing { filename: b"x".to_vec(), format: None });
    let sparse = ConvertOptions { sparse_size: 1000, ..Default::default() };
    assert_eq!(refused(raw(Preallocation::Off), &sparse), "sparse_size");
    assert_eq!(refused(raw(Preallocation::Off), &compressed()), "compress");
    assert_eq!(refused(raw(Preallocation::Off), &delta), "base");
    assert_eq!(refused(luks(), &compressed()), "compress");
    assert_eq!(refused(luks(), &delta), "base");
    assert_eq!(refused(raw(Preallocation::Metadata), &plain), "preallocation");
    assert_eq!(refused(qcow2(CreateOptions { backing, ..Default::default() }), &plain), "backing_file");
    assert_eq!(refused(qcow2(CreateOptions::default()), &delta), "base");
    assert_eq!(refused(qcow2(CreateOptions { version: 9, ..Default::default() }), &plain), "version");
    let full = CreateOptions { preallocation: Preallocation::Full, ..Default::default() };
    assert_eq!(refused(qcow2(full), &compressed()), "preallocation");
    let data_file = Some(DataFile { filename: b"x".to_vec(), raw: false });
    assert_eq!(
        refused(qcow2(CreateOptions { data_file: data_file.clone(), ..Default::default() }), &plain),
        "data_file"
    );
    assert_eq!(refused(qcow2(CreateOptions { data_file, ..Default::default() }), &compressed()), "compress");
}

#[test]
fn short_transfers_change_nothing() {
    let (bytes, storage) = disk(3 << 20, 31);
    let source = raw_image(Arc::new(ShortIo::new(storage.clone(), 3000)));
    let (raw, result) = to_raw(&source, &ConvertOptions::default()).unwrap();
    assert_same(&bytes, &raw, 0, "raw");
    assert_eq!(result.virtual_size, 3 << 20);
    let plain = raw_image(storage);
    for options in [ConvertOptions::default(), compressed()] {
        let whole = qcow2_bytes(&plain, &CreateOptions::default(), &options, 2);
        let target = Arc::new(MemoryStorage::new());
        let short: Arc<dyn Storage> = Arc::new(ShortIo::new(target.clone(), 3000));
        let create = Box::default();
        let to = ConvertTarget::New(NewTarget::Qcow2 { storage: short, data_file: None, create });
        convert(&source, to, &options, &Job::new()).unwrap();
        assert!(whole == target.to_vec());
    }
}

#[test]
fn every_fault_is_reported_and_leaves_no_image() {
    let (_, storage) = disk(4 << 20, 37);
    let mut seen = 0;
    for n in 0.. {
        for workers in [1, 4] {
            // A fault of the source, then one of the target.
            let source = raw_image(Arc::new(FaultStorage::new(storage.clone(), Fault::nth(n, 5))));
            let options = ConvertOptions { concurrency: NonZeroUsize::new(workers), ..compressed() };
            let target = Arc::new(MemoryStorage::new());
            let to = ConvertTarget::New(NewTarget::Qcow2 {
                storage: target.clone(),
                data_file: None,
                create: Box::default(),
            });
            let read = convert(&source, to, &options, &Job::new());
            assert_eq!(read.is_ok(), target.to_vec().starts_with(b"QFI"));

            let full: Arc<dyn Storage> =
                Arc::new(FaultStorage::new(target.clone(), Fault::from(Op::Write, n, 28)));
            let to = ConvertTarget::New(NewTarget::Qcow2 {
                storage: full,
                data_file: None,
                create: Box::default(),
            });
            let write = convert(&raw_image(storage.clone()), to, &options, &Job::new());
            assert_eq!(write.is_ok(), target.to_vec().starts_with(b"QFI"));
            let errno = |r: &Result<ConvertResult>| r.as_ref().err().map(|e| (e.kind(), e.errno().unwrap()));
            assert!(matches!(errno(&read), None | Some((ErrorKind::Io, 5))));
            assert!(matches!(errno(&write), None | Some((ErrorKind::Io, 28))));
            if read.is_ok() && write.is_ok() {
                assert!(seen > 20, "{seen}");
                return;
            }
            seen += 1;
        }
    }
}

#[test]
fn a_full_disk_leaves_nothing() {
    let dir = Fixture::new();
    let (_, storage) = disk(4 << 20, 41);
    let path = dir.path("out");
    let new = NewFile::create(&path, Overwrite::Refuse, &[]).unwrap();
    let full: Arc<dyn Storage> = Arc::new(FaultStorage::new(new.storage(), Fault::from(Op::Write, 3, 28)));
    let target =
        ConvertTarget::New(NewTarget::Raw { storage: full, preallocation: Preallocation::Off, keep: false });
    let error = convert(&raw_image(storage), target, &ConvertOptions::default(), &Job::new()).unwrap_err();
    assert_eq!((error.errno(), error.path()), (Some(28), Some(path.as_path())));
    drop(new);
    assert_eq!(std::fs::read_dir(dir.dir()).unwrap().count(), 0);
}

/// Cancels its job when `read_at` was called a number of times, and fails if it is read much longer.
struct Cancelling<'a> {
    inner: &'a Image,
    job: &'a Job,
    calls: std::sync::atomic::AtomicU64,
    at: u64,
}

impl GuestSource for Cancelling<'_> {
    fn virtual_size(&self) -> u64 {
        self.inner.virtual_size()
    }
    fn cluster_size(&self) -> u64 {
        65536
    }
    fn extents_up_to(
        &self,
        start: u64,
        length: u64,
        most: usize,
        job: &Job,
        out: &mut Vec<qcow2_engine::Extent>,
    ) -> Result<u64> {
        let from = out.len();
        let covered = self.inner.extents_up_to(start, length, most, job, out)?;
        out[from..].iter_mut().for_each(|e| e.host = None);
        Ok(covered)
    }
    fn read_at(&self, buf: MemMut<'_>, offset: u64) -> Result<()> {
        let call = self.calls.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
        if call == self.at {
            self.job.cancel();
        }
        if call > self.at + 64 {
            return Err(Error::new(ErrorKind::Internal, "read long after it was cancelled"));
        }
        self.inner.read_at(buf, offset)
    }
}

#[test]
fn cancelling_stops_at_the_next_chunk() {
    let mut rng = Rng::new(5);
    let bytes = rng.bytes(32 << 20);
    let image = raw_image(Arc::new(MemoryStorage::from_bytes(&bytes)));
    for at in [0, 1, 5, 30] {
        for to_raw in [true, false] {
            let job = Job::new();
            let source = Cancelling { inner: &image, job: &job, calls: 0.into(), at };
            let storage = Arc::new(MemoryStorage::new());
            let target = match to_raw {
                true => ConvertTarget::New(NewTarget::Raw {
                    storage: storage.clone(),
                    preallocation: Preallocation::Off,
                    keep: false,
                }),
                false => ConvertTarget::New(NewTarget::Qcow2 {
                    storage: storage.clone(),
                    data_file: None,
                    create: Box::default(),
                }),
            };
            let options = ConvertOptions { concurrency: NonZeroUsize::new(4), ..Default::default() };
            let error = convert(&source, target, &options, &job).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Aborted, "{error}");
            assert!(!storage.to_vec().starts_with(b"QFI"));
        }
    }
}

#[test]
fn progress_ends_at_the_whole_disk() {
    let (_, storage) = disk((4 << 20) + 512, 43);
    for options in [ConvertOptions::default(), compressed()] {
        let job = Job::new();
        let to = ConvertTarget::New(NewTarget::Qcow2 {
            storage: Arc::new(MemoryStorage::new()),
            data_file: None,
            create: Box::default(),
        });
        convert(&raw_image(storage.clone()), to, &options, &job).unwrap();
        assert_eq!(job.progress(), ((4 << 20) + 512, (4 << 20) + 512));
    }
}

#[test]
fn an_empty_disk() {
    let Some(qemu) = Qemu::find() else { return };
    let dir = Fixture::new();
    let source = raw_image(Arc::new(MemoryStorage::new()));
    assert!(to_raw(&source, &ConvertOptions::default()).unwrap().0.is_empty());
    to_qcow2(&source, &dir.path("out"), &CreateOptions::default(), &ConvertOptions::default()).unwrap();
    qemu.assert_clean(&dir.path("out"));
}
