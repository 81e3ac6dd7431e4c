//! Guest data behind a door: on every path it is stored as the door makes it, and read as it was.

use crate::watched;

use std::sync::Arc;

use qcow2_engine::amend::{AmendOptions, amend_through};
use qcow2_engine::backing::{Backing, CommitOptions, RebaseOptions, commit, rebase};
use qcow2_engine::check::{CheckOptions, Repair, repair};
use qcow2_engine::clone::CloneTarget;
use qcow2_engine::compact::CompactOptions;
use qcow2_engine::convert::{Compression, ConvertOptions, ConvertTarget, convert};
use qcow2_engine::create::{CreateOptions, DataFile, NewTarget, Preallocation, create};
use qcow2_engine::image::{SegmentKind, read_header};
use qcow2_engine::storage::MemoryStorage;
use qcow2_engine::{
    Discard, Image, Job, Layer, Mem, MemMut, OpenOptions, Qcow2, Raw, ReadStorage, ResizeOptions, Storage,
    WriteOptions,
};
use qcow2_testkit::model::assert_same;
use qcow2_testkit::plans::Table;
use qcow2_testkit::storage::{Door, Hooked, Space};

use watched::{MIB, REWRITE, Run, Watched, bytes_of, marks};

/// Layouts that differ in how data gets to its place.
fn layouts(door: Door) -> Vec<(&'static str, CreateOptions)> {
    let plain = CreateOptions { size: 2 * MIB, data_door: door.open(), ..CreateOptions::default() };
    let data_file = Some(DataFile { filename: b"data".to_vec(), raw: false });
    vec![
        ("64 KiB", plain.clone()),
        ("512 bytes", CreateOptions { cluster_size: 512, size: MIB, ..plain.clone() }),
        ("version 2", CreateOptions { cluster_size: 4096, version: 2, ..plain.clone() }),
        ("subclusters", CreateOptions { cluster_size: 32768, extended_l2: true, ..plain.clone() }),
        ("data file", CreateOptions { cluster_size: 16384, data_file: data_file.clone(), ..plain.clone() }),
        ("metadata", CreateOptions { preallocation: Preallocation::Metadata, ..plain.clone() }),
        (
            "version 2, falloc",
            CreateOptions {
                preallocation: Preallocation::Falloc,
                version: 2,
                cluster_size: 4096,
                ..plain.clone()
            },
        ),
        (
            "subclusters, metadata",
            CreateOptions { preallocation: Preallocation::Metadata, extended_l2: true, ..plain.clone() },
        ),
        ("full", CreateOptions { preallocation: Preallocation::Full, cluster_size: 4096, ..plain.clone() }),
        ("data file, falloc", CreateOptions { preallocation: Preallocation::Falloc, data_file, ..plain }),
    ]
}

/// Every way in which guest bytes come to a place of the files; says whether a mark could be seen there.
fn everything(name: &str, door: Door, options: &CreateOptions) -> bool {
    let made = Watched::create(options);
    let (c, internal) = (options.cluster_size, options.data_file.is_none());
    let mut run = Run { what: name.to_owned(), image: made.open(), disk: vec![0; options.size as usize] };
    run.check("created");
    // Whole clusters and parts, aligned to nothing; zeroes and discards around them.
    run.mark(0, 3 * c + 700);
    run.mark(5 * c + 100, c / 3);
    run.mark(7 * c, 4 * c);
    run.write(8 * c, &vec![0; c as usize]);
    run.zero(9 * c + 30, c / 2, false);
    run.zero(2 * c, c, true);
    run.discard(10 * c..11 * c);
    run.mark(10 * c + 512, 512);
    run.zero(12 * c, 2 * c, false);
    run.mark(13 * c + c / 4, 100);
    run.check("written");
    run.image.flush().unwrap();
    if internal {
        let frozen = run.disk.clone();
        run.image.execute(&Table::of(&run.image).create("1", "one")).unwrap();
        run.mark(c + 7, c);
        run.mark(6 * c, 300);
        run.zero(7 * c + 512, 512, true);
        run.check("beside a snapshot");
        run.image.execute(&Table::of(&run.image).create("2", "two")).unwrap();
        run.image.execute(&Table::of(&run.image).apply(0)).unwrap();
        run.disk = frozen;
        run.check("applied");
        run.mark(14 * c, 2 * c);
        while Table::of(&run.image).count > 0 {
            run.image.execute(&Table::of(&run.image).delete(0)).unwrap();
        }
        run.check("without snapshots");
    }
    // Smaller in the middle of a cluster, and larger in every way: nothing of the old shows.
    let mut size = options.size;
    run.mark(size - 2 * c, 2 * c);
    run.resize(size - c - 512, Preallocation::Off);
    seen_behind_the_end(&made, door, &run);
    for preallocation in
        [Preallocation::Off, Preallocation::Metadata, Preallocation::Falloc, Preallocation::Full]
    {
        size += 5 * c + 512;
        run.resize(size, preallocation);
        run.check("grown");
        run.mark(size - 2 * c - 512, 700);
        run.check("grown and written");
    }
    run.image.close().unwrap();
    made.assert_holds(&run.disk, &format!("{name}, closed"));
    let mut seen = made.has_marks();
    seen |= cloned_and_converted(&made, options, &run);
    seen |= compacted_and_repaired(&made, &mut run, c);
    seen | made.has_marks() | moved_along_the_chain(&made, door, options, &mut run)
}

/// What is left of the last cluster behind the end reads as zeroes to whoever makes the disk longer.
fn seen_behind_the_end(made: &Watched, door: Door, run: &Run) {
    let top = run.image.top_qcow2().unwrap();
    let (end, cluster) = (run.image.virtual_size(), top.geometry().cluster_size());
    let mut segments = Vec::new();
    top.plan_read(end..end.next_multiple_of(cluster), &mut segments).unwrap();
    for segment in segments {
        let SegmentKind::Data(place) = segment.kind else { continue };
        let data = made.files.last().unwrap();
        let mut bytes = vec![0; segment.length as usize];
        data.read_at(MemMut::from(&mut bytes[..]), place.host).unwrap();
        if data.len().unwrap() > place.host {
            door.read(segment.start, place.host, &mut bytes);
        }
        assert!(bytes.iter().all(|byte| *byte == 0), "{}: behind the end", run.what);
    }
}

/// Copies of the disk in new images of the same shape.
fn cloned_and_converted(made: &Watched, options: &CreateOptions, run: &Run) -> bool {
    let what = format!("{}, cloned", run.what);
    let target = Watched::files(options);
    let to = CloneTarget {
        disk: NewTarget::Qcow2 {
            storage: target.storage(),
            data_file: target.data_file(),
            create: Box::new(options.clone()),
        },
        compression: None,
    };
    let image = made.open();
    image.begin_clone(to, &Job::new()).unwrap().run(&image, None, &Job::new()).unwrap();
    target.assert_holds(&run.disk, &what);
    let mut seen = target.has_marks();
    for sparse_size in [0, 4096] {
        let target = Watched::files(options);
        let to = ConvertTarget::New(NewTarget::Qcow2 {
            storage: target.storage(),
            data_file: target.data_file(),
            create: Box::new(options.clone()),
        });
        let convert_options = ConvertOptions { sparse_size, ..ConvertOptions::default() };
        convert(&image, to, &convert_options, &Job::new()).unwrap();
        target.assert_holds(&run.disk, &format!("{}, converted, sparse {sparse_size}", run.what));
        let existing = target.open();
        convert(&image, ConvertTarget::Existing(&existing), &convert_options, &Job::new()).unwrap();
        existing.close().unwrap();
        target.assert_holds(&run.disk, &format!("{}, converted onto itself", run.what));
        seen |= target.has_marks();
    }
    // Out of the door again.
    for compression in [None, Some(Compression::default())] {
        let (target, data) = (Arc::new(MemoryStorage::new()), compression.is_none());
        let to = match data {
            true => ConvertTarget::New(NewTarget::Raw {
                storage: target.clone(),
                preallocation: Preallocation::Off,
                keep: false,
            }),
            false => ConvertTarget::New(NewTarget::Qcow2 {
                storage: target.clone(),
                data_file: None,
                create: Box::default(),
            }),
        };
        convert(&image, to, &ConvertOptions { compression, ..Default::default() }, &Job::new()).unwrap();
        let layer: Box<dyn Layer> = match data {
            true => Box::new(Raw::new(target).unwrap()),
            false => Box::new(Qcow2::open(target, &OpenOptions::default()).unwrap()),
        };
        let plain = Image::new(vec![layer]).unwrap();
        assert_same(&run.disk, &bytes_of(&plain), 0, &format!("{}, converted out", run.what));
    }
    image.close().unwrap();
    seen
}

fn compacted_and_repaired(made: &Watched, run: &mut Run, c: u64) -> bool {
    // The process dies: what it had reserved is leaked, what it had flushed is there.
    run.image = made.open();
    run.discard(0..3 * c);
    run.mark(3 * c, c);
    run.zero(4 * c, c, false);
    run.write(5 * c, &vec![0; c as usize]);
    run.image.flush().unwrap();
    let report = repair(&*made.files[0], Repair::All, &CheckOptions::default(), &Job::new()).unwrap();
    assert_eq!(report.corruptions + report.leaks, 0, "{}", run.what);
    made.assert_holds(&run.disk, &format!("{}, repaired", run.what));
    run.image = made.open();
    let told = run.image.compact(CompactOptions { dry_run: true, ..REWRITE }, &Job::new()).unwrap();
    let result = run.image.compact(REWRITE, &Job::new()).unwrap();
    assert!(
        result.zero_clusters > 0 && told.zero_clusters == result.zero_clusters,
        "{}: {told:?}, {result:?}",
        run.what
    );
    run.check("compacted");
    run.image.close().unwrap();
    made.assert_holds(&run.disk, &format!("{}, compacted and closed", run.what));
    made.has_marks()
}

/// An overlay is committed, another one gets other backing files and becomes an older version.
fn moved_along_the_chain(made: &Watched, door: Door, options: &CreateOptions, run: &mut Run) -> bool {
    let c = options.cluster_size;
    let named = |name: &[u8]| Some(Backing { filename: name.to_vec(), format: Some(b"qcow2".to_vec()) });
    let options = CreateOptions {
        backing: named(b"base"),
        preallocation: Preallocation::Off,
        size: run.disk.len() as u64,
        ..options.clone()
    };
    let over = |top: &Watched| Image::new(vec![top.layer(true), made.layer(false)]).unwrap();
    let top = Watched::create(&options);
    run.image = over(&top);
    run.mark(c / 2, c);
    run.zero(4 * c, c + 512, true);
    run.mark(16 * c + 100, 2 * c);
    run.check("over a backing file");
    run.image.close().unwrap();
    let (above, base) = (top.open(), made.open());
    commit(&above, &base, &CommitOptions::default(), &Job::new()).unwrap();
    base.close().unwrap();
    above.close().unwrap();
    made.assert_holds(&run.disk, &format!("{}, committed", run.what));
    let committed = run.disk.clone();
    run.image = over(&top);
    run.check("over what it was committed to");
    run.mark(9 * c + 512, 512);
    run.zero(6 * c, c, true);
    run.image.flush().unwrap();
    rebase(&run.image, None, None, &RebaseOptions::default(), &Job::new()).unwrap();
    top.assert_holds(&run.disk, &format!("{}, rebased", run.what));
    let seen = top.has_marks() | made.has_marks();
    let expands = options.version >= 3 && !options.extended_l2 && options.data_file.is_none();
    // A cluster is expanded with its place in the file alone.
    if !expands || door == Door::LegacyAes {
        return seen;
    }
    // Zero clusters that hide a backing file become data.
    let top = Watched::create(&options);
    (run.image, run.disk) = (over(&top), committed);
    run.zero(0, 3 * c, false);
    run.mark(3 * c + 5, 100);
    run.zero(3 * c, c, false);
    run.image.close().unwrap();
    let old = AmendOptions { version: Some(2), ..AmendOptions::default() };
    let data = options.data_door.as_ref().map(|door| door.open(top.storage()));
    amend_through(&*top.files[0], data.as_deref(), &old, &CheckOptions::default(), &Job::new()).unwrap();
    assert_eq!(read_header(&*top.files[0]).unwrap().version, 2);
    run.image = over(&top);
    run.check("as version 2");
    seen | top.has_marks()
}

#[test]
fn no_path_leaves_guest_data_in_clear() {
    for door in [Door::Xts, Door::LegacyAes] {
        for (layout, options) in layouts(door) {
            let name = format!("{}, {layout}", door.name());
            assert!(!everything(&name, door, &options), "{name}: a mark in clear");
        }
    }
}

/// The same without a door: the marks are looked for where they would be.
#[test]
fn without_a_door_the_marks_are_seen() {
    for (name, options) in layouts(Door::None) {
        assert!(everything(name, Door::None, &options), "{name}");
    }
}

#[test]
fn a_disk_that_is_full_stores_nothing_in_clear() {
    for (door, cluster_size) in [(Door::Scrambling, 4096), (Door::Xts, 65536), (Door::LegacyAes, 4096)] {
        let options =
            CreateOptions { cluster_size, size: 64 * MIB, data_door: door.open(), ..Default::default() };
        let made = Watched::files(&options);
        let space = Arc::new(Space::default());
        let storage: Arc<dyn Storage> = Arc::new(Hooked::with(made.storage(), Arc::clone(&space)));
        create(Arc::clone(&storage), None, &options, &Job::new()).unwrap();
        let open = OpenOptions { data_door: door.open(), allow_weak: true, ..OpenOptions::default() };
        let mut qcow2 = Qcow2::open(storage, &open).unwrap();
        qcow2.enable_writing(WriteOptions { discard: Discard::Unmap, ..WriteOptions::default() }).unwrap();
        let image = Image::new(vec![Box::new(qcow2)]).unwrap();
        let mut disk = vec![0; options.size as usize];
        space.fill_up(300);
        let (mut full, mut at) = (0, 0);
        while full < 10 {
            let bytes = marks(cluster_size / 2);
            match image.write_at(Mem::from(&bytes[..]), at) {
                Ok(()) => disk[at as usize..][..bytes.len()].copy_from_slice(&bytes),
                Err(error) => {
                    assert!(error.is_no_space(), "{error:?}");
                    full += 1;
                }
            }
            at += 2 * cluster_size;
        }
        image.resize_with(32 * MIB + 512, ResizeOptions { shrink: true, ..Default::default() }).unwrap();
        disk.truncate(32 * MIB as usize + 512);
        image.close().unwrap();
        made.assert_holds(&disk, "full");
        assert!(!made.has_marks());
    }
}
