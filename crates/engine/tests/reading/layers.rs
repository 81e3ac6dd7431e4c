//! The contract of layers that are read, kept by qcow2 of several shapes and by raw.

use std::path::Path;
use std::sync::Arc;

use qcow2_engine::create::{CreateOptions, create};
use qcow2_engine::storage::MemoryStorage;
use qcow2_engine::{
    Discard, Image, Job, Layer, LayerExt, OpenOptions, Qcow2, Raw, Result, Storage, StorageExt, WriteOptions,
};
use qcow2_testkit::contract::{DiskContract, LayerContract};
use qcow2_testkit::{Fixture, Qemu};

const SIZE: u64 = 2 << 20;

fn open_qcow2(storage: Arc<dyn Storage>) -> Result<Box<dyn Layer>> {
    Ok(Box::new(Qcow2::open(storage, &OpenOptions::default())?))
}

fn open_raw(storage: Arc<dyn Storage>) -> Result<Box<dyn Layer>> {
    Ok(Box::new(Raw::new(storage)?))
}

/// The bytes of the disk, by QEMU.
fn disk(qemu: &Qemu, path: &Path, format: &str) -> Vec<u8> {
    let raw = path.with_extension("raw");
    qemu.img(&["convert", "-f", format, "-O", "raw", path.to_str().unwrap(), raw.to_str().unwrap()]).ok();
    std::fs::read(raw).unwrap()
}

const WRITES: [&str; 5] = [
    "write -P 1 0 100k",
    "write -P 2 700k 3k",
    "write -z 300k 200k",
    "write -P 3 1536k 512k",
    "discard 1600k 128k",
];

#[test]
fn qcow2_keeps_the_contract() {
    let Some(qemu) = Qemu::find() else { return };
    for (options, compressed) in [
        ("cluster_size=64k", false),
        ("cluster_size=4k,compat=0.10", false),
        ("cluster_size=512", false),
        ("cluster_size=64k,extended_l2=on", false),
        ("cluster_size=64k", true),
        ("cluster_size=16k,compression_type=zstd", true),
    ] {
        let fixture = Fixture::new();
        let path = fixture.path("a.qcow2");
        qemu.create(&path, options, Some(SIZE));
        qemu.io(&path, "qcow2", &WRITES);
        if compressed {
            qemu.io(
                &path,
                "qcow2",
                &["write -c -P 4 256k 64k", "write -c -P 5 320k 64k", "write -c -P 6 1m 64k"],
            );
        }
        let (file, expected) = (std::fs::read(&path).unwrap(), disk(&qemu, &path, "qcow2"));
        let contract =
            LayerContract { name: options, file: &file, open: &open_qcow2, expected: &expected, below: None };
        contract.check();
    }
}

#[test]
fn an_overlay_keeps_the_contract() {
    let Some(qemu) = Qemu::find() else { return };
    for options in ["cluster_size=64k", "cluster_size=64k,extended_l2=on"] {
        let fixture = Fixture::new();
        let (base, path) = (fixture.path("base.img"), fixture.path("a.qcow2"));
        let below: Vec<u8> = (0..SIZE).map(|at| (at >> 9) as u8 | 1).collect();
        std::fs::write(&base, &below).unwrap();
        let named = ["create", "-f", "qcow2", "-o", options, "-F", "raw", "-b"];
        qemu.img(&[&named[..], &[base.to_str().unwrap(), path.to_str().unwrap()]].concat()).ok();
        qemu.io(&path, "qcow2", &WRITES);
        let (file, expected) = (std::fs::read(&path).unwrap(), disk(&qemu, &path, "qcow2"));
        let contract = LayerContract {
            name: options,
            file: &file,
            open: &open_qcow2,
            expected: &expected,
            below: Some(&below),
        };
        contract.check();
    }
}

#[test]
fn raw_keeps_the_contract() {
    let file: Vec<u8> =
        (0..300_032u32).map(|at| if at / 50_000 == 2 { 0 } else { (at >> 8) as u8 }).collect();
    LayerContract { name: "raw", file: &file, open: &open_raw, expected: &file, below: None }.check();
}

fn disk_keeps_the_contract(
    name: &str,
    storage: &Arc<dyn Storage>,
    open: &dyn Fn(Arc<dyn Storage>) -> Result<Box<dyn Layer>>,
) {
    let image = |write: Option<WriteOptions>| {
        let mut layer = open(Arc::clone(storage)).unwrap();
        if let Some(write) = write {
            layer.enable_writing(write).unwrap();
        }
        Image::new(vec![layer]).unwrap()
    };
    let disk = image(Some(WriteOptions { discard: Discard::Unmap, ..WriteOptions::default() }));
    DiskContract { name, disk: &disk, reopen: &|| Box::new(image(None)) }.check();
    disk.close().unwrap();
}

#[test]
fn disks_that_are_written_to_keep_the_contract() {
    for (cluster_size, extended_l2, version) in
        [(65536, false, 3), (512, false, 3), (4096, false, 2), (16384, true, 3)]
    {
        let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::new());
        let options =
            CreateOptions { size: SIZE, cluster_size, extended_l2, version, ..CreateOptions::default() };
        create(Arc::clone(&storage), None, &options, &Job::new()).unwrap();
        disk_keeps_the_contract(&format!("qcow2, {cluster_size}, version {version}"), &storage, &open_qcow2);
    }
    let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::new());
    storage.resize(SIZE).unwrap();
    disk_keeps_the_contract("raw", &storage, &open_raw);
}
