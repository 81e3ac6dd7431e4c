//! A panic is a bug, and bugs happen: it ends the request that met it with a coded error. The process goes on, requests of
//! others too, and nobody waits for who is gone. The file's guard is the addon's own.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, reason = "tests")]

#[path = "../../node/src/guard.rs"]
mod guard;

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use guard::guarded;
use qcow2_engine::clone::CloneTarget;
use qcow2_engine::convert::{ConvertOptions, ConvertTarget, convert};
use qcow2_engine::create::{NewTarget, Preallocation};
use qcow2_engine::{Error, ErrorKind, Image, Job, OpenOptions, Qcow2, Storage, WriteOptions};
use qcow2_testkit::disk_model::Rig;
use qcow2_testkit::matrix::Geometry;
use qcow2_testkit::ops::{Target, stamped};
use qcow2_testkit::recorder::RecordingStorage;
use qcow2_testkit::storage::{Before, Hooked, Op};

/// Calls of one kind panic while it is armed.
struct Panicking {
    on: Op,
    armed: AtomicBool,
    met: AtomicU32,
}

impl Panicking {
    fn new(on: Op) -> Arc<Self> {
        Arc::new(Self { on, armed: AtomicBool::new(false), met: AtomicU32::new(0) })
    }
}

impl Before for Panicking {
    fn before(&self, op: Op, _range: Range<u64>) -> io::Result<()> {
        if op == self.on && self.armed.load(Ordering::Relaxed) {
            let number = self.met.fetch_add(1, Ordering::Relaxed);
            panic!("a test panic, number {number}");
        }
        Ok(())
    }
}

fn assert_internal(error: &Error) {
    assert_eq!(error.kind(), ErrorKind::Internal, "{error:?}");
    assert_eq!(error.kind().code(), "ERR_QCOW2_INTERNAL");
}

fn image(on: Op) -> (Image, Arc<Panicking>) {
    let rig = Rig::forge(&Geometry { size: 64 * 65536, ..Geometry::plain(65536) }, 5);
    let panicking = Panicking::new(on);
    let storage = Hooked::with(Arc::new(RecordingStorage::plain(rig.image)), Arc::clone(&panicking));
    let mut qcow2 = Qcow2::open(Arc::new(storage), &OpenOptions::default()).unwrap();
    qcow2.enable_writing(WriteOptions::default()).unwrap();
    (Image::new(vec![Box::new(qcow2)]).unwrap(), panicking)
}

#[test]
fn what_a_panic_says_is_kept() {
    let error = guarded(|| -> Result<(), Error> { panic!("plain text") }).unwrap_err();
    assert_internal(&error);
    assert!(error.to_string().contains("a bug in this library: plain text"), "{error}");
    let error = guarded(|| -> Result<(), Error> { panic!("with a number, {}", 7) }).unwrap_err();
    assert!(error.to_string().contains("with a number, 7"), "{error}");
    let error = guarded(|| -> Result<(), Error> { std::panic::panic_any(7) }).unwrap_err();
    assert!(error.to_string().contains("no message"), "{error}");
    assert_eq!(guarded(|| Ok(7)).unwrap(), 7);
    let error = guarded(|| -> Result<(), Error> { Err(Error::new(ErrorKind::Limit, "too many")) });
    assert_eq!(error.unwrap_err().kind(), ErrorKind::Limit);
}

/// Workers as the addon has them: each request guarded. Those that panic fail alone; nobody waits for their locks or
/// registrations, on the same image either.
#[test]
fn a_request_that_panics_fails_alone() {
    for on in [Op::Write, Op::Read, Op::Sync] {
        let ((broken, panicking), (sound, _)) = (image(on), image(on));
        panicking.armed.store(true, Ordering::Relaxed);
        let start = Instant::now();
        std::thread::scope(|scope| {
            for worker in 0..4u64 {
                let (broken, sound) = (&broken, &sound);
                scope.spawn(move || {
                    for n in 0..20u64 {
                        // All at the same clusters: what one left registered would keep the others waiting.
                        let at = (n + worker) % 8 * 65536 + 512 * worker;
                        let generation = (100 + n * 4 + worker) as u32;
                        let part = stamped(at, 512, generation);
                        let on_broken = guarded(|| {
                            broken.write(at, &part)?;
                            broken.flush()?;
                            broken.read(at, &mut [0; 512])
                        });
                        if let Err(error) = on_broken {
                            assert_internal(&error);
                        }
                        guarded(|| sound.write(at, &part)).unwrap();
                        let mut bytes = [0; 512];
                        guarded(|| sound.read(at, &mut bytes)).unwrap();
                        assert!(bytes[..] == part[..]);
                    }
                });
            }
        });
        assert!(panicking.met.load(Ordering::Relaxed) > 0, "{on:?} never panicked");
        assert!(start.elapsed() < Duration::from_secs(100), "{on:?}: somebody waited for who is gone");
        sound.close().unwrap();
    }
}

/// Jobs have threads of their own: a panic in one ends the job with an error, not the process or its other threads.
#[test]
fn a_job_whose_worker_panics_fails() {
    let (source, reading) = image(Op::Read);
    let target = || -> Arc<dyn Storage> { Arc::new(RecordingStorage::plain(qcow2_testkit::Sparse::new(0))) };
    let raw = |storage| {
        ConvertTarget::New(NewTarget::Raw { storage, preallocation: Preallocation::Off, keep: false })
    };
    let clone = |storage| {
        source.begin_clone(
            CloneTarget::from(NewTarget::Raw { storage, preallocation: Preallocation::Off, keep: false }),
            &Job::new(),
        )
    };
    reading.armed.store(true, Ordering::Relaxed);
    let options = ConvertOptions::default();
    let converted = guarded(|| convert(&source, raw(target()), &options, &Job::new()));
    assert_internal(&converted.unwrap_err());
    let cloned = guarded(|| clone(target())?.run(&source, None, &Job::new()));
    assert_internal(&cloned.unwrap_err());
    reading.armed.store(false, Ordering::Relaxed);

    let panicking = Panicking::new(Op::Write);
    panicking.armed.store(true, Ordering::Relaxed);
    let broken: Arc<dyn Storage> = Arc::new(Hooked::with(target(), Arc::clone(&panicking)));
    let converted = guarded(|| convert(&source, raw(Arc::clone(&broken)), &options, &Job::new()));
    assert_internal(&converted.unwrap_err());
    panicking.met.store(0, Ordering::Relaxed);
    let begun = clone(broken).unwrap();
    // The request that copies first meets the clone's panic: it is the clone's, and the write goes on.
    for n in 0..64u64 {
        source.write(n << 16, &stamped(n << 16, 512, 50)).unwrap();
    }
    assert_eq!(panicking.met.load(Ordering::Relaxed), 1, "a clone that ended is not copied for");
    assert_internal(&guarded(|| begun.run(&source, None, &Job::new())).unwrap_err());
    convert(&source, raw(target()), &options, &Job::new()).unwrap();
    clone(target()).unwrap().run(&source, None, &Job::new()).unwrap();
}
