//! An object of JavaScript's as a storage.

use std::fmt;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;
use qcow2_engine::storage::{Fetch, Fetched, Identity, Operation, Run, Traits, carried, no_space};
use qcow2_engine::{Mem, MemMut, ReadStorage, Storage};

use super::asking::{Answer, Ask, Asking, Known, Thrown};
use crate::pool::lent;

/// The kind of an object's identity.
const KIND: &str = "source";

/// Bytes of one question that reads or writes, at most.
const PIECE: usize = 4 << 20;

/// What an object can do.
pub(super) struct Abilities {
    /// For messages.
    pub(super) name: PathBuf,
    /// What tells it apart.
    pub(super) identity: String,
    /// Bytes.
    pub(super) size: u64,
    /// It is written to.
    pub(super) writable: bool,
    /// It can have another size.
    pub(super) resizes: bool,
    /// It knows `sync`.
    pub(super) syncs: bool,
    /// It tells what is zero.
    pub(super) tells: bool,
}

/// The storage. Its end is the end of the questions.
pub(super) struct AskedStorage {
    asking: Arc<Asking>,
    abilities: Abilities,
    size: AtomicU64,
    /// What was told last: from there on, these runs.
    told: Mutex<(u64, Vec<Known>)>,
    /// Who makes it longer: what lies between the end and a write is made first.
    grows: Mutex<()>,
}

impl AskedStorage {
    pub(super) fn new(asking: Arc<Asking>, abilities: Abilities) -> Self {
        let size = AtomicU64::new(abilities.size);
        Self { asking, abilities, size, told: Mutex::default(), grows: Mutex::default() }
    }

    fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    fn refuse_writes(&self) -> io::Result<()> {
        if self.abilities.writable { Ok(()) } else { Err(io::ErrorKind::ReadOnlyFilesystem.into()) }
    }

    fn write(&self, offset: u64, data: Vec<u8>) -> io::Result<usize> {
        let length = data.len();
        self.asking.wait(Ask::Write(offset, data), |_| ())?;
        *self.told.lock() = Default::default();
        Ok(length)
    }

    fn truncate(&self, size: u64) -> io::Result<()> {
        self.asking.wait(Ask::Truncate(size), |_| ())?;
        *self.told.lock() = Default::default();
        self.size.store(size, Ordering::Release);
        Ok(())
    }

    /// The run at `at` of what was told last.
    fn told_at(&self, at: u64) -> Option<Run> {
        let told = self.told.lock();
        let (start, runs) = &*told;
        let known = runs.iter().find(|known| at < known.end).filter(|_| at >= *start)?;
        Some(Run::new(known.end, !known.zero))
    }
}

impl fmt::Debug for AskedStorage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AskedStorage").field("name", &self.abilities.name).finish()
    }
}

impl Drop for AskedStorage {
    fn drop(&mut self) {
        self.asking.end();
    }
}

impl ReadStorage for AskedStorage {
    fn read_at(&self, mut buf: MemMut<'_>, offset: u64) -> io::Result<usize> {
        let end = offset.saturating_add(buf.len().min(PIECE) as u64).min(self.size());
        if offset >= end {
            return Ok(0);
        }
        let bytes = self.asking.wait(Ask::Read(offset..end), |answer| {
            let Answer::Bytes(bytes) = answer else { return Vec::new() };
            let mut own = vec![0; bytes.len()];
            bytes.copy_to(&mut own);
            own
        })?;
        Ok(buf.copy_from(&bytes))
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.size())
    }

    fn run_in(&self, range: Range<u64>) -> io::Result<Run> {
        let size = self.size();
        if range.start >= size {
            return Ok(Run::new(u64::MAX, false));
        }
        if !self.abilities.tells {
            return Ok(Run::new(size, true));
        }
        if let Some(run) = self.told_at(range.start) {
            return Ok(run);
        }
        let asked = range.start..range.end.min(size);
        let start = asked.start;
        let runs = self.asking.wait(Ask::Extents(asked), |answer| match answer {
            Answer::Extents(runs) => runs,
            Answer::Bytes(_) | Answer::Done => Vec::new(),
        })?;
        *self.told.lock() = (start, runs);
        Ok(self.told_at(start).unwrap_or(Run::new(size, true)))
    }

    fn identity(&self) -> Option<Identity> {
        Some(Identity::new(KIND, &self.abilities.identity))
    }

    fn traits(&self) -> Traits {
        let Abilities { writable, resizes, .. } = self.abilities;
        Traits { block_device: !resizes, writable, waits: true, ..Traits::default() }
    }

    fn path(&self) -> Option<&Path> {
        Some(&self.abilities.name)
    }

    fn operation(&self, operation: Operation) -> &'static str {
        match operation {
            Operation::Read => "read",
            Operation::Write | Operation::WriteVectored | Operation::Space => "write",
            Operation::Length => "size",
            Operation::SetLength => "truncate",
            Operation::Sync => "sync",
            Operation::Close => "close",
            Operation::Run => "extents",
        }
    }

    fn is_transient(&self, error: &io::Error) -> bool {
        carried::<Thrown>(error).map_or(error.kind() == io::ErrorKind::TimedOut, |thrown| thrown.transient)
    }
}

impl Storage for AskedStorage {
    fn write_at(&self, buf: Mem<'_>, offset: u64) -> io::Result<usize> {
        self.refuse_writes()?;
        let (piece, _) = buf.split_at(PIECE);
        let end = offset.checked_add(piece.len() as u64).ok_or(io::ErrorKind::InvalidInput)?;
        if piece.is_empty() {
            return Ok(0);
        }
        let mut data = vec![0; piece.len()];
        piece.copy_to(&mut data);
        if end <= self.size() {
            return self.write(offset, data);
        }
        if !self.abilities.resizes {
            return Err(no_space());
        }
        let _grows = self.grows.lock();
        if offset > self.size() {
            self.truncate(offset)?;
        }
        let written = self.write(offset, data)?;
        self.size.fetch_max(end, Ordering::AcqRel);
        Ok(written)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.refuse_writes()?;
        let _grows = self.grows.lock();
        match (self.abilities.resizes, len.cmp(&self.size())) {
            (_, std::cmp::Ordering::Equal) => Ok(()),
            (true, _) => self.truncate(len),
            (false, std::cmp::Ordering::Less) => Ok(()),
            (false, std::cmp::Ordering::Greater) => Err(no_space()),
        }
    }

    fn sync_data(&self) -> io::Result<()> {
        match self.abilities.syncs && self.abilities.writable {
            true => self.asking.wait(Ask::Sync, |_| ()),
            false => Ok(()),
        }
    }
}

impl Fetch for AskedStorage {
    fn fetch(&self, range: Range<u64>, done: Fetched) -> u64 {
        let hears = move |answer: io::Result<Answer<'_>>| match answer {
            Ok(Answer::Bytes(bytes)) => done(Ok(bytes)),
            Ok(Answer::Done | Answer::Extents(_)) => done(Err(io::ErrorKind::InvalidData.into())),
            Err(error) => done(Err(error)),
        };
        self.asking.ask(Ask::Read(range), Box::new(hears)).into()
    }

    fn give_up(&self, fetch: u64) {
        self.asking.forget(u32::try_from(fetch).unwrap_or_default());
    }

    fn given_up(&self) -> Option<io::Error> {
        self.asking.given_up()
    }

    fn waiting(&self, wait: &mut dyn FnMut()) {
        lent(wait);
    }
}
