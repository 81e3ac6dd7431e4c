//! Everything at once: guest requests of several threads, reads of all of the disk, clones, and one management operation
//! behind the other, on a storage whose calls take their time.
//!
//! Sectors say where they belong and who wrote them last. Each thread has units of its own among those of the others, so it
//! knows at any moment what must be in them.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use qcow2_engine::clone::CloneTarget;
use qcow2_engine::compact::CompactOptions;
use qcow2_engine::create::{CreateOptions, NewTarget, Preallocation};
use qcow2_engine::{Discard, Image, Job, ResizeOptions, Storage, WriteOptions};
use qcow2_testkit::audit::{Findings, audit};
use qcow2_testkit::disk_model::{Opening, Rig};
use qcow2_testkit::matrix::{Backing, DataFile, Geometry};
use qcow2_testkit::ops::{Found, SECTOR, Target, Value, identify, stamped};
use qcow2_testkit::plans::Table;
use qcow2_testkit::recorder::RecordingStorage;
use qcow2_testkit::storage::{Door, Hooked, Op};
use qcow2_testkit::{Rng, Sparse};

const THREADS: u64 = 4;
const SHRINK: ResizeOptions = ResizeOptions { shrink: true, preallocation: Preallocation::Off };

/// How long each layout is tried: more in a long run.
fn time() -> Duration {
    let millis = std::env::var("QCOW2_STRESS_MILLIS").ok().and_then(|n| n.parse().ok());
    Duration::from_millis(millis.unwrap_or(1000))
}

fn first_seed() -> u64 {
    std::env::var("QCOW2_STRESS_SEED").ok().and_then(|n| n.parse().ok()).unwrap_or(1)
}

fn geometries() -> Vec<Geometry> {
    let plain = Geometry::plain;
    let small = |cluster_size, clusters| Geometry { size: clusters * cluster_size, ..plain(cluster_size) };
    vec![
        small(4096, 300),
        small(512, 600),
        Geometry { backing: Backing::LongerQcow2, ..small(4096, 200) },
        Geometry { version: 2, ..small(4096, 200) },
        Geometry { extended_l2: true, backing: Backing::EqualQcow2, ..small(16384, 60) },
        Geometry { zstd: true, refcount_bits: 64, ..small(1024, 400) },
        Geometry { data_file: DataFile::External, ..small(4096, 200) },
        Geometry { data_file: DataFile::ExternalRaw, extended_l2: true, ..small(16384, 40) },
        Geometry { door: Door::LegacyAes, ..small(4096, 200) },
        Geometry { door: Door::Xts, data_file: DataFile::External, ..small(4096, 200) },
    ]
}

/// Calls that take their time now and then.
fn slow(seed: u64) -> impl Fn(Op, Range<u64>) -> std::io::Result<()> + Send + Sync {
    let calls = AtomicU64::new(seed << 32);
    move |op, _| {
        let mut rng = Rng::new(calls.fetch_add(1, Ordering::Relaxed));
        let one_in = if op == Op::Sync { 3 } else { 40 };
        if rng.below(one_in) == 0 {
            // Some reads take so long that much is given up and used again meanwhile.
            let long = op == Op::Read && rng.below(20) == 0;
            std::thread::sleep(Duration::from_micros(rng.below(if long { 10_000 } else { 400 })));
        }
        Ok(())
    }
}

fn value(sector: u64, bytes: &[u8], what: &str) -> Value {
    match identify(sector, bytes) {
        Found::Value(value) => value,
        other => panic!("{what}: sector {sector}: {other:?}"),
    }
}

/// One disk and what is done to it.
struct World<'a> {
    rig: &'a Rig,
    image: Image,
    what: String,
    /// The part of the disk that threads write to; behind it, it grows and shrinks.
    size: u64,
    unit: u64,
    compressed: bool,
    /// Whether a discarded cluster reads as zeroes.
    discards: bool,
    stop: AtomicBool,
    generation: AtomicU32,
}

impl World<'_> {
    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    fn generation(&self) -> u32 {
        self.generation.fetch_add(1, Ordering::Relaxed)
    }

    fn read(&self, offset: u64, length: u64) -> Vec<u8> {
        let mut bytes = vec![0; length as usize];
        self.image.read(offset, &mut bytes).unwrap();
        bytes
    }

    /// Writes to the units of one thread; they are what it made of them, at any moment.
    fn write(&self, thread: u64, seed: u64) {
        let mut rng = Rng::new(seed * 31 + thread);
        let sectors = self.unit / SECTOR;
        let mut known: Vec<Value> = (0..)
            .zip(self.read(0, self.size).chunks_exact(SECTOR as usize))
            .map(|(sector, bytes)| value(sector, bytes, &self.what))
            .collect();
        while !self.stopped() {
            let unit = rng.below(self.size / self.unit / THREADS) * THREADS + thread;
            let start = unit * self.unit;
            let first = rng.below(sectors);
            let (offset, len) = (start + first * SECTOR, (1 + rng.below(sectors - first)) * SECTOR);
            let generation = self.generation();
            let (offset, len, now) = match rng.below(12) {
                0 | 1 if self.compressed => {
                    let bytes = stamped(start, self.unit, generation);
                    self.image.write_compressed(start, &bytes).unwrap();
                    (start, self.unit, Value::Written(generation))
                }
                2 if self.discards => {
                    self.image.discard(start, self.unit).unwrap();
                    (start, self.unit, Value::Zero)
                }
                3 => {
                    self.image.write_zeroes(offset, len, rng.below(2) == 0).unwrap();
                    (offset, len, Value::Zero)
                }
                4 => {
                    self.image.write_zeroes(start, self.unit, rng.below(2) == 0).unwrap();
                    (start, self.unit, Value::Zero)
                }
                5 => {
                    self.image.flush().unwrap();
                    continue;
                }
                6..9 => {
                    for (sector, bytes) in
                        (start / SECTOR..).zip(self.read(start, self.unit).chunks_exact(SECTOR as usize))
                    {
                        let (found, expected) = (value(sector, bytes, &self.what), known[sector as usize]);
                        assert_eq!(found, expected, "{}: sector {sector} of thread {thread}", self.what);
                    }
                    continue;
                }
                _ => {
                    self.image.write(offset, &stamped(offset, len, generation)).unwrap();
                    (offset, len, Value::Written(generation))
                }
            };
            known[(offset / SECTOR) as usize..((offset + len) / SECTOR) as usize].fill(now);
        }
        let end = self.read(0, self.size);
        for (sector, bytes) in (0..).zip(end.chunks_exact(SECTOR as usize)) {
            if sector * SECTOR / self.unit % THREADS == thread {
                assert_eq!(
                    value(sector, bytes, &self.what),
                    known[sector as usize],
                    "{}: the end",
                    self.what
                );
            }
        }
    }

    /// Reads everything, in pieces of any length: every sector belongs where it is.
    fn look(&self, seed: u64) {
        let mut rng = Rng::new(seed);
        while !self.stopped() {
            let first = rng.below(self.size / SECTOR);
            let length = (1 + rng.below(200)).min(self.size / SECTOR - first) * SECTOR;
            for (sector, bytes) in
                (first..).zip(self.read(first * SECTOR, length).chunks_exact(SECTOR as usize))
            {
                value(sector, bytes, &self.what);
            }
        }
    }

    fn clone(&self, seed: u64) {
        let mut rng = Rng::new(seed);
        while !self.stopped() {
            let storage = Arc::new(RecordingStorage::plain(Sparse::new(0)));
            let raw = rng.below(2) == 0;
            let target = match raw {
                true => CloneTarget::from(NewTarget::Raw {
                    storage: storage.clone(),
                    preallocation: Preallocation::Off,
                    keep: false,
                }),
                false => CloneTarget {
                    disk: NewTarget::Qcow2 {
                        storage: storage.clone(),
                        data_file: None,
                        create: Box::new(CreateOptions::default()),
                    },
                    compression: None,
                },
            };
            // The disk may have another size by then.
            let Ok(clone) = self.image.begin_clone(target, &Job::new()) else { continue };
            clone.run(&self.image, None, &Job::new()).unwrap();
            let file = storage.snapshot();
            let bytes = if raw {
                file.to_vec()
            } else {
                assert!(audit(&file).is_clean(), "{}: a clone", self.what);
                let rig =
                    Rig { geometry: Geometry::plain(65536), image: file, data_file: None, backing: None };
                let clone = rig.open_state(&rig.files(), &Opening::default()).unwrap();
                let mut bytes = vec![0; clone.virtual_size() as usize];
                clone.read(0, &mut bytes).unwrap();
                bytes
            };
            for (sector, bytes) in (0..self.size / SECTOR).zip(bytes.chunks_exact(SECTOR as usize)) {
                value(sector, bytes, &format!("{}: a clone", self.what));
            }
        }
    }

    fn manage(&self, seed: u64, file: &RecordingStorage) {
        let mut rng = Rng::new(seed);
        let geometry = &self.rig.geometry;
        let mut names = 100;
        while !self.stopped() {
            let table = Table::of(&self.image);
            let any = rng.below(table.count.max(1) as u64) as usize;
            match rng.below(12) {
                0 | 1 if geometry.snapshots() && table.count < 4 => {
                    names += 1;
                    self.image.execute(&table.create(&names.to_string(), "new")).unwrap();
                }
                2 | 3 if any < table.count => self.image.execute(&table.delete(any)).unwrap(),
                4 if any < table.count => self.image.execute(&table.rename(any, "another")).unwrap(),
                5..8 => {
                    let (rewrite, zeroes) = (rng.below(2) == 0, rng.below(2) == 0);
                    let options = CompactOptions { rewrite, zeroes, dry_run: rng.below(4) == 0 };
                    self.image.compact(options, &Job::new()).unwrap();
                }
                8 if geometry.version >= 3 => {
                    self.image.add_bitmap("new", None, true).unwrap();
                    std::thread::sleep(Duration::from_millis(1));
                    self.image.enable_bitmap("new", false).unwrap();
                    self.image.bitmap_extents("new").unwrap();
                    self.image.remove_bitmap("new").unwrap();
                }
                9 if geometry.version >= 3 || table.count == 0 => self.resize(&mut rng),
                _ => self
                    .image
                    .settled(|| {
                        // Late refcounts say so as long as the image is open.
                        let findings = Findings { dirty: false, ..audit(&file.snapshot()) };
                        assert!(findings.is_clean(), "{}: {findings:#?}", self.what);
                        Ok(())
                    })
                    .unwrap(),
            }
        }
    }

    fn resize(&self, rng: &mut Rng) {
        let more = (1 + rng.below(40)) * self.unit + rng.below(8) * SECTOR;
        self.image.resize_with(self.size, SHRINK).unwrap();
        self.image.resize(self.size + more).unwrap();
        assert!(self.read(self.size, more).iter().all(|b| *b == 0), "{}: what grew", self.what);
        let at = self.size + rng.below(more / SECTOR) * SECTOR;
        self.image.write(at, &stamped(at, SECTOR, 9)).unwrap();
        if rng.below(2) == 0 {
            self.image.flush().unwrap();
        }
        self.image.resize_with(self.size, SHRINK).unwrap();
    }
}

fn run(geometry: &Geometry, seed: u64) {
    let rig = Rig::forge(geometry, seed);
    let files: Vec<_> = rig.files().into_iter().map(RecordingStorage::plain).map(Arc::new).collect();
    let storages: Vec<Arc<dyn Storage>> = files
        .iter()
        .map(|file| Arc::new(Hooked::with(file.clone(), slow(seed))) as Arc<dyn Storage>)
        .collect();
    let write = WriteOptions {
        discard: Discard::Unmap,
        lazy_refcounts: seed.is_multiple_of(4) && geometry.version >= 3,
        first_fit: seed.is_multiple_of(3),
        ..WriteOptions::default()
    };
    let mut opening = Opening { write: Some(write), ..Opening::default() };
    // Now and then tables are forgotten all the time.
    opening.read.l2_cache_bytes = seed.is_multiple_of(2).then_some(1);
    let image = rig.open(&storages, &opening).unwrap();
    let unit = geometry.cluster_size;
    let world = World {
        rig: &rig,
        image,
        what: format!("{} seed {seed}", geometry.name()),
        size: geometry.size / (unit * THREADS) * (unit * THREADS),
        unit,
        compressed: geometry.menu().compression,
        discards: geometry.version >= 3,
        stop: AtomicBool::new(false),
        generation: AtomicU32::new(1000),
    };
    let until = Instant::now() + time();
    std::thread::scope(|scope| {
        let world = &world;
        let mut threads: Vec<_> =
            (0..THREADS).map(|thread| scope.spawn(move || world.write(thread, seed))).collect();
        threads.push(scope.spawn(move || world.look(seed)));
        threads.push(scope.spawn(move || world.clone(seed)));
        let file = &*files[0];
        threads.push(scope.spawn(move || world.manage(seed, file)));
        while Instant::now() < until && !threads.iter().any(|thread| thread.is_finished()) {
            std::thread::sleep(Duration::from_millis(5));
        }
        world.stop.store(true, Ordering::Release);
    });
    world.image.close().unwrap();
    let findings = audit(&files[0].snapshot());
    assert!(findings.is_clean(), "{}: {findings:#?}", world.what);
}

#[test]
fn nobody_disturbs_anybody() {
    for geometry in geometries() {
        run(&geometry, first_seed());
    }
}
