//! A file system without space while an open image is managed: the image and its guest go on, and what was asked for can be
//! done when there is space.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use qcow2_engine::compact::CompactOptions;
use qcow2_engine::storage::{Access, FileStorage};
use qcow2_engine::{
    Image, Job, Mem, MemMut, OpenOptions, Qcow2, ResizeOptions, Result, Storage, StorageExt, WriteOptions,
};
use qcow2_testkit::plans::Table;
use qcow2_testkit::storage::{Hooked, Op};
use qcow2_testkit::{Fixture, Qemu};

const CLUSTER: u64 = 65536;
const MIB: u64 = 1 << 20;

type Operation = fn(&Image) -> Result<()>;

const OPERATIONS: [(&str, Operation); 6] = [
    ("shrink", |image| {
        let shrink = ResizeOptions { shrink: true, ..ResizeOptions::default() };
        image.resize_with(9 * MIB + 512, shrink)
    }),
    ("rename", |image| {
        let table = Table::of(image);
        image.execute(&table.rename(0, &"long".repeat(4000)))
    }),
    ("compact", |image| {
        let options = CompactOptions { rewrite: true, ..CompactOptions::default() };
        image.compact(options, &Job::new()).map(drop)
    }),
    ("add a bitmap", |image| image.add_bitmap("new", Some(9), true)),
    ("clear a bitmap", |image| image.clear_bitmap("on")),
    ("remove a bitmap", |image| image.remove_bitmap("off")),
];

/// A file of which the call number `n` that would take space fails, and all later ones until there is space. Clusters without
/// contents are holes.
fn limited(path: &Path, n: u64, space: &Arc<AtomicBool>) -> Arc<dyn Storage> {
    let file = Arc::new(FileStorage::open(path, Access::ReadWrite).unwrap());
    let (inner, space, calls) = (file.clone(), space.clone(), AtomicU64::new(0));
    Arc::new(Hooked::with(file, move |op, range: Range<u64>| {
        if !matches!(op, Op::Write | Op::Allocate) || space.load(Ordering::Relaxed) {
            return Ok(());
        }
        let mut clusters = range.start / CLUSTER..range.end.div_ceil(CLUSTER);
        let takes_space = clusters.any(|cluster| is_hole(&*inner, cluster * CLUSTER));
        let full = takes_space && calls.fetch_add(1, Ordering::Relaxed) >= n;
        if full { Err(std::io::Error::from_raw_os_error(28)) } else { Ok(()) }
    }))
}

fn is_hole(file: &dyn Storage, offset: u64) -> bool {
    let end = file.size().unwrap().min(offset + CLUSTER);
    let mut bytes = vec![0u8; end.saturating_sub(offset) as usize];
    file.read_exact_at(MemMut::from(&mut bytes[..]), offset).unwrap();
    bytes.iter().all(|&byte| byte == 0)
}

/// A disk with a snapshot, bitmaps, and holes in its file.
fn prepare(qemu: &Qemu, path: &Path) {
    let name = path.to_str().unwrap();
    qemu.create(path, "", Some(64 * MIB));
    qemu.io(path, "qcow2", &["write -P 1 0 1M", "write -P 2 30M 1M", "write -P 3 9M 64k"]);
    qemu.img(&["snapshot", "-c", "s", name]).ok();
    qemu.img(&["bitmap", "--add", "-g", "512", name, "on"]).ok();
    qemu.img(&["bitmap", "--add", "--disable", name, "off"]).ok();
    qemu.io(path, "qcow2", &["write -P 4 0 1M", "write -P 3 9M 64k", "discard 0 256k"]);
    qemu.img(&["snapshot", "-c", "t", name]).ok();
    qemu.io(path, "qcow2", &["write -P 5 512k 64k"]);
}

fn open(file: Arc<dyn Storage>) -> Image {
    let mut image = Qcow2::open(file, &OpenOptions::default()).unwrap();
    image.enable_writing(WriteOptions::default()).unwrap();
    Image::new(vec![Box::new(image)]).unwrap()
}

fn byte_at(image: &Image, offset: u64) -> u8 {
    let mut byte = [0];
    image.read_at(MemMut::from(&mut byte[..]), offset).unwrap();
    byte[0]
}

/// Whether the operation failed.
fn tried(qemu: &Qemu, operation: Operation, n: u64, what: &str) -> bool {
    let fixture = Fixture::new();
    let path = fixture.path("a.qcow2");
    prepare(qemu, &path);
    let space = Arc::new(AtomicBool::new(false));
    let image = open(limited(&path, n, &space));
    let done = operation(&image);
    let failed = done.is_err();
    if let Err(error) = done {
        assert!(error.is_no_space(), "{what}: {error:?}");
        image.write_at(Mem::from(&[9; 512][..]), 512 << 10).unwrap_or_else(|e| panic!("{what}: {e}"));
        image.flush().unwrap_or_else(|e| panic!("{what}: {e}"));
        space.store(true, Ordering::Relaxed);
        operation(&image).unwrap_or_else(|e| panic!("{what}, again: {e}"));
        assert_eq!(byte_at(&image, 512 << 10), 9, "{what}");
    }
    space.store(true, Ordering::Relaxed);
    image.write_at(Mem::from(&[8; 512][..]), 4 * MIB).unwrap_or_else(|e| panic!("{what}: {e}"));
    assert_eq!([byte_at(&image, 9 * MIB), byte_at(&image, MIB - 1)], [3, 4], "{what}");
    image.close().unwrap_or_else(|e| panic!("{what}: {e}"));
    qemu.assert_clean(&path);
    let consistent = !qemu.img(&["info", path.to_str().unwrap()]).ok().contains("in-use");
    assert!(consistent, "{what}");
    failed
}

#[test]
fn an_open_image_goes_on_where_there_is_no_space_to_manage_it() {
    let Some(qemu) = Qemu::find() else { return };
    for (name, operation) in OPERATIONS {
        let failed = (0..).take_while(|n| tried(&qemu, operation, *n, &format!("{name}, write {n}"))).count();
        assert!(failed > 0, "{name}");
    }
}
