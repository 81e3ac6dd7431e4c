//! LUKS files as layers: what other tools make, and what they read of what is written here.

use crate::support;

use std::fs;
use std::path::Path;
use std::sync::Arc;

use qcow2_core::NewImage;
use qcow2_core::disk::DiskOptions;
use qcow2_core::space::Preallocation;
use qcow2_core::storage::{Access, FileStorage, MemoryStorage};
use qcow2_core::{ErrorKind, Job, Layer, Mem, MemMut, Raw, Result, Storage, StorageExt};
use qcow2_engine::convert::{ConvertOptions, ConvertTarget, convert};
use qcow2_engine::create::NewTarget;
use qcow2_engine::{Image, LayerExt, WriteOptions};
use qcow2_luks::layer::{inspect, inspect_bytes};
use qcow2_luks::luks1::format;
use qcow2_luks::{Cost, Details, FormatOptions, Header, Luks, NewLuks, OpenOptions};
use qcow2_testkit::Sparse;
use qcow2_testkit::contract::{DiskContract, LayerContract};
use qcow2_testkit::crash::{Durability, Session};
use qcow2_testkit::storage::Device;
use support::{Folder, SECRET, cryptsetup, data, qemu_create, qemu_to_raw, qemu_write};

const SIZE: usize = 1 << 20;
/// Little work for a guess.
const PBKDF2: [&str; 4] = ["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"];
const BY_FILE: [&str; 3] = ["-q", "--key-file", "-"];

fn open(storage: Arc<dyn Storage>) -> Result<Box<dyn Layer>> {
    open_with(storage, None)
}

fn open_with(storage: Arc<dyn Storage>, header: Option<Arc<dyn Storage>>) -> Result<Box<dyn Layer>> {
    let mut layer = Luks::open(storage, &OpenOptions { header, ..OpenOptions::default() })?;
    layer.unlock(SECRET.as_bytes(), &Job::new())?;
    Ok(Box::new(layer))
}

fn file(path: &Path) -> Arc<dyn Storage> {
    FileStorage::open(path, Access::ReadWrite).unwrap().into_storage()
}

fn memory(bytes: &[u8]) -> Arc<dyn Storage> {
    Arc::new(MemoryStorage::from_bytes(bytes))
}

fn read(layer: &dyn Layer) -> Vec<u8> {
    let mut segments = Vec::new();
    layer.plan(0..layer.virtual_size(), &mut segments).unwrap();
    let mut bytes = vec![0; layer.virtual_size() as usize];
    layer.read_segment(&segments[0], MemMut::from(&mut bytes[..])).unwrap();
    bytes
}

fn made(size: u64, preallocation: Preallocation) -> NewLuks {
    let options = FormatOptions { cost: Cost::Iterations(1000), ..FormatOptions::new(SECRET.as_bytes()) };
    NewLuks::new(format(&options, &Job::new()).unwrap(), size, preallocation).unwrap()
}

/// `cryptsetup` encrypts the plain bytes of a file in place, and puts a header of version 2 in front of them.
fn encrypt_in_place(folder: &Folder, name: &str, plain: &[u8], options: &[&str]) -> std::path::PathBuf {
    let mut bytes = plain.to_vec();
    bytes.resize(plain.len() + (32 << 20), 0);
    let path = folder.write(name, &bytes);
    let args = ["reencrypt", "--encrypt", "--type", "luks2", "--reduce-device-size", "32M"];
    cryptsetup(&[&args[..], &PBKDF2, &BY_FILE, options].concat(), &path, SECRET);
    path
}

#[test]
fn what_qemu_makes_keeps_the_contract_of_layers() {
    let Some(folder) = Folder::new() else { return };
    for options in [
        "iter-time=10",
        "iter-time=10,cipher-alg=serpent-256,cipher-mode=cbc,ivgen-alg=essiv,ivgen-hash-alg=sha256",
    ] {
        let image = folder.path("qemu.luks");
        qemu_create(&image, "1M", options);
        qemu_write(&folder.write("plain", &data(SIZE)), &image);
        let bytes = fs::read(&image).unwrap();
        LayerContract { name: options, file: &bytes, open: &open, expected: &data(SIZE), below: None }
            .check();
        fs::remove_file(&image).unwrap();
    }
}

#[test]
fn what_cryptsetup_encrypts_reads_alike_and_is_written_for_it() {
    let Some(folder) = Folder::new() else { return };
    for sectors in ["512", "4096"] {
        let path = encrypt_in_place(&folder, "luks2", &data(SIZE), &["--sector-size", sectors]);
        // The tail of what the tool moved is behind the data.
        let mut layer = open(file(&path)).unwrap();
        assert!(read(&*layer)[..SIZE] == data(SIZE), "{sectors}");
        layer.make_writable(DiskOptions::default()).unwrap();
        let writable = layer.as_writable().unwrap();
        writable.write_at(Mem::from(&[9; 6000][..]), 1000).unwrap();
        writable.write_zeroes(100_000, 70_001, true).unwrap();
        writable.flush().unwrap();
        let mut expected = data(SIZE);
        expected[1000..7000].fill(9);
        expected[100_000..170_001].fill(0);
        drop(layer);
        let header = folder.path(&format!("header{sectors}"));
        let args =
            ["reencrypt", "--decrypt", "--force-offline-reencrypt", "--header", header.to_str().unwrap()];
        cryptsetup(&[&args[..], &BY_FILE].concat(), &path, SECRET);
        assert!(fs::read(&path).unwrap()[..SIZE] == expected, "{sectors}");
    }
}

#[test]
fn version_2_with_argon2_keeps_the_contract_of_layers() {
    let Some(folder) = Folder::new() else { return };
    let path = folder.write("argon2", &vec![0; (16 << 20) + SIZE]);
    let cost = ["--pbkdf", "argon2id", "--pbkdf-memory", "65536", "--pbkdf-force-iterations", "4"];
    let args = ["luksFormat", "--type", "luks2", "--sector-size", "4096"];
    cryptsetup(&[&args[..], &cost, &BY_FILE].concat(), &path, SECRET);
    let mut layer = open(file(&path)).unwrap();
    layer.make_writable(DiskOptions::default()).unwrap();
    layer.as_writable().unwrap().write_at(Mem::from(&data(SIZE)[..]), 0).unwrap();
    assert!(read(&*layer) == data(SIZE));
    assert!(read(&*layer.reopen().unwrap()) == data(SIZE));
    support::cryptsetup_opens(&path, SECRET, 0);
    let wrong = Luks::open(file(&path), &OpenOptions::default()).unwrap().unlock(b"hunter3", &Job::new());
    assert_eq!(wrong.unwrap_err().kind(), ErrorKind::BadSecret);
}

#[test]
fn a_disk_without_its_secret_has_all_but_its_data() {
    let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::new());
    made(SIZE as u64, Preallocation::Off).create(&storage.clone().into(), &Job::new()).unwrap();
    let mut layer = Luks::open(storage, &OpenOptions::default()).unwrap();
    assert_eq!((layer.virtual_size(), layer.encryption()), (SIZE as u64, Some("luks")));
    assert!(!layer.is_detached() && layer.file(0).is_none());
    let Header::Luks1(header) = layer.current_header().unwrap() else { panic!("version 2") };
    let details = Details::from(&*header);
    assert_eq!(
        (details.cipher_alg, details.cipher_mode, details.ivgen_alg),
        ("aes-256", "xts", Some("plain64"))
    );
    assert_eq!(
        (details.payload_offset, details.slots.len(), details.slots[1].key_offset),
        (2_068_480, 8, 262_144)
    );
    let mut segments = Vec::new();
    layer.plan(0..512, &mut segments).unwrap();
    let error = layer.read_segment(&segments[0], MemMut::from(&mut [0; 512][..])).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::BadSecret);
    assert_eq!(layer.make_writable(DiskOptions::default()).unwrap_err().kind(), ErrorKind::BadSecret);
    assert_eq!(layer.unlock(b"hunter3", &Job::new()).unwrap_err().kind(), ErrorKind::BadSecret);
    let job = Job::new();
    job.cancel();
    assert_eq!(layer.unlock(SECRET.as_bytes(), &job).unwrap_err().kind(), ErrorKind::Aborted);
}

#[test]
fn headers_in_files_of_their_own() {
    let Some(folder) = Folder::new() else { return };
    for version in ["luks1", "luks2"] {
        let header = folder.path(version);
        let path = folder.write("detached", &vec![7; SIZE]);
        let args = ["luksFormat", "--type", version, "--header", header.to_str().unwrap()];
        let cost = if version == "luks1" { &PBKDF2[2..] } else { &PBKDF2[..] };
        cryptsetup(&[&args[..], cost, &BY_FILE].concat(), &path, SECRET);
        assert!(fs::read(&path).unwrap() == vec![7; SIZE]);
        let mut layer = open_with(file(&path), Some(file(&header))).unwrap();
        assert_eq!((layer.virtual_size(), layer.files().len()), (SIZE as u64, 2));
        layer.make_writable(DiskOptions::default()).unwrap();
        layer.as_writable().unwrap().write_at(Mem::from(&data(SIZE)[..]), 0).unwrap();
        assert!(fs::read(&path).unwrap() != data(SIZE));
        assert!(read(&*layer) == data(SIZE));
        if version == "luks1" {
            let options = format!(
                "driver=luks,key-secret=s,file.filename={},header.filename={}",
                path.display(),
                header.display()
            );
            let plain = folder.path("plain");
            assert!(support::qemu_opts_to_raw(&options, &plain) == data(SIZE));
        }
        // A header alone has no data.
        let mut alone = Luks::open(file(&header), &OpenOptions::default()).unwrap();
        let error = alone.unlock(SECRET.as_bytes(), &Job::new()).unwrap_err();
        assert_eq!((error.kind(), error.field()), (ErrorKind::InvalidArgument, Some("payload-offset")));
        // The data has no header.
        let error = Luks::open(file(&path), &OpenOptions::default()).unwrap_err();
        assert_eq!((error.kind(), error.field()), (ErrorKind::InvalidHeader, Some("magic")));
    }
}

#[test]
fn what_is_being_reencrypted_is_refused_by_name() {
    let Some(folder) = Folder::new() else { return };
    let path = encrypt_in_place(&folder, "begun", &data(SIZE), &["--init-only"]);
    let error = Luks::open(file(&path), &OpenOptions::default()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::UnsupportedFeature);
    assert!(error.message().contains("online-reencrypt-v2"), "{error}");
    let found = inspect(&*file(&path), &OpenOptions::default()).unwrap();
    assert_eq!(found.findings[0].code.as_str(), "UNKNOWN_FEATURE");
}

#[test]
fn what_is_made_here_keeps_the_contract_of_disks() {
    let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::new());
    made(SIZE as u64, Preallocation::Off).create(&storage.clone().into(), &Job::new()).unwrap();
    let image = |write: bool| {
        let mut layer = open(Arc::clone(&storage)).unwrap();
        if write {
            layer.enable_writing(WriteOptions::default()).unwrap();
        }
        Image::new(vec![layer]).unwrap()
    };
    let disk = image(true);
    // Nobody wrote to it: it is noise.
    qcow2_core::Disk::write_zeroes(&disk, 0, SIZE as u64, true, qcow2_core::Durability::AtFlush).unwrap();
    DiskContract { name: "luks", disk: &disk, reopen: &|| Box::new(image(false)) }.check();
    disk.close().unwrap();
}

#[test]
fn new_files_are_for_other_tools_too() {
    let Some(folder) = Folder::new() else { return };
    for mode in [Preallocation::Off, Preallocation::Metadata, Preallocation::Falloc, Preallocation::Full] {
        let path = folder.write("new.luks", b"");
        made(SIZE as u64, mode).create(&file(&path).into(), &Job::new()).unwrap();
        support::cryptsetup_opens(&path, SECRET, 0);
        let theirs = qemu_to_raw(&path, &folder.path("raw"));
        assert_eq!(theirs.len(), SIZE);
        assert!(theirs == read(&*open(file(&path)).unwrap()), "{mode:?}");
    }
}

#[test]
fn no_power_cut_leaves_half_of_a_converted_file() {
    let (mut session, storages) = Session::new(vec![Sparse::new(0)], Durability::Flush);
    // Zeroes between data.
    let mut disk = data(300_032);
    disk[50_000..200_000].fill(0);
    let source = Image::new(vec![Box::new(Raw::new(memory(&disk)).unwrap())]).unwrap();
    let storage: Arc<dyn Storage> = storages[0].clone();
    let image = Arc::new(made(300_032, Preallocation::Off));
    let target = ConvertTarget::New(NewTarget::Format { image, hosts: storage.into() });
    let options = ConvertOptions { durable: true, ..ConvertOptions::default() };
    convert(&source, target, &options, &Job::new()).unwrap();
    let (mut images, mut judged) = (0, 0);
    for state in session.states(1, 100) {
        let bytes = state.files[0].to_vec();
        judged += 1;
        if bytes.starts_with(b"LUKS") {
            assert!(read(&*open(memory(&bytes)).unwrap()) == disk, "cut {}, {:?}", state.cut, state.shape);
            images += 1;
        }
    }
    assert!(images > 0 && images < judged, "{images} of {judged} files are complete");
}

#[test]
fn a_device_is_as_long_as_it_is() {
    let device: Arc<dyn Storage> = Device::new(4 << 20);
    device.write_all_at(Mem::from(&[5; 4096][..]), 0).unwrap();
    let error = made(4 << 20, Preallocation::Off).create(&device.clone().into(), &Job::new()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    let mut start = [0; 4096];
    device.read_exact_at(MemMut::from(&mut start[..]), 0).unwrap();
    assert!(start == [5; 4096], "it was left alone");
    let new = made(SIZE as u64, Preallocation::Full);
    new.create(&device.clone().into(), &Job::new()).unwrap();
    let mut layer = open(device).unwrap();
    let size = (4 << 20) - new.length(0);
    assert_eq!(layer.virtual_size(), size);
    layer.make_writable(DiskOptions::default()).unwrap();
    let writable = layer.as_writable().unwrap();
    writable.resize(size, Preallocation::Off, &Job::new()).unwrap();
    let error = writable.resize(size - 512, Preallocation::Off, &Job::new()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument);
}

#[test]
fn a_file_is_no_image_before_its_header_is_complete() {
    let new = made(SIZE as u64, Preallocation::Off);
    let host: Arc<dyn Storage> = Arc::new(MemoryStorage::new());
    host.write_all_at(Mem::from(&b"LUKS\xba\xbe\0\x01"[..]), 0).unwrap();
    let disk = new.disk(&host.clone().into(), &Job::new()).unwrap();
    disk.as_writable().unwrap().write_at(Mem::from(&data(SIZE)[..]), 0).unwrap();
    assert_eq!(
        Luks::open(Arc::clone(&host), &OpenOptions::default()).unwrap_err().kind(),
        ErrorKind::InvalidHeader
    );
    new.publish(&host.clone().into()).unwrap();
    assert!(read(&*open(host).unwrap()) == data(SIZE));
}

#[test]
fn sizes_that_change() {
    let Some(folder) = Folder::new() else { return };
    let path = folder.write("ours.luks", b"");
    made(SIZE as u64, Preallocation::Off).create(&file(&path).into(), &Job::new()).unwrap();
    qemu_write(&folder.write("plain", &data(SIZE)), &path);
    let mut layer = open(file(&path)).unwrap();
    layer.make_writable(DiskOptions::default()).unwrap();
    let writable = layer.as_writable().unwrap();
    for (size, mode) in
        [(2 * SIZE, Preallocation::Off), (SIZE / 2, Preallocation::Off), (SIZE, Preallocation::Falloc)]
    {
        writable.resize(size as u64, mode, &Job::new()).unwrap();
        let mut expected = data(SIZE.min(size));
        if size == SIZE {
            expected.truncate(SIZE / 2);
        }
        expected.resize(size, 0);
        assert!(read(&*layer) == expected, "{size}");
        assert!(qemu_to_raw(&path, &folder.path("raw")) == expected, "{size}");
    }
    let refused = |size: u64, mode| writable.resize(size, mode, &Job::new()).unwrap_err();
    assert_eq!(refused(1000, Preallocation::Off).kind(), ErrorKind::InvalidArgument);
    assert_eq!(refused(u64::MAX - 511, Preallocation::Off).kind(), ErrorKind::Limit);
    assert_eq!(refused(1 << 21, Preallocation::Metadata).field(), Some("preallocation"));
    let job = Job::new();
    job.cancel();
    assert_eq!(writable.resize(1 << 22, Preallocation::Off, &job).unwrap_err().kind(), ErrorKind::Aborted);
    assert_eq!(layer.virtual_size(), SIZE as u64);
    assert_eq!(open(file(&path)).unwrap().virtual_size(), SIZE as u64);
}

#[test]
fn files_that_are_cut_off_and_limits() {
    let new = made(4096, Preallocation::Off);
    let storage = Arc::new(MemoryStorage::new());
    let host: Arc<dyn Storage> = storage.clone();
    new.create(&host.into(), &Job::new()).unwrap();
    let bytes = storage.to_vec();
    let cut = |length: usize| Luks::open(memory(&bytes[..length]), &OpenOptions::default());
    for length in [0, 7, 100, 591] {
        let error = cut(length).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::InvalidHeader | ErrorKind::Corrupt), "{length}: {error}");
        assert!(inspect_bytes(&bytes[..length], None, &OpenOptions::default()).header.is_none());
    }
    let error = cut(100_000).unwrap_err();
    assert_eq!((error.kind(), error.field()), (ErrorKind::Corrupt, Some("payload-offset")));
    assert_eq!(
        inspect(&*memory(&bytes[..1000]), &OpenOptions::default()).unwrap().findings[0].code.as_str(),
        "TABLE_OUT_OF_BOUNDS"
    );
    // QEMU's size of a disk whose last sector is there in part.
    assert_eq!(cut(bytes.len() - 100).unwrap().virtual_size(), 4096);
    let tight = OpenOptions { max_virtual_size: 4095, ..OpenOptions::default() };
    assert_eq!(Luks::open(memory(&bytes), &tight).unwrap_err().kind(), ErrorKind::Limit);
    assert_eq!(inspect(&*memory(&bytes), &tight).unwrap().findings[0].code.as_str(), "LIMIT");
    let found = inspect_bytes(&bytes[..1024], None, &OpenOptions::default());
    assert!(found.header.is_some() && found.virtual_size.is_none() && found.findings.is_empty());
    let mut unknown = bytes;
    unknown[7] = 3;
    let error = Luks::open(memory(&unknown), &OpenOptions::default()).unwrap_err();
    assert_eq!((error.kind(), error.field()), (ErrorKind::UnsupportedFeature, Some("version")));
}
