//! Random writes: the contract of disks, and QEMU as the judge.

use std::path::Path;

use qcow2_core::storage::Access;
use qcow2_core::{Disk, Durability, ErrorKind, Layer, Mem};
use qcow2_engine::{Image, ResizeOptions};
use qcow2_testkit::contract::DiskContract;
use qcow2_testkit::{Fixture, Qemu};
use qcow2_vmdk::Vmdk;

use crate::support::{chain, guest, open};

const SUBFORMATS: [&str; 4] =
    ["monolithicSparse", "monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat"];

fn writable(path: &Path) -> Image {
    let mut vmdk = open(path, Access::ReadWrite).unwrap();
    vmdk.make_writable(Default::default()).unwrap();
    Image::new(vec![Box::new(vmdk)]).unwrap()
}

fn create(qemu: &Qemu, path: &Path, options: &str, size: u64) {
    let size = size.to_string();
    qemu.img(&["create", "-q", "-f", "vmdk", "-o", options, path.to_str().unwrap(), &size]).ok();
}

#[test]
fn what_is_written_to_keeps_the_contract_of_disks_and_is_what_qemu_reads() {
    let Some(qemu) = Qemu::find() else { return };
    for subformat in SUBFORMATS {
        let fixture = Fixture::new();
        let path = fixture.path("image.vmdk");
        create(&qemu, &path, &format!("subformat={subformat}"), (3 << 20) + 1536);
        let before = open(&path, Access::ReadOnly).unwrap().cid();
        let image = writable(&path);
        let reopen =
            || Box::new(chain(open(&path, Access::ReadOnly).unwrap())) as Box<dyn qcow2_core::GuestSource>;
        DiskContract { name: subformat, disk: &image, reopen: &reopen }.check();
        image.close().unwrap();
        let vmdk = open(&path, Access::ReadOnly).unwrap();
        assert_ne!(vmdk.cid(), before);
        assert!(guest(&chain(vmdk)) == qemu.guest_bytes(&path, "vmdk", &[]), "{subformat}");
        qemu.img(&["check", "-q", "-f", "vmdk", path.to_str().unwrap()]).ok();
    }
}

#[test]
fn qemu_and_we_take_turns_at_an_image() {
    let Some(qemu) = Qemu::find() else { return };
    let fixture = Fixture::new();
    let path = fixture.path("image.vmdk");
    create(&qemu, &path, "zeroed_grain=on", 100 << 20);
    for round in 0..3u8 {
        let at = u64::from(round) * 40_000;
        qemu.io(
            &path,
            "vmdk",
            &[format!("write -P {} {at} 20000", round + 1), format!("write -z {} 65536", 4 << 20)],
        );
        let image = writable(&path);
        image.write_at(Mem::from(&[round + 10; 100_000][..]), at + 20_000).unwrap();
        image.write_at(Mem::from(&[round + 20; 70_000][..]), (4 << 20) + at).unwrap();
        image.close().unwrap();
        assert!(
            guest(&chain(open(&path, Access::ReadOnly).unwrap())) == qemu.guest_bytes(&path, "vmdk", &[])
        );
        qemu.img(&["check", "-q", "-f", "vmdk", path.to_str().unwrap()]).ok();
    }
}

/// Larger by one table, by many, and over the end of a directory's sector.
#[test]
fn a_disk_grows_and_qemu_reads_it() {
    let Some(qemu) = Qemu::find() else { return };
    for (subformat, steps) in [
        ("monolithicSparse", &[(32u64 << 20) + 512, 100 << 20, 20 << 30, 300 << 30][..]),
        ("monolithicFlat", &[2 << 20, 3 << 20]),
        ("twoGbMaxExtentSparse", &[40 << 20, 2 << 30]),
    ] {
        let fixture = Fixture::new();
        let path = fixture.path("image.vmdk");
        create(&qemu, &path, &format!("subformat={subformat}"), 1536);
        let mut last = 1536;
        for &size in steps {
            let image = writable(&path);
            image.write_at(Mem::from(&[3; 512][..]), last - 512).unwrap();
            image.grow(size).unwrap();
            image.write_at(Mem::from(&[5; 1024][..]), size - 1024).unwrap();
            image.close().unwrap();
            last = size;
            let commands =
                [format!("read -P 5 {} 1024", size - 1024), format!("read -P 0 {} 1024", size / 2)];
            let (length, _) =
                (qemu.io(&path, "vmdk", &["length".to_owned()]), qemu.io(&path, "vmdk", &commands));
            assert!(!length.is_empty());
            let vmdk = open(&path, Access::ReadOnly).unwrap();
            assert_eq!((vmdk.virtual_size(), vmdk.descriptor().size()), (size, size), "{subformat}");
            qemu.io(&path, "vmdk", &[format!("write -P 6 {} 512", size / 2)]);
        }
        let image = writable(&path);
        let shrink = ResizeOptions { shrink: true, ..ResizeOptions::default() };
        let kind = image.resize_with(last - 512, shrink).unwrap_err().kind();
        assert_eq!(kind, ErrorKind::UnsupportedFeature);
        if subformat.starts_with("two") {
            assert_eq!(image.grow((2 << 30) + 512).unwrap_err().kind(), ErrorKind::UnsupportedFeature);
        }
    }
}

/// Requests of several threads that meet in the same grains.
#[test]
fn writes_that_meet_in_a_grain_are_all_there() {
    let Some(qemu) = Qemu::find() else { return };
    let fixture = Fixture::new();
    let path = fixture.path("image.vmdk");
    create(&qemu, &path, "subformat=monolithicSparse", 8 << 20);
    let image = writable(&path);
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let image = &image;
            scope.spawn(move || {
                for sector in (thread..16384).step_by(4) {
                    let durability = if sector % 1000 == 0 { Durability::Now } else { Durability::AtFlush };
                    Disk::write_at(image, Mem::from(&[sector as u8 | 1; 512][..]), sector * 512, durability)
                        .unwrap();
                }
            });
        }
    });
    image.close().unwrap();
    let bytes = guest(&chain(open(&path, Access::ReadOnly).unwrap()));
    for (sector, bytes) in bytes.chunks(512).enumerate() {
        assert!(bytes.iter().all(|byte| *byte == sector as u8 | 1), "{sector}");
    }
    assert!(bytes == qemu.guest_bytes(&path, "vmdk", &[]));
    // Grains that two requests made at once are used again: the file has no more than the disk, and its metadata.
    assert!(std::fs::metadata(&path).unwrap().len() < (8 << 20) + (1 << 20));
}

/// What is around a write in its grain is the parent's, and zeroes hide what the parent has.
#[test]
fn a_child_takes_requests_and_is_what_qemu_reads() {
    let Some(qemu) = Qemu::find() else { return };
    for options in ["zeroed_grain=off", "zeroed_grain=on"] {
        let fixture = Fixture::new();
        let size = (3 << 20) + 512;
        let mut model = crate::support::disk(9, size);
        let raw = fixture.file("raw", &model);
        let (base, child) = (fixture.path("base.vmdk"), fixture.path("child.vmdk"));
        qemu.convert(&raw, "raw", &base, "vmdk", &[]);
        let names = [base.to_str().unwrap(), child.to_str().unwrap()];
        qemu.img(&["create", "-q", "-f", "vmdk", "-o", options, "-b", names[0], "-F", "vmdk", names[1]]).ok();
        let open_child = |access| {
            let mut top = open(&child, access).unwrap();
            if access == Access::ReadWrite {
                top.make_writable(Default::default()).unwrap();
            }
            Image::new(vec![Box::new(top), Box::new(open(&base, Access::ReadOnly).unwrap())]).unwrap()
        };
        let image = open_child(Access::ReadWrite);
        let mut rng = qcow2_testkit::Rng::new(5);
        for step in 0..120u32 {
            let start = rng.below(size as u64);
            let length = rng.below(200_000.min(size as u64 - start) + 1);
            let range = start as usize..(start + length) as usize;
            match rng.below(4) {
                0 => {
                    image.write_zeroes(start, length, rng.below(2) == 0).unwrap();
                    model[range].fill(0);
                }
                1 if step % 8 == 0 => image.flush().unwrap(),
                _ => {
                    image.write_at(Mem::from(&vec![step as u8; length as usize][..]), start).unwrap();
                    model[range].fill(step as u8);
                }
            }
        }
        assert!(guest(&image) == model, "{options}");
        image.close().unwrap();
        drop(image);
        assert!(qemu.guest_bytes(&child, "vmdk", &[]) == model, "{options}");
        assert!(guest(&open_child(Access::ReadOnly)) == model, "{options}");
        qemu.img(&["check", "-q", "-f", "vmdk", names[1]]).ok();
        qemu.io(&child, "vmdk", &["write -P 1 0 512"]);
        let image = open_child(Access::ReadWrite);
        image.write_at(Mem::from(&[2; 512][..]), 512).unwrap();
        image.grow(8 << 20).unwrap();
        image.close().unwrap();
        model[..512].fill(1);
        model[512..1024].fill(2);
        model.resize(8 << 20, 0);
        assert!(qemu.guest_bytes(&child, "vmdk", &[]) == model, "{options}, grown");
    }
}

/// Writes of several threads into grains that the parent has.
#[test]
fn writes_that_meet_in_a_grain_of_a_child_keep_what_is_around_them() {
    let Some(qemu) = Qemu::find() else { return };
    let fixture = Fixture::new();
    let size = 4 << 20;
    let below: Vec<u8> = (0..size).map(|at: usize| (at / 512) as u8 | 1).collect();
    let raw = fixture.file("raw", &below);
    let (base, child) = (fixture.path("base.vmdk"), fixture.path("child.vmdk"));
    qemu.convert(&raw, "raw", &base, "vmdk", &[]);
    let names = [base.to_str().unwrap(), child.to_str().unwrap()];
    qemu.img(&["create", "-q", "-f", "vmdk", "-b", names[0], "-F", "vmdk", names[1]]).ok();
    let mut top = open(&child, Access::ReadWrite).unwrap();
    top.make_writable(Default::default()).unwrap();
    let image = Image::new(vec![Box::new(top), Box::new(open(&base, Access::ReadOnly).unwrap())]).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let image = &image;
            scope.spawn(move || {
                for sector in (thread..8192).step_by(8) {
                    image.write_at(Mem::from(&[0; 512][..]), sector * 512).unwrap();
                }
            });
        }
    });
    image.close().unwrap();
    drop(image);
    let bytes = qemu.guest_bytes(&child, "vmdk", &[]);
    for (sector, bytes) in bytes.chunks(512).enumerate() {
        let expected = if sector % 8 < 4 { 0 } else { sector as u8 | 1 };
        assert!(bytes.iter().all(|byte| *byte == expected), "{sector}");
    }
}

/// Zeroes that hide the parent stay zeroes around a write that began before.
#[test]
fn zeroes_and_writes_that_meet_in_a_grain_of_a_child_show_nothing_of_the_parent() {
    let Some(qemu) = Qemu::find() else { return };
    let fixture = Fixture::new();
    let raw = fixture.file("raw", &vec![7; 16 << 20]);
    let (base, child) = (fixture.path("base.vmdk"), fixture.path("child.vmdk"));
    qemu.convert(&raw, "raw", &base, "vmdk", &[]);
    let names = [base.to_str().unwrap(), child.to_str().unwrap()];
    qemu.img(&[
        "create",
        "-q",
        "-f",
        "vmdk",
        "-o",
        "zeroed_grain=on",
        "-b",
        names[0],
        "-F",
        "vmdk",
        names[1],
    ])
    .ok();
    let mut top = open(&child, Access::ReadWrite).unwrap();
    top.make_writable(Default::default()).unwrap();
    let image = Image::new(vec![Box::new(top), Box::new(open(&base, Access::ReadOnly).unwrap())]).unwrap();
    let barrier = std::sync::Barrier::new(2);
    std::thread::scope(|scope| {
        for zeroes in [true, false] {
            let (image, barrier) = (&image, &barrier);
            scope.spawn(move || {
                for grain in 0..256u64 {
                    barrier.wait();
                    match zeroes {
                        true => image.write_zeroes(grain * 65536, 65536, false).unwrap(),
                        false => image.write_at(Mem::from(&[1; 512][..]), grain * 65536 + 1024).unwrap(),
                    }
                }
            });
        }
    });
    for (grain, bytes) in guest(&image).chunks(65536).enumerate() {
        assert!(bytes.iter().all(|byte| *byte < 2), "{grain} shows what the parent has");
    }
}

#[test]
fn what_is_only_read_is_refused() {
    let Some(qemu) = Qemu::find() else { return };
    let fixture = Fixture::new();
    let refused = |path: &Path, access| {
        let mut vmdk: Vmdk = open(path, access).unwrap();
        vmdk.make_writable(Default::default()).unwrap_err().kind()
    };
    let path = fixture.path("stream.vmdk");
    create(&qemu, &path, "subformat=streamOptimized", 1 << 20);
    assert_eq!(refused(&path, Access::ReadWrite), ErrorKind::UnsupportedFeature);
    let path = fixture.path("sparse.vmdk");
    create(&qemu, &path, "subformat=monolithicSparse", 1 << 20);
    assert_eq!(refused(&path, Access::ReadOnly), ErrorKind::ReadOnly);
    // A change that another file tracks would be lost to who reads that.
    let flat = fixture.path("flat.vmdk");
    create(&qemu, &flat, "subformat=monolithicFlat", 1 << 20);
    let mut text = std::fs::read(&flat).unwrap();
    text.extend(b"changeTrackPath=\"flat-ctk.vmdk\"\n");
    std::fs::write(&flat, &text).unwrap();
    assert_eq!(refused(&flat, Access::ReadWrite), ErrorKind::UnsupportedFeature);
}
