//! A storage that remembers: every call that changes the file, and every sync, in order.
//!
//! Several files share one [`Journal`], so that they can be cut at the same instant. The file itself is kept in
//! memory, sparse, and its clones are cheap.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::{Mutex, RwLock};
use qcow2_engine::storage::{Identity, ReadStorage, Traits};
use qcow2_engine::{Mem, MemMut, Storage};

use crate::Sparse;

/// What a discarded byte becomes: its content is unspecified, so anything that still reads it is found out.
pub const DISCARDED: u8 = 0xdb;

/// One call that changed a file, or a sync.
#[derive(Debug, Clone)]
pub enum Change {
    /// `pwrite`.
    Write {
        /// Where.
        offset: u64,
        /// What.
        data: Arc<[u8]>,
    },
    /// The range reads as zeroes from then on.
    Zero {
        /// Where.
        offset: u64,
        /// Bytes.
        length: u64,
    },
    /// The range is unspecified from then on.
    Discard {
        /// Where.
        offset: u64,
        /// Bytes.
        length: u64,
    },
    /// Cuts or extends the file.
    SetLen(u64),
    /// Reserves space, and extends the file to this end.
    Allocate(u64),
    /// A completed sync: everything of this file that the journal had before this position is durable.
    Sync {
        /// Length of the journal when the sync began.
        covers: usize,
    },
}

/// A change and the number of the file it was made to.
#[derive(Debug, Clone)]
pub struct Entry {
    /// Number of the file, from 0.
    pub file: usize,
    /// What happened.
    pub change: Change,
}

/// The order of all changes to all files. Positions count from the journal's start and never repeat.
#[derive(Debug, Default)]
pub struct Journal {
    inner: Mutex<Kept>,
}

#[derive(Debug, Default)]
struct Kept {
    dropped: usize,
    entries: Vec<Entry>,
}

impl Journal {
    /// An empty journal.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// How many changes there were so far.
    pub fn position(&self) -> usize {
        let kept = self.inner.lock();
        kept.dropped + kept.entries.len()
    }

    /// Takes the entries kept so far, and the position of the first.
    pub fn take(&self) -> (usize, Vec<Entry>) {
        let mut kept = self.inner.lock();
        let entries = std::mem::take(&mut kept.entries);
        let first = kept.dropped;
        kept.dropped += entries.len();
        (first, entries)
    }
}

/// A file in memory whose changes go into a journal.
#[derive(Debug)]
pub struct RecordingStorage {
    bytes: RwLock<Sparse>,
    journal: Option<(Arc<Journal>, usize)>,
    alignment: u32,
    identity: u64,
}

static IDENTITIES: AtomicU64 = AtomicU64::new(1);

impl RecordingStorage {
    /// A file of these bytes, number `file` of `journal`.
    pub fn new(bytes: Sparse, journal: &Arc<Journal>, file: usize) -> Self {
        Self { journal: Some((journal.clone(), file)), ..Self::plain(bytes) }
    }

    /// A file of these bytes that records nothing.
    pub fn plain(bytes: Sparse) -> Self {
        let identity = IDENTITIES.fetch_add(1, Ordering::Relaxed);
        Self { bytes: RwLock::new(bytes), journal: None, alignment: 1, identity }
    }

    /// Refuses requests that are not multiples of `alignment`, as a file opened with O_DIRECT does.
    #[must_use]
    pub fn aligned(mut self, alignment: u32) -> Self {
        self.alignment = alignment;
        self
    }

    /// The file as it is now.
    pub fn snapshot(&self) -> Sparse {
        self.bytes.read().clone()
    }

    fn check(&self, address: usize, len: usize, offset: u64) -> io::Result<()> {
        let alignment = u64::from(self.alignment);
        let aligned = |n: u64| n.is_multiple_of(alignment);
        if aligned(address as u64) && aligned(len as u64) && aligned(offset) {
            return Ok(());
        }
        Err(io::Error::from_raw_os_error(22))
    }

    /// Changes file and journal in one step, so that the journal's order is the file's.
    fn change(&self, change: Change) -> io::Result<()> {
        let mut bytes = self.bytes.write();
        apply(&mut bytes, &change);
        if let Some((journal, file)) = &self.journal {
            journal.inner.lock().entries.push(Entry { file: *file, change });
        }
        Ok(())
    }
}

/// Applies one change to the bytes of its file.
pub fn apply(bytes: &mut Sparse, change: &Change) {
    match change {
        Change::Write { offset, data } => bytes.write(*offset, data),
        Change::Zero { offset, length } => {
            bytes.set_len(bytes.len().max(offset + length));
            bytes.zero(*offset, *length);
        }
        Change::Discard { offset, length } => {
            let length = length.min(&bytes.len().saturating_sub(*offset)).to_owned();
            bytes.write(*offset, &vec![DISCARDED; length as usize]);
        }
        Change::SetLen(len) => bytes.set_len(*len),
        Change::Allocate(end) => bytes.set_len(bytes.len().max(*end)),
        Change::Sync { .. } => {}
    }
}

impl ReadStorage for RecordingStorage {
    fn read_at(&self, mut buf: MemMut<'_>, offset: u64) -> io::Result<usize> {
        self.check(buf.as_mut_ptr().addr(), buf.len(), offset)?;
        let bytes = self.bytes.read();
        let n = bytes.len().saturating_sub(offset).min(buf.len() as u64) as usize;
        buf.copy_from(&bytes.get(offset, n));
        Ok(n)
    }
    fn len(&self) -> io::Result<u64> {
        Ok(self.bytes.read().len())
    }
    fn identity(&self) -> Option<Identity> {
        Some(Identity::new("recorded", &self.identity.to_string()))
    }
    fn traits(&self) -> Traits {
        let (alignment, memory_alignment) = (self.alignment, self.alignment);
        Traits { alignment, memory_alignment, writable: true, ..Traits::default() }
    }
}

impl Storage for RecordingStorage {
    fn write_at(&self, buf: Mem<'_>, offset: u64) -> io::Result<usize> {
        self.write_vectored_at(&[buf], offset)
    }
    fn write_vectored_at(&self, bufs: &[Mem<'_>], offset: u64) -> io::Result<usize> {
        let mut data = vec![0; bufs.iter().map(Mem::len).sum()];
        end_of(offset, data.len() as u64)?;
        let mut at = 0;
        for buf in bufs {
            self.check(buf.as_ptr().addr(), buf.len(), offset)?;
            at += buf.copy_to(&mut data[at..]);
        }
        if at > 0 {
            self.change(Change::Write { offset, data: data.into() })?;
        }
        Ok(at)
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.change(Change::SetLen(len))
    }
    fn sync_data(&self) -> io::Result<()> {
        let Some((journal, _)) = &self.journal else { return Ok(()) };
        let covers = journal.position();
        // What others write while a sync runs is not covered by it: give them the time to.
        std::thread::yield_now();
        self.change(Change::Sync { covers })
    }
    fn write_zeroes(&self, offset: u64, length: u64, _unmap: bool) -> io::Result<()> {
        end_of(offset, length)?;
        if length == 0 { Ok(()) } else { self.change(Change::Zero { offset, length }) }
    }
    fn discard(&self, offset: u64, length: u64) -> io::Result<()> {
        end_of(offset, length)?;
        self.change(Change::Discard { offset, length })
    }
    fn allocate(&self, offset: u64, length: u64) -> io::Result<()> {
        let end = end_of(offset, length)?;
        if length == 0 { Ok(()) } else { self.change(Change::Allocate(end)) }
    }
}

/// The end of a range; none behind the last offset.
fn end_of(offset: u64, length: u64) -> io::Result<u64> {
    offset.checked_add(length).ok_or_else(|| io::ErrorKind::InvalidInput.into())
}
