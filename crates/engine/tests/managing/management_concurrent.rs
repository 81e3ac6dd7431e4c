//! Snapshots taken, applied and deleted while guest requests of several threads are in flight.
//!
//! Each thread writes to a part of the disk of its own, one request behind the other. So of each thread, a snapshot holds
//! exactly what its first so many requests left, and these are at least those that were complete when the snapshot
//! began, at most those that had begun when it ended: the snapshot is one moment for all of them.

use crate::management;

use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use qcow2_engine::Image;
use qcow2_testkit::Rng;
use qcow2_testkit::contents::{Contents, disk};
use qcow2_testkit::crash::{Durability, Session};
use qcow2_testkit::matrix::Geometry;
use qcow2_testkit::ops::{Op, stamped};
use qcow2_testkit::plans::Table;

use management::{Action, World, checked, geometries, play, sound};

const THREADS: usize = 4;
const REQUESTS: usize = 40;

/// How often everything is done: more in a long run.
fn rounds() -> u64 {
    let states: u64 = std::env::var("QCOW2_CRASH_STATES").ok().and_then(|n| n.parse().ok()).unwrap_or(0);
    (states / 5_000).max(1)
}

/// What one thread does to its part of the disk.
struct Lane {
    /// First byte and end of the part: whole clusters.
    start: u64,
    end: u64,
    ops: Vec<Op>,
    first_generation: u32,
    begun: AtomicUsize,
    done: AtomicUsize,
}

impl Lane {
    fn new(thread: usize, geometry: &Geometry, seed: u64) -> Self {
        let cluster = geometry.cluster_size;
        let clusters = geometry.size / cluster / THREADS as u64;
        let (start, end) = (thread as u64 * clusters * cluster, (thread as u64 + 1) * clusters * cluster);
        let mut rng = Rng::new(seed * 31 + thread as u64);
        let compressed = geometry.menu().compression;
        let ops = (0..REQUESTS).map(|_| request(&mut rng, start, end, cluster, compressed)).collect();
        let first_generation = 10_000 * (thread as u32 + 1);
        Self { start, end, ops, first_generation, begun: AtomicUsize::new(0), done: AtomicUsize::new(0) }
    }

    fn run(&self, image: &Image, stop: &AtomicBool) {
        for (n, op) in self.ops.iter().enumerate() {
            self.begun.store(n + 1, Ordering::SeqCst);
            play(image, &[*op], self.first_generation + n as u32).unwrap_or_else(|e| panic!("{op:?}: {e:?}"));
            self.done.store(n + 1, Ordering::SeqCst);
            if stop.load(Ordering::SeqCst) {
                return;
            }
        }
    }

    /// Applies the requests of this range to `disk`, as they leave it.
    fn apply(&self, disk: &mut [u8], requests: std::ops::Range<usize>) {
        for n in requests {
            match self.ops[n] {
                Op::Write { offset, len } | Op::Compressed { offset, len } => {
                    let bytes = stamped(offset, len, self.first_generation + n as u32);
                    disk[offset as usize..(offset + len) as usize].copy_from_slice(&bytes);
                }
                Op::Zero { offset, len, .. } => disk[offset as usize..(offset + len) as usize].fill(0),
                _ => {}
            }
        }
    }

    fn part<'a>(&self, disk: &'a [u8]) -> &'a [u8] {
        &disk[self.start as usize..self.end as usize]
    }
}

/// A request inside a part of the disk. No discards: what they leave is not one thing.
fn request(rng: &mut Rng, start: u64, end: u64, cluster: u64, compressed: bool) -> Op {
    let offset = start + rng.below((end - start) / 512) * 512;
    let len = (512 * (1 + rng.below(3 * cluster / 512))).min(end - offset);
    let aligned = offset / cluster * cluster;
    match rng.below(8) {
        0 if compressed => Op::Compressed { offset: aligned, len: cluster },
        1 => Op::Zero { offset, len, unmap: true },
        2 => Op::Zero { offset: aligned, len: cluster, unmap: rng.below(2) == 0 },
        3 => Op::Flush,
        _ => Op::Write { offset, len },
    }
}

/// How many requests of each thread a change may have seen: begun before its end, complete before its begin.
type Bounds = Vec<RangeInclusive<usize>>;

/// Runs `change` while all threads write, in the middle of it.
fn amid<T>(image: &Image, lanes: &[Lane], change: impl FnOnce() -> T) -> (T, Bounds) {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for lane in lanes {
            let stop = &stop;
            scope.spawn(move || lane.run(image, stop));
        }
        while lanes.iter().map(|l| l.done.load(Ordering::SeqCst)).sum::<usize>() < THREADS * REQUESTS / 4 {
            std::thread::yield_now();
        }
        let done: Vec<usize> = lanes.iter().map(|l| l.done.load(Ordering::SeqCst)).collect();
        let out = change();
        let bounds = lanes.iter().zip(done).map(|(l, done)| done..=l.begun.load(Ordering::SeqCst)).collect();
        (out, bounds)
    })
}

/// Fails unless `found` is `base` with the first so many requests of each thread on it.
fn is_one_moment(found: &[u8], base: &[u8], lanes: &[Lane], bounds: &Bounds, what: &str) {
    for (number, (lane, bounds)) in lanes.iter().zip(bounds).enumerate() {
        let mut model = base.to_vec();
        lane.apply(&mut model, 0..*bounds.start());
        let fits = bounds.clone().any(|count| {
            if count > *bounds.start() {
                lane.apply(&mut model, count - 1..count);
            }
            lane.part(&model) == lane.part(found)
        });
        assert!(fits, "{what}: thread {number} after {bounds:?} requests");
    }
}

#[test]
fn a_snapshot_is_one_moment_of_all_requests_and_survives_any_power_cut() {
    let mut amidst = 0;
    for geometry in geometries().iter().filter(|g| g.snapshots()) {
        for seed in 1..=rounds() {
            let world = World::build(geometry, seed);
            let what = format!("{} create", world.name);
            let (mut session, storages) = Session::new(world.files(), Durability::Flush);
            let image = world.open(&storages);
            let before = world.contents(&world.files());
            let lanes: Vec<Lane> = (0..THREADS).map(|t| Lane::new(t, geometry, seed)).collect();
            let ((), bounds) = amid(&image, &lanes, || {
                image.execute(&Table::of(&image).create("9", "amid")).unwrap();
            });
            let now = || storages.iter().map(|s| s.snapshot()).collect::<Vec<_>>();
            image.flush().unwrap();
            let after = Contents::live(&image, &world.rig, &now()).unwrap();
            let mut end = before.active.clone();
            lanes.iter().for_each(|lane| lane.apply(&mut end, 0..REQUESTS));
            assert!(after.active == end, "{what}: the active disk");
            assert_eq!(after.snapshots[..3], before.snapshots[..], "{what}");
            let taken = after.snapshots[3].disk.clone();
            is_one_moment(&taken, &before.active, &lanes, &bounds, &what);
            amidst += bounds.iter().filter(|b| *b.end() < REQUESTS).count();
            image.close().unwrap();
            for state in session.states(seed, 40) {
                let text = format!("{what}, cut {}, {:?}", state.cut, state.shape);
                sound(&state.files[0]).unwrap_or_else(|e| panic!("{text}: {e}"));
                let found =
                    Contents::read(&world.rig, &state.files).unwrap_or_else(|e| panic!("{text}: {e}"));
                let snapshots = [&before.snapshots, &after.snapshots];
                assert!(snapshots.contains(&&found.snapshots), "{text}: {found:?}");
            }
        }
    }
    assert!(amidst > 0, "no thread had requests to come");
}

#[test]
fn a_snapshot_is_applied_at_one_moment_of_all_requests() {
    for geometry in geometries().iter().filter(|g| g.snapshots()) {
        for seed in 1..=rounds() {
            let world = World::build(geometry, seed);
            let what = format!("{} apply", world.name);
            let (mut session, storages) = Session::new(world.files(), Durability::Flush);
            let image = world.open(&storages);
            let before = world.contents(&world.files());
            let lanes: Vec<Lane> = (0..THREADS).map(|t| Lane::new(t, geometry, seed)).collect();
            let ((), bounds) = amid(&image, &lanes, || {
                image.execute(&Table::of(&image).apply(1)).unwrap();
            });
            image.close().unwrap();
            let now: Vec<_> = storages.iter().map(|s| s.snapshot()).collect();
            let after = world.contents(&now);
            assert_eq!(after.snapshots, before.snapshots, "{what}");
            // What came behind the moment lies on the snapshot's disk.
            for (number, (lane, bounds)) in lanes.iter().zip(bounds).enumerate() {
                let fits = bounds.clone().any(|count| {
                    let mut model = before.snapshots[1].disk.clone();
                    lane.apply(&mut model, count..REQUESTS);
                    lane.part(&model) == lane.part(&after.active)
                });
                assert!(fits, "{what}: thread {number} after {bounds:?} requests");
            }
            sound(&now[0]).unwrap_or_else(|e| panic!("{what}: {e}"));
            for state in session.states(seed, 40) {
                let text = format!("{what}, cut {}, {:?}", state.cut, state.shape);
                sound(&state.files[0]).unwrap_or_else(|e| panic!("{text}: {e}"));
                let found =
                    Contents::read(&world.rig, &state.files).unwrap_or_else(|e| panic!("{text}: {e}"));
                assert_eq!(found.snapshots, before.snapshots, "{text}");
            }
        }
    }
}

#[test]
fn everything_is_managed_while_requests_are_in_flight() {
    for geometry in &geometries() {
        for seed in 1..=rounds() {
            let world = World::build(geometry, seed);
            let (mut session, storages) = Session::new(world.files(), Durability::Flush);
            let image = world.open(&storages);
            let before = world.contents(&world.files());
            let lanes: Vec<Lane> = (0..THREADS).map(|t| Lane::new(t, geometry, seed)).collect();
            let actions = [
                Action::Rename(1),
                Action::Delete(0),
                Action::AddBitmap(true),
                Action::EnableBitmap("off", true),
                Action::MergeBitmaps,
                Action::Delete(1),
                Action::RemoveBitmap("on"),
                Action::Create,
                Action::ClearBitmap("off"),
            ];
            let mut snapshots = before.snapshots.clone();
            amid(&image, &lanes, || {
                for action in actions.into_iter().filter(|a| a.fits(geometry)) {
                    let old = Contents { snapshots: snapshots.clone(), ..before.clone() };
                    action.run(&image).unwrap_or_else(|e| panic!("{}: {action:?}: {e:?}", world.name));
                    if matches!(action, Action::Delete(_)) {
                        snapshots = action.expect(&old).snapshots;
                    }
                    // Readers see a whole disk at every moment.
                    disk(&image).unwrap();
                }
            });
            let mut end = before.active.clone();
            lanes.iter().for_each(|lane| lane.apply(&mut end, 0..REQUESTS));
            assert!(disk(&image).unwrap() == end, "{}: the active disk", world.name);
            image.close().unwrap();
            let now: Vec<_> = storages.iter().map(|s| s.snapshot()).collect();
            let after = world.contents(&now);
            assert!(after.active == end, "{}: the active disk, closed", world.name);
            assert!(after.bitmaps.iter().all(|b| b.ranges.is_some()), "{}: {after:?}", world.name);
            sound(&now[0]).and_then(|()| checked(&now[0])).unwrap();
            for state in session.sample_states(seed, 60) {
                let text = format!("{}, cut {}, {:?}", world.name, state.cut, state.shape);
                sound(&state.files[0]).unwrap_or_else(|e| panic!("{text}: {e}"));
                let found =
                    Contents::read(&world.rig, &state.files).unwrap_or_else(|e| panic!("{text}: {e}"));
                // A snapshot is there as it was, whatever its name, or it is gone.
                for shot in found.snapshots.iter().filter(|s| s.id != "9") {
                    let old = before.snapshots.iter().find(|s| s.id == shot.id);
                    assert!(old.is_some_and(|old| old.disk == shot.disk), "{text}: {found:?}");
                }
            }
        }
    }
}
