//! The simulator of power cuts finds what it is there to find: a raw disk that keeps its promises passes, and each way
//! of breaking them is caught.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests")]

use std::sync::Arc;

use qcow2_engine::{Mem, MemMut, Result, Storage, StorageExt};
use qcow2_testkit::Sparse;
use qcow2_testkit::crash::{Durability, FIRST_GENERATION, History, Scope, Session};
use qcow2_testkit::ops::{Menu, Op, Target};
use qcow2_testkit::recorder::RecordingStorage;

/// How a disk can break its promises.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Bug {
    None,
    /// A flush reports success and does nothing.
    NoSync,
    /// A write goes to the sector behind the right one and is then repeated at the right place.
    Stray,
    /// A flush syncs before it writes out the last write that it was told of.
    LateWrite,
}

struct RawDisk {
    file: Arc<dyn Storage>,
    bug: Bug,
    held: parking_lot::Mutex<Option<(u64, Vec<u8>)>>,
}

impl RawDisk {
    fn boxed(file: Arc<dyn Storage>, bug: Bug) -> Box<dyn Target> {
        Box::new(Self { file, bug, held: parking_lot::Mutex::new(None) })
    }
    fn release(&self) -> Result<()> {
        match self.held.lock().take() {
            Some((offset, data)) => self.file.write_all_at(Mem::from(&data[..]), offset),
            None => Ok(()),
        }
    }
}

impl Target for RawDisk {
    fn size(&self) -> u64 {
        self.file.len().unwrap()
    }
    fn read(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        self.release()?;
        self.file.read_padded_at(MemMut::from(out), offset)
    }
    fn write(&self, offset: u64, data: &[u8]) -> Result<()> {
        self.release()?;
        match self.bug {
            Bug::LateWrite => *self.held.lock() = Some((offset, data.to_vec())),
            Bug::Stray if offset + 512 + data.len() as u64 <= self.size() => {
                let mut old = vec![0; 512];
                self.read(offset + data.len() as u64, &mut old)?;
                self.file.write_all_at(Mem::from(data), offset + 512)?;
                self.file.write_all_at(Mem::from(data), offset)?;
                self.file.write_all_at(Mem::from(&old[..]), offset + data.len() as u64)?;
            }
            _ => self.file.write_all_at(Mem::from(data), offset)?,
        }
        Ok(())
    }
    fn write_compressed(&self, offset: u64, data: &[u8]) -> Result<()> {
        self.write(offset, data)
    }
    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> Result<()> {
        self.release()?;
        self.file.zero(offset, len, unmap)
    }
    fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.write_zeroes(offset, len, true)
    }
    fn flush(&self) -> Result<()> {
        if self.bug != Bug::NoSync {
            self.file.flush()?;
        }
        self.release()
    }
    fn grow(&self, size: u64) -> Result<()> {
        self.file.resize(size)
    }
    fn close(&self) -> Result<()> {
        self.release()?;
        self.flush()
    }
}

/// Plays sequences and judges every state; gives how many states there were, or what the first bad one was.
fn judge(bug: Bug) -> std::result::Result<usize, String> {
    let mut judged = 0;
    for seed in 0..6 {
        let menu = Menu { grow: false, ..Menu::new(4096, 100 * 1024) };
        let mut start = Sparse::new(menu.size);
        start.write(3 * 512, &qcow2_testkit::ops::stamped(3 * 512, 9 * 512, 1));
        let (mut session, storages) = Session::new(vec![start], Durability::Flush);
        let file = storages[0].clone();
        session.start(&*RawDisk::boxed(file.clone(), bug));
        session.play(&|| Ok(RawDisk::boxed(file.clone(), bug)), &menu.sequence(seed, 60), false);
        let history = session.history();
        for state in session.states(seed, 300) {
            let disk = RawDisk::boxed(Arc::new(RecordingStorage::plain(state.files[0].clone())), Bug::None);
            history
                .judge(&*disk, state.cut, &Scope::Whole)
                .map_err(|e| format!("seed {seed}, cut {}, {:?}: {e}", state.cut, state.shape))?;
            judged += 1;
        }
    }
    Ok(judged)
}

#[test]
fn a_raw_disk_keeps_its_promises() {
    let judged = judge(Bug::None).unwrap();
    assert!(judged > 2500, "{judged} states");
}

#[test]
fn a_flush_without_sync_is_caught() {
    assert!(judge(Bug::NoSync).unwrap_err().contains("allowed are"));
}

#[test]
fn a_write_that_strays_for_a_moment_is_caught() {
    assert!(judge(Bug::Stray).unwrap_err().contains("Stray"));
}

#[test]
fn a_write_behind_the_sync_is_caught() {
    assert!(judge(Bug::LateWrite).is_err());
}

/// Two files with syncs of their own: each keeps its own part.
#[test]
fn files_are_cut_together_and_synced_apart() {
    let (mut session, files) = Session::new(vec![Sparse::new(1024), Sparse::new(1024)], Durability::Flush);
    files[0].write_all_at(Mem::from(&[1; 512][..]), 0).unwrap();
    files[1].write_all_at(Mem::from(&[2; 512][..]), 0).unwrap();
    files[1].flush().unwrap();
    files[0].write_all_at(Mem::from(&[3; 512][..]), 512).unwrap();
    let (mut lost, mut kept) = (0, 0);
    for state in session.states(1, 400).filter(|s| s.cut == 4) {
        assert_eq!(state.files[1].get(0, 1), [2], "synced");
        match state.files[0].get(0, 1)[0] {
            0 => lost += 1,
            _ => kept += 1,
        }
    }
    assert!(lost > 10 && kept > 10, "{lost} {kept}");
    session.forget();
    assert!(session.states(1, 0).all(|s| s.files[1].get(0, 1) == [2]), "what is durable is not forgotten");
}

/// What failed may be there or not, and is never promised.
#[test]
fn a_failed_write_is_allowed_and_not_promised() {
    let (session, files) = Session::new(vec![Sparse::new(8192)], Durability::Each);
    let disk = RawDisk::boxed(files[0].clone(), Bug::None);
    session.start(&*disk);
    session.run(&*disk, Op::Write { offset: 0, len: 512 }, FIRST_GENERATION).unwrap();
    let history: History = session.history();
    assert_eq!(history.allowed(0, 99).len(), 1, "promised at once");
    assert_eq!(history.allowed(0, 0).len(), 1, "not begun");
}
