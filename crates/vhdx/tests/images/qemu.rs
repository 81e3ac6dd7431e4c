//! Images in both directions between this crate and QEMU.

use std::path::Path;
use std::sync::Arc;

use qcow2_core::convert::{ConvertOptions, copy_disk};
use qcow2_core::new_image::{Hosts, NewImage};
use qcow2_core::storage::{Access, FileStorage};
use qcow2_core::{Chain, Job, Mem, Raw, Storage};
use qcow2_testkit::contract::LayerContract;
use qcow2_testkit::{Fixture, Qemu, Rng};
use qcow2_vhdx::structures::Payload;
use qcow2_vhdx::{NewOptions, OpenOptions, Subformat, Vhdx};

use crate::forge::{
    BLOCKS, MIB, bytes_of, check, create, image, memory, metadata, open_disk, open_layer, open_source,
};

fn storage(path: &Path) -> Arc<dyn Storage> {
    Arc::new(FileStorage::open(path, Access::ReadWrite).unwrap())
}

fn is_sound(qemu: &Qemu, path: &Path) {
    qemu.img(&["check", "-q", "-f", "vhdx", path.to_str().unwrap()]).ok();
    assert!(check(storage(path)).unwrap().is_clean());
}

const OPTIONS: [&str; 5] = [
    "subformat=dynamic",
    "subformat=dynamic,block_size=1M,block_state_zero=off",
    "subformat=fixed",
    "subformat=fixed,block_size=2M,log_size=3M",
    "block_size=256M,log_size=1M",
];

/// Made and written by QEMU, read by this crate; then the other way around, in the same file.
#[test]
fn images_go_back_and_forth() {
    let Some(qemu) = Qemu::find() else { return };
    for options in OPTIONS {
        let fixture = Fixture::new();
        let path = fixture.path("a.vhdx");
        let size = (9 << 20) + 512;
        qemu.img(&["create", "-q", "-f", "vhdx", "-o", options, path.to_str().unwrap(), &size.to_string()])
            .ok();
        qemu.io(&path, "vhdx", &["write -P 1 0 1000k", "write -P 2 3M 2M", "write -P 3 9M 512"]);
        let expected = qemu.guest_bytes(&path, "vhdx", &[]);
        assert_eq!(expected[(9 << 20) + 511], 3);
        let disk = open_disk(storage(&path)).unwrap();
        assert!(bytes_of(&disk) == expected, "{options}");
        disk.write_at(Mem::from(&[4; 70_000][..]), (7 << 20) + 1000).unwrap();
        disk.write_zeroes(3 << 20, 1 << 20, true).unwrap();
        disk.write_at(Mem::from(&[5; 700][..]), 5000).unwrap();
        let ours = bytes_of(&disk);
        disk.close().unwrap();
        is_sound(&qemu, &path);
        assert!(qemu.guest_bytes(&path, "vhdx", &[]) == ours, "{options}");
        qemu.io(&path, "vhdx", &["write -P 6 6M 1M"]);
        let last = bytes_of(&open_source(storage(&path)).unwrap());
        assert!(last[6 << 20..7 << 20].iter().all(|byte| *byte == 6) && last[..6 << 20] == ours[..6 << 20]);
        is_sound(&qemu, &path);
    }
}

#[test]
fn an_image_of_qemu_keeps_the_contract_of_layers() {
    let Some(qemu) = Qemu::find() else { return };
    let fixture = Fixture::new();
    let path = fixture.path("a.vhdx");
    let size: u64 = (3 << 20) + 512;
    qemu.img(&[
        "create",
        "-q",
        "-f",
        "vhdx",
        "-o",
        "block_size=1M",
        path.to_str().unwrap(),
        &size.to_string(),
    ])
    .ok();
    qemu.io(&path, "vhdx", &["write -P 1 100k 30k", "write -P 2 3M 512"]);
    let (file, expected) = (std::fs::read(&path).unwrap(), qemu.guest_bytes(&path, "vhdx", &[]));
    LayerContract { name: "qemu", file: &file, open: &open_layer, expected: &expected, below: None }.check();
}

/// What is made here has the same places and fields as what QEMU makes, and QEMU reads and writes it.
#[test]
fn new_images_are_laid_out_as_qemu_does() {
    let Some(qemu) = Qemu::find() else { return };
    let fixture = Fixture::new();
    let defaults = NewOptions::default();
    let cases = [
        ("subformat=dynamic", NewOptions { size: 20 << 20, ..defaults.clone() }),
        ("subformat=dynamic", NewOptions { size: 5 << 30, ..defaults.clone() }),
        ("subformat=dynamic", NewOptions { size: 200 << 30, ..defaults.clone() }),
        (
            "subformat=dynamic,block_size=2M,block_state_zero=off,log_size=2M",
            NewOptions {
                size: 63 << 40,
                block_size: 2 * MIB,
                log_size: 2 * MIB,
                block_state_zero: false,
                ..defaults.clone()
            },
        ),
        (
            "subformat=fixed,block_size=4M",
            NewOptions {
                size: (9 << 20) + 512,
                block_size: 4 * MIB,
                subformat: Subformat::Fixed,
                ..defaults
            },
        ),
    ];
    for (options, new) in cases {
        let (theirs, ours) = (fixture.path("theirs"), fixture.path("ours"));
        let _ = std::fs::remove_file(&ours);
        qemu.img(&[
            "create",
            "-q",
            "-f",
            "vhdx",
            "-o",
            options,
            theirs.to_str().unwrap(),
            &new.size.to_string(),
        ])
        .ok();
        std::fs::write(&ours, b"").unwrap();
        create(&new, storage(&ours)).unwrap();
        let open = |path: &Path| Vhdx::open(storage(path), &OpenOptions::default()).unwrap();
        let (a, b) = (open(&theirs), open(&ours));
        assert_eq!(a.metadata().block_size, b.metadata().block_size, "{options}");
        assert_eq!(a.metadata().leave_blocks_allocated, b.metadata().leave_blocks_allocated);
        assert_eq!(a.metadata().virtual_size_at, b.metadata().virtual_size_at);
        assert_eq!(
            (a.header().log_length, a.header().log_offset),
            (b.header().log_length, b.header().log_offset)
        );
        let info = qemu.img(&["info", "-f", "vhdx", ours.to_str().unwrap()]).ok();
        assert!(info.contains(&format!("({} bytes)", new.size)), "{info}");
        if new.size < 10 << 30 {
            is_sound(&qemu, &ours);
            let at = new.size - 512;
            qemu.io(&ours, "vhdx", &[format!("write -P 7 {at} 512")]);
            let disk = open_source(storage(&ours)).unwrap();
            let mut found = [0; 512];
            disk.read_at(qcow2_core::MemMut::from(&mut found[..]), at).unwrap();
            assert_eq!(found, [7; 512]);
            is_sound(&qemu, &ours);
        }
    }
}

/// What was forged for the other tests is an image to QEMU, too.
#[test]
fn forged_images_are_images() {
    let Some(qemu) = Qemu::find() else { return };
    let fixture = Fixture::new();
    let entries =
        [Payload::Zero, Payload::Present(BLOCKS + MIB), Payload::NotPresent, Payload::Present(BLOCKS)];
    let path = fixture.file("forged.vhdx", &image(&metadata(4 << 20, 512), &entries));
    assert!(qemu.guest_bytes(&path, "vhdx", &[]) == bytes_of(&open_source(storage(&path)).unwrap()));
}

/// A log of several entries that this crate left: QEMU brings it in, and finds the same disk.
#[test]
fn a_log_that_is_left_is_brought_in_by_qemu() {
    let Some(qemu) = Qemu::find() else { return };
    let fixture = Fixture::new();
    let path = fixture.path("a.vhdx");
    std::fs::write(&path, b"").unwrap();
    let new = NewOptions { size: 150 << 20, block_size: MIB, ..NewOptions::default() };
    create(&new, storage(&path)).unwrap();
    let disk = open_disk(storage(&path)).unwrap();
    let mut rng = Rng::new(1);
    // An entry for each, of which the log holds 128: it was begun anew when it is left.
    for round in 0..140 {
        disk.write_at(Mem::from(&rng.bytes(512)[..]), round * MIB + rng.below(1000) * 512).unwrap();
        disk.flush().unwrap();
    }
    // As a process leaves it that is killed now.
    let left = fixture.path("left.vhdx");
    std::fs::copy(&path, &left).unwrap();
    let expected = bytes_of(&disk);
    assert!(Vhdx::open(storage(&left), &OpenOptions::default()).unwrap().is_dirty());
    assert!(bytes_of(&open_source(storage(&left)).unwrap()) == expected);
    let name = left.to_str().unwrap();
    assert_ne!(qemu.img(&["check", "-f", "vhdx", name]).code, 0);
    qemu.img(&["check", "-r", "all", "-f", "vhdx", name]).ok();
    assert!(qemu.guest_bytes(&left, "vhdx", &[]) == expected);
    is_sound(&qemu, &left);
}

/// A disk that is copied into a new image: the same bytes whatever the number of workers, and as QEMU reads it.
#[test]
fn copies_are_what_was_copied() {
    let Some(qemu) = Qemu::find() else { return };
    let fixture = Fixture::new();
    let mut disk = vec![0; (21 << 20) + 512];
    let mut rng = Rng::new(4);
    for (at, length) in [(0, 5000), (4 << 20, 3 << 20), ((9 << 20) + 4096, 8192), ((21 << 20) - 100, 612)] {
        let bytes = rng.bytes(length);
        disk[at..at + length].copy_from_slice(&bytes);
    }
    let source = Raw::new(memory(&disk)).unwrap();
    let source = Chain::new(vec![Box::new(source)]).unwrap();
    let dynamic = NewOptions { size: disk.len() as u64, block_size: MIB, ..NewOptions::default() };
    for (new, sparse_size) in [
        (dynamic.clone(), 4096),
        (dynamic.clone(), 0),
        (NewOptions { block_size: 4 * MIB, block_state_zero: false, ..dynamic.clone() }, 4096),
        (NewOptions { subformat: Subformat::Fixed, ..dynamic }, 4096),
    ] {
        let copy = |workers: usize| {
            let host = memory(&[]);
            let concurrency = std::num::NonZeroUsize::new(workers);
            let options =
                ConvertOptions { concurrency, sparse_size, durable: true, ..ConvertOptions::default() };
            let planned = Arc::new(new.plan().unwrap());
            let hosts = Hosts::from(Arc::clone(&host));
            copy_disk(&source, &options, &Job::new(), |context, workers| {
                planned.sink(hosts, context, workers)
            })
            .unwrap();
            let mut file = vec![0; host.len().unwrap() as usize];
            host.read_at(qcow2_core::MemMut::from(&mut file[..]), 0).unwrap();
            file
        };
        let (one, four) = (copy(1), copy(4));
        // Everything but the identifiers in the metadata and the headers is the same.
        assert!(
            one[4 << 20..] == four[4 << 20..] && one[2 << 20..3 << 20] == four[2 << 20..3 << 20],
            "{new:?}"
        );
        let path = fixture.file("copy.vhdx", &four);
        is_sound(&qemu, &path);
        assert!(qemu.guest_bytes(&path, "vhdx", &[]) == disk, "{new:?}");
        let planned = new.plan().unwrap();
        let expected = match (new.subformat, sparse_size) {
            (Subformat::Fixed, _) | (_, 0) => planned.length(22 << 20),
            _ if new.block_size == MIB => planned.length(7 << 20),
            _ => planned.length(4 * (4 << 20)),
        };
        assert_eq!(four.len() as u64, expected, "{new:?}");
    }
}
