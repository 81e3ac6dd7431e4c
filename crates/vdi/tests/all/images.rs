//! Images that QEMU makes, read by us, and the reverse.

use std::path::Path;
use std::sync::Arc;

use qcow2_core::convert::ConvertOptions;
use qcow2_core::new_image::{Hosts, NewImage};
use qcow2_core::space::Preallocation;
use qcow2_core::storage::{Access, FileStorage};
use qcow2_core::{Job, Mem, Raw, Storage};
use qcow2_engine::Image;
use qcow2_engine::convert::{ConvertTarget, convert};
use qcow2_engine::create::NewTarget;
use qcow2_testkit::contract::LayerContract;
use qcow2_testkit::{Fixture, Qemu};
use qcow2_vdi::NewVdi;

use crate::support::{bytes_of, disk, forged, image, memory, new, open, read};

fn contract(name: &str, file: &[u8], expected: &[u8]) {
    LayerContract { name, file, open: &open, expected, below: None }.check();
}

#[test]
fn images_of_qemu_keep_the_contract_of_layers() {
    let Some(qemu) = Qemu::find() else { return };
    let fixture = Fixture::new();
    let size = 5 * (1 << 20) + 512;
    let (expected, path) = (disk(size, 1), fixture.path("image"));
    let raw = fixture.file("raw", &expected);
    for options in ["static=off", "static=on"] {
        qemu.convert(&raw, "raw", &path, "vdi", &["-o", options]);
        contract(options, &std::fs::read(&path).unwrap(), &expected);
    }
    qemu.img(&["create", "-q", "-f", "vdi", path.to_str().unwrap(), &size.to_string()]).ok();
    contract("empty", &std::fs::read(&path).unwrap(), &vec![0; size as usize]);
    qemu.io(&path, "vdi", &["write -P 7 1000k 3000", "write -P 9 4M 66000", "write -P 1 0 1"]);
    let expected = qemu.guest_bytes(&path, "vdi", &[]);
    contract("written", &std::fs::read(&path).unwrap(), &expected);
}

#[test]
fn block_sizes_of_others_and_bytes_in_front_of_blocks() {
    for (block_size, extra) in [(4096, 0), (4096, 512), (8192, 4096)] {
        let storage = memory(&forged(40, block_size, extra));
        let expected = disk(40 * u64::from(block_size), 5);
        let written = image(Arc::clone(&storage), true);
        written.write_at(qcow2_core::Mem::from(&expected[..]), 0).unwrap();
        written.close().unwrap();
        let file = bytes_of(&*storage);
        contract(&format!("{block_size} and {extra}"), &file, &expected);
    }
}

fn file(path: &Path) -> Arc<dyn Storage> {
    Arc::new(FileStorage::open(path, Access::ReadWrite).unwrap())
}

#[test]
fn what_is_made_here_is_read_and_checked_by_qemu() {
    let Some(qemu) = Qemu::find() else { return };
    let fixture = Fixture::new();
    let mib = 1 << 20;
    for (size, is_static) in [
        (0, false),
        (512, false),
        (mib, true),
        (3 * mib - 512, false),
        (130 * mib, false),
        (2 * mib + 512, true),
    ] {
        let path = fixture.file("ours", &new(size, is_static));
        let written = image(file(&path), true);
        let mut expected = vec![0; size as usize];
        for (at, length) in [(size / 2, size / 3), (size - size / 4, size / 4), (0, size / 9)] {
            let data = disk(length, size + at);
            written.write_at(qcow2_core::Mem::from(&data[..]), at).unwrap();
            expected[at as usize..][..data.len()].copy_from_slice(&data);
        }
        written.write_zeroes(size / 2, size / 8, true).unwrap();
        expected[(size / 2) as usize..][..(size / 8) as usize].fill(0);
        written.close().unwrap();
        let name = path.to_str().unwrap();
        let checked = qemu.img(&["check", "-f", "vdi", name]);
        assert_eq!(checked.code, 0, "{size}: {checked:?}");
        assert!(qemu.guest_bytes(&path, "vdi", &[]) == expected, "{size} bytes, static: {is_static}");
        // QEMU goes on where we ended, and we where it did.
        if size > mib {
            qemu.io(&path, "vdi", &["write -P 3 1000k 2k"]);
            expected[1_024_000..][..2048].fill(3);
            qemu.img(&["check", "-f", "vdi", name]).ok();
            assert!(read(vec![open(file(&path)).unwrap()]).unwrap() == expected, "{size} after QEMU");
        }
    }
}

#[test]
fn blocks_of_zeroes_and_disks_of_64_tib() {
    let mut bytes = new(3 << 20, false);
    // The entry of a block that was discarded.
    bytes[512..516].copy_from_slice(&0xffff_fffe_u32.to_le_bytes());
    contract("zero", &bytes, &vec![0; 3 << 20]);
    let storage = memory(&bytes);
    let written = image(Arc::clone(&storage), true);
    written.write_at(qcow2_core::Mem::from(&[7; 100][..]), 1000).unwrap();
    written.close().unwrap();
    let found = read(vec![open(storage).unwrap()]).unwrap();
    assert!(
        found[1000..1100] == [7; 100]
            && found[..1000] == [0; 1000]
            && found[1100..] == vec![0; (3 << 20) - 1100]
    );
    // Only what is looked at is read of the block map, here a hole of the file.
    let size: u64 = 64 << 40;
    let header =
        qcow2_vdi::structures::Header::new(size, qcow2_vdi::structures::ImageType::Static, [[1; 16]; 2])
            .unwrap();
    let storage = memory(&header.to_bytes());
    storage.set_len(header.offset_data.into()).unwrap();
    let layer = open(storage).unwrap();
    let mut segments = Vec::new();
    let error = layer.plan(size - 4096..size, &mut segments).unwrap_err();
    assert_eq!(error.kind(), qcow2_core::ErrorKind::Corrupt);
}

/// What a conversion makes is what QEMU's makes: as long, and sound.
#[test]
fn conversions_into_new_images() {
    let Some(qemu) = Qemu::find() else { return };
    let fixture = Fixture::new();
    let size = 7 * (1 << 20) + 512;
    let expected = disk(size, 11);
    let source = Image::new(vec![Box::new(Raw::new(memory(&expected)).unwrap())]).unwrap();
    for is_static in [false, true] {
        let path = fixture.file("converted", b"");
        let image = Arc::new(NewVdi::new(size, is_static, Preallocation::Off).unwrap());
        let target = ConvertTarget::New(NewTarget::Format { image, hosts: Hosts::from(file(&path)) });
        convert(&source, target, &ConvertOptions::default(), &Job::new()).unwrap();
        qemu.img(&["check", "-f", "vdi", path.to_str().unwrap()]).ok();
        assert!(qemu.guest_bytes(&path, "vdi", &[]) == expected, "static: {is_static}");
        assert!(read(vec![open(file(&path)).unwrap()]).unwrap() == expected);
        let theirs = fixture.path("theirs");
        let raw = fixture.file("raw", &expected);
        let option = if is_static { "static=on" } else { "static=off" };
        qemu.convert(&raw, "raw", &theirs, "vdi", &["-o", option]);
        assert_eq!(std::fs::metadata(&path).unwrap().len(), std::fs::metadata(&theirs).unwrap().len());
    }
}

/// A disk that is written to before it is an image: a live clone's target.
#[test]
fn disks_that_become_images() {
    let storage: Arc<dyn Storage> = memory(b"");
    let (image, hosts) =
        (NewVdi::new(3 << 20, false, Preallocation::Off).unwrap(), Hosts::from(Arc::clone(&storage)));
    let layer = image.disk(&hosts, &Job::new()).unwrap();
    let writable = layer.as_writable().unwrap();
    writable.write_at(Mem::from(&[3; 5000][..]), (2 << 20) - 100).unwrap();
    writable.close().unwrap();
    assert!(open(Arc::clone(&storage)).is_err(), "an image before its time");
    image.publish(&hosts).unwrap();
    let found = read(vec![open(storage).unwrap()]).unwrap();
    assert!(found[(2 << 20) - 100..(2 << 20) + 4900] == [3; 5000]);
}
