//! Requests, power cuts, failing calls, another size.

use std::sync::Arc;

use qcow2_core::check::{Finding, FindingCode};
use qcow2_core::space::Preallocation;
use qcow2_core::{Disk, ErrorKind, GuestSource, Job, Mem, Storage};
use qcow2_testkit::contract::{DiskContract, WriterContract};
use qcow2_testkit::{Fixture, Qemu};
use qcow2_vpc::Subformat;
use qcow2_vpc::structures::DiskType;

use crate::support::{bytes_of, forged, image, memory, new, open, read};

fn sound(storage: Arc<dyn Storage>) {
    // Every block can be read, and at worst a copy of the footer or some space is lost.
    read(vec![open(Arc::clone(&storage)).unwrap()]).unwrap();
    let layer = open(storage).unwrap();
    let report = layer.as_checkable().unwrap().check(10, &Job::new()).unwrap();
    let harmless = |finding: &Finding| matches!(finding.code, FindingCode::Copy | FindingCode::Leak);
    assert!(report.findings.iter().all(harmless), "{report:?}");
}

#[test]
fn disks_keep_their_contract() {
    for bytes in [
        new(3 << 20, Subformat::Dynamic, true),
        new(3 << 20, Subformat::Fixed, true),
        forged(40, 64 << 10, DiskType::Dynamic),
    ] {
        let storage = memory(&bytes);
        let disk = image(Arc::clone(&storage), true);
        let reopen = || Box::new(image(Arc::clone(&storage), false)) as Box<dyn GuestSource>;
        DiskContract { name: "vpc", disk: &disk, reopen: &reopen }.check();
        disk.close().unwrap();
        sound(storage);
    }
}

#[test]
fn writers_keep_their_contract() {
    let contract = |name, file: &[u8], unit, grows| {
        WriterContract { name, file, below: None, open: &open, unit, grows, shrinks: grows, sound: &sound }
            .check();
    };
    contract("dynamic", &forged(24, 4096, DiskType::Dynamic), 4096, true);
    contract("fixed", &new(24 * 4096, Subformat::Fixed, true), 4096, false);
}

#[test]
fn an_image_that_a_killed_process_left_ends_with_its_footer() {
    let Some(qemu) = Qemu::find() else { return };
    let fixture = Fixture::new();
    let storage = memory(&new(8 << 20, Subformat::Dynamic, true));
    let disk = image(Arc::clone(&storage), true);
    // The last sector of a block, which forges the footer of a fixed disk.
    let mut forged = new(3 << 20, Subformat::Fixed, true);
    forged.drain(..3 << 20);
    disk.write_at(Mem::from(&forged[..]), (2 << 20) - 512).unwrap();
    std::mem::forget(disk);
    let bytes = bytes_of(&*storage);
    assert_eq!(image(memory(&bytes), false).virtual_size(), 8 << 20);
    let footer = &bytes[bytes.len() - 512..];
    assert!(footer == &bytes[..512], "the file ends with something else");
    let path = fixture.file("killed", &bytes);
    assert_eq!(qemu.guest_bytes(&path, "vpc", &[]).len(), 8 << 20);
}

#[test]
fn bits_of_sectors_are_set_before_data_is_written() {
    let storage = memory(&forged(4, 16 << 10, DiskType::Dynamic));
    let disk = image(Arc::clone(&storage), true);
    disk.write_at(Mem::from(&[1; 512][..]), 0).unwrap();
    disk.close().unwrap();
    let mut bytes = bytes_of(&*storage);
    let place = u32::from_be_bytes(bytes[1536..1540].try_into().unwrap()) as usize * 512;
    assert_eq!(bytes[place..place + 512], [0xff; 512]);
    // As Virtual PC leaves it: one sector was written.
    bytes[place] = 0x80;
    bytes[place + 1..place + 512].fill(0);
    let storage = memory(&bytes);
    let disk = image(Arc::clone(&storage), true);
    disk.write_at(Mem::from(&[2; 512][..]), 1024).unwrap();
    disk.close().unwrap();
    assert_eq!(bytes_of(&*storage)[place..place + 4], [0xff; 4]);
}

#[test]
fn sizes_of_disks_with_a_geometry() {
    let Some(qemu) = Qemu::find() else { return };
    let fixture = Fixture::new();
    for subformat in [Subformat::Dynamic, Subformat::Fixed] {
        let storage = memory(&new(10 << 20, subformat, false));
        let disk = image(Arc::clone(&storage), true);
        disk.write_at(Mem::from(&[5; 512][..]), disk.virtual_size() - 512).unwrap();
        let error = disk.grow(20 << 20).unwrap_err();
        assert_eq!((error.kind(), error.field()), (ErrorKind::InvalidArgument, Some("size")));
        let next = 20_994_048;
        assert!(error.message().contains(&next.to_string()), "{error}");
        let old = disk.virtual_size() as usize;
        disk.grow(next).unwrap();
        disk.close().unwrap();
        let path = fixture.file("grown", &bytes_of(&*storage));
        let found = qemu.guest_bytes(&path, "vpc", &[]);
        assert_eq!(found.len() as u64, next);
        assert!(found[old - 512..old] == [5; 512] && found[old..].iter().all(|byte| *byte == 0));
        let mut layer = open(Arc::clone(&storage)).unwrap();
        layer.make_writable(qcow2_core::DiskOptions::default()).unwrap();
        let resize = |size| layer.as_writable().unwrap().resize(size, Preallocation::Off, &Job::new());
        assert_eq!(resize(10 << 20).unwrap_err().kind(), ErrorKind::InvalidArgument);
        let kind = resize(3 << 40).unwrap_err().kind();
        assert!(matches!(kind, ErrorKind::Limit | ErrorKind::UnsupportedFeature), "{kind:?}");
        // The size that it had before, and what a larger one shows again.
        resize(old as u64).unwrap();
        layer.as_writable().unwrap().close().unwrap();
        let path = fixture.file("cut", &bytes_of(&*storage));
        let found = qemu.guest_bytes(&path, "vpc", &[]);
        assert!(found.len() == old && found[old - 512..] == [5; 512]);
        sound(Arc::clone(&storage));
    }
}
