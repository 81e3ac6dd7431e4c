//! Requests, power cuts, failing calls, another size.

use std::sync::Arc;

use qcow2_core::check::Finding;
use qcow2_core::space::Preallocation;
use qcow2_core::{Disk, ErrorKind, Job, Mem, Storage};
use qcow2_engine::ResizeOptions;
use qcow2_testkit::contract::{DiskContract, WriterContract};
use qcow2_testkit::{Fixture, Qemu};

use crate::support::{bytes_of, forged, image, memory, new, open};

fn sound(storage: Arc<dyn Storage>) {
    let layer = open(storage).unwrap();
    let report = layer.as_checkable().unwrap().check(10, &Job::new()).unwrap();
    // Places that a power cut left without a block: the number of blocks is larger than that of entries.
    let lost = |finding: &Finding| finding.message.starts_with("allocated blocks mismatch");
    assert!(report.findings.iter().all(lost), "{report:?}");
}

#[test]
fn disks_keep_their_contract() {
    for bytes in [new(3 << 20, false), new((3 << 20) + 512, true), forged(400, 4096, 0)] {
        let storage = memory(&bytes);
        let disk = image(Arc::clone(&storage), true);
        let reopen = || Box::new(image(Arc::clone(&storage), false)) as Box<dyn qcow2_core::GuestSource>;
        DiskContract { name: "vdi", disk: &disk, reopen: &reopen }.check();
        disk.close().unwrap();
        sound(storage);
    }
}

#[test]
fn writers_keep_their_contract() {
    for extra in [0, 512] {
        let file = forged(24, 4096, extra);
        let name = format!("vdi with {extra}");
        WriterContract {
            name: &name,
            file: &file,
            below: None,
            open: &open,
            unit: 4096,
            grows: true,
            shrinks: true,
            sound: &sound,
        }
        .check();
    }
}

#[test]
fn a_disk_grows_as_far_as_its_block_map() {
    let Some(qemu) = Qemu::find() else { return };
    let fixture = Fixture::new();
    let storage = memory(&new(1 << 20, false));
    let disk = image(Arc::clone(&storage), true);
    disk.write_at(Mem::from(&[5; 4096][..]), (1 << 20) - 4096).unwrap();
    for size in [(1 << 20) + 512, 128 << 20] {
        disk.grow(size).unwrap();
        assert_eq!(disk.virtual_size(), size);
    }
    disk.write_at(Mem::from(&[6; 512][..]), (128 << 20) - 512).unwrap();
    let error = disk.grow((128 << 20) + 512).unwrap_err();
    assert_eq!((error.kind(), error.field()), (ErrorKind::UnsupportedFeature, Some("size")));
    disk.close().unwrap();
    let bytes = bytes_of(&*storage);
    let path = fixture.file("grown", &bytes);
    qemu.img(&["check", "-f", "vdi", path.to_str().unwrap()]).ok();
    let found = qemu.guest_bytes(&path, "vdi", &[]);
    assert_eq!(found.len(), 128 << 20);
    assert!(found[(1 << 20) - 4096..1 << 20] == [5; 4096] && found[(128 << 20) - 512..] == [6; 512]);
}

#[test]
fn a_disk_that_is_cut_off_is_whole_for_qemu() {
    let Some(qemu) = Qemu::find() else { return };
    let fixture = Fixture::new();
    let shrink = ResizeOptions { shrink: true, ..ResizeOptions::default() };
    let storage = memory(&new(8 << 20, false));
    let disk = image(Arc::clone(&storage), true);
    for block in [0, 2, 5, 7] {
        disk.write_at(Mem::from(&[block as u8 + 1; 4096][..]), block << 20).unwrap();
    }
    disk.resize_with((2 << 20) + 8192, shrink).unwrap();
    disk.write_at(Mem::from(&[9; 512][..]), 1 << 20).unwrap();
    disk.grow(6 << 20).unwrap();
    disk.close().unwrap();
    let path = fixture.file("cut", &bytes_of(&*storage));
    qemu.img(&["check", "-f", "vdi", path.to_str().unwrap()]).ok();
    let found = qemu.guest_bytes(&path, "vdi", &[]);
    let mut expected = vec![0; 6 << 20];
    for (at, length, byte) in [(0, 4096, 1), (1 << 20, 512, 9), (2 << 20, 4096, 3)] {
        expected[at..at + length].fill(byte);
    }
    assert!(found == expected);
    sound(storage);

    // The last block of the disk has the first place.
    let storage = memory(&new(8 << 20, false));
    let disk = image(Arc::clone(&storage), true);
    disk.write_at(Mem::from(&[1; 512][..]), 7 << 20).unwrap();
    disk.write_at(Mem::from(&[2; 512][..]), 0).unwrap();
    let error = disk.resize_with(1 << 20, shrink).unwrap_err();
    assert_eq!((error.kind(), error.field()), (ErrorKind::UnsupportedFeature, Some("size")));
    assert_eq!(disk.virtual_size(), 8 << 20);
}

#[test]
fn sizes_that_a_disk_does_not_get() {
    let mut layer = open(memory(&new(1 << 20, false))).unwrap();
    layer.make_writable(qcow2_core::DiskOptions::default()).unwrap();
    let writable = layer.as_writable().unwrap();
    for (size, preallocation, kind) in [
        ((1 << 20) + 1, Preallocation::Off, ErrorKind::InvalidArgument),
        (2 << 20, Preallocation::Full, ErrorKind::InvalidArgument),
        (1 << 62, Preallocation::Off, ErrorKind::UnsupportedFeature),
    ] {
        assert_eq!(writable.resize(size, preallocation, &Job::new()).unwrap_err().kind(), kind, "{size}");
        assert_eq!(layer.virtual_size(), 1 << 20);
    }
}
