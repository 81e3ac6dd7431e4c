//! Power cuts during everything that manages an image: at any of them it is the old image or the new one, with leaks
//! at worst.
//!
//! A bounded sample of states by default. `QCOW2_CRASH_STATES=100000` judges about that many (`.ci/crash` does so).

use crate::management;

use std::collections::BTreeMap;
use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use qcow2_engine::Storage;
use qcow2_engine::image::read_header;
use qcow2_testkit::Qemu;
use qcow2_testkit::audit::audit;
use qcow2_testkit::contents::Contents;
use qcow2_testkit::crash::{Durability, Session, State};
use qcow2_testkit::plans::{Table, text};
use qcow2_testkit::recorder::RecordingStorage;
use qcow2_testkit::storage::{Hooked, Space};

use management::{
    Action, World, amendments, checked, checked_by_qemu, geometries, goes_on, run_amend, sound,
};

/// Seeds per layout and the random states of each change: more in a long run.
fn effort() -> (u64, usize) {
    let wanted: usize = std::env::var("QCOW2_CRASH_STATES").ok().and_then(|n| n.parse().ok()).unwrap_or(0);
    // A seed is about 20,000 states then.
    if wanted == 0 { (0, 12) } else { ((wanted as u64 / 20_000).max(1), 100) }
}

static JUDGED: AtomicUsize = AtomicUsize::new(0);

/// Judges states, the cheap way each, and a sample by slower judges.
struct Judge<'a> {
    world: &'a World,
    qemu: Option<&'a Qemu>,
    old: &'a Contents,
    new: &'a Contents,
    resized: bool,
    /// The order of snapshots and bitmaps may change.
    any_order: bool,
    what: String,
}

impl Judge<'_> {
    fn judge(&self, state: &State) {
        let number = JUDGED.fetch_add(1, Ordering::Relaxed);
        let verdict = std::panic::catch_unwind(AssertUnwindSafe(|| self.verdict(state, number)));
        if let Err(e) = verdict.unwrap_or_else(|_| Err("panicked".into())) {
            if let Some(folder) = std::env::var_os("QCOW2_CRASH_KEEP") {
                for (n, file) in state.files.iter().enumerate() {
                    file.write_to(&std::path::Path::new(&folder).join(format!("state-{n}")));
                }
            }
            panic!("{}: {}, cut {}, {:?}: {e}", self.world.name, self.what, state.cut, state.shape);
        }
    }

    fn verdict(&self, state: &State, number: usize) -> Result<(), String> {
        sound(&state.files[0])?;
        let found = Contents::read(&self.world.rig, &state.files)?;
        let found = if self.any_order { found.sorted() } else { found };
        found.judge(self.old, self.new, self.resized)?;
        // Marked as not closed cleanly, refcounts and flags may be anything: `goes_on` repairs them.
        let marked = self.any_order && audit(&state.files[0]).dirty;
        if number.is_multiple_of(8) && !marked {
            checked(&state.files[0])?;
        }
        if number.is_multiple_of(if marked { 4 } else { 16 }) {
            goes_on(self.world, &state.files, number as u64)?;
        }
        if number.is_multiple_of(211)
            && !marked
            && let Some(qemu) = self.qemu
        {
            checked_by_qemu(qemu, &self.world.rig, &state.files)?;
        }
        Ok(())
    }
}

/// Runs `f` for every item on all cores.
fn on_all_cores<T: Sync>(items: &[T], f: impl Fn(&T) + Sync) {
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(2, usize::from) {
            scope.spawn(|| {
                while let Some(item) = items.get(next.fetch_add(1, Ordering::Relaxed)) {
                    f(item);
                }
            });
        }
    });
}

/// Every change on every layout that has it; of a short run, each change on a few layouts and each layout with a few.
fn cases<T: Clone>(changes: impl Fn(&World) -> Vec<T>) -> Vec<(Arc<World>, T, u64)> {
    let (seeds, _) = effort();
    let only = std::env::var("QCOW2_CRASH_ONLY").unwrap_or_default();
    let mut cases = Vec::new();
    for (number, geometry) in geometries().iter().enumerate().filter(|(_, g)| g.name().contains(&only)) {
        for seed in 1..=seeds.max(1) {
            let world = Arc::new(World::build(geometry, seed));
            for (i, change) in changes(&world).into_iter().enumerate() {
                if seeds > 0 || (i + number).is_multiple_of(3) {
                    cases.push((world.clone(), change, seed));
                }
            }
        }
    }
    cases
}

#[test]
fn the_plans_are_those_of_the_facade() {
    let table = Table { generation: 7, count: 3 };
    let golden = include_str!("../../../../__test__/unit/snapshot-plans.txt");
    let plans = [
        ("create new", table.create("5", "new")),
        ("apply third", table.apply(1)),
        ("delete 3", table.delete(1)),
        ("rename first erste", table.rename(0, "erste")),
    ];
    let ours: Vec<String> = plans.iter().map(|(name, plan)| format!("{name}\n{}", text(plan))).collect();
    assert_eq!(ours.join("\n"), golden.split_once("\n\n").unwrap().1);
}

#[test]
fn no_power_cut_leaves_anything_between_the_old_image_and_the_new_one() {
    let qemu = Qemu::find();
    let all = |world: &World| {
        let geometry = &world.rig.geometry;
        Action::all().into_iter().filter(|action| action.fits(geometry)).collect()
    };
    let cases = cases(all);
    on_all_cores(&cases, |(world, action, seed)| explore(world, *action, *seed, qemu.as_ref()));
    eprintln!("{} states of {} changes", JUDGED.load(Ordering::Relaxed), cases.len());
}

/// Runs the change on an image that a guest wrote to, and judges its states.
fn explore(world: &World, action: Action, seed: u64, qemu: Option<&Qemu>) {
    let (mut session, storages) = Session::new(world.files(), Durability::Flush);
    let image = world.open(&storages);
    world.scribble(&image, seed, 3000).unwrap();
    image.flush().unwrap();
    let now = || storages.iter().map(|s| s.snapshot()).collect::<Vec<_>>();
    let old = Contents::live(&image, &world.rig, &now()).unwrap();
    session.forget();
    let what = format!("{action:?}");
    action.run(&image).unwrap_or_else(|e| panic!("{}: {what}: {e:?}", world.name));
    let new = action.expect(&old);
    if action == Action::Close {
        assert_eq!(world.contents(&now()), new, "{}: {what}", world.name);
    } else {
        let live = Contents::live(&image, &world.rig, &now()).unwrap();
        assert_eq!(live, new, "{}: {what}", world.name);
        // What is complete is durable.
        let last = session.states(seed, 0).last().unwrap();
        let found = world.contents(&last.files);
        found.judge(&new, &new, true).unwrap_or_else(|e| panic!("{}: {what}, complete: {e}", world.name));
    }
    drop(image);
    let resized = action.resizes();
    let judge = Judge { world, qemu, old: &old, new: &new, resized, any_order: false, what };
    session.states(seed, effort().1).for_each(|state| judge.judge(&state));
}

/// The same without any space: what frees some is done where things are, or refused.
#[test]
fn no_power_cut_on_a_full_disk_harms_what_frees_space() {
    let qemu = Qemu::find();
    let cases = cases(|world: &World| {
        let geometry = &world.rig.geometry;
        Action::freeing().into_iter().filter(|action| action.fits(geometry)).collect()
    });
    let done = Mutex::new(BTreeMap::<&str, [usize; 2]>::new());
    on_all_cores(&cases, |(world, action, seed)| {
        let kind = match action {
            Action::Delete(_) => "delete",
            Action::RemoveBitmap(_) => "remove",
            Action::ClearBitmap(_) => "clear",
            _ => "shrink",
        };
        let refused = !explore_full(world, *action, *seed, qemu.as_ref());
        done.lock().unwrap().entry(kind).or_default()[usize::from(refused)] += 1;
    });
    let done = done.into_inner().unwrap();
    eprintln!("done and refused: {done:?}");
    assert!(done.len() == 4 && done.values().all(|[done, refused]| *done > 0 && *refused <= *done));
}

/// As `explore`, on a file system that ran full. Whether the change was made.
fn explore_full(world: &World, action: Action, seed: u64, qemu: Option<&Qemu>) -> bool {
    let (mut session, storages) = Session::new(world.files(), Durability::Flush);
    let space = Arc::new(Space::of(&*storages[0]));
    let mut files: Vec<Arc<dyn Storage>> = storages.iter().map(|s| s.clone() as Arc<dyn Storage>).collect();
    files[0] = Arc::new(Hooked::with(storages[0].clone(), Arc::clone(&space)));
    let image = world.rig.open(&files, &management::writable()).unwrap();
    world.scribble(&image, seed, 3000).unwrap();
    image.flush().unwrap();
    space.fill_up(0);
    let now = || storages.iter().map(|s| s.snapshot()).collect::<Vec<_>>();
    let before = Contents::live(&image, &world.rig, &now()).unwrap();
    let old = before.clone().sorted();
    session.forget();
    let what = format!("{action:?} without space");
    let done = action.run(&image);
    let new = match &done {
        Ok(()) => action.expect(&before).sorted(),
        Err(error) => {
            assert!(error.is_no_space(), "{}: {what}: {error:?}", world.name);
            old.clone()
        }
    };
    let live = Contents::live(&image, &world.rig, &now()).unwrap().sorted();
    assert_eq!(live, new, "{}: {what}", world.name);
    let last = session.states(seed, 0).last();
    if let (Ok(()), Some(last)) = (&done, last) {
        let found = world.contents(&last.files).sorted();
        found.judge(&new, &new, true).unwrap_or_else(|e| panic!("{}: {what}, complete: {e}", world.name));
    }
    let resized = action.resizes();
    let judge = Judge { world, qemu, old: &old, new: &new, resized, any_order: true, what };
    session.states(seed, effort().1).for_each(|state| judge.judge(&state));
    // Bitmaps that changed need space, and say so; nothing is left behind then either.
    if let Err(error) = image.close() {
        assert!(error.is_no_space(), "{}: {}, close: {error:?}", world.name, judge.what);
    }
    let findings = audit(&now()[0]);
    // Version 2 has no mark for refcounts on their way.
    let fine = findings.is_clean() || world.rig.geometry.version == 2 && findings.is_sound();
    assert!(fine, "{}: {}: {findings:#?}", world.name, judge.what);
    done.is_ok()
}

#[test]
fn no_power_cut_while_an_image_is_amended_harms_it() {
    let qemu = Qemu::find();
    let cases = cases(|world: &World| amendments(&world.rig.geometry));
    on_all_cores(&cases, |(world, options, seed)| {
        let (mut session, storages) = Session::new(world.files(), Durability::Flush);
        let old = world.contents(&world.files());
        let what = format!("{options:?}");
        // Version 2 has no bitmaps: they are removed first.
        if options.version == Some(2) && world.rig.geometry.version == 3 {
            let image = world.open(&storages);
            old.bitmaps.iter().for_each(|b| image.remove_bitmap(&b.name).unwrap());
            // Nor snapshots of another size.
            while Table::of(&image).count > 1 {
                image.execute(&Table::of(&image).delete(0)).unwrap();
            }
            image.close().unwrap();
            session.forget();
        }
        let now = || storages.iter().map(|s| s.snapshot()).collect::<Vec<_>>();
        let old = world.contents(&now());
        let header = |storage: &dyn Storage| read_header(storage).unwrap();
        let before = header(&*storages[0]);
        run_amend(storages[0].clone(), &world.rig.geometry, options)
            .unwrap_or_else(|e| panic!("{}: {what}: {e:?}", world.name));
        let after = header(&*storages[0]);
        assert_eq!(world.contents(&now()), old, "{}: {what}", world.name);
        let judge = Judge {
            world,
            qemu: qemu.as_ref(),
            old: &old,
            new: &old,
            resized: false,
            any_order: false,
            what,
        };
        session.states(*seed, effort().1).for_each(|state| {
            judge.judge(&state);
            let storage = Arc::new(RecordingStorage::plain(state.files[0].clone()));
            let found = header(&*storage);
            let widths = [before.geometry, after.geometry].map(|g| g.refcount_bits());
            assert!([before.version, after.version].contains(&found.version), "{options:?}");
            assert!(widths.contains(&found.geometry.refcount_bits()), "{options:?}");
            // It can be done again, to the same end.
            let again = run_amend(storage.clone(), &world.rig.geometry, options);
            again.unwrap_or_else(|e| panic!("{options:?} again: {e:?}"));
            let again = header(&*storage);
            assert_eq!((again.version, again.compatible), (after.version, after.compatible), "{options:?}");
            assert_eq!(again.geometry, after.geometry, "{options:?}");
        });
    });
}

#[test]
fn a_plan_that_stops_between_two_steps_leaves_the_old_image_or_the_new_one() {
    let actions = [Action::Create, Action::Apply(0), Action::Delete(1), Action::Rename(0)];
    for geometry in geometries().iter().filter(|g| g.snapshots()) {
        let world = World::build(geometry, 1);
        for action in actions {
            for steps in 1.. {
                let (mut session, storages) = Session::new(world.files(), Durability::Flush);
                let image = world.open(&storages);
                world.scribble(&image, 7, 3000).unwrap();
                image.flush().unwrap();
                let now = || storages.iter().map(|s| s.snapshot()).collect::<Vec<_>>();
                let old = Contents::live(&image, &world.rig, &now()).unwrap();
                let new = action.expect(&old);
                session.forget();
                let table = Table::of(&image);
                let mut plan = match action {
                    Action::Create => table.create("9", "new"),
                    Action::Apply(index) => table.apply(index),
                    Action::Delete(index) => table.delete(index),
                    _ => table.rename(0, "another name, and a longer one"),
                };
                if steps > plan.steps.len() {
                    break;
                }
                plan.steps.truncate(steps);
                image.execute(&plan).unwrap();
                let what = format!("{action:?}, {steps} steps");
                let resized = action.resizes();
                let judge = Judge {
                    world: &world,
                    qemu: None,
                    old: &old,
                    new: &new,
                    resized,
                    any_order: false,
                    what,
                };
                session
                    .states(steps as u64, 4)
                    .filter(|s| s.cut % 3 == steps % 3)
                    .for_each(|s| judge.judge(&s));
                // The process lives on with what the steps made.
                session.forget();
                world.scribble(&image, 7, 4000).unwrap();
                image.flush().unwrap();
                let then = Contents::live(&image, &world.rig, &now()).unwrap();
                assert!(then.snapshots == old.snapshots || then.snapshots == new.snapshots, "{}", judge.what);
                image.close().unwrap();
                sound(&now()[0]).unwrap_or_else(|e| panic!("{}: {}: {e}", world.name, judge.what));
                let closed = world.contents(&now());
                assert!(closed.active == then.active && closed.snapshots == then.snapshots, "{}", judge.what);
            }
        }
    }
}

#[test]
fn no_power_cut_while_an_unclean_image_is_opened_harms_it() {
    let layouts = geometries().into_iter().filter(|g| g.version >= 3);
    for (number, geometry) in layouts.enumerate() {
        let world = World::build(&geometry, 2);
        let contents = world.contents(&world.files());
        let mut files = world.files();
        // As lazy refcounts leave it: the mark is there, some refcounts are not.
        let header = read_header(&RecordingStorage::plain(files[0].clone())).unwrap();
        let block = files[0].u64(header.refcount_table_offset.0) & !511;
        let some = 3 + number as u64 % 3;
        files[0].write(block + some, &[0; 7]);
        let marks = files[0].get(79, 1)[0] | 1;
        files[0].write(79, &[marks]);
        let (mut session, storages) = Session::new(files, Durability::Flush);
        let image = world.open(&storages);
        world.scribble(&image, 9, 3000).unwrap();
        image.flush().unwrap();
        drop(image);
        let opened = storages[0].snapshot();
        sound(&opened).unwrap_or_else(|e| panic!("{}: {e}", world.name));
        let mut judged = 0;
        for state in session.states(3, effort().1) {
            let text = format!("{}: cut {}, {:?}", world.name, state.cut, state.shape);
            let found = Contents::read(&world.rig, &state.files).unwrap_or_else(|e| panic!("{text}: {e}"));
            assert!(found.snapshots == contents.snapshots, "{text}");
            // Marked, or sound; and it opens again for writing, and is sound then.
            sound(&state.files[0]).unwrap_or_else(|e| panic!("{text}: {e}"));
            goes_on(&world, &state.files, state.cut as u64).unwrap_or_else(|e| panic!("{text}: {e}"));
            judged += 1;
        }
        assert!(judged > 5, "{}: {judged} states", world.name);
    }
}
