//! Where structures lie that move: a file on which the same is done again and again stays as long as it was.

use std::path::Path;
use std::sync::Arc;

use qcow2_engine::storage::MemoryStorage;
use qcow2_engine::{Discard, Image, OpenOptions, Qcow2, ReadStorage, ResizeOptions, Storage, WriteOptions};
use qcow2_testkit::ops::{Target, stamped};
use qcow2_testkit::plans::Table;
use qcow2_testkit::{Fixture, Qemu};

const ROUNDS: usize = 100;
/// Rounds in which a file may find its length.
const FIRST: usize = 4;

/// What a round does, by its name; each call is one opening of the file, as of a command line.
type Round = (&'static str, &'static [fn(&Image)]);

fn open(file: &Arc<MemoryStorage>) -> Image {
    let mut image = Qcow2::open(Arc::clone(file) as Arc<dyn Storage>, &OpenOptions::default()).unwrap();
    image.enable_writing(WriteOptions::default()).unwrap();
    Image::new(vec![Box::new(image)]).unwrap()
}

/// The file in memory: it needs no syncs.
fn load(path: &Path) -> Arc<MemoryStorage> {
    Arc::new(MemoryStorage::from_bytes(&std::fs::read(path).unwrap()))
}

fn assert_clean(qemu: &Qemu, file: &MemoryStorage, path: &Path) {
    std::fs::write(path, file.to_vec()).unwrap();
    qemu.assert_clean(path);
}

fn create(image: &Image) {
    let table = Table::of(image);
    image.execute(&table.create(&(table.count + 1).to_string(), "made")).unwrap();
}

fn delete(image: &Image) {
    image.execute(&Table::of(image).delete(0)).unwrap();
}

fn apply(image: &Image) {
    image.execute(&Table::of(image).apply(0)).unwrap();
}

fn rename(image: &Image) {
    image.execute(&Table::of(image).rename(0, "another name")).unwrap();
}

fn write(image: &Image) {
    image.write(0, &stamped(0, 64 << 10, 7)).unwrap();
}

fn add(image: &Image) {
    image.add_bitmap("bits", None, true).unwrap();
    image.write(1 << 20, &stamped(1 << 20, 4096, 8)).unwrap();
}

fn remove(image: &Image) {
    image.remove_bitmap("bits").unwrap();
}

fn larger(image: &Image) {
    image.resize(8 << 30).unwrap();
}

fn smaller(image: &Image) {
    let options = ResizeOptions { shrink: true, ..ResizeOptions::default() };
    image.resize_with(64 << 20, options).unwrap();
}

const ROUNDS_OF: [Round; 5] = [
    ("snapshots", &[create, delete]),
    ("two snapshots", &[create, create, delete, delete]),
    ("a disk that goes back", &[create, write, rename, apply, delete]),
    ("bitmaps", &[add, remove]),
    ("sizes", &[larger, smaller]),
];

#[test]
fn a_file_does_not_grow_where_structures_move() {
    let Some(qemu) = Qemu::find() else { return };
    for (cluster_size, written, rounds) in [("64k", "1M", ROUNDS), ("512", "300k", 12), ("4k", "5M", 24)] {
        for (name, steps) in ROUNDS_OF {
            let fixture = Fixture::new();
            let path = fixture.path("a.qcow2");
            qemu.create(&path, &format!("cluster_size={cluster_size}"), Some(64 << 20));
            qemu.io(&path, "qcow2", &[format!("write -P 5 0 {written}"), "write -P 6 40M 64k".to_owned()]);
            let contents = qemu.guest_bytes(&path, "qcow2", &[]);
            let file = load(&path);
            let lengths: Vec<u64> = (0..rounds)
                .map(|_| {
                    for step in steps {
                        let image = open(&file);
                        step(&image);
                        image.close().unwrap();
                    }
                    file.len().unwrap()
                })
                .collect();
            let most = lengths[..FIRST].iter().max().unwrap();
            let what = format!("{name}, clusters of {cluster_size}: {lengths:?}");
            assert!(lengths.iter().all(|length| length <= most), "{what}");
            assert_clean(&qemu, &file, &path);
            let now = qemu.guest_bytes(&path, "qcow2", &[]);
            assert!(name == "bitmaps" || now == contents, "{what}");
        }
    }
}

/// The same in one handle: what became free is used again before it is closed.
#[test]
fn nor_while_it_stays_open() {
    let Some(qemu) = Qemu::find() else { return };
    for (name, steps) in ROUNDS_OF {
        let fixture = Fixture::new();
        let path = fixture.path("a.qcow2");
        qemu.create(&path, "", Some(64 << 20));
        qemu.io(&path, "qcow2", &["write -P 5 0 1M"]);
        let file = load(&path);
        let image = open(&file);
        let mut lengths = Vec::new();
        for _ in 0..ROUNDS {
            steps.iter().for_each(|step| step(&image));
            lengths.push(file.len().unwrap());
        }
        let most = lengths[..FIRST].iter().max().unwrap();
        assert!(lengths.iter().all(|length| length <= most), "{name}: {lengths:?}");
        image.close().unwrap();
        assert_clean(&qemu, &file, &path);
    }
}

/// A few clusters more than QEMU, which writes in place what we write beside.
#[test]
fn a_file_is_about_as_long_as_with_qemu() {
    let Some(qemu) = Qemu::find() else { return };
    let fixture = Fixture::new();
    let theirs = fixture.path("theirs.qcow2");
    qemu.create(&theirs, "", Some(64 << 20));
    qemu.io(&theirs, "qcow2", &["write -P 5 0 1M"]);
    let file = load(&theirs);
    for _ in 0..10 {
        for step in [create, delete] {
            let image = open(&file);
            step(&image);
            image.close().unwrap();
        }
        let path = theirs.to_str().unwrap();
        qemu.img(&["snapshot", "-c", "made", path]).ok();
        qemu.img(&["snapshot", "-d", "made", path]).ok();
    }
    let (ours, theirs) = (file.len().unwrap(), theirs.metadata().unwrap().len());
    assert!(ours <= theirs + (8 << 16), "{ours} against {theirs}");
}

/// What a guest writes first: offset and length each, by the cluster size.
const FIRST_WRITES: [(&str, &[(u64, u64)]); 4] = [
    ("64k", &[(0, 64 << 10)]),
    ("64k", &[(0, 4096), (64 << 10, 4096), (128 << 10, 1 << 20)]),
    ("64k", &[(0, 3 << 20)]),
    ("32k", &[(0, 4096), (4096, 8192), (32 << 10, 64 << 10)]),
];

/// The first chunk, in which neighbours of a guest find each other, begins where the first cluster is free: nothing in front of it is
/// a hole.
#[test]
fn the_first_clusters_of_a_guest_follow_the_structures() {
    let Some(qemu) = Qemu::find() else { return };
    for (cluster_size, writes) in FIRST_WRITES {
        let fixture = Fixture::new();
        let theirs = fixture.path("theirs.qcow2");
        qemu.create(&theirs, &format!("cluster_size={cluster_size}"), Some(4 << 20));
        let file = load(&theirs);
        let image = open(&file);
        for &(offset, length) in writes {
            image.write(offset, &stamped(offset, length, 7)).unwrap();
            qemu.io(&theirs, "qcow2", &[format!("write -P 7 {offset} {length}")]);
        }
        image.close().unwrap();
        assert_clean(&qemu, &file, &fixture.path("ours.qcow2"));
        let (ours, theirs) = (file.len().unwrap(), theirs.metadata().unwrap().len());
        assert!(ours <= theirs, "{cluster_size}, {writes:?}: {ours} against {theirs}");
    }
}

/// Where programs expect it, without looking at the header.
#[test]
fn the_table_of_a_first_snapshot_lies_where_qemu_has_it() {
    let Some(qemu) = Qemu::find() else { return };
    for written in [0u64, 512, 1 << 20] {
        let fixture = Fixture::new();
        let theirs = fixture.path("theirs.qcow2");
        qemu.create(&theirs, "", Some(64 << 20));
        if written > 0 {
            qemu.io(&theirs, "qcow2", &[format!("write -P 7 0 {written}")]);
        }
        let file = load(&theirs);
        let image = open(&file);
        create(&image);
        image.close().unwrap();
        assert_clean(&qemu, &file, &fixture.path("ours.qcow2"));
        qemu.img(&["snapshot", "-c", "made", theirs.to_str().unwrap()]).ok();
        let [ours, theirs] =
            [file.to_vec(), std::fs::read(&theirs).unwrap()].map(|bytes| bytes[64..72].to_vec());
        assert_eq!(ours, theirs, "{written} bytes written");
    }
}

/// The first free clusters, one behind the other, and nothing ahead of them: neither space nor refcount blocks. Data is as safe.
#[test]
fn first_fit_leaves_no_holes() {
    let Some(qemu) = Qemu::find() else { return };
    let fixture = Fixture::new();
    let path = fixture.path("a.qcow2");
    qemu.create(&path, "cluster_size=512", Some(1 << 20));
    let file = load(&path);
    let first_fit = || {
        let storage = Arc::clone(&file) as Arc<dyn Storage>;
        let mut image = Qcow2::open(storage, &OpenOptions::default()).unwrap();
        image.enable_writing(WriteOptions { first_fit: true, ..WriteOptions::default() }).unwrap();
        Image::new(vec![Box::new(image)]).unwrap()
    };
    let image = first_fit();
    // Header, refcount table and block, L1 table, four L2 tables, and data: all that one refcount block counts.
    for (offset, length) in [(64 << 10, 60 << 10), (0, 64 << 10)] {
        image.write(offset, &stamped(offset, length, 3)).unwrap();
        image.flush().unwrap();
    }
    assert_eq!(file.len().unwrap(), 256 * 512, "while it is open, too");
    image.close().unwrap();
    assert_eq!(file.len().unwrap(), 256 * 512);
    let image = first_fit();
    image.write(124 << 10, &stamped(124 << 10, 512, 3)).unwrap();
    image.close().unwrap();
    assert_eq!(file.len().unwrap(), 258 * 512, "with a refcount block more");
    assert_clean(&qemu, &file, &path);
    assert_eq!(
        qemu.guest_bytes(&path, "qcow2", &[])[..(124 << 10) + 512],
        stamped(0, (124 << 10) + 512, 3)[..]
    );
}

/// Where refcount blocks lie, and that what a discard frees is what the next write takes, is as with qemu-io.
#[test]
fn first_fit_lies_where_qemu_puts_it() {
    let Some(qemu) = Qemu::find() else { return };
    let fixture = Fixture::new();
    let [ours, theirs] = ["ours", "theirs"].map(|name| fixture.path(name));
    let writes = [
        (0u64, 700u64 << 10),
        (900 << 10, 1 << 10),
        (1 << 20, 300 << 10),
        (0, 64 << 10),
        (3 << 20, 32 << 10),
    ];
    let discards = [(0u64, 64u64 << 10), (512 << 10, 64 << 10)];
    qemu.create(&theirs, "cluster_size=1k,refcount_bits=64", Some(4 << 20));
    let file = load(&theirs);
    let mut image = Qcow2::open(Arc::clone(&file) as Arc<dyn Storage>, &OpenOptions::default()).unwrap();
    let write = WriteOptions { first_fit: true, discard: Discard::Unmap, ..WriteOptions::default() };
    image.enable_writing(write).unwrap();
    let image = Image::new(vec![Box::new(image)]).unwrap();
    let mut commands = Vec::new();
    for (index, (offset, length)) in writes.into_iter().enumerate() {
        if index == 3 {
            for (offset, length) in discards {
                image.discard(offset, length).unwrap();
                commands.push(format!("discard {offset} {length}"));
            }
        }
        image.write(offset, &vec![7; length as usize]).unwrap();
        commands.push(format!("write -P 7 {offset} {length}"));
    }
    image.close().unwrap();
    assert_clean(&qemu, &file, &ours);
    qemu.io(&theirs, "qcow2", &commands);
    assert_eq!(qemu.map_json(&ours, "qcow2"), qemu.map_json(&theirs, "qcow2"));
    assert_eq!(std::fs::metadata(&ours).unwrap().len(), std::fs::metadata(&theirs).unwrap().len());
}
