//! Calls that fail while an image is managed: whichever it is, the change happened or it did not, what is read stays
//! right, and the file has at worst leaks.
//!
//! A sample of the calls by default; all of them with `QCOW2_FAULTS`.

use crate::management;

use std::sync::Arc;

use qcow2_engine::{ErrorKind, Image, Result, Storage};
use qcow2_testkit::Sparse;
use qcow2_testkit::contents::{Contents, disk};
use qcow2_testkit::crash::{Durability, Session};
use qcow2_testkit::recorder::RecordingStorage;
use qcow2_testkit::storage::{Fault, FaultStorage, Op as Call};

use management::{Action, World, amendments, geometries, goes_on, run_amend, sound, writable};

const EIO: i32 = 5;
const ENOSPC: i32 = 28;

/// The kinds of faults: each call once, and a disk that is full from then on.
fn faults() -> [Fault; 3] {
    let full = vec![Call::Write, Call::Allocate, Call::SetLen, Call::Zero];
    [
        Fault::nth(0, EIO),
        Fault { ops: full, after: 0, once: false, errno: ENOSPC },
        Fault { ops: vec![Call::Sync], after: 0, once: false, errno: EIO },
    ]
}

/// Every call in a long run; else about this many of them.
fn calls(total: u64, few: u64) -> impl Iterator<Item = u64> {
    let step = if std::env::var_os("QCOW2_FAULTS").is_some() { 1 } else { (total / few).max(1) };
    (0..total).step_by(step as usize)
}

/// Files of which one fails, with a record of what happens to them.
struct Faulty {
    session: Session,
    recording: Vec<Arc<RecordingStorage>>,
    faulty: Arc<FaultStorage>,
    files: Vec<Arc<dyn Storage>>,
}

impl Faulty {
    fn new(files: Vec<Sparse>, fault: Fault, file: usize) -> Self {
        let (session, recording) = Session::new(files, Durability::Flush);
        let faulty = Arc::new(FaultStorage::new(recording[file].clone(), fault));
        let mut files: Vec<Arc<dyn Storage>> =
            recording.iter().map(|f| f.clone() as Arc<dyn Storage>).collect();
        files[file] = faulty.clone();
        Self { session, recording, faulty, files }
    }

    fn now(&self) -> Vec<Sparse> {
        self.recording.iter().map(|s| s.snapshot()).collect()
    }
}

/// Opens the image and lets a guest write to it, all of it durable.
fn begin(world: &World, faulty: &mut Faulty) -> (Image, Contents) {
    let image = world.rig.open(&faulty.files, &writable()).unwrap();
    world.scribble(&image, 5, 3000).unwrap();
    image.flush().unwrap();
    faulty.session.forget();
    let old = Contents::live(&image, &world.rig, &faulty.now()).unwrap();
    (image, old)
}

/// Runs the change with the call number `n` of it failing; gives how many calls of these kinds it makes.
fn explore(world: &World, action: Action, fault: &Fault, file: usize, n: Option<u64>) -> u64 {
    // As many calls as the beginning makes, of this kind, succeed.
    let mut dry = Faulty::new(world.files(), Fault { after: u64::MAX, ..fault.clone() }, file);
    let (image, _) = begin(world, &mut dry);
    let before = dry.faulty.calls();
    let Some(n) = n else {
        action.run(&image).unwrap_or_else(|e| panic!("{}: {action:?}: {e:?}", world.name));
        return dry.faulty.calls() - before;
    };
    drop((image, dry));
    let what = format!("{}: {action:?}, call {n} of file {file}, {fault:?}", world.name);
    let mut faulty = Faulty::new(world.files(), Fault { after: before + n, ..fault.clone() }, file);
    let (image, old) = begin(world, &mut faulty);
    let result = action.run(&image);
    let new = action.expect(&old);
    judge(world, action, &mut faulty, &image, (&old, &new), &result)
        .unwrap_or_else(|e| panic!("{what}: {result:?}: {e}"));
    0
}

fn judge(
    world: &World,
    action: Action,
    faulty: &mut Faulty,
    image: &Image,
    (old, new): (&Contents, &Contents),
    result: &Result<()>,
) -> std::result::Result<(), String> {
    let resized = action.resizes();
    let possible = if result.is_ok() { new } else { old };
    if let Err(e) = result
        && e.kind() == ErrorKind::Internal
    {
        return Err("an internal error".into());
    }
    let found = Contents::read(&world.rig, &faulty.now())?;
    found.judge(possible, new, resized)?;
    sound(&faulty.now()[0])?;
    // What readers of this handle see: faults of reading may go on.
    match disk(image) {
        Ok(live) if live != possible.active && live != new.active => {
            return Err("the disk reads differently".into());
        }
        _ => {}
    }
    for state in faulty.session.sample_states(9, 3) {
        let cut = |e| format!("cut {}, {:?}: {e}", state.cut, state.shape);
        sound(&state.files[0]).map_err(cut)?;
        Contents::read(&world.rig, &state.files).and_then(|c| c.judge(old, new, resized)).map_err(cut)?;
    }
    // The process goes on, as far as the image lets it.
    let went_on = world.scribble(image, 6, 4000).and_then(|()| image.flush());
    let live = disk(image).ok();
    let closed = image.close();
    let files = faulty.now();
    sound(&files[0]).map_err(|e| format!("closed: {e}"))?;
    let end = Contents::read(&world.rig, &files)?;
    if end.snapshots != possible.snapshots && end.snapshots != new.snapshots {
        return Err(format!("closed: snapshots of {end:?}"));
    }
    if went_on.is_ok()
        && closed.is_ok()
        && live.is_some_and(|live| live != end.active)
        && action != Action::Close
    {
        return Err("closed: the disk is another one".into());
    }
    goes_on(world, &files, 3)
}

#[test]
fn any_call_may_fail_while_an_image_is_managed() {
    let mut failures = 0;
    for (number, geometry) in geometries().iter().enumerate() {
        let world = World::build(geometry, 3);
        let actions = Action::all().into_iter().filter(|a| a.fits(geometry)).enumerate();
        let all = std::env::var_os("QCOW2_FAULTS").is_some();
        for (_, action) in actions.filter(|(i, _)| all || (i + number).is_multiple_of(3)) {
            for fault in faults() {
                for file in 0..world.files().len() {
                    let total = explore(&world, action, &fault, file, None);
                    for n in calls(total, 6) {
                        explore(&world, action, &fault, file, Some(n));
                        failures += 1;
                    }
                }
            }
        }
    }
    assert!(failures > 500, "{failures}");
}

#[test]
fn any_call_may_fail_while_an_image_is_amended() {
    let mut failures = 0;
    for geometry in geometries() {
        let world = World::build(&geometry, 4);
        for options in amendments(&geometry).iter().filter(|o| o.version != Some(2)) {
            let old = world.contents(&world.files());
            for fault in faults() {
                let dry = Faulty::new(world.files(), Fault { after: u64::MAX, ..fault.clone() }, 0);
                run_amend(dry.faulty.clone(), &geometry, options).unwrap();
                for n in calls(dry.faulty.calls(), 5) {
                    let what = format!("{}: {options:?}, call {n}, {fault:?}", world.name);
                    let mut faulty = Faulty::new(world.files(), Fault { after: n, ..fault.clone() }, 0);
                    let result = run_amend(faulty.faulty.clone(), &geometry, options);
                    let kind = result.as_ref().err().map(|e| e.kind());
                    assert!(matches!(kind, None | Some(ErrorKind::Io)), "{what}: {result:?}");
                    let files = faulty.now();
                    sound(&files[0]).unwrap_or_else(|e| panic!("{what}: {e}"));
                    assert_eq!(world.contents(&files), old, "{what}");
                    for state in faulty.session.sample_states(n, 3) {
                        sound(&state.files[0]).unwrap_or_else(|e| panic!("{what}: {e}"));
                        assert_eq!(world.contents(&state.files), old, "{what}, cut {}", state.cut);
                    }
                    run_amend(faulty.recording[0].clone(), &geometry, options)
                        .unwrap_or_else(|e| panic!("{what}, again: {e:?}"));
                    assert_eq!(world.contents(&faulty.now()), old, "{what}, again");
                    failures += 1;
                }
            }
        }
    }
    assert!(failures > 100, "{failures}");
}
