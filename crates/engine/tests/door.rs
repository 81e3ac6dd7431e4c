//! Guest data behind a door: on every path it is stored as the door makes it, and read as it was.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, reason = "tests")]

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use qcow2_engine::amend::{AmendOptions, amend, amend_through};
use qcow2_engine::backing::{Backing, CommitOptions, RebaseOptions, commit, rebase};
use qcow2_engine::check::{CheckOptions, Repair, repair};
use qcow2_engine::clone::CloneTarget;
use qcow2_engine::compact::CompactOptions;
use qcow2_engine::convert::{Compression, ConvertOptions, ConvertTarget, convert};
use qcow2_engine::create::{CreateOptions, DataFile, Preallocation, create};
use qcow2_engine::image::{SegmentKind, read_header};
use qcow2_engine::storage::MemoryStorage;
use qcow2_engine::{
    DataDoor, Discard, ErrorKind, ExtentKind, GuestSource, Image, Job, Layer, Mem, MemMut, OpenOptions,
    Qcow2, Raw, ResizeOptions, Result, Storage, WriteOptions,
};
use qcow2_testkit::audit::audit;
use qcow2_testkit::contract::LayerContract;
use qcow2_testkit::forge::field;
use qcow2_testkit::model::assert_same;
use qcow2_testkit::plans::Table;
use qcow2_testkit::recorder::{Change, Journal, RecordingStorage};
use qcow2_testkit::storage::{Hooked, Op, Scrambling, Space, scramble, unscramble};
use qcow2_testkit::{Forge, Sparse};

const MARK: &[u8; 16] = b"a plain mark 016";
const MIB: u64 = 1 << 20;
const REWRITE: CompactOptions = CompactOptions { rewrite: true, zeroes: true, dry_run: false };

fn marks(length: u64) -> Vec<u8> {
    MARK.repeat(length as usize / 16 + 1)[..length as usize].to_vec()
}

fn bytes_of(image: &Image) -> Vec<u8> {
    let mut bytes = vec![0xa5; image.virtual_size() as usize];
    image.read_at(MemMut::from(&mut bytes[..]), 0).unwrap();
    bytes
}

/// An image whose files remember all that was ever written to them.
struct Watched {
    journal: Arc<Journal>,
    files: Vec<Arc<RecordingStorage>>,
    door: Option<Arc<dyn DataDoor>>,
}

impl Watched {
    /// Empty files for an image with these options.
    fn files(create: &CreateOptions) -> Self {
        let journal = Journal::new();
        let count = 1 + usize::from(create.data_file.is_some());
        let file = |number| Arc::new(RecordingStorage::new(Sparse::new(0), &journal, number));
        let files = (0..count).map(file).collect();
        Self { journal, files, door: create.data_door.clone() }
    }

    fn create(options: &CreateOptions) -> Self {
        let made = Self::files(options);
        create(made.storage(), made.data_file(), options, &Job::new()).unwrap();
        made
    }

    fn storage(&self) -> Arc<dyn Storage> {
        self.files[0].clone()
    }

    fn data_file(&self) -> Option<Arc<dyn Storage>> {
        self.files.get(1).map(|file| file.clone() as Arc<dyn Storage>)
    }

    fn layer(&self, writable: bool) -> Box<dyn Layer> {
        let options = OpenOptions { data_door: self.door.clone(), ..OpenOptions::default() };
        let mut qcow2 = Qcow2::open(self.storage(), &options).unwrap();
        if let Some(data_file) = self.data_file() {
            qcow2.set_data_file(data_file);
        }
        if writable {
            let write = WriteOptions { discard: Discard::Unmap, ..WriteOptions::default() };
            qcow2.enable_writing(write).unwrap();
        }
        Box::new(qcow2)
    }

    fn open(&self) -> Image {
        Image::new(vec![self.layer(true)]).unwrap()
    }

    /// Whether a mark was written to a file since the last time, or is in one.
    fn has_marks(&self) -> bool {
        let written = self.journal.take().1.into_iter().any(|entry| match entry.change {
            Change::Write { data, .. } => contains_mark(&data),
            _ => false,
        });
        written || self.files.iter().any(|file| contains_mark(&file.snapshot().to_vec()))
    }

    /// Read anew, it is `disk`; the image is sound.
    fn assert_holds(&self, disk: &[u8], what: &str) {
        let image = Image::new(vec![self.layer(false)]).unwrap();
        assert_same(disk, &bytes_of(&image), 0, what);
        let findings = audit(&self.files[0].snapshot());
        assert!(findings.is_sound(), "{what}: {findings:#?}");
    }
}

/// At any offset: sectors may have been moved, but what is in them keeps its place.
fn contains_mark(bytes: &[u8]) -> bool {
    bytes.chunks_exact(16).any(|part| part == MARK)
}

/// A disk under test, and what it must read as.
struct Run {
    what: String,
    image: Image,
    disk: Vec<u8>,
}

impl Run {
    fn write(&mut self, at: u64, bytes: &[u8]) {
        self.image.write_at(Mem::from(bytes), at).unwrap_or_else(|e| panic!("{}: {e:?}", self.what));
        self.disk[at as usize..][..bytes.len()].copy_from_slice(bytes);
    }
    fn mark(&mut self, at: u64, length: u64) {
        // The marks are where they are on the disk: sixteen bytes each.
        let whole = marks(length + 16);
        self.write(at, &whole[(at % 16) as usize..][..length as usize]);
    }
    fn zero(&mut self, at: u64, length: u64, unmap: bool) {
        self.image.write_zeroes(at, length, unmap).unwrap();
        self.disk[at as usize..(at + length) as usize].fill(0);
    }
    fn discard(&mut self, range: Range<u64>) {
        self.image.discard(range.start, range.end - range.start).unwrap();
        self.disk[range.start as usize..range.end as usize].fill(0);
    }
    fn resize(&mut self, size: u64, preallocation: Preallocation) {
        let options = ResizeOptions { shrink: true, preallocation };
        self.image.resize_with(size, options).unwrap_or_else(|e| panic!("{}: {e:?}", self.what));
        self.disk.resize(size as usize, 0);
    }
    fn check(&self, step: &str) {
        assert_same(&self.disk, &bytes_of(&self.image), 0, &format!("{}, {step}", self.what));
    }
}

/// Layouts that differ in how data gets to its place.
fn layouts(door: Option<Arc<dyn DataDoor>>) -> Vec<(&'static str, CreateOptions)> {
    let plain = CreateOptions { size: 2 * MIB, data_door: door, ..CreateOptions::default() };
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
fn everything(name: &str, options: &CreateOptions) -> bool {
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
    seen_behind_the_end(&made, &run);
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
    seen | made.has_marks() | moved_along_the_chain(&made, options, &mut run)
}

/// What is left of the last cluster behind the end reads as zeroes to whoever makes the disk longer.
fn seen_behind_the_end(made: &Watched, run: &Run) {
    let top = run.image.top_qcow2().unwrap();
    let (end, cluster) = (run.image.virtual_size(), top.geometry().cluster_size());
    let mut segments = Vec::new();
    top.plan_read(end..end.next_multiple_of(cluster), &mut segments).unwrap();
    for segment in segments {
        let SegmentKind::Data(place) = segment.kind else { continue };
        let data = made.files.last().unwrap();
        let mut bytes = vec![0; segment.length as usize];
        data.read_at(MemMut::from(&mut bytes[..]), place.host).unwrap();
        if data.len().unwrap() > place.host && made.door.is_some() {
            unscramble(&mut bytes, place.host);
        }
        assert!(bytes.iter().all(|byte| *byte == 0), "{}: behind the end", run.what);
    }
}

/// Copies of the disk in new images of the same shape.
fn cloned_and_converted(made: &Watched, options: &CreateOptions, run: &Run) -> bool {
    let what = format!("{}, cloned", run.what);
    let target = Watched::files(options);
    let to = CloneTarget::Qcow2 {
        storage: target.storage(),
        data_file: target.data_file(),
        create: Box::new(options.clone()),
        compression: None,
    };
    let image = made.open();
    image.begin_clone(to, &Job::new()).unwrap().run(&image, None, &Job::new()).unwrap();
    target.assert_holds(&run.disk, &what);
    let mut seen = target.has_marks();
    for sparse_size in [0, 4096] {
        let target = Watched::files(options);
        let to = ConvertTarget::Qcow2 {
            storage: target.storage(),
            data_file: target.data_file(),
            create: Box::new(options.clone()),
        };
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
            true => {
                ConvertTarget::Raw { storage: target.clone(), preallocation: Preallocation::Off, keep: false }
            }
            false => {
                ConvertTarget::Qcow2 { storage: target.clone(), data_file: None, create: Box::default() }
            }
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
fn moved_along_the_chain(made: &Watched, options: &CreateOptions, run: &mut Run) -> bool {
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
    if options.version < 3 || options.extended_l2 || options.data_file.is_some() {
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
    for (name, options) in layouts(Scrambling::door()) {
        assert!(!everything(name, &options), "{name}: a mark in clear");
    }
}

/// The same without a door: the marks are looked for where they would be.
#[test]
fn without_a_door_the_marks_are_seen() {
    for (name, options) in layouts(None) {
        assert!(everything(name, &options), "{name}");
    }
}

#[test]
fn a_disk_that_is_full_stores_nothing_in_clear() {
    for cluster_size in [4096, 65536] {
        let options = CreateOptions {
            cluster_size,
            size: 64 * MIB,
            data_door: Scrambling::door(),
            ..Default::default()
        };
        let made = Watched::files(&options);
        let space = Arc::new(Space::default());
        let storage: Arc<dyn Storage> = Arc::new(Hooked::with(made.storage(), Arc::clone(&space)));
        create(Arc::clone(&storage), None, &options, &Job::new()).unwrap();
        let open = OpenOptions { data_door: Scrambling::door(), ..OpenOptions::default() };
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

/// What is mapped before anything is written to it has a flag, and takes no writes.
#[test]
fn preallocated_clusters_are_flagged_and_not_written() {
    let data_file = Some(DataFile { filename: b"data".to_vec(), raw: false });
    for (data_file, extended_l2) in [(None, false), (None, true), (data_file, false)] {
        let preallocation = Preallocation::Metadata;
        let data_door = Scrambling::door();
        let options = CreateOptions {
            size: 64 * MIB,
            preallocation,
            data_door,
            data_file,
            extended_l2,
            ..CreateOptions::default()
        };
        let made = Watched::create(&options);
        let image = made.open();
        image.resize_with(128 * MIB, ResizeOptions { shrink: false, preallocation }).unwrap();
        image.close().unwrap();
        let changes = made.journal.take().1.into_iter().map(|entry| match entry.change {
            Change::Write { data, .. } => data.len() as u64,
            _ => 0,
        });
        let written: u64 = changes.sum();
        assert!(written < MIB, "{options:?}: {written} bytes written");
        made.assert_holds(&vec![0; 128 * MIB as usize], "preallocated");
        let length: u64 = made.files.iter().map(|file| file.len().unwrap()).sum();
        assert!(length > 128 * MIB, "{options:?}: all has its place");
        let mut segments = Vec::new();
        let top = made.open();
        top.top_qcow2().unwrap().plan_read(0..128 * MIB, &mut segments).unwrap();
        let placed = |kind| match extended_l2 {
            true => matches!(kind, SegmentKind::Unallocated(Some(_))),
            false => matches!(kind, SegmentKind::Zero(Some(_))),
        };
        assert!(segments.iter().all(|segment| placed(segment.kind)), "{segments:?}");
    }
}

/// Nothing about the file says anything about the disk, and clusters without bytes stay without.
#[test]
fn a_layer_behind_a_door_hands_out_no_file() {
    let options = CreateOptions { size: 2 * MIB, data_door: Scrambling::door(), ..CreateOptions::default() };
    let made = Watched::create(&options);
    let mut run = Run { what: "layer".to_owned(), image: made.open(), disk: vec![0; 2 * MIB as usize] };
    run.mark(0, 200_000);
    run.zero(65536, 65536, false);
    run.image.close().unwrap();
    let layer = made.layer(false);
    assert!(layer.file(0).is_none());
    let image = Image::new(vec![layer.reopen().unwrap()]).unwrap();
    let mut extents = Vec::new();
    image.extents(0, 2 * MIB, &Job::new(), &mut extents).unwrap();
    assert!(extents.iter().all(|extent| extent.host.is_none()), "{extents:?}");
    let kinds: Vec<_> = extents.iter().map(|extent| (extent.start, extent.kind)).collect();
    let expected = [
        (0, ExtentKind::Data),
        (65536, ExtentKind::Zero),
        (131072, ExtentKind::Data),
        (262144, ExtentKind::Unallocated),
    ];
    assert_eq!(kinds, expected);
    // What has no bytes is read without a request.
    let reads = Arc::new(Mutex::new(Vec::new()));
    let log = Arc::clone(&reads);
    let hooked = Hooked::with(made.storage(), move |op: Op, range: Range<u64>| {
        log.lock().unwrap().push((op, range));
        Ok(())
    });
    let open = OpenOptions { data_door: Scrambling::door(), ..OpenOptions::default() };
    let qcow2 = Qcow2::open(Arc::new(hooked), &open).unwrap();
    let image = Image::new(vec![Box::new(qcow2)]).unwrap();
    let mut bytes = [1; 512];
    image.read_at(MemMut::from(&mut bytes[..]), 70_000).unwrap();
    reads.lock().unwrap().clear();
    image.read_at(MemMut::from(&mut bytes[..]), 80_000).unwrap();
    image.read_at(MemMut::from(&mut bytes[..]), MIB).unwrap();
    assert!(reads.lock().unwrap().is_empty() && bytes == [0; 512]);
    let file = made.files[0].snapshot().to_vec();
    let open = |storage| -> Result<Box<dyn Layer>> {
        let options = OpenOptions { data_door: Scrambling::door(), ..OpenOptions::default() };
        Ok(Box::new(Qcow2::open(storage, &options)?))
    };
    LayerContract { name: "door", file: &file, open: &open, expected: &run.disk, below: None }.check();
}

/// An image that says it is encrypted is written to behind a door, and goes on saying so.
#[test]
fn a_header_keeps_its_encryption_method() {
    const CLUSTER: u64 = 4096;
    let mut forge = Forge::new(3, 12, 64 * CLUSTER).crypt_method(1).scrambled();
    forge.data(3, &marks(CLUSTER));
    let made = Watched {
        journal: Journal::new(),
        files: vec![Arc::new(RecordingStorage::plain(forge.build().bytes))],
        door: Scrambling::door(),
    };
    let method = || made.files[0].snapshot().u32(field::CRYPT_METHOD);
    let mut disk = vec![0; 64 * CLUSTER as usize];
    disk[3 * CLUSTER as usize..4 * CLUSTER as usize].copy_from_slice(&marks(CLUSTER));
    let mut run = Run { what: "method".to_owned(), image: made.open(), disk };
    run.check("opened");
    let changes: [(&str, &dyn Fn(&mut Run)); 6] = [
        ("create", &|run| run.image.execute(&Table::of(&run.image).create("1", "one")).unwrap()),
        ("grow", &|run| run.resize(1 << 22, Preallocation::Off)),
        ("write", &|run| run.mark(40 * CLUSTER, 600)),
        ("shrink", &|run| run.resize(50 * CLUSTER + 512, Preallocation::Off)),
        ("compact", &|run| run.image.compact(REWRITE, &Job::new()).map(|_| ()).unwrap()),
        ("delete", &|run| run.image.execute(&Table::of(&run.image).delete(0)).unwrap()),
    ];
    for (what, change) in changes {
        change(&mut run);
        run.image.flush().unwrap();
        assert_eq!(method(), 1, "{what}");
        run.check(what);
    }
    run.image.close().unwrap();
    assert_eq!(method(), 1);
    // Without a door it is not read, not written to, and not judged by its bytes.
    let mut plain = Qcow2::open(made.storage(), &OpenOptions::default()).unwrap();
    assert_eq!(plain.enable_writing(WriteOptions::default()).unwrap_err().field(), Some("crypt_method"));
    let plain = Image::new(vec![Box::new(plain)]).unwrap();
    let mut bytes = [0; 512];
    let error = plain.read_at(MemMut::from(&mut bytes[..]), 3 * CLUSTER).unwrap_err();
    assert_eq!((error.kind(), error.field()), (ErrorKind::UnsupportedFeature, Some("crypt_method")));
    let error = plain.compact(CompactOptions { dry_run: true, ..REWRITE }, &Job::new()).unwrap_err();
    assert_eq!(error.field(), Some("crypt_method"));
}

#[test]
fn zero_clusters_of_an_encrypted_image_are_not_expanded_in_clear() {
    let mut forge = Forge::new(3, 12, 8 << 12).crypt_method(1).backing("base", "raw");
    forge.zero_plain(1);
    let storage = RecordingStorage::plain(forge.build().bytes);
    let before = storage.snapshot().to_vec();
    let old = AmendOptions { version: Some(2), refcount_bits: Some(16), ..AmendOptions::default() };
    let error = amend(&storage, &old, &CheckOptions::default(), &Job::new()).unwrap_err();
    assert_eq!(
        (error.kind(), error.field()),
        (ErrorKind::UnsupportedFeature, Some("crypt_method")),
        "{error}"
    );
    assert!(storage.snapshot().to_vec() == before);
}

#[test]
fn what_cannot_be_behind_a_door_is_refused() {
    let door = Scrambling::door;
    let raw = Some(DataFile { filename: b"data".to_vec(), raw: true });
    let options =
        CreateOptions { size: MIB, data_door: door(), data_file: raw.clone(), ..CreateOptions::default() };
    assert_eq!(options.validate().unwrap_err().field(), Some("data_file_raw"));
    let kept = CreateOptions {
        data_file: raw.clone().map(|data_file| DataFile { raw: false, ..data_file }),
        keep_data_file: true,
        preallocation: Preallocation::Metadata,
        ..options
    };
    assert_eq!(kept.validate().unwrap_err().field(), Some("keep_data_file"));
    let made = Watched::create(&CreateOptions { size: MIB, data_file: raw, ..CreateOptions::default() });
    let open = OpenOptions { data_door: door(), ..OpenOptions::default() };
    let error = Qcow2::open(made.storage(), &open).unwrap_err();
    assert_eq!((error.kind(), error.field()), (ErrorKind::InvalidArgument, Some("data_file_raw")));
    let create = CreateOptions { size: MIB, data_door: door(), ..CreateOptions::default() };
    let made = Watched::create(&create);
    let image = made.open();
    let error = image.write_compressed_at(Mem::from(&[1; 65536][..]), 0).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::UnsupportedFeature, "{error}");
    let source = Image::new(vec![Box::new(Raw::new(Watched::files(&create).storage()).unwrap())]).unwrap();
    let compressed =
        ConvertOptions { compression: Some(Compression::default()), ..ConvertOptions::default() };
    for target in [
        ConvertTarget::Existing(&image),
        ConvertTarget::Qcow2 { storage: made.storage(), data_file: None, create: Box::new(create.clone()) },
    ] {
        let error = convert(&source, target, &compressed, &Job::new()).unwrap_err();
        assert_eq!((error.kind(), error.field()), (ErrorKind::InvalidArgument, Some("compress")));
    }
    let target = CloneTarget::Qcow2 {
        storage: made.storage(),
        data_file: None,
        create: Box::new(create),
        compression: Some(Compression::default()),
    };
    assert_eq!(image.begin_clone(target, &Job::new()).unwrap_err().field(), Some("compress"));
}

/// An image on top has a door of its own, or none; those below keep theirs.
#[test]
fn an_overlay_has_its_own_door() {
    let options = CreateOptions { size: MIB, data_door: Scrambling::door(), ..CreateOptions::default() };
    let base = Watched::create(&options);
    let mut run = Run { what: "overlay".to_owned(), image: base.open(), disk: vec![0; MIB as usize] };
    run.mark(0, 100_000);
    let backing = Some(Backing { filename: b"base".to_vec(), format: Some(b"qcow2".to_vec()) });
    let top = Watched::create(&CreateOptions { size: MIB, backing, ..CreateOptions::default() });
    assert!(run.image.top_qcow2().unwrap().open_options().for_another().data_door.is_none());
    run.image = run.image.put_overlay(|| Ok(top.layer(true))).unwrap();
    run.check("put on");
    run.mark(500, 9000);
    run.check("written to");
    run.image.close().unwrap();
    assert!(top.has_marks() && !base.has_marks());
}

/// Space of a data file becomes a hole when no read can find it any more that planned before it was given up: by the guest, or by a
/// compaction that found nothing but zeroes there.
#[test]
fn space_behind_a_door_is_given_back_when_reads_are_over() {
    for zeroes in [false, true] {
        give_back(CompactOptions { zeroes, ..CompactOptions::default() });
    }
}

fn give_back(compact: CompactOptions) {
    const CLUSTER: u64 = 4096;
    let options = CreateOptions {
        size: MIB,
        cluster_size: CLUSTER,
        data_door: Scrambling::door(),
        data_file: Some(DataFile { filename: b"data".to_vec(), raw: false }),
        ..CreateOptions::default()
    };
    let made = Watched::create(&options);
    let (held, is_held) = sync_channel(1);
    let (go, goes) = sync_channel::<()>(1);
    let (goes, armed) = (Mutex::new(goes), Arc::new(AtomicBool::new(false)));
    let arms = Arc::clone(&armed);
    let zeroed = Arc::new(Mutex::new(Vec::new()));
    let log = Arc::clone(&zeroed);
    let hook = move |op: Op, range: Range<u64>| {
        match op {
            Op::Read if arms.swap(false, Ordering::AcqRel) => {
                held.send(()).unwrap();
                goes.lock().unwrap().recv().unwrap();
            }
            Op::Zero | Op::Discard => log.lock().unwrap().push(range),
            _ => {}
        }
        Ok(())
    };
    let open = OpenOptions { data_door: Scrambling::door(), ..OpenOptions::default() };
    let mut qcow2 = Qcow2::open(made.storage(), &open).unwrap();
    qcow2.set_data_file(Arc::new(Hooked::with(made.data_file().unwrap(), hook)));
    qcow2.enable_writing(WriteOptions { discard: Discard::Unmap, ..WriteOptions::default() }).unwrap();
    let image = Image::new(vec![Box::new(qcow2)]).unwrap();
    let mut run = Run { what: format!("{compact:?}"), image, disk: vec![0; MIB as usize] };
    run.mark(0, 20 * CLUSTER);
    if compact.zeroes {
        run.write(3 * CLUSTER, &vec![0; 6 * CLUSTER as usize]);
    }
    run.image.flush().unwrap();
    let expected = run.disk[5 * CLUSTER as usize..6 * CLUSTER as usize].to_vec();
    let image = &run.image;
    let (early, read) = std::thread::scope(|scope| {
        armed.store(true, Ordering::Release);
        let reader = scope.spawn(|| {
            let mut bytes = vec![0xa5; CLUSTER as usize];
            image.read_at(MemMut::from(&mut bytes[..]), 5 * CLUSTER).map(|()| bytes)
        });
        is_held.recv().unwrap();
        let discarded = if compact.zeroes { Ok(()) } else { image.discard(3 * CLUSTER, 6 * CLUSTER) };
        let discarded = discarded.and_then(|()| image.flush());
        let compacting = scope.spawn(|| image.compact(compact, &Job::new()));
        std::thread::sleep(Duration::from_millis(100));
        let early = compacting.is_finished() || !zeroed.lock().unwrap().is_empty();
        go.send(()).unwrap();
        let read = reader.join().unwrap().unwrap();
        discarded.and_then(|()| compacting.join().unwrap()).unwrap();
        (early, read)
    });
    assert!(!early, "{}: given back under a read", run.what);
    assert!(read == expected, "{}: the bytes before", run.what);
    let freed: u64 = zeroed.lock().unwrap().iter().map(|range| range.end - range.start).sum();
    assert!(freed >= MIB - 14 * CLUSTER, "{}: all but what is still there, not {freed}", run.what);
    run.disk[3 * CLUSTER as usize..9 * CLUSTER as usize].fill(0);
    run.check("compacted");
    run.mark(4 * CLUSTER + 100, 10);
    run.check("written again");
    run.image.close().unwrap();
    made.assert_holds(&run.disk, &run.what);
}

/// What other sectors are scrambled to is garbage: the tests above would see a byte at a wrong place.
#[test]
fn a_sector_at_another_place_is_garbage() {
    let (mut here, mut there) = (marks(512), marks(512));
    scramble(&mut here, 0);
    scramble(&mut there, 512);
    assert!(here.iter().zip(&there).filter(|(a, b)| a == b).count() < 50);
}
