//! What comes as a stream, as a file that is read while it grows.
//!
//! The bytes go to a file without a name. A read waits until its bytes have come. Who reads says which bytes are not asked for again
//! ([`Arriving::taken`]): their space is given back, so that of a stream that is read in the order in which it comes only a little is ever
//! stored. What was given back is never read as the zeroes that it became: asking for it again is an error.

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

use super::new_file::temporary;
use super::{FileStorage, ReadStorage, Storage, StorageExt, Traits};
use crate::error::GivenUp;
use crate::{Error, ErrorKind, Job, Mem, MemMut, Result};

/// Space is given back in blocks of this size.
const BLOCK: u64 = 64 << 10;
/// What is counted of a block, until all of it was taken.
const PART: u64 = 512;
/// Parts of a block.
const PARTS: u8 = (BLOCK / PART) as u8;
/// Who waits looks this often whether it is still wanted.
const LOOK: Duration = Duration::from_millis(50);

/// A storage whose bytes are still coming.
pub trait Arriving {
    /// The bytes were read, and are not asked for again: all whole sectors of 512 bytes among them.
    ///
    /// # Errors
    /// `Corrupt`, where the stream ended in front of them: in a file, what lies behind the end can read as zeroes.
    fn taken(&self, offset: u64, length: u64) -> Result<()>;

    /// All that was wanted is read: what else comes is counted and dropped, and this waits for the end.
    ///
    /// # Errors
    /// When the wait was given up: the stream broke, or is not what it was said to be.
    fn settle(&self) -> io::Result<()>;
}

/// What is known of a stream before it comes.
#[derive(Debug, Clone, Copy, Default)]
pub struct Expected {
    /// Its length in bytes.
    pub length: Option<u64>,
    /// The image in it says where its parts are, in units of so many bytes. Of what it names nothing can lie behind the unit in which the
    /// stream ends; and until that comes, its length is no matter.
    pub unit: Option<u64>,
    /// What is read when all else was: nothing is dropped.
    pub keep: bool,
}

/// A stream, as far as it came.
#[derive(Debug)]
pub struct Spool {
    file: FileStorage,
    expected: Expected,
    /// Cancelled when the stream broke or nobody wants it any more.
    job: Arc<Job>,
    state: Mutex<State>,
    moved: Condvar,
}

#[derive(Debug, Default)]
struct State {
    came: u64,
    ended: bool,
    /// Parts of each block that were taken.
    taken: Vec<u8>,
    /// Bytes that were given back.
    freed: u64,
    /// Most bytes that were stored at once.
    peak: u64,
    /// Readers that wait for what has not come.
    waiting: u32,
    dropping: bool,
}

/// How far a spool is. Bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Came.
    pub came: u64,
    /// Are stored now.
    pub stored: u64,
    /// Were stored at once, at most.
    pub peak: u64,
    /// Somebody waits for what has not come.
    pub wanted: bool,
}

impl State {
    fn stored(&self) -> u64 {
        self.came.saturating_sub(self.freed)
    }

    /// The first byte of a range that was given back.
    fn gone(&self, offset: u64, length: u64) -> Option<u64> {
        if self.dropping {
            return Some(offset);
        }
        let end = offset.saturating_add(length);
        let blocks = offset / BLOCK..end.div_ceil(BLOCK);
        let gone = blocks.into_iter().find(|&block| self.parts(block) >= PARTS)?;
        Some(offset.max(gone * BLOCK))
    }

    fn parts(&self, block: u64) -> u8 {
        usize::try_from(block).ok().and_then(|block| self.taken.get(block)).copied().unwrap_or(0)
    }

    /// Counts whole parts of a range as taken; returns the run of blocks that this completes.
    fn take(&mut self, offset: u64, length: u64) -> Option<(u64, u64)> {
        let (mut at, end) = (offset.next_multiple_of(PART), (offset + length) / PART * PART);
        let mut run: Option<(u64, u64)> = None;
        while at < end {
            let block = at / BLOCK;
            let stop = ((block + 1) * BLOCK).min(end);
            let index = usize::try_from(block).unwrap_or(usize::MAX);
            if let Some(parts) = self.taken.get_mut(index).filter(|parts| **parts < PARTS) {
                *parts = parts.saturating_add(((stop - at) / PART) as u8);
                if *parts >= PARTS {
                    self.freed += BLOCK;
                    run = Some(run.map_or((block, block + 1), |(first, _)| (first, block + 1)));
                }
            }
            at = stop;
        }
        run.map(|(first, last)| (first * BLOCK, last * BLOCK))
    }
}

impl Spool {
    /// An empty spool, whose file lies in `folder`. Whoever waits gives up when the job is cancelled.
    ///
    /// # Errors
    /// `Io`: no file can be made there.
    pub fn new(folder: &Path, expected: Expected, job: Arc<Job>) -> Result<Self> {
        let file: File = temporary(folder).map_err(|e| Error::io(e, "open").with_path(folder))?;
        let file = FileStorage::from_file(file, Some(folder.to_owned()), true)?;
        Ok(Self { file, expected, job, state: Mutex::default(), moved: Condvar::new() })
    }

    /// What came next. One at a time.
    ///
    /// # Errors
    /// `Io`: of a full disk `ENOSPC`.
    pub fn append(&self, bytes: Mem<'_>) -> Result<()> {
        let (at, dropping) = {
            let state = self.state.lock();
            (state.came, state.dropping)
        };
        if !dropping {
            self.file.write_all_at(bytes, at)?;
        }
        let mut state = self.state.lock();
        state.came = at.saturating_add(bytes.len() as u64);
        if dropping || state.dropping {
            state.freed = state.came;
        } else {
            // Memory follows what came, never what was said.
            let blocks = usize::try_from(state.came.div_ceil(BLOCK)).unwrap_or(usize::MAX);
            state.taken.resize(blocks, 0);
            state.peak = state.peak.max(state.stored());
        }
        drop(state);
        self.moved.notify_all();
        Ok(())
    }

    /// Nothing more comes.
    pub fn end(&self) {
        self.state.lock().ended = true;
        self.moved.notify_all();
    }

    /// How far it is.
    pub fn progress(&self) -> Progress {
        let state = self.state.lock();
        Progress { came: state.came, stored: state.stored(), peak: state.peak, wanted: state.waiting > 0 }
    }

    /// Waits until `is` has a value for what came.
    fn wait<T>(&self, wants: bool, is: impl Fn(&State) -> Option<T>) -> io::Result<T> {
        let mut state = self.state.lock();
        loop {
            if self.job.is_cancelled() {
                return Err(GivenUp.into());
            }
            if let Some(value) = is(&state) {
                return Ok(value);
            }
            state.waiting += u32::from(wants);
            self.moved.wait_for(&mut state, LOOK);
            state.waiting -= u32::from(wants);
        }
    }

    fn refuse_gone(&self, state: &State, offset: u64, length: u64) -> io::Result<()> {
        let Some(at) = state.gone(offset, length) else { return Ok(()) };
        let message = format!(
            "the image has the bytes at {at} in two places of its disk, and the stream has passed them: write it to a file, and convert that"
        );
        Err(io::Error::other(Error::new(ErrorKind::UnsupportedFeature, message).with_offset(at)))
    }
}

/// The error of a range that a stream is too short for, which ended in the unit that it ended in.
fn behind_end(came: u64, unit: u64, offset: u64, length: u64) -> Option<Error> {
    let end = came.checked_next_multiple_of(unit).unwrap_or(u64::MAX);
    let message = || format!("the stream ended after {came} bytes, and the image in it goes on behind that");
    (offset.saturating_add(length) > end)
        .then(|| Error::new(ErrorKind::Corrupt, message()).with_offset(offset))
}

impl ReadStorage for Spool {
    fn read_at(&self, mut buf: MemMut<'_>, offset: u64) -> io::Result<usize> {
        if buf.is_empty() {
            return Ok(0);
        }
        let length = buf.len() as u64;
        let is_there = |state: &State| state.came > offset || state.ended;
        let (came, ended) = self.wait(true, |state| is_there(state).then_some((state.came, state.ended)))?;
        let behind =
            self.expected.unit.filter(|_| ended).and_then(|unit| behind_end(came, unit, offset, length));
        if let Some(error) = behind {
            return Err(io::Error::other(error));
        }
        if came <= offset {
            return Ok(0);
        }
        let there = usize::try_from(came - offset).unwrap_or(usize::MAX).min(buf.len());
        let got = self.file.read_at(buf.take_front(there), offset)?;
        // Looked at behind the read: what is given back is marked before it is.
        self.refuse_gone(&self.state.lock(), offset, got as u64)?;
        Ok(got)
    }

    fn len(&self) -> io::Result<u64> {
        if let Some(length) = self.expected.length {
            return Ok(length);
        }
        let endless = self.expected.unit.map(|_| i64::MAX as u64);
        self.wait(true, |state| if state.ended { Some(state.came) } else { endless })
    }

    fn allocated_bytes(&self) -> io::Result<u64> {
        Ok(self.state.lock().stored())
    }

    fn traits(&self) -> Traits {
        Traits { waits: true, ..Traits::default() }
    }

    fn arriving(&self) -> Option<&dyn Arriving> {
        Some(self)
    }
}

impl Arriving for Spool {
    fn taken(&self, offset: u64, length: u64) -> Result<()> {
        let mut state = self.state.lock();
        let (came, unit) = (state.came, self.expected.unit.unwrap_or(PART));
        let run = state.take(offset, length);
        drop(state);
        if let Some((start, end)) = run {
            // Space that cannot be given back is a larger spool, and no error.
            let _given = self.file.discard(start, end - start);
            self.moved.notify_all();
        }
        behind_end(came, unit, offset, length).map_or(Ok(()), Err)
    }

    fn settle(&self) -> io::Result<()> {
        if !self.expected.keep {
            let mut state = self.state.lock();
            state.dropping = true;
            state.freed = state.came;
            drop(state);
            let _given = self.file.set_len(0);
        }
        // What is kept may be all that is taken: more comes when somebody wants it.
        self.wait(self.expected.keep, |state| state.ended.then_some(()))
    }
}

impl Storage for Spool {
    fn write_at(&self, _: Mem<'_>, _: u64) -> io::Result<usize> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn set_len(&self, _: u64) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn sync_data(&self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

    use std::thread;

    use super::*;
    use crate::ErrorKind;

    fn spool(expected: Expected) -> (tempfile::TempDir, Arc<Job>, Spool) {
        let folder = tempfile::tempdir().unwrap();
        let job = Arc::new(Job::new());
        let spool = Spool::new(folder.path(), expected, Arc::clone(&job)).unwrap();
        // Windows keeps the name until the file is closed.
        let names = std::fs::read_dir(folder.path()).unwrap().count();
        assert_eq!(names, usize::from(cfg!(windows)), "the file has no name");
        (folder, job, spool)
    }

    fn read(spool: &Spool, offset: u64, length: usize) -> Result<Vec<u8>> {
        let mut bytes = vec![0xee; length];
        let got = spool.read_up_to_at(MemMut::from(&mut bytes[..]), offset)?;
        bytes.truncate(got);
        Ok(bytes)
    }

    fn pattern(length: u64) -> Vec<u8> {
        (0..length).map(|at| (at / 512 % 251 + 1) as u8).collect()
    }

    #[test]
    fn a_read_waits_for_its_bytes_and_a_length_for_the_end() {
        let (_folder, _, spool) = spool(Expected::default());
        let bytes = pattern(3 * BLOCK);
        thread::scope(|scope| {
            let all = scope.spawn(|| read(&spool, 0, 4 * BLOCK as usize).unwrap());
            let length = scope.spawn(|| spool.len().unwrap());
            for piece in bytes.chunks(50_000) {
                spool.append(Mem::from(piece)).unwrap();
            }
            spool.end();
            assert!(all.join().unwrap() == bytes);
            assert_eq!(length.join().unwrap(), 3 * BLOCK);
        });
        assert!(!spool.progress().wanted);
    }

    #[test]
    fn what_was_taken_is_given_back_and_never_read_as_zeroes() {
        let (_folder, _, spool) = spool(Expected::default());
        let bytes = pattern(8 * BLOCK);
        spool.append(Mem::from(&bytes[..])).unwrap();
        let space = spool.file.space_in_use().unwrap();
        // In pieces that are no blocks; what is no whole sector does not count.
        for start in (0..2 * BLOCK).step_by(4096) {
            spool.taken(start, 4096).unwrap();
        }
        spool.taken(4 * BLOCK, BLOCK - 1).unwrap();
        assert_eq!(spool.taken(8 * BLOCK - 512, 1024).unwrap_err().kind(), ErrorKind::Corrupt);
        assert_eq!(spool.progress().stored, 6 * BLOCK);
        assert!(spool.file.space_in_use().unwrap() < space, "the space is free");
        let error = read(&spool, BLOCK, 10).unwrap_err();
        assert_eq!((error.kind(), error.offset()), (ErrorKind::UnsupportedFeature, Some(BLOCK)));
        assert_eq!(read(&spool, 4 * BLOCK, 512).unwrap(), bytes[4 * BLOCK as usize..][..512]);
        assert_eq!(spool.progress().peak, 8 * BLOCK);
    }

    #[test]
    fn an_image_does_not_go_on_behind_the_unit_in_which_its_stream_ends() {
        let (_folder, _, spool) = spool(Expected { unit: Some(BLOCK), ..Expected::default() });
        assert_eq!(spool.len().unwrap(), i64::MAX as u64, "not known, and no matter");
        spool.append(Mem::from(&pattern(BLOCK + 512)[..])).unwrap();
        spool.end();
        assert_eq!(spool.len().unwrap(), BLOCK + 512);
        assert_eq!(read(&spool, BLOCK, BLOCK as usize).unwrap().len(), 512);
        assert_eq!(read(&spool, 2 * BLOCK, 1).unwrap_err().kind(), ErrorKind::Corrupt);
    }

    #[test]
    fn settling_drops_what_comes_and_waits_for_the_end() {
        let (_folder, _, spool) = spool(Expected::default());
        spool.append(Mem::from(&pattern(BLOCK)[..])).unwrap();
        thread::scope(|scope| {
            let settled = scope.spawn(|| spool.settle());
            while spool.progress().stored > 0 {
                thread::yield_now();
            }
            spool.append(Mem::from(&pattern(BLOCK)[..])).unwrap();
            spool.end();
            settled.join().unwrap().unwrap();
        });
        let progress = spool.progress();
        assert_eq!((progress.came, progress.stored, progress.peak), (2 * BLOCK, 0, BLOCK));
        assert_eq!(spool.file.size().unwrap(), 0);
        assert!(read(&spool, 0, 1).is_err());
    }

    #[test]
    fn who_waits_gives_up_with_the_job() {
        let (_folder, job, spool) = spool(Expected::default());
        thread::scope(|scope| {
            let waits =
                [scope.spawn(|| read(&spool, 0, 1).map(drop)), scope.spawn(|| spool.size().map(drop))];
            job.cancel();
            for wait in waits {
                assert_eq!(wait.join().unwrap().unwrap_err().kind(), ErrorKind::Aborted);
            }
        });
    }
}
