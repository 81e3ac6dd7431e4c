//! Images that Hyper-V and Disk2vhd made, from the source of QEMU: they are not part of the project, and fetched by `npm run iotests`.

use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;

use qcow2_core::storage::{Access, FileStorage};
use qcow2_core::{Layer, MemMut, Storage};
use qcow2_testkit::{Fixture, Qemu, skipped};
use qcow2_vhdx::{OpenOptions, Vhdx};

use crate::forge::{check, open_disk, open_source};

/// The sample, unpacked.
fn sample(fixture: &Fixture, name: &str) -> Option<PathBuf> {
    let home = std::env::var_os("HOME").map(PathBuf::from).unwrap_or_default();
    let folder = std::env::var_os("QEMU_SRC")
        .map_or_else(|| home.join(".cache/qcow2-ci/iotests/trixie"), PathBuf::from);
    let packed = folder.join("tests/qemu-iotests/sample_images").join(format!("{name}.bz2"));
    if !packed.exists() {
        skipped(format!("{} is not there", packed.display()));
        return None;
    }
    let out = Command::new("bzip2").arg("-dc").arg(&packed).output();
    match out {
        Ok(out) if out.status.success() => Some(fixture.file(name, &out.stdout)),
        _ => {
            skipped("bzip2 is not installed");
            None
        }
    }
}

fn storage(path: &std::path::Path) -> Arc<dyn Storage> {
    Arc::new(FileStorage::open(path, Access::ReadWrite).unwrap())
}

/// What QEMU reads is what is read here.
fn same_as_qemu(qemu: &Qemu, path: &std::path::Path) {
    let raw = path.with_extension("raw");
    qemu.convert(path, "vhdx", &raw, "raw", &[]);
    let (ours, theirs) = (open_source(storage(path)).unwrap(), storage(&raw));
    let mut at = 0;
    let (mut a, mut b) = (vec![0; 4 << 20], vec![0; 4 << 20]);
    while at < ours.virtual_size() {
        let length = (ours.virtual_size() - at).min(4 << 20) as usize;
        let mut segments = Vec::new();
        ours.layers()[0].plan(at..at + length as u64, &mut segments).unwrap();
        ours.read_at(MemMut::from(&mut a[..length]), at).unwrap();
        theirs.read_at(MemMut::from(&mut b[..length]), at).unwrap();
        assert!(a[..length] == b[..length], "{}: other bytes at {at:#x}", path.display());
        at += length as u64;
    }
}

#[test]
fn images_of_other_products_are_read_as_qemu_does() {
    let Some(qemu) = Qemu::find() else { return };
    for name in ["iotest-dynamic-1G.vhdx", "test-disk2vhd.vhdx"] {
        let fixture = Fixture::new();
        let Some(path) = sample(&fixture, name) else { continue };
        same_as_qemu(&qemu, &path);
        assert!(check(storage(&path)).unwrap().is_clean(), "{name}");
        let disk = open_disk(storage(&path)).unwrap();
        disk.write_at(qcow2_core::Mem::from(&[9; 4096][..]), 200 << 20).unwrap();
        disk.close().unwrap();
        qemu.img(&["check", "-f", "vhdx", path.to_str().unwrap()]).ok();
        let verified = qemu.io(&path, "vhdx", &["read -P 9 200M 4096"]);
        assert!(!verified.contains("Pattern"), "{verified}");
    }
}

/// A log that was not brought in: QEMU refuses to read such an image.
#[test]
fn an_image_with_a_dirty_log_is_read_and_not_changed() {
    let Some(qemu) = Qemu::find() else { return };
    let fixture = Fixture::new();
    let Some(path) = sample(&fixture, "iotest-dirtylog-10G-4M.vhdx") else { return };
    let before = std::fs::read(&path).unwrap();
    let ours = Vhdx::open(storage(&path), &OpenOptions::default()).unwrap();
    assert!(ours.is_dirty());
    let mut in_memory = Vec::new();
    ours.plan(0..ours.virtual_size(), &mut in_memory).unwrap();
    let mut found = vec![0; 4 << 20];
    ours.read_segment(
        in_memory.iter().find(|s| matches!(s.kind, qcow2_core::layer::SegmentKind::Data(_))).unwrap(),
        MemMut::from(&mut found[..]),
    )
    .unwrap();
    assert!(std::fs::read(&path).unwrap() == before, "reading changed the file");
    // QEMU brings its copy in; this crate brings the file in.
    let copy = fixture.path("copy.vhdx");
    std::fs::copy(&path, &copy).unwrap();
    qemu.img(&["check", "-r", "all", "-f", "vhdx", copy.to_str().unwrap()]).ok();
    let theirs = Vhdx::open(storage(&copy), &OpenOptions::default()).unwrap();
    let mut by_qemu = Vec::new();
    theirs.plan(0..theirs.virtual_size(), &mut by_qemu).unwrap();
    assert_eq!(in_memory, by_qemu);
    drop(open_disk(storage(&path)).unwrap());
    let after = Vhdx::open(storage(&path), &OpenOptions::default()).unwrap();
    assert!(!after.is_dirty());
    let mut on_disk = Vec::new();
    after.plan(0..after.virtual_size(), &mut on_disk).unwrap();
    assert_eq!(in_memory, on_disk);
    qemu.img(&["check", "-f", "vhdx", path.to_str().unwrap()]).ok();
    qemu.assert_identical(&path, "vhdx", &copy, "vhdx");
}
