//! Random writes, zeroes and discards against a byte vector, over every kind of image; QEMU judges the result.

use std::path::Path;
use std::sync::Arc;

use qcow2_engine::storage::{Access, FileStorage};
use qcow2_engine::{
    Discard, Image, Layer, Mem, MemMut, OpenOptions, Qcow2, Raw, ReadStorage, Result, Storage, StorageExt,
    WriteOptions,
};
use qcow2_testkit::storage::{CountingStorage, Op};
use qcow2_testkit::{Fixture, Forge, Qemu, Rng};

const SIZE: u64 = 6 << 20;

fn file(path: &Path, access: Access) -> Arc<dyn Storage> {
    Arc::new(FileStorage::open(path, access).unwrap())
}

/// The chain of `paths`, the first one writable; with an external data file where one is given.
fn open(paths: &[&Path], data: Option<&Path>) -> Result<Image> {
    let mut layers: Vec<Box<dyn Layer>> = Vec::new();
    for (depth, path) in paths.iter().enumerate() {
        let access = if depth == 0 { Access::ReadWrite } else { Access::ReadOnly };
        let storage = file(path, access);
        if path.extension().is_some_and(|e| e == "raw") {
            layers.push(Box::new(Raw::new(storage)?));
            continue;
        }
        let mut image = Qcow2::open(storage, &OpenOptions::default())?;
        if let Some(data) = data.filter(|_| depth == 0) {
            image.set_data_file(file(data, access));
        }
        if depth == 0 {
            image.enable_writing(WriteOptions { discard: Discard::Unmap, ..WriteOptions::default() })?;
        }
        layers.push(Box::new(image));
    }
    Image::new(layers)
}

fn read_all(image: &Image) -> Vec<u8> {
    let mut bytes = vec![0u8; image.virtual_size() as usize];
    image.read_at(MemMut::from(&mut bytes[..]), 0).unwrap();
    bytes
}

/// Runs random operations; `model` is what the disk must read as.
fn exercise(
    image: &Image,
    model: &mut [u8],
    rng: &mut Rng,
    cluster: u64,
    compressible: bool,
    discards_zero: bool,
) {
    for step in 0..120u8 {
        let size = model.len() as u64;
        let offset = rng.below(size);
        let most = [600, 5000, 70_000, 400_000][rng.below(4) as usize];
        let length = (1 + rng.below(most)).min(size - offset);
        let (a, b) = (offset as usize, (offset + length) as usize);
        match rng.below(8) {
            0 => {
                image.write_zeroes(offset, length, rng.below(2) == 0).unwrap();
                model[a..b].fill(0);
            }
            1 if discards_zero => {
                image.discard(offset, length).unwrap();
                let start = offset.next_multiple_of(cluster);
                let end = if offset + length == size { size } else { (offset + length) / cluster * cluster };
                if start < end {
                    model[start as usize..end as usize].fill(0);
                }
            }
            2 if compressible => {
                let start = offset / cluster * cluster;
                let end = (start + cluster * (1 + rng.below(3))).min(size);
                let bytes: Vec<u8> = (start..end).map(|i| (i / 7) as u8 ^ step).collect();
                image.write_compressed_at(Mem::from(&bytes[..]), start).unwrap();
                model[start as usize..end as usize].copy_from_slice(&bytes);
            }
            3 => image.flush().unwrap(),
            _ => {
                let bytes: Vec<u8> =
                    (offset..offset + length).map(|i| (i as u8).wrapping_mul(step | 1) ^ step).collect();
                image.write_at(Mem::from(&bytes[..]), offset).unwrap();
                model[a..b].copy_from_slice(&bytes);
            }
        }
        if step % 16 == 15 {
            assert!(read_all(image) == *model, "step {step}");
        }
    }
}

const GEOMETRIES: [&str; 12] = [
    "cluster_size=64k",
    "compat=0.10",
    "cluster_size=512",
    "cluster_size=512,compat=0.10",
    "cluster_size=2M",
    "extended_l2=on",
    "extended_l2=on,cluster_size=16k",
    "refcount_bits=1",
    "refcount_bits=2,cluster_size=4k",
    "refcount_bits=64",
    "compression_type=zstd",
    "preallocation=metadata",
];

fn cluster_of(options: &str) -> u64 {
    let value = options.split(',').find_map(|o| o.strip_prefix("cluster_size="));
    match value {
        None => 65536,
        Some("2M") => 2 << 20,
        Some(v) => {
            v.strip_suffix('k').map_or_else(|| v.parse().unwrap(), |k| k.parse::<u64>().unwrap() << 10)
        }
    }
}

#[test]
fn standalone_images() {
    let Some(qemu) = Qemu::find() else { return };
    for (seed, options) in GEOMETRIES.iter().enumerate() {
        let fixture = Fixture::new();
        let path = fixture.path("a.qcow2");
        qemu.create(&path, options, Some(SIZE));
        let mut model = vec![0u8; SIZE as usize];
        let mut rng = Rng::new(seed as u64);
        for _ in 0..2 {
            let image = open(&[&path], None).unwrap();
            exercise(&image, &mut model, &mut rng, cluster_of(options), true, true);
            image.close().unwrap();
            qemu.assert_clean(&path);
            assert!(qemu.guest_bytes(&path, "qcow2", &[]) == model, "{options}");
        }
    }
}

#[test]
fn overlays_and_shared_clusters() {
    let Some(qemu) = Qemu::find() else { return };
    for (seed, options) in GEOMETRIES.iter().filter(|o| !o.contains("prealloc")).enumerate() {
        for base_size in [SIZE / 2 + 512, SIZE * 2] {
            let fixture = Fixture::new();
            let (base, top) = (fixture.path("base.raw"), fixture.path("top.qcow2"));
            let content: Vec<u8> = (0..base_size).map(|i| (i / 3) as u8).collect();
            std::fs::write(&base, &content).unwrap();
            let backing = format!("{options},backing_file={},backing_fmt=raw", base.display());
            qemu.create(&top, &backing, Some(SIZE));
            qemu.io(&top, "qcow2", &["write -P 9 1M 700k", "write -c -P 5 2M 2M"]);
            // Packed clusters use up narrow refcounts, so a snapshot of them cannot be made.
            let snapshots = !options.contains("refcount_bits=1") && !options.contains("refcount_bits=2");
            if snapshots {
                qemu.img(&["snapshot", "-c", "before", top.to_str().unwrap()]).ok();
            }
            let mut model = qemu.guest_bytes(&top, "qcow2", &[]);
            let before = model.clone();
            let image = open(&[&top, &base], None).unwrap();
            let v2 = options.contains("0.10");
            exercise(&image, &mut model, &mut Rng::new(seed as u64), cluster_of(options), true, !v2);
            image.close().unwrap();
            qemu.assert_clean(&top);
            assert!(qemu.guest_bytes(&top, "qcow2", &[]) == model, "{options}");
            if snapshots {
                assert!(qemu.guest_bytes(&top, "qcow2", &["-l", "before"]) == before, "{options}: snapshot");
            }
        }
    }
}

#[test]
fn external_data_files() {
    let Some(qemu) = Qemu::find() else { return };
    for raw in [false, true] {
        let fixture = Fixture::new();
        let (path, data) = (fixture.path("a.qcow2"), fixture.path("a.data"));
        let raw_option = if raw { ",data_file_raw=on" } else { "" };
        qemu.create(&path, &format!("data_file={}{raw_option}", data.display()), Some(SIZE));
        let mut model = vec![0u8; SIZE as usize];
        let image = open(&[&path], Some(&data)).unwrap();
        exercise(&image, &mut model, &mut Rng::new(7), 65536, false, true);
        image.close().unwrap();
        qemu.assert_clean(&path);
        assert!(qemu.guest_bytes(&path, "qcow2", &[]) == model, "raw {raw}");
        if raw {
            assert!(std::fs::read(&data).unwrap() == model);
        }
    }
}

#[test]
fn growing_the_disk() {
    let Some(qemu) = Qemu::find() else { return };
    for options in ["cluster_size=512", "cluster_size=64k", "extended_l2=on", "compat=0.10"] {
        let fixture = Fixture::new();
        let (base, path) = (fixture.path("base.raw"), fixture.path("a.qcow2"));
        std::fs::write(&base, vec![0xaa; 3 << 20]).unwrap();
        qemu.create(
            &path,
            &format!("{options},backing_file={},backing_fmt=raw", base.display()),
            Some((1 << 20) + 1536),
        );
        let image = open(&[&path, &base], None).unwrap();
        let mut model = vec![0xaa; (1 << 20) + 1536];
        let mut rng = Rng::new(3);
        for size in [(1 << 20) + 4096, 2 << 20, 40 << 20] {
            image.resize(size).unwrap();
            model.resize(size as usize, 0);
            assert!(read_all(&image) == model, "{options}: grown to {size}");
            let at = rng.below(size - 5000) as usize;
            image.write_at(Mem::from(&[7u8; 5000][..]), at as u64).unwrap();
            model[at..at + 5000].fill(7);
        }
        image.close().unwrap();
        qemu.assert_clean(&path);
        assert!(qemu.guest_bytes(&path, "qcow2", &[]) == model, "{options}");
    }
}

/// Space is asked for ahead where the image grows fast and only there; closing gives back what is left of it.
#[test]
fn a_fast_growing_file_gets_its_space_ahead() {
    const CLUSTER: u64 = 65536;
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("fast.qcow2");
    for (clusters, ahead) in [(10, false), (1000, true)] {
        Forge::new(3, 16, 4000 * CLUSTER).build().bytes.write_to(&path);
        let counting = Arc::new(CountingStorage::new(file(&path, Access::ReadWrite)));
        let mut qcow2 = Qcow2::open(counting.clone(), &OpenOptions::default()).unwrap();
        qcow2.enable_writing(WriteOptions::default()).unwrap();
        let image = Image::new(vec![Box::new(qcow2)]).unwrap();
        for n in 0..clusters {
            image.write_at(Mem::from(&[n as u8 | 1; CLUSTER as usize][..]), n * CLUSTER).unwrap();
        }
        // Twice for the L2 table: it, and the entry that names it.
        assert_eq!(counting.of(Op::Allocate).calls > 2, ahead, "{clusters} clusters");
        image.close().unwrap();
        // With room for the metadata.
        let most = (clusters + 16) * CLUSTER;
        assert!(counting.size().unwrap() <= most, "{clusters} clusters: {} bytes", counting.size().unwrap());
        assert!(counting.allocated_bytes().unwrap() <= most, "{clusters} clusters");
        drop(image);
        let image = open(&[&path], None).unwrap();
        for n in 0..clusters {
            let mut bytes = [0; CLUSTER as usize];
            image.read_at(MemMut::from(&mut bytes[..]), n * CLUSTER).unwrap();
            assert!(bytes == [n as u8 | 1; CLUSTER as usize]);
        }
    }
}
