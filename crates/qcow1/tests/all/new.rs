//! New images: held against those of QEMU, and read by it.

use std::num::NonZeroUsize;
use std::sync::Arc;

use qcow2_core::convert::{Compression, ConvertOptions, ConvertResult, Delta};
use qcow2_core::new_image::Hosts;
use qcow2_core::storage::MemoryStorage;
use qcow2_core::{ErrorKind, GuestSource, Job, MemMut, NewImage, Raw, Storage};
use qcow2_engine::Image;
use qcow2_engine::convert::{ConvertTarget, convert};
use qcow2_engine::create::NewTarget;
use qcow2_qcow1::NewQcow1;
use qcow2_testkit::contract::LayerContract;
use qcow2_testkit::crash::{Durability, Session};
use qcow2_testkit::{Fixture, Qemu, Rng, Sparse};

use crate::images::open;

fn image(bytes: &[u8]) -> Image {
    Image::new(vec![open(Arc::new(MemoryStorage::from_bytes(bytes))).unwrap()]).unwrap()
}

fn raw(bytes: &[u8]) -> Image {
    let layer = Raw::new(Arc::new(MemoryStorage::from_bytes(bytes))).unwrap();
    Image::new(vec![Box::new(layer)]).unwrap()
}

fn guest(source: &dyn GuestSource) -> Vec<u8> {
    let mut bytes = vec![1; source.virtual_size() as usize];
    source.read_at(MemMut::from(&mut bytes[..]), 0).unwrap();
    bytes
}

fn empty(size: u64, backing: Option<&str>) -> Vec<u8> {
    let file = Arc::new(MemoryStorage::new());
    let backing = backing.map(|name| name.as_bytes().to_vec());
    let hosts = Hosts::from(Arc::clone(&file) as Arc<dyn Storage>);
    NewQcow1::new(size, backing).unwrap().create(&hosts, &Job::new()).unwrap();
    file.to_vec()
}

fn write(
    own: Arc<dyn Storage>,
    source: &Image,
    backing: Option<&str>,
    how: &ConvertOptions,
) -> ConvertResult {
    let backing = backing.map(|name| name.as_bytes().to_vec());
    let image = Arc::new(NewQcow1::new(source.virtual_size(), backing).unwrap());
    let target = ConvertTarget::New(NewTarget::Format { image, hosts: own.into() });
    convert(source, target, how, &Job::new()).unwrap()
}

fn converted(source: &Image, backing: Option<&str>, how: &ConvertOptions) -> Vec<u8> {
    let bytes = |workers| {
        let file = Arc::new(MemoryStorage::new());
        let how = ConvertOptions { concurrency: NonZeroUsize::new(workers), ..how.clone() };
        write(file.clone(), source, backing, &how);
        file.to_vec()
    };
    let (alone, several) = (bytes(1), bytes(3));
    assert!(alone == several, "the bytes depend on the number of workers");
    alone
}

fn compressed() -> ConvertOptions {
    ConvertOptions { compression: Some(Compression::default()), ..ConvertOptions::default() }
}

/// Text and noise, with holes between, and data at the very end.
fn disk(seed: u64, size: usize) -> Vec<u8> {
    let mut rng = Rng::new(seed);
    let mut bytes = vec![0; size];
    for (at, length, text) in [
        (0, 70_001, true),
        (300_000, 8192, true),
        (400_000, 100_000, false),
        (2_090_000, 100_000, true),
        (size.saturating_sub(700), 700, true),
    ] {
        let (at, end) = (at.min(size), (at + length).min(size));
        let part = if text { rng.text(end - at) } else { rng.bytes(end - at) };
        bytes[at..end].copy_from_slice(&part);
    }
    bytes
}

#[test]
fn an_empty_image_has_the_bytes_of_qemus() {
    let Some(qemu) = Qemu::find() else { return };
    let fixture = Fixture::new();
    fixture.file("base.raw", &[0; 512]);
    for (size, backing) in [
        (1, None),
        (512, None),
        (1 << 20, None),
        ((5 << 30) + 512, None),
        (1 << 40, Some("base.raw")),
        (4 << 20, Some("./././base.raw")),
    ] {
        let path = fixture.path("theirs");
        let (name, size_text) = (path.to_str().unwrap(), size.to_string());
        let mut line = vec!["create", "-q", "-f", "qcow"];
        line.extend(backing.iter().flat_map(|name| ["-b", *name, "-F", "raw"]));
        line.extend([name, &size_text]);
        qemu.img(&line).ok();
        assert!(empty(size, backing) == std::fs::read(&path).unwrap(), "{size} {backing:?}");
    }
}

#[test]
fn copies_keep_the_contract_of_layers_and_qemu_reads_them() {
    let qemu = Qemu::find();
    let fixture = Fixture::new();
    let plain = ConvertOptions::default();
    let full = ConvertOptions { sparse_size: 0, ..plain.clone() };
    for (size, how, what) in [
        (512, &plain, "a sector"),
        (5 * (1 << 20) + 1536, &plain, "plain"),
        (5 * (1 << 20) + 1536, &full, "with zeroes as data"),
        (512, &compressed(), "a sector, compressed"),
        (5 * (1 << 20) + 1536, &compressed(), "compressed"),
        (2 << 20, &compressed(), "one table"),
    ] {
        let expected = disk(size as u64, size);
        let file = converted(&raw(&expected), None, how);
        LayerContract { name: what, file: &file, open: &open, expected: &expected, below: None }.check();
        let Some(qemu) = &qemu else { continue };
        let path = fixture.file("image", &file);
        assert!(qemu.guest_bytes(&path, "qcow", &[]) == expected, "{what}");
        // QEMU goes on at the end of the file, wherever that is.
        let (mut changed, last) = (expected, size - 512);
        qemu.io(&path, "qcow", &["write -P 5 0 512".to_owned(), format!("write -P 6 {last} 512")]);
        changed[..512].fill(5);
        changed[last..].fill(6);
        assert!(guest(&image(&std::fs::read(&path).unwrap())) == changed, "{what}, after QEMU");
    }
    let shrunk = converted(&raw(&disk(1, 5 << 20)), None, &compressed());
    let whole = converted(&raw(&disk(1, 5 << 20)), None, &plain);
    // What is noise is stored as it is.
    assert!(shrunk.len() < whole.len() - 100_000 && shrunk.len() > 100_000);
    assert!(converted(&raw(&vec![0; 5 << 20]), None, &plain) == empty(5 << 20, None));
}

#[test]
fn a_copy_on_a_base_has_what_differs() {
    let Some(qemu) = Qemu::find() else { return };
    let fixture = Fixture::new();
    let below = disk(7, 3 << 20);
    let base = fixture.file("base.raw", &below);
    let top = fixture.path("top.qcow2");
    let (name, base) = (top.to_str().unwrap(), base.to_str().unwrap());
    qemu.img(&["create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", "-o", "cluster_size=512", name, "4M"])
        .ok();
    qemu.io(
        &top,
        "qcow2",
        &["write -P 7 1000 3000", "write -z 64k 1k", "write -z 3M 64k", "write -P 9 3500k 5k"],
    );
    let expected = qemu.guest_bytes(&top, "qcow2", &[]);
    let own = qcow2_engine::Qcow2::open(
        Arc::new(MemoryStorage::from_bytes(&std::fs::read(&top).unwrap())),
        &Default::default(),
    );
    let base_layer = Raw::new(Arc::new(MemoryStorage::from_bytes(&below))).unwrap();
    let source = Image::new(vec![Box::new(own.unwrap()), Box::new(base_layer)]).unwrap();
    let delta = Some(Delta { layers: 1, base_size: below.len() as u64 });
    for how in [ConvertOptions::default(), compressed()] {
        let file = converted(&source, Some(base), &ConvertOptions { delta, ..how });
        // Both tables, and no more than the clusters of what was written.
        assert!(file.len() < 90_000, "{}", file.len());
        let path = fixture.file("delta", &file);
        assert!(qemu.guest_bytes(&path, "qcow", &[]) == expected);
    }
}

#[test]
fn no_power_cut_leaves_half_of_an_image() {
    for (how, backing) in [(ConvertOptions::default(), None), (compressed(), None)] {
        let (mut session, storages) = Session::new(vec![Sparse::new(0)], Durability::Flush);
        let disk = disk(3, 600_064);
        let how = ConvertOptions { durable: true, ..how };
        write(storages[0].clone(), &raw(&disk), backing, &how);
        let (mut images, mut judged) = (0, 0);
        for state in session.states(1, 100) {
            let bytes = state.files[0].to_vec();
            judged += 1;
            if bytes.starts_with(b"QFI") {
                assert!(guest(&image(&bytes)) == disk, "cut {}, {:?}", state.cut, state.shape);
                images += 1;
            }
        }
        assert!(images > 0 && images < judged, "{images} of {judged} files are complete");
    }
}

#[test]
fn what_the_format_cannot_hold_is_refused() {
    let field = |size, name: Option<&[u8]>| {
        let error = NewQcow1::new(size, name.map(<[u8]>::to_vec)).unwrap_err();
        (error.kind(), error.field())
    };
    use ErrorKind::{InvalidArgument, Limit, UnsupportedFeature};
    assert_eq!(field(0, None), (InvalidArgument, Some("size")));
    assert_eq!(field(1 << 50, None), (Limit, Some("size")));
    assert_eq!(field(u64::MAX, None), (Limit, Some("size")));
    assert_eq!(field(1, Some(b"")), (InvalidArgument, Some("backing_file")));
    assert_eq!(field(1, Some(&[b'a'; 1024])), (InvalidArgument, Some("backing_file")));
    let new = NewQcow1::new(1, Some(vec![b'a'; 1023])).unwrap();
    let hosts = Hosts::from(Arc::new(MemoryStorage::new()) as Arc<dyn Storage>);
    assert_eq!(new.disk(&hosts, &Job::new()).unwrap_err().kind(), UnsupportedFeature);
    assert_eq!(image(&empty(512, None)).layers().len(), 1);
}
