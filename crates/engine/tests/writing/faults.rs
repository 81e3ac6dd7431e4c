//! Calls that fail: whichever it is, nothing panics or hangs, what reads gives is right, the file has at worst leaks,
//! and what was flushed is there.

use std::sync::Arc;

use qcow2_engine::{Discard, ErrorKind, Storage, WriteOptions};
use qcow2_testkit::audit::audit;
use qcow2_testkit::crash::{Durability, FIRST_GENERATION, Scope, Session};
use qcow2_testkit::disk_model::{Opening, Rig};
use qcow2_testkit::matrix::{Backing, DataFile, Geometry};
use qcow2_testkit::ops::{Op, Target};
use qcow2_testkit::storage::{Door, Fault, FaultStorage, Op as Call, ShortIo};

const EIO: i32 = 5;
const ENOSPC: i32 = 28;

fn writable() -> Opening {
    let write = WriteOptions { discard: Discard::Unmap, ..WriteOptions::default() };
    Opening { write: Some(write), ..Opening::default() }
}

fn geometries() -> Vec<Geometry> {
    let plain = Geometry::plain;
    vec![
        plain(65536),
        plain(512),
        Geometry { backing: Backing::ShorterRaw, ..plain(4096) },
        Geometry { extended_l2: true, ..plain(16384) },
        Geometry { data_file: DataFile::External, ..plain(65536) },
        Geometry { door: Door::Xts, backing: Backing::ShorterRaw, ..plain(4096) },
        Geometry { door: Door::LegacyAes, ..plain(4096) },
    ]
}

/// Plays a sequence in which the calls that `fault` names fail; gives how many did.
fn play(geometry: &Geometry, seed: u64, fault: &Fault, faulty_file: usize) -> u64 {
    let rig = Rig::forge(geometry, seed);
    let what = format!("{} seed {seed}, {fault:?} of file {faulty_file}", geometry.name());
    let (mut session, recording) = Session::new(rig.files(), Durability::Flush);
    let faulty = Arc::new(FaultStorage::new(recording[faulty_file].clone(), fault.clone()));
    let mut files: Vec<Arc<dyn Storage>> = recording.iter().map(|f| f.clone() as Arc<dyn Storage>).collect();
    session.start(&rig.open(&files, &Opening::default()).unwrap());
    files[faulty_file] = faulty.clone();
    let open = || rig.open(&files, &writable()).map(|i| Box::new(i) as Box<dyn Target>);
    let mut menu = rig.menu();
    menu.reopen = false;
    let image = session.play(&open, &menu.sequence(seed, 25), true);
    // Where reading works, what it gives is right.
    if let Some(image) = image {
        let _ = session.verify(&*image, 0, image.size());
        let _ = image.close();
    }
    let failed = faulty.failed();
    // The process is gone, the system is not: every change is in the file.
    let history = session.history();
    let state = session.states(0, 0).filter(|s| s.shape == qcow2_testkit::crash::Shape::All).last().unwrap();
    let findings = audit(&state.files[0]);
    assert!(findings.is_sound(), "{what}: {:#?}", findings.corruptions);
    let image = rig.open_state(&state.files, &Opening::default()).unwrap_or_else(|e| panic!("{what}: {e:?}"));
    history.judge(&image, state.cut, &Scope::Whole).unwrap_or_else(|e| panic!("{what}: {e}"));
    failed
}

/// The first so many calls of each kind, one at a time; more of them where `QCOW2_FAULTS` says so.
fn depth() -> u64 {
    std::env::var("QCOW2_FAULTS").ok().and_then(|n| n.parse().ok()).unwrap_or(24)
}

#[test]
fn any_single_call_may_fail() {
    let mut failed = 0;
    for geometry in geometries() {
        for n in 0..depth() {
            // Dense at the start, then wider.
            let n = if n < 20 { n } else { 20 + (n - 20) * 7 };
            let errno = if n % 2 == 0 { EIO } else { ENOSPC };
            failed += play(&geometry, 1 + n % 3, &Fault::nth(n, errno), 0);
        }
    }
    assert!(failed > depth(), "{failed} calls failed");
}

#[test]
fn a_disk_may_fill_up_and_stay_full() {
    for geometry in geometries() {
        for n in (0..depth()).map(|n| n * 3) {
            for call in [Call::Write, Call::Allocate, Call::SetLen, Call::Zero] {
                let fault = Fault { ops: vec![call], after: n, once: false, errno: ENOSPC };
                play(&geometry, 2, &fault, 0);
                if geometry.data_file != DataFile::Internal {
                    play(&geometry, 2, &fault, 1);
                }
            }
        }
    }
}

#[test]
fn syncs_and_reads_may_fail_for_good() {
    for geometry in geometries() {
        for n in 0..depth() / 2 {
            play(&geometry, 3, &Fault::from(Call::Sync, n, EIO), 0);
            play(&geometry, 3, &Fault::from(Call::Read, n * 5, EIO), 0);
            play(&geometry, 3, &Fault::from(Call::Discard, n, EIO), 0);
        }
    }
}

/// Short transfers are no errors.
#[test]
fn short_transfers_change_nothing() {
    for geometry in geometries() {
        let rig = Rig::forge(&geometry, 5);
        let (session, recording) = Session::new(rig.files(), Durability::Flush);
        let files: Vec<Arc<dyn Storage>> =
            recording.into_iter().map(|f| Arc::new(ShortIo::new(f, 777)) as Arc<dyn Storage>).collect();
        session.start(&rig.open(&files, &Opening::default()).unwrap());
        let open = || rig.open(&files, &writable()).map(|i| Box::new(i) as Box<dyn Target>);
        let mut ops = rig.menu().sequence(5, 40);
        ops.push(Op::Reopen);
        let image = session.play(&open, &ops, false).unwrap();
        session.verify(&*image, 0, image.size()).unwrap();
    }
}

/// After a failed metadata write nobody knows what the file says: no more writes, but reads.
#[test]
fn a_failed_metadata_write_poisons_the_image() {
    let rig = Rig::forge(&Geometry::plain(65536), 1);
    let (session, recording) = Session::new(rig.files(), Durability::Flush);
    let open_files: Vec<Arc<dyn Storage>> = vec![recording[0].clone()];
    session.start(&rig.open(&open_files, &Opening::default()).unwrap());
    let failing =
        |after| Arc::new(FaultStorage::new(recording[0].clone(), Fault::from(Call::Write, after, EIO)));
    let mut poisoned = false;
    for after in 0..6 {
        let files: Vec<Arc<dyn Storage>> = vec![failing(after)];
        let image = rig.open(&files, &writable()).unwrap();
        let fresh = Op::Write { offset: 44 * 65536, len: 512 };
        let written = session.run(&image, fresh, FIRST_GENERATION);
        if let Err(e) = image.flush() {
            assert_eq!(e.kind(), ErrorKind::Io, "{e:?}");
            let refused =
                session.run(&image, Op::Write { offset: 0, len: 512 }, FIRST_GENERATION + 1).unwrap_err();
            assert!(refused.to_string().contains("refuses writes"), "{refused:?}");
            poisoned = poisoned || written.is_ok();
        }
        session.verify(&image, 0, image.virtual_size()).unwrap();
    }
    assert!(poisoned, "no flush failed");
}
