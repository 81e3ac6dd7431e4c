//! Power cuts while a clone is made, and while the image is compacted beside it: the image keeps what was flushed, and what
//! became of an unfinished clone is no image.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use qcow2_engine::clone::CloneTarget;
use qcow2_engine::compact::CompactOptions;
use qcow2_engine::convert::Compression;
use qcow2_engine::create::{CreateOptions, NewTarget};
use qcow2_engine::{Discard, Job, Storage, WriteOptions};
use qcow2_testkit::audit::audit;
use qcow2_testkit::contents::disk;
use qcow2_testkit::crash::{Durability, Scope, Session};
use qcow2_testkit::disk_model::{Opening, Rig};
use qcow2_testkit::matrix::{Backing, DataFile, Geometry};
use qcow2_testkit::ops::Op;
use qcow2_testkit::storage::Door;
use qcow2_testkit::{Sparse, crash::FIRST_GENERATION};

/// Most compactions beside a clone.
const COMPACTIONS: usize = 3;

/// How often everything is done: more in a long run.
fn rounds() -> u64 {
    let states: u64 = std::env::var("QCOW2_CRASH_STATES").ok().and_then(|n| n.parse().ok()).unwrap_or(0);
    (states / 5_000).max(1)
}

fn geometries() -> Vec<Geometry> {
    let plain = Geometry::plain;
    let small = |cluster_size, clusters| Geometry { size: clusters * cluster_size, ..plain(cluster_size) };
    vec![
        small(4096, 100),
        small(512, 400),
        Geometry { backing: Backing::LongerQcow2, ..small(4096, 80) },
        Geometry { extended_l2: true, ..small(16384, 40) },
        Geometry { zstd: true, refcount_bits: 64, ..small(1024, 200) },
        Geometry { data_file: DataFile::External, ..small(4096, 100) },
        Geometry { door: Door::Xts, ..small(4096, 80) },
    ]
}

/// The disk in the file of a clone, which is an image of its own.
fn cloned(file: &Sparse) -> Result<Vec<u8>, String> {
    let findings = audit(file);
    if !findings.is_clean() {
        return Err(format!("{findings:#?}"));
    }
    let rig = Rig { geometry: Geometry::plain(65536), image: file.clone(), data_file: None, backing: None };
    disk(&rig.open_state(&rig.files(), &Opening::default()).map_err(|e| format!("{e:?}"))?)
}

fn is_image(file: &Sparse) -> bool {
    file.to_vec().starts_with(b"QFI\xfb")
}

fn explore(geometry: &Geometry, seed: u64, compacts: bool) -> usize {
    let rig = Rig::forge(geometry, seed);
    let what = format!("{} seed {seed}, compacts {compacts}", geometry.name());
    let own = rig.files().len();
    let (mut session, storages) =
        Session::new(rig.files().into_iter().chain([Sparse::new(0)]).collect(), Durability::Flush);
    let files: Vec<Arc<dyn Storage>> = storages.iter().map(|s| s.clone() as Arc<dyn Storage>).collect();
    let write = WriteOptions { discard: Discard::Unmap, ..WriteOptions::default() };
    let image = rig.open(&files[..own], &Opening { write: Some(write), ..Opening::default() }).unwrap();
    session.start(&image);
    let mut menu = rig.menu();
    (menu.size, menu.grow, menu.reopen) = (image.virtual_size() / 512 * 512, false, false);
    let play = |ops: Vec<Op>, first: u32| {
        for (op, generation) in ops.into_iter().zip(first..) {
            session.run(&image, op, generation).unwrap_or_else(|e| panic!("{what}: {op:?}: {e:?}"));
        }
    };
    play(menu.sequence(seed, 8), FIRST_GENERATION);
    let create = CreateOptions { cluster_size: 4096, ..CreateOptions::default() };
    let target = CloneTarget {
        disk: NewTarget::Qcow2 { storage: files[own].clone(), data_file: None, create: Box::new(create) },
        compression: seed.is_multiple_of(2).then(Compression::default),
    };
    let moment = disk(&image).unwrap();
    let clone = image.begin_clone(target, &Job::new()).unwrap();
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        if compacts {
            scope.spawn(|| {
                // Each adds states to judge, so there are not as many as the machine finds time for.
                for _ in 0..COMPACTIONS {
                    if over.load(Ordering::Acquire) {
                        break;
                    }
                    let options = CompactOptions { rewrite: true, zeroes: true, ..CompactOptions::default() };
                    image.compact(options, &Job::new()).unwrap();
                }
            });
        }
        let requests = scope.spawn(|| play(menu.sequence(seed + 1, 12), FIRST_GENERATION + 100));
        if seed % 2 == 1 {
            requests.join().unwrap();
            clone.run(&image, None, &Job::new()).unwrap();
        } else {
            clone.run(&image, None, &Job::new()).unwrap();
            requests.join().unwrap();
        }
        over.store(true, Ordering::Release);
    });
    play(menu.sequence(seed + 2, 4), FIRST_GENERATION + 200);
    session.run(&image, Op::Flush, FIRST_GENERATION + 300).unwrap();
    assert!(cloned(&storages[own].snapshot()).as_deref() == Ok(&moment[..]), "{what}: the clone");
    let history = session.history();
    let (mut judged, mut images) = (0, 0);
    for state in session.states(seed, 40) {
        let text = format!("{what}, cut {}, {:?}", state.cut, state.shape);
        let findings = audit(&state.files[0]);
        assert!(findings.is_sound(), "{text}: {findings:#?}");
        let found = rig.open_state(&state.files[..own], &Opening::default()).unwrap();
        history.judge(&found, state.cut, &Scope::Whole).unwrap_or_else(|e| panic!("{text}: {e}"));
        if is_image(&state.files[own]) {
            let found = cloned(&state.files[own]).unwrap_or_else(|e| panic!("{text}: the clone: {e}"));
            assert!(found == moment, "{text}: a clone that is not what the disk was");
            images += 1;
        }
        judged += 1;
    }
    assert!(images > 0 && images < judged, "{what}: {images} of {judged} clones are complete");
    judged
}

#[test]
fn no_power_cut_leaves_half_a_clone() {
    let mut judged = 0;
    for seed in 0..2 * rounds() {
        for geometry in geometries() {
            judged += explore(&geometry, seed, false);
        }
    }
    eprintln!("{} crash states beside a clone", judged);
}

#[test]
fn no_power_cut_of_a_compaction_beside_a_clone_loses_anything() {
    let mut judged = 0;
    // A second history where there is time for many.
    let seeds = if rounds() > 1 { 2 * rounds() } else { 1 };
    for seed in 10..10 + seeds {
        for geometry in geometries() {
            judged += explore(&geometry, seed, true);
        }
    }
    eprintln!("{} crash states of a compaction beside a clone", judged);
}
