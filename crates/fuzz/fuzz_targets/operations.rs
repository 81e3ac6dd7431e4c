//! Sequences of guest operations, some of whose host calls fail, on images of several layouts: nothing panics, what
//! reads give is right, and the file has at worst leaks and keeps what was flushed.
#![no_main]

use std::sync::Arc;

use arbitrary::{Arbitrary, Unstructured};
use libfuzzer_sys::fuzz_target;
use qcow2_engine::{Discard, Storage, WriteOptions};
use qcow2_testkit::audit::audit;
use qcow2_testkit::crash::{Durability, Scope, Session, Shape};
use qcow2_testkit::disk_model::{Opening, Rig};
use qcow2_testkit::matrix::{Backing, DataFile, Geometry};
use qcow2_testkit::ops::{Op, SECTOR, Target};
use qcow2_testkit::storage::{Fault, FaultStorage, Op as Call};

#[derive(Arbitrary, Debug)]
enum Step {
    Write(u16, u8),
    Compressed(u8),
    Zero(u16, u8, bool),
    Discard(u16, u8),
    Read(u16, u8),
    Flush,
    Grow(u8),
    Reopen,
}

#[derive(Arbitrary, Debug)]
struct Input {
    layout: u8,
    flush_each: bool,
    lazy: bool,
    fault: Option<(u8, u8, bool, bool)>,
    steps: Vec<Step>,
}

fn geometry(layout: u8) -> Geometry {
    let plain = Geometry { size: 40 * 4096 + 512, ..Geometry::plain(4096) };
    match layout % 7 {
        0 => plain,
        1 => Geometry { size: 200 * 512, ..Geometry::plain(512) },
        2 => Geometry { backing: Backing::ShorterRaw, ..plain },
        3 => Geometry { backing: Backing::LongerQcow2, version: 2, ..plain },
        4 => Geometry { extended_l2: true, size: 12 * 16384 + 512, ..Geometry::plain(16384) },
        5 => Geometry { data_file: DataFile::External, ..plain },
        _ => Geometry { refcount_bits: 1, ..plain },
    }
}

/// Operations in whole sectors, inside the disk as it is by then.
fn operations(steps: &[Step], rig: &Rig) -> Vec<Op> {
    let cluster = rig.geometry.cluster_size;
    let mut size = rig.geometry.size / SECTOR * SECTOR;
    let mut ops = Vec::new();
    for step in steps.iter().take(64) {
        let range = |at: u16, sectors: u8| {
            let offset = u64::from(at) * SECTOR % size;
            (offset, ((u64::from(sectors) + 1) * SECTOR).min(size - offset))
        };
        ops.push(match *step {
            Step::Write(at, sectors) => {
                let (offset, len) = range(at, sectors);
                Op::Write { offset, len }
            }
            Step::Compressed(at) if rig.menu().compression => {
                let offset = u64::from(at) * cluster % size / cluster * cluster;
                Op::Compressed { offset, len: cluster.min(size - offset) }
            }
            Step::Zero(at, sectors, unmap) => {
                let (offset, len) = range(at, sectors);
                Op::Zero { offset, len, unmap }
            }
            Step::Discard(at, sectors) => {
                let (offset, len) = range(at, sectors);
                Op::Discard { offset, len }
            }
            Step::Read(at, sectors) => {
                let (offset, len) = range(at, sectors);
                Op::Read { offset, len }
            }
            Step::Flush | Step::Compressed(_) => Op::Flush,
            Step::Grow(sectors) => {
                size += (u64::from(sectors) + 1) * SECTOR;
                Op::Grow { size }
            }
            Step::Reopen => Op::Reopen,
        });
    }
    ops
}

fuzz_target!(|data: &[u8]| {
    let Ok(input) = Input::arbitrary(&mut Unstructured::new(data)) else { return };
    let rig = Rig::forge(&geometry(input.layout), 1);
    let durability = if input.flush_each { Durability::Each } else { Durability::Flush };
    let (mut session, recording) = Session::new(rig.files(), durability);
    let mut files: Vec<Arc<dyn Storage>> = recording.iter().map(|f| f.clone() as Arc<dyn Storage>).collect();
    session.start(&rig.open(&files, &Opening::default()).expect("a sound image"));
    if let Some((kind, after, once, full)) = input.fault {
        let calls =
            [Call::Read, Call::Write, Call::SetLen, Call::Sync, Call::Zero, Call::Discard, Call::Allocate];
        let ops = calls.get(usize::from(kind)).map(|call| vec![*call]).unwrap_or_default();
        let fault = Fault { ops, after: after.into(), once, errno: if full { 28 } else { 5 } };
        files[0] = Arc::new(FaultStorage::new(recording[0].clone(), fault));
    }
    let write = WriteOptions {
        discard: Discard::Unmap,
        flush_each: input.flush_each,
        lazy_refcounts: input.lazy && rig.geometry.version >= 3,
        ..WriteOptions::default()
    };
    let opening = Opening { write: Some(write), ..Opening::default() };
    let open = || rig.open(&files, &opening).map(|image| Box::new(image) as Box<dyn Target>);
    let image = session.play(&open, &operations(&input.steps, &rig), true);
    if let Some(image) = image {
        let _ = session.verify(&*image, 0, image.size());
    }
    let history = session.history();
    let state = session.states(0, 0).filter(|s| s.shape == Shape::All).last().expect("one at least");
    let findings = audit(&state.files[0]);
    assert!(findings.is_sound(), "{:#?}", findings.corruptions);
    let image = rig.open_state(&state.files, &Opening::default()).expect("it opens");
    history.judge(&image, state.cut, &Scope::Whole).expect("what was flushed is there");
});
