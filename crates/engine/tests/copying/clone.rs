//! Live clones: whatever guests do meanwhile, the copy is the disk as it was at one moment, whole and clean; and whatever
//! happens to the copy, guests do not notice.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use qcow2_engine::clone::CloneTarget;
use qcow2_engine::compact::CompactOptions;
use qcow2_engine::convert::Compression;
use qcow2_engine::create::{CreateOptions, DataFile as NamedData, NewTarget, Preallocation};
use qcow2_engine::format::CompressionType;
use qcow2_engine::{Discard, ErrorKind, Image, Job, Raw, ResizeOptions, Storage, WriteOptions};
use qcow2_testkit::audit::audit;
use qcow2_testkit::disk_model::{Opening, Rig};
use qcow2_testkit::matrix::{Backing, DataFile, Geometry};
use qcow2_testkit::ops::{Found, SECTOR, Target, Value, identify, stamped};
use qcow2_testkit::plans::Table;
use qcow2_testkit::recorder::RecordingStorage;
use qcow2_testkit::storage::{Door, Fault, FaultStorage, Op as Call, Scrambling};
use qcow2_testkit::{Fixture, Qemu, Rng, Sparse};

const THREADS: u64 = 5;

/// A file that a clone is made in.
fn empty() -> Arc<RecordingStorage> {
    Arc::new(RecordingStorage::plain(Sparse::new(0)))
}

fn open(rig: &Rig) -> (Image, Vec<Arc<RecordingStorage>>) {
    let storages: Vec<_> = rig.files().into_iter().map(|f| Arc::new(RecordingStorage::plain(f))).collect();
    let files: Vec<Arc<dyn Storage>> = storages.iter().map(|s| s.clone() as Arc<dyn Storage>).collect();
    let write = WriteOptions { discard: Discard::Unmap, ..WriteOptions::default() };
    let opening = Opening { write: Some(write), ..Opening::default() };
    (rig.open(&files, &opening).unwrap(), storages)
}

fn open_raw(bytes: &[u8]) -> Image {
    let mut sparse = Sparse::new(bytes.len() as u64);
    sparse.write(0, bytes);
    let raw = Raw::new(Arc::new(RecordingStorage::plain(sparse))).unwrap();
    let options = WriteOptions { discard: Discard::Unmap, ..WriteOptions::default() };
    Image::new(vec![Box::new(raw.with_write_options(&options))]).unwrap()
}

fn read_all(image: &Image) -> Vec<u8> {
    let mut bytes = vec![0; image.virtual_size() as usize];
    image.read(0, &mut bytes).unwrap();
    bytes
}

/// The kinds of target, each with a way to read what became of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Raw,
    Qcow2,
    SmallClusters,
    Subclusters,
    Compressed,
    DataFile,
    Preallocated,
    Door,
    PreallocatedDoor,
}

const KINDS: [Kind; 9] = [
    Kind::Raw,
    Kind::Qcow2,
    Kind::SmallClusters,
    Kind::Subclusters,
    Kind::Compressed,
    Kind::DataFile,
    Kind::Preallocated,
    Kind::Door,
    Kind::PreallocatedDoor,
];

struct Made {
    kind: Kind,
    file: Arc<RecordingStorage>,
    data: Option<Arc<RecordingStorage>>,
}

impl Made {
    fn new(kind: Kind) -> Self {
        Self { kind, file: empty(), data: (kind == Kind::DataFile).then(empty) }
    }

    fn target(&self) -> CloneTarget {
        let storage = self.file.clone();
        let defaults = CreateOptions::default();
        let create = match self.kind {
            Kind::Raw => {
                return CloneTarget::from(NewTarget::Raw {
                    storage,
                    preallocation: Preallocation::Off,
                    keep: false,
                });
            }
            Kind::Qcow2 => defaults,
            Kind::SmallClusters => CreateOptions { cluster_size: 512, refcount_bits: 1, ..defaults },
            Kind::Subclusters => CreateOptions { extended_l2: true, cluster_size: 2 << 20, ..defaults },
            Kind::Compressed => CreateOptions { compression_type: CompressionType::Zstd, ..defaults },
            Kind::DataFile => {
                let data_file = Some(NamedData { filename: b"data".to_vec(), raw: true });
                CreateOptions { data_file, ..defaults }
            }
            Kind::Preallocated => CreateOptions { preallocation: Preallocation::Metadata, ..defaults },
            Kind::Door => CreateOptions { data_door: Scrambling::door(), cluster_size: 4096, ..defaults },
            Kind::PreallocatedDoor => {
                let preallocation = Preallocation::Metadata;
                CreateOptions { data_door: Scrambling::door(), preallocation, ..defaults }
            }
        };
        CloneTarget {
            disk: NewTarget::Qcow2 {
                storage,
                data_file: self.data.clone().map(|data| data as Arc<dyn Storage>),
                create: Box::new(create),
            },
            compression: (self.kind == Kind::Compressed).then(Compression::default),
        }
    }

    /// The clone's bytes; a qcow2 clone is audited.
    fn bytes(&self, what: &str) -> Vec<u8> {
        let file = self.file.snapshot();
        if self.kind == Kind::Raw {
            return file.to_vec();
        }
        let findings = audit(&file);
        assert!(findings.is_clean(), "{what}: {findings:#?}");
        let rig = Rig {
            geometry: Geometry {
                door: match self.kind {
                    Kind::Door | Kind::PreallocatedDoor => Door::Scrambling,
                    _ => Door::None,
                },
                ..Geometry::plain(65536)
            },
            image: file,
            data_file: self.data.as_ref().map(|data| data.snapshot()),
            backing: None,
        };
        let bytes = read_all(&rig.open_state(&rig.files(), &Opening::default()).unwrap());
        if let Some(data) = rig.data_file {
            assert_eq!(data.to_vec(), bytes, "{what}: the data file is the raw disk");
        }
        bytes
    }
}

/// What one thread did: ranges of its own sectors, and what they are since.
type Log = Mutex<Vec<(u64, u64, Value)>>;

/// A thread's share: units (of a cluster, or a sector) by turns, so that every chunk is everybody's.
#[derive(Clone, Copy)]
struct Lane {
    thread: u64,
    unit: u64,
    size: u64,
    whole: bool,
    compression: bool,
}

impl Lane {
    fn owns(&self, sector: u64) -> bool {
        sector * SECTOR / self.unit % THREADS == self.thread
    }

    /// Does one thing to one unit; says what it was.
    fn act(&self, image: &Image, rng: &mut Rng, generation: u32) -> (u64, u64, Value) {
        let units = self.size.div_ceil(self.unit);
        let unit = (rng.below(units) / THREADS * THREADS + self.thread).min(units - 1);
        let unit = if unit % THREADS == self.thread { unit } else { self.thread };
        let start = unit * self.unit;
        let end = (start + self.unit).min(self.size);
        let sectors = (end - start) / SECTOR;
        let first = rng.below(sectors);
        let part = (start + first * SECTOR, (1 + rng.below(sectors - first)) * SECTOR);
        match rng.below(if self.whole { 8 } else { 5 }) {
            5 if self.compression => {
                image.write_compressed(start, &stamped(start, end - start, generation)).unwrap();
                (start, end - start, Value::Written(generation))
            }
            6 => {
                image.discard(start, end - start).unwrap();
                (start, end - start, Value::Zero)
            }
            4 => {
                image.write_zeroes(part.0, part.1, rng.below(2) == 0).unwrap();
                (part.0, part.1, Value::Zero)
            }
            _ => {
                image.write(part.0, &stamped(part.0, part.1, generation)).unwrap();
                (part.0, part.1, Value::Written(generation))
            }
        }
    }
}

fn values(bytes: &[u8], what: &str) -> Vec<Value> {
    let sectors = (0..).zip(bytes.chunks_exact(SECTOR as usize));
    let value = |(sector, part): (u64, &[u8])| match identify(sector, part) {
        Found::Value(value) => value,
        other => panic!("{what}: sector {sector}: {other:?}"),
    };
    sectors.map(value).collect()
}

/// The clone must be what the thread's first `k` operations made of its sectors, for one `k` in the range.
fn judge(
    lane: &Lane,
    start: &[Value],
    found: &[Value],
    log: &[(u64, u64, Value)],
    k: (usize, usize),
    what: &str,
) {
    let mut now = start.to_vec();
    let mut wrong: i64 = (0..now.len()).filter(|&s| lane.owns(s as u64) && now[s] != found[s]).count() as i64;
    let mut nearest = (i64::MAX, 0);
    for done in 0..=k.1 {
        if done >= k.0 {
            nearest = nearest.min((wrong, done));
        }
        let Some(&(offset, len, value)) = log.get(done) else { break };
        for sector in offset / SECTOR..(offset + len) / SECTOR {
            let sector = sector as usize;
            wrong -= i64::from(now[sector] != found[sector]);
            now[sector] = value;
            wrong += i64::from(now[sector] != found[sector]);
        }
    }
    assert_eq!(
        nearest.0, 0,
        "{what}: thread {} did {k:?} operations before the point in time, but no such state is in the clone: {nearest:?}",
        lane.thread
    );
}

/// Ends the other threads, also when a judgement fails.
struct Stops<'a>(&'a AtomicBool);

impl Drop for Stops<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

/// Threads write as fast as they can, and `beside` runs again and again; clones are taken in the middle.
fn stress_beside(
    image: &Image,
    (unit, compression): (u64, bool),
    kinds: &[Kind],
    seed: u64,
    what: &str,
    beside: &(dyn Fn() + Sync),
) {
    let size = image.virtual_size() / SECTOR * SECTOR;
    let start = values(&read_all(image), what);
    let logs: Vec<Log> = (0..THREADS).map(|_| Log::default()).collect();
    let begun: Vec<AtomicUsize> = (0..THREADS).map(|_| AtomicUsize::new(0)).collect();
    let stop = AtomicBool::new(false);
    // What a raw disk's discard leaves is anything.
    let whole = unit > SECTOR && image.top_qcow2().is_some();
    let lanes: Vec<Lane> =
        (0..THREADS).map(|thread| Lane { thread, unit, size, whole, compression }).collect();
    let completed = |t: usize| logs[t].lock().unwrap().len();
    std::thread::scope(|scope| {
        let _stops = Stops(&stop);
        for lane in &lanes {
            let t = lane.thread as usize;
            let (logs, begun, stop) = (&logs, &begun, &stop);
            scope.spawn(move || {
                let mut rng = Rng::new(seed << 8 | lane.thread);
                for n in 0..40_000u32 {
                    if stop.load(Ordering::Acquire) {
                        break;
                    }
                    begun[t].fetch_add(1, Ordering::AcqRel);
                    let done = lane.act(image, &mut rng, 1000 + n * THREADS as u32 + lane.thread as u32);
                    logs[t].lock().unwrap().push(done);
                }
            });
        }
        scope.spawn(|| {
            while !stop.load(Ordering::Acquire) {
                beside();
                std::thread::yield_now();
            }
        });
        for &kind in kinds {
            let what = format!("{what} to {kind:?}");
            let made = Made::new(kind);
            let before: Vec<usize> = (0..logs.len()).map(completed).collect();
            let clone = image.begin_clone(made.target(), &Job::new()).unwrap();
            let after: Vec<usize> = begun.iter().map(|b| b.load(Ordering::Acquire)).collect();
            std::thread::yield_now();
            let job = Job::new();
            let result = clone.run(image, None, &job).unwrap();
            assert_eq!(result.virtual_size, image.virtual_size(), "{what}");
            assert_eq!(job.progress(), (result.virtual_size, result.virtual_size), "{what}");
            let found = values(&made.bytes(&what), &what);
            for lane in &lanes {
                let t = lane.thread as usize;
                // What had begun by then is in the log when it is done.
                let begun = Instant::now();
                while completed(t) < after[t] {
                    assert!(begun.elapsed() < Duration::from_secs(100), "{what}: thread {t} is gone");
                    std::thread::yield_now();
                }
                let log = logs[t].lock().unwrap().clone();
                judge(lane, &start, &found, &log, (before[t], after[t]), &what);
            }
        }
    });
}

fn stress(image: &Image, unit: u64, compression: bool, kinds: &[Kind], seed: u64, what: &str) {
    stress_beside(image, (unit, compression), kinds, seed, what, &|| {
        std::thread::sleep(Duration::from_millis(5))
    });
}

#[test]
fn a_clone_is_the_disk_at_one_moment() {
    let plain = |cluster, size| Geometry { size, ..Geometry::plain(cluster) };
    let geometries = [
        plain(65536, (3 << 20) + 512),
        plain(512, (1 << 20) + 512),
        Geometry { backing: Backing::LongerQcow2, ..plain(4096, 2 << 20) },
        Geometry { extended_l2: true, backing: Backing::ShorterRaw, ..plain(16384, (2 << 20) + 1536) },
        plain(2 << 20, 20 << 20),
        Geometry { data_file: DataFile::ExternalRaw, ..plain(4096, 2 << 20) },
        Geometry { door: Door::Xts, ..plain(4096, 2 << 20) },
        Geometry { door: Door::LegacyAes, ..plain(4096, 2 << 20) },
    ];
    for (seed, geometry) in (1..).zip(&geometries) {
        let rig = Rig::forge(geometry, seed);
        let (image, storages) = open(&rig);
        let what = geometry.name();
        stress(&image, geometry.cluster_size, rig.menu().compression, &KINDS, seed, &what);
        image.close().unwrap();
        drop(image);
        let findings = audit(&storages[0].snapshot());
        assert!(findings.is_clean(), "{what}: {findings:#?}");
    }
}

/// Every chunk, and every cluster, is written to by everybody.
#[test]
fn requests_that_share_a_chunk_wait_for_its_copy() {
    let rig = Rig::forge(&Geometry { size: 2 << 20, ..Geometry::plain(65536) }, 3);
    let (image, _) = open(&rig);
    stress(&image, SECTOR, false, &[Kind::Raw, Kind::Qcow2, Kind::Compressed, Kind::Raw], 77, "sectors");
}

#[test]
fn a_raw_disk_is_cloned_while_it_is_written() {
    let image = open_raw(&stamped(0, 2 << 20, 9));
    stress(&image, 4096, false, &[Kind::Raw, Kind::Qcow2, Kind::SmallClusters], 5, "raw");
}

/// What moves clusters, frees them and writes everything out does not show either.
#[test]
fn a_disk_is_cloned_while_its_image_is_compacted() {
    for geometry in [
        Geometry { size: 2 << 20, ..Geometry::plain(4096) },
        Geometry { extended_l2: true, size: 3 << 20, ..Geometry::plain(16384) },
    ] {
        let rig = Rig::forge(&geometry, 9);
        let (image, storages) = open(&rig);
        let compacted = AtomicUsize::new(0);
        let beside = || {
            let n = compacted.fetch_add(1, Ordering::Relaxed);
            let options =
                CompactOptions { rewrite: n.is_multiple_of(2), zeroes: n.is_multiple_of(3), dry_run: false };
            image.compact(options, &Job::new()).unwrap();
            image.settled(|| Ok(())).unwrap();
        };
        let kinds = [Kind::Raw, Kind::Qcow2, Kind::Compressed, Kind::Raw];
        let what = format!("{} compacted", geometry.name());
        stress_beside(&image, (geometry.cluster_size, true), &kinds, 4, &what, &beside);
        assert!(compacted.load(Ordering::Relaxed) > 0);
        image.close().unwrap();
        let findings = audit(&storages[0].snapshot());
        assert!(findings.is_clean(), "{what}: {findings:#?}");
    }
}

/// Two at once, each of its own moment.
#[test]
fn clones_of_two_moments_are_made_side_by_side() {
    let image = open_raw(&stamped(0, 1 << 20, 9));
    let made = [Made::new(Kind::Qcow2), Made::new(Kind::Raw)];
    let first = (image.begin_clone(made[0].target(), &Job::new()).unwrap(), read_all(&image));
    image.write(0, &stamped(0, 300 << 10, 10)).unwrap();
    let second = (image.begin_clone(made[1].target(), &Job::new()).unwrap(), read_all(&image));
    image.write(100 << 10, &stamped(100 << 10, 300 << 10, 11)).unwrap();
    image.write_zeroes(900 << 10, 100 << 10, true).unwrap();
    let now = read_all(&image);
    std::thread::scope(|scope| {
        let (first, second, image) = (first.0, second.0, &image);
        scope.spawn(move || first.run(image, None, &Job::new()).unwrap());
        scope.spawn(move || second.run(image, None, &Job::new()).unwrap());
    });
    assert!(made[0].bytes("first") == first.1);
    assert!(made[1].bytes("second") == second.1);
    assert!(read_all(&image) == now && now != second.1 && first.1 != second.1);
}

/// Applying a snapshot changes the whole disk at once: the clone has what was there.
#[test]
fn a_snapshot_is_applied_under_a_clone() {
    let rig = Rig::forge(&Geometry { size: 45 * 4096, ..Geometry::plain(4096) }, 8);
    let (image, storages) = open(&rig);
    image.write(8192, &stamped(8192, 9 * 4096, 50)).unwrap();
    let made = Made::new(Kind::Qcow2);
    let clone = image.begin_clone(made.target(), &Job::new()).unwrap();
    let then = read_all(&image);
    image.execute(&Table::of(&image).apply(0)).unwrap();
    assert!(read_all(&image) != then);
    clone.run(&image, None, &Job::new()).unwrap();
    assert!(made.bytes("clone") == then);
    image.close().unwrap();
    assert!(audit(&storages[0].snapshot()).is_clean());
}

#[test]
fn a_disk_that_grows_is_cloned_as_it_was() {
    for raw in [true, false] {
        let rig = Rig::forge(&Geometry { size: 20 * 65536 + 512, ..Geometry::plain(65536) }, 4);
        let image = if raw { open_raw(&stamped(0, 20 * 65536 + 512, 3)) } else { open(&rig).0 };
        let made = Made::new(Kind::Raw);
        let (clone, then) = (image.begin_clone(made.target(), &Job::new()).unwrap(), read_all(&image));
        image.grow(64 * 65536).unwrap();
        let size = image.virtual_size();
        image.write(then.len() as u64 - 512, &stamped(then.len() as u64 - 512, 65536, 60)).unwrap();
        image.write(size - 512, &stamped(size - 512, 512, 61)).unwrap();
        assert_eq!(clone.virtual_size(), then.len() as u64);
        clone.run(&image, None, &Job::new()).unwrap();
        assert!(made.bytes("clone") == then, "raw {raw}");
    }
}

#[test]
fn a_disk_that_shrinks_is_cloned_as_it_was() {
    for raw in [true, false] {
        let rig = Rig::forge(&Geometry { size: 20 * 65536 + 512, ..Geometry::plain(65536) }, 4);
        let image = if raw { open_raw(&stamped(0, 20 * 65536 + 512, 3)) } else { open(&rig).0 };
        image.write(12 * 65536, &stamped(12 * 65536, 8 * 65536, 60)).unwrap();
        let made = Made::new(Kind::Qcow2);
        let (clone, then) = (image.begin_clone(made.target(), &Job::new()).unwrap(), read_all(&image));
        image.resize_with(10 * 65536 + 512, ResizeOptions { shrink: true, ..Default::default() }).unwrap();
        image.grow(16 * 65536).unwrap();
        image.write(15 * 65536, &stamped(15 * 65536, 65536, 61)).unwrap();
        clone.run(&image, None, &Job::new()).unwrap();
        assert!(made.bytes("clone") == then, "raw {raw}");
    }
}

/// A full or broken target ends the clone; every request of the guest succeeds, and the image is clean.
#[test]
fn a_failing_target_never_fails_the_guest() {
    for (call, errno) in [(Call::Write, 28), (Call::Write, 5), (Call::Sync, 5), (Call::SetLen, 28)] {
        for after in [0, 1, 3, 10, 40] {
            for kind in [Kind::Raw, Kind::Qcow2] {
                let what = format!("{call:?} errno {errno} after {after} to {kind:?}");
                let rig = Rig::forge(&Geometry { size: 3 << 20, ..Geometry::plain(65536) }, 6);
                let (image, storages) = open(&rig);
                let file = empty();
                let fault = Fault { ops: vec![call], after, once: false, errno };
                let storage: Arc<dyn Storage> = Arc::new(FaultStorage::new(file, fault));
                let target = match kind {
                    Kind::Raw => CloneTarget::from(NewTarget::Raw {
                        storage,
                        preallocation: Preallocation::Off,
                        keep: false,
                    }),
                    _ => CloneTarget {
                        disk: NewTarget::Qcow2 { storage, data_file: None, create: Box::default() },
                        compression: None,
                    },
                };
                let begun = image.begin_clone(target, &Job::new());
                for n in 0..40u64 {
                    let at = n * 7 % 48 * 65536;
                    image.write(at, &stamped(at, 65536, n as u32 + 70)).expect(&what);
                }
                match begun.and_then(|clone| clone.run(&image, None, &Job::new())) {
                    Ok(_) => assert!(after >= 10 || call != Call::Write, "{what}: no write failed"),
                    Err(e) => {
                        assert_eq!((e.kind(), e.errno()), (ErrorKind::Io, Some(errno)), "{what}: {e:?}")
                    }
                }
                image.write(0, &stamped(0, 65536, 200)).expect(&what);
                image.close().expect(&what);
                let findings = audit(&storages[0].snapshot());
                assert!(findings.is_clean(), "{what}: {findings:#?}");
            }
        }
    }
}

#[test]
fn a_clone_that_is_cancelled_dropped_or_closed_over_lets_requests_go_on() {
    let begin = |image: &Image| image.begin_clone(Made::new(Kind::Qcow2).target(), &Job::new()).unwrap();
    let image = open_raw(&stamped(0, 1 << 20, 9));
    let job = Job::new();
    job.cancel();
    assert_eq!(begin(&image).run(&image, None, &job).unwrap_err().kind(), ErrorKind::Aborted);
    assert_eq!(
        image.begin_clone(Made::new(Kind::Raw).target(), &job).map(drop).unwrap_err().kind(),
        ErrorKind::Aborted
    );
    drop(begin(&image));
    image.write(0, &stamped(0, 512, 20)).unwrap();
    let (other, clone) = (open_raw(&[0; 512]), begin(&image));
    assert_eq!(clone.run(&other, None, &Job::new()).unwrap_err().kind(), ErrorKind::InvalidArgument);
    let clone = begin(&image);
    image.close().unwrap();
    assert_eq!(clone.run(&image, None, &Job::new()).unwrap_err().kind(), ErrorKind::Closed);

    let rig = Rig::forge(&Geometry { size: 3 << 20, ..Geometry::plain(65536) }, 6);
    let (image, storages) = open(&rig);
    let clone = begin(&image);
    image.write(0, &stamped(0, 512, 20)).unwrap();
    image.close().unwrap();
    assert_eq!(clone.run(&image, None, &Job::new()).unwrap_err().kind(), ErrorKind::Closed);
    let refused = image.begin_clone(Made::new(Kind::Raw).target(), &Job::new()).map(drop).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Closed);
    assert!(audit(&storages[0].snapshot()).is_clean());
}

#[test]
fn options_that_contradict_each_other_are_refused() {
    let image = open_raw(&stamped(0, 1 << 16, 9));
    let make = |create: CreateOptions, compression| CloneTarget {
        disk: NewTarget::Qcow2 { storage: empty(), data_file: None, create: Box::new(create) },
        compression,
    };
    let backing = qcow2_engine::create::Backing { filename: b"base".to_vec(), format: Some(b"raw".to_vec()) };
    let compressed = Some(Compression::default());
    let refused = [
        make(CreateOptions { backing: Some(backing), ..CreateOptions::default() }, None),
        make(
            CreateOptions { preallocation: Preallocation::Metadata, ..CreateOptions::default() },
            compressed,
        ),
        make(
            CreateOptions {
                data_file: Some(NamedData { filename: b"data".to_vec(), raw: false }),
                ..CreateOptions::default()
            },
            compressed,
        ),
        make(CreateOptions { cluster_size: 1000, ..CreateOptions::default() }, None),
        CloneTarget::from(NewTarget::Raw {
            storage: empty(),
            preallocation: Preallocation::Metadata,
            keep: false,
        }),
    ];
    for target in refused {
        let what = format!("{target:?}");
        let error = image.begin_clone(target, &Job::new()).map(drop).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{what}");
    }
}

/// What is empty costs nothing, however large; and a request that zeroes all of it copies what there is first.
#[test]
fn a_disk_of_16_tib_is_cloned_by_what_it_holds() {
    let size = 16u64 << 40;
    let options = CreateOptions { size, cluster_size: 2 << 20, ..CreateOptions::default() };
    let file = empty();
    qcow2_engine::create::create(file.clone(), None, &options, &Job::new()).unwrap();
    let mut qcow2 = qcow2_engine::Qcow2::open(file, &Default::default()).unwrap();
    qcow2.enable_writing(WriteOptions::default()).unwrap();
    let image = Image::new(vec![Box::new(qcow2)]).unwrap();
    let places: Vec<u64> = (0..40).map(|n| n * (size / 40) / 65536 * 65536).collect();
    for &at in &places {
        image.write(at, &stamped(at, 3000, 7)).unwrap();
    }
    let made = Made::new(Kind::Qcow2);
    let clone = image.begin_clone(made.target(), &Job::new()).unwrap();
    image.write_zeroes(0, size, true).unwrap();
    let result = clone.run(&image, None, &Job::new()).unwrap();
    assert_eq!((result.virtual_size, result.bytes_written), (size, 40 << 16));
    let rig =
        Rig { geometry: Geometry::plain(65536), image: made.file.snapshot(), data_file: None, backing: None };
    let copy = rig.open_state(&rig.files(), &Opening::default()).unwrap();
    for &at in &places {
        let mut bytes = vec![0; 3000];
        copy.read(at, &mut bytes).unwrap();
        assert!(bytes == stamped(at, 3000, 7), "at {at}");
        image.read(at, &mut bytes).unwrap();
        assert!(bytes.iter().all(|b| *b == 0), "at {at}");
    }
}

/// QEMU reads the copies as we do.
#[test]
fn qemu_finds_the_clone_sound() {
    let Some(qemu) = Qemu::find() else { return };
    let fixture = Fixture::new();
    let rig = Rig::forge(&Geometry { size: (3 << 20) + 512, ..Geometry::plain(65536) }, 11);
    let (image, _) = open(&rig);
    for kind in [Kind::Qcow2, Kind::SmallClusters, Kind::Subclusters, Kind::Compressed] {
        let made = Made::new(kind);
        let clone = image.begin_clone(made.target(), &Job::new()).unwrap();
        let then = read_all(&image);
        for n in 0..30u64 {
            image.write(n * 90_112, &stamped(n * 90_112, 4096, 90 + n as u32)).unwrap();
        }
        clone.run(&image, None, &Job::new()).unwrap();
        let path = fixture.path(&format!("{kind:?}.qcow2"));
        made.file.snapshot().write_to(&path);
        qemu.assert_clean(&path);
        assert!(qemu.guest_bytes(&path, "qcow2", &[]) == then, "{kind:?}");
    }
}
