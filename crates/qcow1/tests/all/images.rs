//! Images that QEMU makes, held against the contract of layers, and damaged ones.

use std::path::Path;
use std::sync::Arc;

use qcow2_core::storage::MemoryStorage;
use qcow2_core::{Chain, ErrorKind, Job, Layer, MemMut, Raw, Result, Storage};
use qcow2_qcow1::{OpenOptions, Qcow1};
use qcow2_testkit::contract::LayerContract;
use qcow2_testkit::{Fixture, Qemu, Rng};

const SIZE: u64 = 3 * (1 << 20) + 512;

pub(crate) fn open(storage: Arc<dyn Storage>) -> Result<Box<dyn Layer>> {
    Ok(Box::new(Qcow1::open(storage, &OpenOptions::default())?))
}

fn check(name: &str, path: &Path, expected: &[u8], below: Option<&[u8]>) {
    let file = std::fs::read(path).unwrap();
    LayerContract { name, file: &file, open: &open, expected, below }.check();
}

/// A disk with text, noise and holes.
fn disk(seed: u64) -> Vec<u8> {
    let mut rng = Rng::new(seed);
    let mut bytes = vec![0; SIZE as usize];
    for (at, length) in [(0, 70_000), (300_000, 8192), (2_000_000, 100_000), (SIZE as usize - 5000, 5000)] {
        bytes[at..at + length].copy_from_slice(&rng.text(length));
    }
    bytes[400_000..500_000].copy_from_slice(&rng.bytes(100_000));
    bytes
}

#[test]
fn converted_images_keep_the_contract_of_layers() {
    let Some(qemu) = Qemu::find() else { return };
    let fixture = Fixture::new();
    let expected = disk(1);
    let raw = fixture.file("raw", &expected);
    let path = fixture.path("plain");
    qemu.convert(&raw, "raw", &path, "qcow", &[]);
    check("plain", &path, &expected, None);
}

#[test]
fn an_empty_image_keeps_the_contract_of_layers() {
    let Some(qemu) = Qemu::find() else { return };
    let fixture = Fixture::new();
    let image = fixture.path("empty");
    qemu.img(&["create", "-q", "-f", "qcow", image.to_str().unwrap(), &SIZE.to_string()]).ok();
    check("empty", &image, &vec![0; SIZE as usize], None);
    let layer = open(Arc::new(MemoryStorage::from_bytes(&std::fs::read(&image).unwrap()))).unwrap();
    assert_eq!(layer.absent_from(0), SIZE);
}

#[test]
fn an_overlay_keeps_the_contract_of_layers() {
    let Some(qemu) = Qemu::find() else { return };
    let fixture = Fixture::new();
    let below = disk(2);
    let base = fixture.file("base.raw", &below);
    let path = fixture.path("overlay");
    let (name, base) = (path.to_str().unwrap(), base.to_str().unwrap());
    qemu.img(&["create", "-q", "-f", "qcow", "-b", base, "-F", "raw", name]).ok();
    qemu.io(&path, "qcow", &["write -P 7 1000 3000", "write -P 9 2097152 66000", "write -P 1 0 1"]);
    let expected = qemu.guest_bytes(&path, "qcow", &[]);
    assert_ne!(expected, below);
    check("overlay", &path, &expected, Some(&below));
    let layer = open(Arc::new(MemoryStorage::from_bytes(&std::fs::read(&path).unwrap()))).unwrap();
    let backing = layer.references().backing.unwrap();
    assert_eq!((backing.filename.as_slice(), backing.format), (base.as_bytes(), None));
    assert_eq!((layer.format(), layer.unit()), ("qcow", Some(512)));
}

/// Data counts the guest's sectors, and compressed clusters are stored in clear, as `write -c` of qemu-io makes them.
#[test]
fn an_encrypted_image_keeps_the_contract_of_layers() {
    let Some(qemu) = Qemu::find() else { return };
    let fixture = Fixture::new();
    let below = disk(3);
    let base = fixture.file("base.raw", &below);
    let path = fixture.path("encrypted");
    let (name, secret) = (path.to_str().unwrap(), "secret,id=s,data=more than sixteen bytes");
    let options = "encrypt.format=aes,encrypt.key-secret=s";
    let base = base.to_str().unwrap();
    let create =
        ["create", "-q", "--object", secret, "-f", "qcow", "-o", options, "-b", base, "-F", "raw", name];
    qemu.img(&create).ok();
    let image = format!("driver=qcow,encrypt.key-secret=s,file.filename={name}");
    let mut write = vec!["--object", secret];
    for command in [
        "write -P 7 1000 3000",
        "write -c -P 6 8192 512",
        "write -P 9 2097152 66000",
        "write -P 1 0 1",
        "write -c -P 5 2097664 512",
    ] {
        write.extend(["-c", command]);
    }
    write.extend(["--image-opts", &image]);
    qemu.io_with(&write);
    let raw = fixture.path("raw");
    qemu.img(&["convert", "--object", secret, "--image-opts", &image, "-O", "raw", raw.to_str().unwrap()])
        .ok();
    let expected = std::fs::read(&raw).unwrap();
    let unlocked = |secret: &'static [u8]| {
        move |storage: Arc<dyn Storage>| -> Result<Box<dyn Layer>> {
            let mut layer = open(storage)?;
            assert_eq!(layer.encryption(), Some("aes"));
            layer.unlock(secret, &Job::new())?;
            Ok(layer)
        }
    };
    let file = std::fs::read(&path).unwrap();
    let open = &unlocked(b"more than sixteen bytes");
    LayerContract { name: "encrypted", file: &file, open, expected: &expected, below: Some(&below) }.check();
    // Nothing tells a wrong secret: it reads something else.
    let other = unlocked(b"another secret")(Arc::new(MemoryStorage::from_bytes(&file))).unwrap();
    let below = Raw::new(Arc::new(MemoryStorage::from_bytes(&below))).unwrap();
    let mut bytes = vec![0; SIZE as usize];
    Chain::new(vec![other, Box::new(below)]).unwrap().read_at(MemMut::from(&mut bytes[..]), 0).unwrap();
    assert!(bytes[1000..4000] != expected[1000..4000] && bytes[8192..8704] == expected[8192..8704]);
}

/// An image of 512-byte clusters and two L2 tables of 64 entries, without data.
struct Forged(Vec<u8>);

impl Forged {
    const L1: usize = 48;
    const L2: usize = 512;

    fn new() -> Self {
        let mut bytes = vec![0; 2048];
        bytes[..8].copy_from_slice(b"QFI\xfb\0\0\0\x01");
        bytes[24..32].copy_from_slice(&(100u64 * 512).to_be_bytes());
        bytes[32..34].copy_from_slice(&[9, 6]);
        bytes[40..48].copy_from_slice(&(Self::L1 as u64).to_be_bytes());
        Self(bytes).with(Self::L1, Self::L2 as u64)
    }

    fn with(mut self, at: usize, value: u64) -> Self {
        self.0[at..at + 8].copy_from_slice(&value.to_be_bytes());
        self
    }

    fn open(&self) -> Result<Box<dyn Layer>> {
        open(Arc::new(MemoryStorage::from_bytes(&self.0)))
    }

    fn read(&self) -> Result<Vec<u8>> {
        let chain = Chain::new(vec![self.open()?])?;
        let mut bytes = vec![0; chain.virtual_size() as usize];
        chain.read_at(MemMut::from(&mut bytes[..]), 0).map(|()| bytes)
    }
}

#[test]
fn neighbours_of_one_stream_are_both_read() {
    let cluster = Rng::new(5).text(512);
    let stream = qcow2_testkit::forge::codec::deflate(&cluster);
    let entry = 1 << 63 | (stream.len() as u64) << 54 | 1100;
    let mut image = Forged::new().with(Forged::L2, entry).with(Forged::L2 + 8, entry);
    image.0[1100..1100 + stream.len()].copy_from_slice(&stream);
    let mut expected = [&cluster[..], &cluster].concat();
    expected.resize(100 * 512, 0);
    assert!(image.read().unwrap() == expected);
    LayerContract { name: "twice", file: &image.0, open: &open, expected: &expected, below: None }.check();
}

#[test]
fn damage_is_named() {
    let mut encrypted = Forged::new().with(Forged::L2, 1024);
    encrypted.0[39] = 1;
    let error = encrypted.read().unwrap_err();
    assert_eq!((error.kind(), error.field()), (ErrorKind::BadSecret, Some("secret")));
    assert!(encrypted.open().unwrap().file(0).is_none());
    let outside = [(40, "l1_table_offset"), (8, "backing_file_offset")];
    for (at, field) in outside {
        let mut image = Forged::new().with(at, 1 << 40);
        image.0[19] = 4;
        let error = image.open().unwrap_err();
        assert_eq!((error.kind(), error.field()), (ErrorKind::Corrupt, Some(field)));
    }
    for (at, value, field) in [
        (Forged::L1, 2000, "L1 table entry"),
        (Forged::L1, u64::MAX, "L1 table entry"),
        (Forged::L2, 513, "L2 table entry"),
    ] {
        let error = Forged::new().with(at, value).read().unwrap_err();
        assert_eq!((error.kind(), error.field()), (ErrorKind::Corrupt, Some(field)));
    }
    // A stream of no bytes.
    assert_eq!(Forged::new().with(Forged::L2, 1 << 63).read().unwrap_err().kind(), ErrorKind::Corrupt);
}

#[test]
fn limits_of_the_caller_are_kept() {
    let file = Arc::new(MemoryStorage::from_bytes(&Forged::new().0));
    let open =
        |options: OpenOptions| Qcow1::open(Arc::clone(&file) as Arc<dyn Storage>, &options).map(|_| ());
    open(OpenOptions { max_virtual_size: 51200, max_metadata_bytes: 16, l2_cache_bytes: Some(0) }).unwrap();
    for options in [
        OpenOptions { max_virtual_size: 51199, ..OpenOptions::default() },
        OpenOptions { max_metadata_bytes: 15, ..OpenOptions::default() },
    ] {
        assert_eq!(open(options).unwrap_err().kind(), ErrorKind::Limit);
    }
}

/// Whether QEMU opens a file of these bytes.
fn opened_by(qemu: &Qemu, fixture: &Fixture, bytes: &[u8]) -> bool {
    let path = fixture.file("forged", bytes);
    qemu.img(&["info", "-f", "qcow", path.to_str().unwrap()]).code == 0
}

#[test]
fn headers_are_taken_and_refused_as_by_qemu() {
    let Some(qemu) = Qemu::find() else { return };
    let fixture = Fixture::new();
    let header = |at: usize, field: &[u8]| {
        let mut bytes = Forged::new().0;
        bytes.resize(8192, 0);
        bytes[at..at + field.len()].copy_from_slice(field);
        bytes
    };
    let sized = |size: u64, bits: [u8; 2]| {
        let mut bytes = header(24, &size.to_be_bytes());
        bytes[32..34].copy_from_slice(&bits);
        bytes
    };
    let named = |length: u32| {
        let mut bytes = header(8, &1024u64.to_be_bytes());
        bytes[16..20].copy_from_slice(&length.to_be_bytes());
        bytes[1024..2048].fill(b'a');
        bytes
    };
    let mut cases = vec![
        ("version 2", header(4, &2u32.to_be_bytes())),
        ("magic", header(3, &[0xfa])),
        ("padding", header(34, &[1, 2])),
        ("modification time", header(20, &u32::MAX.to_be_bytes())),
        ("no bytes", Vec::new()),
        ("a part of a header", header(0, b"")[..24].to_vec()),
        ("an L1 table anywhere", header(40, &51u64.to_be_bytes())),
    ];
    cases.extend([8, 9, 16, 17].map(|bits| ("cluster_bits", header(32, &[bits, 9]))));
    cases.extend([5, 6, 13, 14].map(|bits| ("l2_bits", header(32, &[12, bits]))));
    cases.extend([0, 1, 2].map(|method: u32| ("crypt_method", header(36, &method.to_be_bytes()))));
    cases.extend([0, 1, 2, 511, 512, 513].map(|size| ("size", sized(size, [12, 9]))));
    cases.extend([1 << 40, 1 << 57, 1 << 62, 1 << 63, u64::MAX].map(|size| ("size", sized(size, [9, 6]))));
    cases.extend([1022, 1023, 1024, u32::MAX].map(|length| ("backing_file_size", named(length))));
    for (what, bytes) in cases {
        let taken = open(Arc::new(MemoryStorage::from_bytes(&bytes)));
        let same = match &taken {
            Ok(_) => opened_by(&qemu, &fixture, &bytes),
            // Tables that would be larger than the file: QEMU reads what is missing as zeroes, or runs out of memory.
            Err(error) if error.kind() == ErrorKind::Limit && error.field() == Some("L1 table") => true,
            Err(error) if error.field() == Some("l1_table_offset") => true,
            Err(_) => !opened_by(&qemu, &fixture, &bytes),
        };
        assert!(same, "{what}: {taken:?}");
    }
}
