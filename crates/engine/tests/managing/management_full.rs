//! A file system without space while an open image is managed: the image and its guest go on, and what was asked for can be
//! done when there is space.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use qcow2_engine::compact::CompactOptions;
use qcow2_engine::create::Preallocation;
use qcow2_engine::storage::{Access, FileStorage};
use qcow2_engine::{
    Image, Job, Mem, MemMut, OpenOptions, Qcow2, ResizeOptions, Result, Storage, StorageExt, WriteOptions,
};
use qcow2_testkit::plans::Table;
use qcow2_testkit::storage::{Hooked, Op, Space, free_clusters};
use qcow2_testkit::{Fixture, Qemu};

const CLUSTER: u64 = 65536;
const MIB: u64 = 1 << 20;

type Operation = fn(&Image) -> Result<()>;

const OPERATIONS: [(&str, Operation); 3] = [
    ("rename", |image| {
        let table = Table::of(image);
        image.execute(&table.rename(0, &"long".repeat(4000)))
    }),
    ("compact", |image| {
        let options = CompactOptions { rewrite: true, ..CompactOptions::default() };
        image.compact(options, &Job::new()).map(drop)
    }),
    ("add a bitmap", |image| image.add_bitmap("new", Some(9), true)),
];

/// What frees space needs none.
const FREEING: [(&str, Operation); 9] = [
    ("shrink", |image| image.resize_with(9 * MIB + 512, SHRINK)),
    ("shrink below all tables", |image| {
        image.resize_with(0, SHRINK).or_else(|_| image.resize_with(512, SHRINK))
    }),
    ("delete the first snapshot", |image| image.execute(&Table::of(image).delete(0))),
    ("delete the last snapshot", |image| image.execute(&Table::of(image).delete(1))),
    ("delete all snapshots", |image| {
        image.execute(&Table::of(image).delete(0))?;
        image.execute(&Table::of(image).delete(0))
    }),
    ("clear an enabled bitmap", |image| image.clear_bitmap("on")),
    ("clear a disabled bitmap", |image| image.clear_bitmap("off")),
    ("remove the first bitmap", |image| image.remove_bitmap("on")),
    ("remove the last bitmap", |image| image.remove_bitmap("off")),
];

const SHRINK: ResizeOptions = ResizeOptions { shrink: true, preallocation: Preallocation::Off };

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

/// A disk with a snapshot, bitmaps, and holes in its file: nothing that is free has space.
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
    let free = free_clusters(&std::fs::read(path).unwrap());
    let file = FileStorage::open(path, Access::ReadWrite).unwrap();
    for cluster in free {
        file.write_all_at(Mem::from(&[0; CLUSTER as usize][..]), cluster * CLUSTER).unwrap();
    }
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

#[test]
fn what_frees_space_needs_none() {
    let Some(qemu) = Qemu::find() else { return };
    for (name, operation) in FREEING {
        for n in 0..4 {
            let fixture = Fixture::new();
            let (path, what) = (fixture.path("a.qcow2"), format!("{name}, write {n}"));
            prepare(&qemu, &path);
            let file = Arc::new(FileStorage::open(&path, Access::ReadWrite).unwrap());
            let space = Arc::new(Space::of(&*file));
            space.fill_up(n);
            let image = open(Arc::new(Hooked::with(file, space)));
            operation(&image).unwrap_or_else(|e| panic!("{what}: {e}"));
            if image.virtual_size() > 9 * MIB {
                assert_eq!([byte_at(&image, 9 * MIB), byte_at(&image, MIB - 1)], [3, 4], "{what}");
            }
            // Bitmaps change with the size of the disk: there must be space for them.
            let stored = image.close();
            qemu.assert_clean(&path);
            let in_use = qemu.img(&["info", path.to_str().unwrap()]).ok().contains("in-use");
            match stored {
                Ok(()) => assert!(!in_use, "{what}"),
                Err(error) => assert!(error.is_no_space() && name.starts_with("shrink"), "{what}: {error}"),
            }
        }
    }
}

/// A table whose tail is longer than a sector needs clusters; free ones that have space will do.
#[test]
fn a_long_snapshot_table_goes_where_space_is() {
    let Some(qemu) = Qemu::find() else { return };
    let fixture = Fixture::new();
    let path = fixture.path("a.qcow2");
    let name = path.to_str().unwrap();
    qemu.create(&path, "", Some(64 * MIB));
    qemu.io(&path, "qcow2", &["write -P 1 0 1M"]);
    for number in 0..8 {
        qemu.img(&["snapshot", "-c", &format!("{number}{}", "long".repeat(60)), name]).ok();
    }
    // A free cluster whose space was not given back.
    let file = FileStorage::open(&path, Access::ReadWrite).unwrap();
    let end = file.size().unwrap().next_multiple_of(CLUSTER);
    file.write_all_at(Mem::from(&[7; CLUSTER as usize][..]), end).unwrap();
    drop(file);
    let image = open(limited(&path, 0, &Arc::default()));
    image.execute(&Table::of(&image).delete(0)).unwrap();
    let left = Table::of(&image).count;
    assert_eq!(left, 7);
    image.close().unwrap();
    qemu.assert_clean(&path);
    let told = qemu.img(&["snapshot", "-l", name]).ok();
    assert!(told.contains("1longlong") && !told.contains("0longlong"), "{told}");
    // Without such clusters it is refused, with a way out.
    let fixture = Fixture::new();
    let compact = fixture.path("b.qcow2");
    std::fs::copy(&path, &compact).unwrap();
    let image = open(Arc::new(FileStorage::open(&compact, Access::ReadWrite).unwrap()));
    image.compact(CompactOptions::default(), &Job::new()).unwrap();
    image.close().unwrap();
    let image = open(limited(&compact, 0, &Arc::default()));
    let error = image.execute(&Table::of(&image).delete(0)).unwrap_err();
    assert!(error.is_no_space() && error.message().contains("the last snapshot"), "{error}");
    image.execute(&Table::of(&image).delete(left - 1)).unwrap();
    image.close().unwrap();
    qemu.assert_clean(&compact);
}

/// A disk that cannot grow, whose changed bitmap cannot be stored either, leaks nothing.
#[test]
fn what_was_reserved_is_given_back_when_a_bitmap_cannot_be_stored() {
    let Some(qemu) = Qemu::find() else { return };
    let fixture = Fixture::new();
    let path = fixture.path("a.qcow2");
    prepare(&qemu, &path);
    let space = Arc::new(AtomicBool::new(true));
    let image = open(limited(&path, 0, &space));
    image.write_at(Mem::from(&[9; 512][..]), 20 * MIB).unwrap();
    image.flush().unwrap();
    space.store(false, Ordering::Relaxed);
    let grown = image.resize(8 << 30);
    assert!(grown.is_err_and(|e| e.is_no_space()));
    assert!(image.close().is_err_and(|e| e.is_no_space()));
    drop(image);
    qemu.assert_clean(&path);
}
