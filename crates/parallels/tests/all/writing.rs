//! Requests, power cuts, failing calls, another size, the mark of an image that is in use.

use std::sync::Arc;

use qcow2_core::check::{Finding, FindingCode};
use qcow2_core::{Disk, ErrorKind, GuestSource, Job, Mem, Storage};
use qcow2_testkit::contract::{DiskContract, WriterContract};
use qcow2_testkit::{Fixture, Qemu};

use crate::support::{bytes_of, forged, image, memory, new, open};

fn sound(storage: Arc<dyn Storage>) {
    let layer = open(storage).unwrap();
    let report = layer.as_checkable().unwrap().check(10, &Job::new()).unwrap();
    let harmless = |finding: &Finding| matches!(finding.code, FindingCode::NotClosed | FindingCode::Leak);
    assert!(report.findings.iter().all(harmless), "{report:?}");
}

#[test]
fn disks_keep_their_contract() {
    for bytes in [new(3 << 20, 1 << 20), new(3 << 20, 16384), forged(60, 63)] {
        let storage = memory(&bytes);
        let disk = image(Arc::clone(&storage), true);
        let reopen = || Box::new(image(Arc::clone(&storage), false)) as Box<dyn GuestSource>;
        if disk.virtual_size().is_multiple_of(1 << 20) {
            DiskContract { name: "parallels", disk: &disk, reopen: &reopen }.check();
        } else {
            // As far as its table reaches.
            disk.write_at(Mem::from(&[1; 900][..]), disk.virtual_size() - 900).unwrap();
            disk.grow(80 * 63 * 512).unwrap();
            disk.write_at(Mem::from(&[2; 900][..]), disk.virtual_size() - 900).unwrap();
            assert_eq!(disk.grow(300 * 63 * 512).unwrap_err().kind(), ErrorKind::UnsupportedFeature);
        }
        disk.close().unwrap();
        let layer = open(storage).unwrap();
        assert!(layer.as_checkable().unwrap().check(10, &Job::new()).unwrap().is_clean());
    }
}

#[test]
fn writers_keep_their_contract() {
    for (name, file) in [("clusters", new(24 * 4096, 4096)), ("sectors", forged(24, 8))] {
        WriterContract {
            name,
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
fn the_mark_of_an_image_that_is_in_use() {
    let Some(qemu) = Qemu::find() else { return };
    let fixture = Fixture::new();
    let storage = memory(&new(3 << 20, 65536));
    let disk = image(Arc::clone(&storage), true);
    assert_eq!(bytes_of(&*storage)[44..48], *b"Ynot");
    disk.write_at(Mem::from(&[1; 900][..]), 1000).unwrap();
    disk.flush().unwrap();
    // A block that nothing refers to when the process is killed.
    disk.write_at(Mem::from(&[2; 900][..]), 2 << 20).unwrap();
    std::mem::forget(disk);
    let killed = bytes_of(&*storage);
    let path = fixture.file("killed", &killed);
    let name = path.to_str().unwrap();
    let (theirs, layer) = (qemu.img(&["check", "-f", "parallels", name]), open(memory(&killed)).unwrap());
    let report = layer.as_checkable().unwrap().check(10, &Job::new()).unwrap();
    let lines: Vec<_> = report.findings.iter().map(ToString::to_string).collect();
    assert_eq!(lines, theirs.stderr.lines().collect::<Vec<_>>(), "{theirs:?}");
    assert_eq!((report.corruptions, report.leaks), (1, 1));
    // Opening it for writing is what repairs it; closing clears the mark.
    let disk = image(Arc::clone(&storage), true);
    let mut found = [0; 900];
    disk.read_at(qcow2_core::MemMut::from(&mut found[..]), 1000).unwrap();
    assert_eq!(found, [1; 900]);
    disk.close().unwrap();
    let path = fixture.file("closed", &bytes_of(&*storage));
    qemu.img(&["check", "-f", "parallels", path.to_str().unwrap()]).ok();
    assert_eq!(bytes_of(&*storage)[44..48], [0; 4]);
}
