//! Power cuts: after any of them the image opens, is sound, and keeps what was flushed.
//!
//! A bounded sample of states by default; `QCOW2_CRASH_STATES=N` judges about N.

use std::sync::Arc;

use qcow2_core::Storage;
use qcow2_core::check::{Finding, FindingCode};
use qcow2_testkit::crash::{Durability, History, Scope, Session, State};
use qcow2_testkit::ops::{Menu, Op, Target};
use qcow2_testkit::recorder::RecordingStorage;
use qcow2_testkit::{Fixture, Qemu, Rng, Sparse};
use qcow2_vhdx::{NewOptions, Subformat};

use crate::forge::{MIB, check, create, open_disk, open_source};

fn states_wanted(usual: usize) -> usize {
    std::env::var("QCOW2_CRASH_STATES").ok().and_then(|n| n.parse().ok()).unwrap_or(usual)
}

/// A new image, as a file of a session.
fn file_of(new: &NewOptions) -> Sparse {
    let storage = RecordingStorage::plain(Sparse::new(0));
    let storage = Arc::new(storage);
    create(new, storage.clone()).unwrap();
    storage.snapshot()
}

fn plain(file: &Sparse) -> Arc<dyn Storage> {
    Arc::new(RecordingStorage::plain(file.clone()))
}

fn judge(history: &History, state: &State, number: usize, qemu: Option<&Qemu>) -> Result<(), String> {
    let scope = Scope::Recent(number as u64, 20);
    let storage = plain(&state.files[0]);
    let disk = open_source(Arc::clone(&storage)).map_err(|e| format!("opening: {e:?}"))?;
    history.judge(&disk, state.cut, &scope)?;
    let report = check(Arc::clone(&storage)).map_err(|e| format!("{e:?}"))?;
    if report.findings.iter().any(|finding| !is_left_by_a_cut(finding)) {
        return Err(format!("{report:?}"));
    }
    if number.is_multiple_of(4) {
        let disk = open_disk(Arc::clone(&storage)).map_err(|e| format!("opening for writing: {e:?}"))?;
        history.judge(&disk, state.cut, &scope)?;
        let data = [7; 512];
        disk.write(0, &data).and_then(|()| disk.close()).map_err(|e| format!("going on: {e:?}"))?;
        let report = check(storage).map_err(|e| format!("{e:?}"))?;
        if !report.is_clean() {
            return Err(format!("after going on: {report:?}"));
        }
    }
    match qemu {
        Some(qemu) if number.is_multiple_of(60) => judge_with_qemu(qemu, history, state, &scope),
        _ => Ok(()),
    }
}

/// A log is there to be brought in, and a header that was being written can be torn: the other one counts.
fn is_left_by_a_cut(finding: &Finding) -> bool {
    let headers = [Some(64 << 10), Some(128 << 10)];
    finding.code == FindingCode::NotClosed
        || finding.code == FindingCode::Copy && headers.contains(&finding.offset)
}

/// QEMU brings the log in as well, and finds the same.
fn judge_with_qemu(qemu: &Qemu, history: &History, state: &State, scope: &Scope) -> Result<(), String> {
    let fixture = Fixture::new();
    let path = fixture.path("state.vhdx");
    state.files[0].write_to(&path);
    let name = path.to_str().unwrap();
    for args in [
        ["check", "-q", "-r", "all", "-f", "vhdx", name],
        ["check", "-q", "-f", "vhdx", name, "--output", "human"],
    ] {
        let out = qemu.img(&args);
        if out.code != 0 {
            return Err(format!("{out:?}"));
        }
    }
    let storage =
        qcow2_core::storage::FileStorage::open(&path, qcow2_core::storage::Access::ReadOnly).unwrap();
    let disk = open_source(Arc::new(storage)).map_err(|e| format!("opening behind QEMU: {e:?}"))?;
    history.judge(&disk, state.cut, scope)
}

fn menu(size: u64) -> Menu {
    Menu { compression: false, discard: false, span: 1, ..Menu::new(MIB, size) }
}

fn cut(what: &str, new: &NewOptions, ops: &[Op], (seed, states): (u64, usize)) {
    let qemu = Qemu::find();
    let (mut session, files) = Session::new(vec![file_of(new)], Durability::Flush);
    session.start_empty(new.size);
    let storage = files[0].clone() as Arc<dyn Storage>;
    let open = || open_disk(Arc::clone(&storage)).map(|disk| Box::new(disk) as Box<dyn Target>);
    drop(session.play(&open, ops, false));
    let history = session.history();
    for (number, state) in session.sample_states(seed, states_wanted(states)).enumerate() {
        if let Err(e) = judge(&history, &state, number, qemu.as_ref()) {
            panic!("{what}, seed {seed}, cut {}, {:?}: {e}", state.cut, state.shape);
        }
    }
}

#[test]
fn a_dynamic_disk_survives_power_cuts() {
    for seed in 0..2 {
        let new = NewOptions { size: 8 * MIB, block_size: MIB, ..NewOptions::default() };
        cut("dynamic", &new, &menu(new.size).sequence(seed, 24), (seed, 40));
    }
}

#[test]
fn a_fixed_disk_survives_power_cuts() {
    let new =
        NewOptions { size: 4 * MIB, block_size: MIB, subformat: Subformat::Fixed, ..NewOptions::default() };
    cut("fixed", &new, &menu(new.size).sequence(3, 20), (3, 40));
}

/// Blocks that come and go: places are used again, the log goes around.
#[test]
fn blocks_that_are_given_up_and_used_again_survive_power_cuts() {
    let new = NewOptions { size: 8 * MIB, block_size: MIB, ..NewOptions::default() };
    let mut rng = Rng::new(5);
    let mut ops = Vec::new();
    for _ in 0..160 {
        let block = rng.below(8) * MIB;
        ops.push(match rng.below(3) {
            0 => Op::Zero { offset: block, len: MIB, unmap: true },
            _ => Op::Write { offset: block + rng.below(100) * 512, len: 4096 },
        });
        if rng.below(2) == 0 {
            ops.push(Op::Flush);
        }
    }
    cut("reuse", &new, &ops, (5, 300));
}

#[test]
fn a_table_that_moves_survives_power_cuts() {
    let new =
        NewOptions { size: 131_070 * MIB, block_size: MIB, block_state_zero: false, ..NewOptions::default() };
    let grown = 131_200 * MIB;
    let ops = [
        Op::Write { offset: 131_069 * MIB, len: 4096 },
        Op::Flush,
        Op::Write { offset: MIB, len: 4096 },
        Op::Grow { size: grown },
        Op::Write { offset: grown - 4096, len: 4096 },
        Op::Flush,
        Op::Write { offset: 5 * MIB, len: 4096 },
    ];
    cut("moved table", &new, &ops, (9, 120));
}

#[test]
fn a_disk_that_is_cut_off_and_grows_again_survives_power_cuts() {
    let new = NewOptions { size: 8 * MIB, block_size: MIB, ..NewOptions::default() };
    let ops = [
        Op::Write { offset: MIB, len: 4096 },
        Op::Write { offset: 6 * MIB - 4096, len: 8192 },
        Op::Flush,
        Op::Write { offset: 7 * MIB, len: 4096 },
        Op::Shrink { size: 6 * MIB - 2048 },
        Op::Write { offset: 3 * MIB, len: 4096 },
        Op::Flush,
        Op::Grow { size: 8 * MIB },
        Op::Write { offset: 7 * MIB + 8192, len: 4096 },
        Op::Shrink { size: 2 * MIB },
        Op::Reopen,
        Op::Write { offset: 0, len: 4096 },
        Op::Flush,
        Op::Grow { size: 8 * MIB },
        Op::Flush,
    ];
    cut("cut off", &new, &ops, (11, 200));
}
