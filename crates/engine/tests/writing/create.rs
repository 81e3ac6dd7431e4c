//! New images, judged by QEMU: clean, and described as QEMU describes its own of the same options.

use std::path::Path;
use std::sync::Arc;

use qcow2_engine::create::{Backing, CreateOptions, DataFile, Preallocation, create};
use qcow2_engine::format::CompressionType;
use qcow2_engine::storage::{MemoryStorage, NewFile, Overwrite};
use qcow2_engine::{ErrorKind, Job, Result, Storage, StorageExt};
use qcow2_testkit::storage::{Fault, FaultStorage, ShortIo};
use qcow2_testkit::{Fixture, Qemu};

/// Creates as the commands do: files that appear when complete.
fn create_file(path: &Path, options: &CreateOptions) -> Result<()> {
    let new = NewFile::create(path, Overwrite::Replace, &[])?;
    let data = match &options.data_file {
        Some(file) => {
            let name = std::str::from_utf8(&file.filename).unwrap();
            Some(NewFile::create(path.with_file_name(name), Overwrite::Replace, &[])?)
        }
        None => None,
    };
    create(new.storage(), data.as_ref().map(NewFile::storage), options, &Job::new())?;
    data.map_or(Ok(()), NewFile::commit)?;
    new.commit()
}

fn qemu_options(o: &CreateOptions) -> String {
    let on = |yes: bool| if yes { "on" } else { "off" };
    let mut text = format!(
        "compat={},cluster_size={},extended_l2={},refcount_bits={},lazy_refcounts={}",
        if o.version == 2 { "0.10" } else { "1.1" },
        o.cluster_size,
        on(o.extended_l2),
        o.refcount_bits,
        on(o.lazy_refcounts),
    );
    if o.compression_type == CompressionType::Zstd {
        text += ",compression_type=zstd";
    }
    text += match o.preallocation {
        Preallocation::Off => "",
        Preallocation::Metadata => ",preallocation=metadata",
        Preallocation::Falloc => ",preallocation=falloc",
        Preallocation::Full => ",preallocation=full",
    };
    if let Some(Backing { filename, format }) = &o.backing {
        text += &format!(",backing_file={}", String::from_utf8_lossy(filename));
        if let Some(format) = format {
            text += &format!(",backing_fmt={}", String::from_utf8_lossy(format));
        }
    }
    if let Some(DataFile { filename, raw }) = &o.data_file {
        text += &format!(",data_file={},data_file_raw={}", String::from_utf8_lossy(filename), on(*raw));
    }
    text
}

/// `info` without what depends on the name, the allocation of the host and the order of creation.
fn description(qemu: &Qemu, path: &Path) -> String {
    let mut info = qemu.info_json(path);
    let map = info.as_object_mut().unwrap();
    for key in ["filename", "actual-size", "children"] {
        map.remove(key);
    }
    info.to_string()
}

/// Creates the image here and with QEMU, side by side, and compares what can be seen.
#[track_caller]
fn assert_like_qemu(options: &CreateOptions) {
    let Some(qemu) = Qemu::find() else { return };
    let (ours, theirs) = (Fixture::new(), Fixture::new());
    for dir in [&ours, &theirs] {
        if options.backing.is_some() {
            qemu.img(&["create", "-q", "-f", "raw", dir.path("base").to_str().unwrap(), "3M"]).ok();
        }
    }
    // QEMU looks for a relative data file in the current folder: name it in full.
    let options_in = |dir: &Fixture| {
        let mut options = options.clone();
        if let Some(data_file) = &mut options.data_file {
            data_file.filename = dir.path("data").to_str().unwrap().into();
        }
        options
    };
    let text = qemu_options(options);
    create_file(&ours.path("image"), &options_in(&ours)).unwrap_or_else(|e| panic!("{text}: {e}"));
    let theirs_text = qemu_options(&options_in(&theirs));
    let backing = format!("backing_file={}", theirs.path("base").display());
    qemu.create(
        &theirs.path("image"),
        &theirs_text.replace("backing_file=base", &backing),
        Some(options.size),
    );
    let both = [&ours, &theirs].map(|dir| {
        let path = dir.path("image");
        qemu.assert_clean(&path);
        let folder = format!("{}/", dir.dir().display());
        (description(&qemu, &path).replace(&folder, ""), qemu.map_json(&path, "qcow2").to_string())
    });
    assert_eq!(both[0].0, both[1].0, "{text}");
    let zeroed = |dir: &Fixture| qemu.guest_bytes(&dir.path("image"), "qcow2", &[]).iter().all(|b| *b == 0);
    assert!(zeroed(&ours), "{text}");
    if options.preallocation == Preallocation::Off && options.data_file.is_none() {
        assert_eq!(both[0].1, both[1].1, "{text}");
        let lengths = [&ours, &theirs].map(|d| std::fs::metadata(d.path("image")).unwrap().len());
        // QEMU's own length depends on the cluster size below the block size of the host.
        if options.cluster_size >= 4096 {
            assert_eq!(lengths[0], lengths[1], "{text}");
        }
    }
}

#[test]
fn every_geometry_is_clean_and_described_alike() {
    for cluster_size in [512, 4096, 65536, 2 << 20] {
        for refcount_bits in [1, 2, 4, 8, 16, 32, 64] {
            for preallocation in [Preallocation::Off, Preallocation::Metadata] {
                let size = if cluster_size == 512 { (700 << 10) + 512 } else { (9 << 20) + 512 };
                let base =
                    CreateOptions { size, cluster_size, refcount_bits, preallocation, ..Default::default() };
                assert_like_qemu(&base);
                if cluster_size >= 16384 {
                    assert_like_qemu(&CreateOptions { extended_l2: true, ..base.clone() });
                }
                if refcount_bits == 16 {
                    assert_like_qemu(&CreateOptions { version: 2, ..base });
                }
            }
        }
    }
}

#[test]
fn every_other_option() {
    let base = CreateOptions { size: 5 << 20, ..Default::default() };
    assert_like_qemu(&base);
    assert_like_qemu(&CreateOptions { size: 0, ..base.clone() });
    assert_like_qemu(&CreateOptions { size: 1, ..base.clone() });
    assert_like_qemu(&CreateOptions { lazy_refcounts: true, ..base.clone() });
    assert_like_qemu(&CreateOptions { compression_type: CompressionType::Zstd, ..base.clone() });
    let backing = Some(Backing { filename: b"base".to_vec(), format: Some(b"raw".to_vec()) });
    assert_like_qemu(&CreateOptions { backing: backing.clone(), ..base.clone() });
    assert_like_qemu(&CreateOptions { backing: backing.clone(), version: 2, ..base.clone() });
    for preallocation in [Preallocation::Metadata, Preallocation::Falloc, Preallocation::Full] {
        assert_like_qemu(&CreateOptions { preallocation, ..base.clone() });
        assert_like_qemu(&CreateOptions { preallocation, version: 2, ..base.clone() });
        assert_like_qemu(&CreateOptions { preallocation, extended_l2: true, ..base.clone() });
        let extended =
            CreateOptions { preallocation, extended_l2: true, backing: backing.clone(), ..base.clone() };
        assert_like_qemu(&extended);
        for raw in [false, true] {
            let data_file = Some(DataFile { filename: b"data".to_vec(), raw });
            assert_like_qemu(&CreateOptions { preallocation, data_file: data_file.clone(), ..base.clone() });
            assert_like_qemu(&CreateOptions { data_file, ..base.clone() });
        }
    }
}

#[test]
fn preallocation_takes_the_space_it_says() {
    let dir = Fixture::new();
    let used = |preallocation, data_file: bool| {
        let data_file = data_file.then(|| DataFile { filename: b"data".to_vec(), raw: true });
        let options = CreateOptions { size: 8 << 20, preallocation, data_file, ..Default::default() };
        create_file(&dir.path("image"), &options).unwrap();
        let file = if options.data_file.is_some() { "data" } else { "image" };
        qcow2_testkit::at::space(&dir.path(file)).unwrap()
    };
    for data_file in [false, true] {
        assert!(used(Preallocation::Off, data_file) < 1 << 20);
        assert!(used(Preallocation::Metadata, data_file) < 1 << 20);
        assert!(used(Preallocation::Falloc, data_file) >= 8 << 20);
        assert!(used(Preallocation::Full, data_file) >= 8 << 20);
    }
}

#[test]
fn huge_images() {
    let Some(qemu) = Qemu::find() else { return };
    let dir = Fixture::new();
    let path = dir.path("image");
    let cases = [
        (16u64 << 40, 65536u64, 16u32, false),
        (64 << 40, 65536, 64, false),
        (16 << 40, 65536, 1, true),
        (2 << 50, 2 << 20, 16, false),
        (128 << 30, 512, 16, false),
        (20 << 30, 512, 64, false),
        (1 << 40, 4096, 16, false),
    ];
    for (size, cluster_size, refcount_bits, extended_l2) in cases {
        let options = CreateOptions { size, cluster_size, refcount_bits, extended_l2, ..Default::default() };
        create_file(&path, &options).unwrap_or_else(|e| panic!("{options:?}: {e}"));
        qemu.assert_clean(&path);
        assert_eq!(qemu.info_json(&path)["virtual-size"], size);
        // The last cluster can be written: every table reaches that far.
        qemu.io(&path, "qcow2", &[format!("write -P 7 {} 512", size - 512)]);
        qemu.assert_clean(&path);
    }
}

#[test]
fn metadata_of_a_large_disk_is_streamed() {
    let Some(qemu) = Qemu::find() else { return };
    let dir = Fixture::new();
    let path = dir.path("image");
    for (size, cluster_size) in [(4u64 << 40, 2u64 << 20), (200 << 30, 65536), (300 << 20, 512)] {
        let preallocation = Preallocation::Metadata;
        create_file(&path, &CreateOptions { size, cluster_size, preallocation, ..Default::default() })
            .unwrap();
        qemu.assert_clean(&path);
        let check = qemu.check_json(&path);
        assert_eq!(check["allocated-clusters"], size / cluster_size);
    }
}

#[test]
fn contradictions_are_refused_and_nothing_is_written() {
    let base = CreateOptions { size: 1 << 20, ..Default::default() };
    let backing = Some(Backing { filename: b"base".to_vec(), format: None });
    let raw = Some(DataFile { filename: b"data".to_vec(), raw: true });
    let plain = Some(DataFile { filename: b"data".to_vec(), raw: false });
    let long = |length| Some(Backing { filename: vec![b'x'; length], format: None });
    let cases = [
        ("version", CreateOptions { version: 4, ..base.clone() }),
        ("cluster_size", CreateOptions { cluster_size: 1000, ..base.clone() }),
        ("cluster_size", CreateOptions { cluster_size: 256, ..base.clone() }),
        ("cluster_size", CreateOptions { cluster_size: 4 << 20, ..base.clone() }),
        ("cluster_size", CreateOptions { cluster_size: 0, ..base.clone() }),
        ("cluster_size", CreateOptions { cluster_size: 8192, extended_l2: true, ..base.clone() }),
        ("refcount_bits", CreateOptions { refcount_bits: 0, ..base.clone() }),
        ("refcount_bits", CreateOptions { refcount_bits: 3, ..base.clone() }),
        ("refcount_bits", CreateOptions { refcount_bits: 128, ..base.clone() }),
        ("refcount_bits", CreateOptions { refcount_bits: 8, version: 2, ..base.clone() }),
        ("extended_l2", CreateOptions { extended_l2: true, version: 2, ..base.clone() }),
        ("lazy_refcounts", CreateOptions { lazy_refcounts: true, version: 2, ..base.clone() }),
        ("data_file", CreateOptions { data_file: raw.clone(), version: 2, ..base.clone() }),
        (
            "data_file",
            CreateOptions {
                data_file: Some(DataFile { filename: b"d".to_vec(), raw: false }),
                ..base.clone()
            },
        ),
        ("keep_data_file", CreateOptions { keep_data_file: true, ..base.clone() }),
        ("keep_data_file", CreateOptions { keep_data_file: true, data_file: plain, ..base.clone() }),
        (
            "keep_data_file",
            CreateOptions {
                keep_data_file: true,
                data_file: raw.clone(),
                preallocation: Preallocation::Falloc,
                ..base.clone()
            },
        ),
        ("data_file_raw", CreateOptions { data_file: raw, backing: backing.clone(), ..base.clone() }),
        ("preallocation", CreateOptions { preallocation: Preallocation::Full, backing, ..base.clone() }),
        ("backing_file", CreateOptions { backing: long(0), ..base.clone() }),
        ("backing file name", CreateOptions { backing: long(1024), ..base.clone() }),
        (
            "header with extensions and names",
            CreateOptions { backing: long(400), cluster_size: 512, ..base.clone() },
        ),
        ("size", CreateOptions { size: u64::MAX, ..base.clone() }),
        ("size", CreateOptions { size: 1 << 63, ..base.clone() }),
        ("size", CreateOptions { size: (128 << 30) + 1, cluster_size: 512, ..base }),
    ];
    for (field, options) in cases {
        let storage = Arc::new(MemoryStorage::new());
        let error = create(storage.clone(), None, &options, &Job::new()).unwrap_err();
        assert_eq!(error.field(), Some(field), "{options:?}: {error}");
        assert!(matches!(error.kind(), ErrorKind::InvalidArgument | ErrorKind::Limit), "{error:?}");
        assert_eq!(storage.size().unwrap(), 0);
    }
}

#[test]
fn a_kept_data_file_is_only_made_longer() {
    let raw = |raw| Some(DataFile { filename: b"data".to_vec(), raw });
    for (raw_file, preallocation) in [(true, Preallocation::Off), (false, Preallocation::Metadata)] {
        let held: Vec<u8> = (1..=u8::MAX).cycle().take(100_000).collect();
        for (length, expected) in [(held.len(), 1 << 20), (0, 1 << 20)] {
            let data = Arc::new(MemoryStorage::from_bytes(&held[..length]));
            let options = CreateOptions {
                size: 1 << 20,
                data_file: raw(raw_file),
                keep_data_file: true,
                preallocation,
                ..Default::default()
            };
            create(Arc::new(MemoryStorage::new()), Some(data.clone()), &options, &Job::new()).unwrap();
            let now = data.to_vec();
            assert_eq!(now.len(), expected);
            assert!(now[..length] == held[..length] && now[length..].iter().all(|byte| *byte == 0));
        }
    }
    // Nothing is cut off.
    let data = Arc::new(MemoryStorage::from_bytes(&[7; 3 << 20]));
    let options =
        CreateOptions { size: 1 << 20, data_file: raw(true), keep_data_file: true, ..Default::default() };
    create(Arc::new(MemoryStorage::new()), Some(data.clone()), &options, &Job::new()).unwrap();
    assert!(data.to_vec() == vec![7; 3 << 20]);
}

#[test]
fn short_writes_and_faults() {
    let options =
        CreateOptions { size: 3 << 20, preallocation: Preallocation::Metadata, ..Default::default() };
    let whole = Arc::new(MemoryStorage::new());
    create(whole.clone(), None, &options, &Job::new()).unwrap();
    let short = Arc::new(MemoryStorage::new());
    create(Arc::new(ShortIo::new(short.clone(), 5000)), None, &options, &Job::new()).unwrap();
    assert!(whole.to_vec() == short.to_vec());
    let mut faults = 0;
    for n in 0.. {
        let target = Arc::new(MemoryStorage::new());
        let faulty = Arc::new(FaultStorage::new(target.clone(), Fault::nth(n, 28)));
        match create(faulty, None, &options, &Job::new()) {
            Ok(()) => break,
            Err(error) => assert_eq!((error.kind(), error.errno()), (ErrorKind::Io, Some(28))),
        }
        faults += 1;
    }
    assert!(faults >= 5, "{faults}");
}

#[test]
fn a_cancelled_create_leaves_nothing() {
    let dir = Fixture::new();
    let new = NewFile::create(dir.path("image"), Overwrite::Refuse, &[]).unwrap();
    let job = Job::new();
    job.cancel();
    let options =
        CreateOptions { size: 1 << 40, preallocation: Preallocation::Metadata, ..Default::default() };
    let error = create(new.storage(), None, &options, &job).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Aborted);
    let storage: Arc<dyn Storage> = new.storage();
    assert_ne!(storage.size().unwrap(), 1 << 40);
    drop(new);
    assert_eq!(std::fs::read_dir(dir.dir()).unwrap().count(), 0);
}
