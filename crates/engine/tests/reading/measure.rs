//! Measuring against `qemu-img measure`: the same bytes for the same source and target.

use std::path::Path;
use std::sync::Arc;

use qcow2_engine::create::{Backing, CreateOptions, Preallocation};
use qcow2_engine::measure::{MeasureTarget, Measurement, Qcow2Target, measure, measure_size};
use qcow2_engine::storage::{Access, FileStorage};
use qcow2_engine::{ErrorKind, Image, Job, Layer, OpenOptions, Qcow2, Raw};
use qcow2_testkit::{Fixture, Qemu};

fn open(path: &Path, format: &str, backing: Option<&Path>) -> Image {
    let storage = |path| Arc::new(FileStorage::open(path, Access::ReadOnly).unwrap());
    let mut layers: Vec<Box<dyn Layer>> = vec![match format {
        "raw" => Box::new(Raw::new(storage(path)).unwrap()) as Box<dyn Layer>,
        _ => Box::new(Qcow2::open(storage(path), &OpenOptions::default()).unwrap()) as Box<dyn Layer>,
    }];
    layers.extend(backing.map(|path| Box::new(Raw::new(storage(path)).unwrap()) as Box<dyn Layer>));
    Image::new(layers).unwrap()
}

fn target(version: u32, bits: u32, refcount_order: u32, extended_l2: bool) -> Qcow2Target {
    let refcount_bits = 1 << refcount_order;
    from(CreateOptions {
        version,
        cluster_size: 1 << bits,
        refcount_bits,
        extended_l2,
        ..CreateOptions::default()
    })
}

fn from(options: CreateOptions) -> Qcow2Target {
    Qcow2Target::from_options(&options).unwrap()
}

/// Targets with the value of `-o` that means them.
fn targets() -> Vec<(String, Qcow2Target)> {
    let mut all = Vec::new();
    for bits in [9, 12, 16, 21] {
        all.push((format!("cluster_size={}", 1 << bits), target(3, bits, 4, false)));
        for order in [0, 3, 6] {
            let options = format!("cluster_size={},refcount_bits={}", 1 << bits, 1 << order);
            all.push((options, target(3, bits, order, false)));
        }
    }
    for bits in [14, 16, 21] {
        all.push((format!("cluster_size={},extended_l2=on", 1 << bits), target(3, bits, 4, true)));
    }
    all.push(("compat=0.10".into(), target(2, 16, 4, false)));
    let modes = [
        ("metadata", Preallocation::Metadata),
        ("falloc", Preallocation::Falloc),
        ("full", Preallocation::Full),
    ];
    for (name, preallocation) in modes {
        let options = CreateOptions { preallocation, cluster_size: 4096, ..CreateOptions::default() };
        all.push((format!("cluster_size=4k,preallocation={name}"), from(options)));
    }
    let backing = Some(Backing { filename: b"base".to_vec(), format: Some(b"raw".to_vec()) });
    let backed = CreateOptions { backing, ..CreateOptions::default() };
    all.push(("backing_file=base,backing_fmt=raw".into(), from(backed)));
    all
}

#[track_caller]
fn assert_same(qemu: &Qemu, args: &[&str], ours: Measurement) {
    let args = [&["measure", "--output=json"][..], args].concat();
    let printed = qemu.img(&args).ok();
    let mut lines = vec![];
    lines.extend(ours.bitmaps.map(|bitmaps| format!("    \"bitmaps\": {bitmaps},\n")));
    lines.push(format!("    \"required\": {},\n", ours.required));
    lines.push(format!("    \"fully-allocated\": {}\n", ours.fully_allocated));
    // The order of the fields is QEMU's choice.
    let mut expected: Vec<_> = printed.trim().lines().map(|l| l.trim().trim_end_matches(',')).collect();
    let mut found: Vec<_> = lines.iter().map(|l| l.trim().trim_end_matches(',')).collect();
    found.extend(["{", "}"]);
    expected.sort_unstable();
    found.sort_unstable();
    assert_eq!(found, expected, "{args:?}");
}

#[test]
fn empty_disks_of_every_geometry() {
    let Some(qemu) = Qemu::find() else { return };
    for size in [0, 1, 512, 65536, (1 << 30) + 5, 100 << 30] {
        let size_text = size.to_string();
        for (options, target) in targets() {
            let args = ["-O", "qcow2", "-o", &options, "--size", &size_text];
            let ours = match measure_size(size, &MeasureTarget::Qcow2(target)) {
                Ok(ours) => ours,
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::Limit);
                    assert_eq!(qemu.img(&[&["measure"][..], &args].concat()).code, 1, "{options} {size}");
                    continue;
                }
            };
            assert_same(&qemu, &args, ours);
        }
        assert_same(
            &qemu,
            &["-O", "raw", "--size", &size_text],
            measure_size(size, &MeasureTarget::Raw).unwrap(),
        );
    }
}

#[test]
fn sources_of_every_kind() {
    let Some(qemu) = Qemu::find() else { return };
    let dir = Fixture::new();
    let raw = dir.path("raw");
    qemu.img(&["create", "-q", "-f", "raw", raw.to_str().unwrap(), "20000256"]).ok();
    qemu.io(&raw, "raw", &["write 0 64k", "write 1M 5000", "write -P 0 3M 4k", "write 19M 70000"]);
    let data = dir.path("data");
    let sources = [
        ("plain", "cluster_size=64k".to_owned(), None),
        ("small", "cluster_size=512".into(), None),
        ("v2", "compat=0.10".into(), None),
        ("subclusters", "extended_l2=on,cluster_size=128k".into(), None),
        ("metadata", "preallocation=metadata".into(), None),
        ("data-file", format!("data_file={}", data.display()), None),
        ("overlay", format!("backing_file={},backing_fmt=raw", raw.display()), Some(raw.as_path())),
    ];
    let mut images = vec![(raw.clone(), "raw", None)];
    for (name, options, backing) in sources {
        let path = dir.path(name);
        qemu.create(&path, &options, Some(20_000_256));
        qemu.io(&path, "qcow2", &["write 100k 100", "write 2M 300k", "write -z 2100k 64k", "write -z 5M 1M"]);
        if !["metadata", "data-file"].contains(&name) {
            qemu.io(&path, "qcow2", &["write -c -P 5 8M 128k"]);
        }
        if !["v2", "data-file"].contains(&name) {
            let p = path.to_str().unwrap();
            qemu.img(&["bitmap", "--add", "-g", "512", p, "fine"]).ok();
            qemu.img(&["bitmap", "--add", "--disable", p, "a longer name for a bitmap"]).ok();
        }
        images.push((path, "qcow2", backing));
    }
    for (path, format, backing) in images {
        let image = if path.ends_with("data-file") {
            let storage = |path: &Path| Arc::new(FileStorage::open(path, Access::ReadOnly).unwrap());
            let mut qcow2 = Qcow2::open(storage(&path), &OpenOptions::default()).unwrap();
            qcow2.set_data_file(storage(&data));
            Image::new(vec![Box::new(qcow2)]).unwrap()
        } else {
            open(&path, format, backing)
        };
        let p = path.to_str().unwrap();
        for (options, target) in targets() {
            let job = Job::new();
            let ours = measure(&image, &MeasureTarget::Qcow2(target), &job).unwrap();
            assert_eq!(job.progress(), (image.virtual_size(), image.virtual_size()));
            assert_same(&qemu, &["-f", format, "-O", "qcow2", "-o", &options, p], ours);
        }
        let ours = measure(&image, &MeasureTarget::Raw, &Job::new()).unwrap();
        assert_same(&qemu, &["-f", format, "-O", "raw", p], ours);
    }
}

#[test]
fn cancelled() {
    let dir = Fixture::new();
    let raw = dir.file("raw", &[1; 4096]);
    let job = Job::new();
    job.cancel();
    let target = MeasureTarget::Qcow2(target(3, 16, 4, false));
    assert_eq!(measure(&open(&raw, "raw", None), &target, &job).unwrap_err().kind(), ErrorKind::Aborted);
}
