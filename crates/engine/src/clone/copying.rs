//! Which chunks of a clone are copied, and who copies them.

use std::collections::BTreeMap;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::{Condvar, Mutex};

use super::scan::{Piece, Scan};
use super::target::Sink;
use crate::image::LiveCopy;
use crate::{Error, ErrorKind, GuestSource, Job, MemMut, Result};

/// Bytes of a chunk at least: less is not worth a claim of its own.
const MIN_CHUNK: u64 = 64 << 10;
/// Most chunks of a disk: their bits take 32 MiB.
const MAX_CHUNKS: u64 = 1 << 28;
/// Bytes that are moved at once, unless a chunk is larger than that and a cluster of the target as large.
const STEP: u64 = 1 << 20;

/// What a clone did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CloneResult {
    /// Size of the disk in bytes.
    pub virtual_size: u64,
    /// Guest bytes read.
    pub bytes_read: u64,
    /// Guest bytes written to the target, zeroes left out.
    pub bytes_written: u64,
}

/// One clone, shared by its workers and the requests on the image.
#[derive(Debug)]
pub(crate) struct Copying {
    size: u64,
    /// Bytes of a chunk, a power of two: whole clusters of the target, so that two copies never meet in one.
    chunk: u64,
    sink: Sink,
    claims: Mutex<Claims>,
    /// A claim ended.
    moved: Condvar,
    read: AtomicU64,
    written: AtomicU64,
}

#[derive(Debug)]
struct Claims {
    /// A bit for each chunk that is copied, being copied, or known to be zero.
    taken: Vec<u64>,
    /// Chunks that are being copied: first to end.
    active: BTreeMap<u64, u64>,
    /// Why the clone ended.
    failure: Option<Error>,
    over: bool,
}

impl Claims {
    fn is_taken(&self, chunk: u64) -> bool {
        self.taken.get((chunk / 64) as usize).is_some_and(|word| word >> (chunk % 64) & 1 == 1)
    }

    fn take(&mut self, chunks: Range<u64>) {
        let mut at = chunks.start;
        while at < chunks.end {
            let count = (64 - at % 64).min(chunks.end - at);
            if let Some(word) = self.taken.get_mut((at / 64) as usize) {
                *word |= (u64::MAX >> (64 - count)) << (at % 64);
            }
            at += count;
        }
    }

    /// The first run of chunks that nobody took.
    fn untaken(&self, chunks: Range<u64>) -> Option<Range<u64>> {
        let start = chunks.clone().find(|&chunk| !self.is_taken(chunk))?;
        let end = (start..chunks.end).find(|&chunk| self.is_taken(chunk)).unwrap_or(chunks.end);
        Some(start..end)
    }

    fn is_active(&self, chunks: &Range<u64>) -> bool {
        self.active.range(..chunks.end).next_back().is_some_and(|(_, end)| *end > chunks.start)
    }
}

/// Chunks that this thread copies. Dropped, it says that they are copied, or that the clone ended.
struct Claim<'a> {
    copying: &'a Copying,
    chunks: Range<u64>,
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        self.copying.claims.lock().active.remove(&self.chunks.start);
        self.copying.moved.notify_all();
    }
}

impl Copying {
    pub(super) fn new(size: u64, sink: Sink) -> Self {
        let mut chunk = MIN_CHUNK.max(sink.cluster_size());
        while size.div_ceil(chunk) > MAX_CHUNKS {
            chunk *= 2;
        }
        // Zeroed memory that is not touched costs nothing.
        let taken = vec![0; size.div_ceil(chunk).div_ceil(64) as usize];
        let claims = Claims { taken, active: BTreeMap::new(), failure: None, over: false };
        Self {
            size,
            chunk,
            sink,
            claims: Mutex::new(claims),
            moved: Condvar::new(),
            read: AtomicU64::new(0),
            written: AtomicU64::new(0),
        }
    }

    pub(super) fn size(&self) -> u64 {
        self.size
    }

    /// A scan of a range of whole chunks.
    pub(super) fn scan(&self, range: Range<u64>) -> Scan {
        Scan::new(range, self.chunk, self.chunk.max(STEP))
    }

    pub(super) fn is_over(&self) -> bool {
        self.claims.lock().over
    }

    /// Waits until nobody copies.
    pub(super) fn wait_idle(&self) {
        let mut claims = self.claims.lock();
        while !claims.active.is_empty() {
            self.moved.wait(&mut claims);
        }
    }

    /// Everything is copied, or the clone failed: completes the target, once.
    pub(super) fn finish(&self) -> Result<CloneResult> {
        let mut claims = self.claims.lock();
        claims.over = true;
        if let Some(error) = claims.failure.take() {
            return Err(error);
        }
        drop(claims);
        self.sink.finish()?;
        Ok(CloneResult {
            virtual_size: self.size,
            bytes_read: self.read.load(Ordering::Relaxed),
            bytes_written: self.written.load(Ordering::Relaxed),
        })
    }

    fn copy_range(&self, disk: &dyn GuestSource, range: Range<u64>) -> Result<()> {
        // A guest's request cannot be cancelled.
        let job = Job::new();
        let mut buffer = Vec::new();
        let mut scan = self.scan(range);
        while let Some(piece) = scan.next(disk, &job)? {
            if self.is_over() {
                return Ok(());
            }
            self.copy_piece(disk, &piece, &mut buffer)?;
        }
        Ok(())
    }

    /// Copies those chunks of a piece that nobody took.
    pub(super) fn copy_piece(
        &self,
        disk: &dyn GuestSource,
        piece: &Piece,
        buffer: &mut Vec<u8>,
    ) -> Result<()> {
        let zero = piece.from / self.chunk..piece.data.start.div_ceil(self.chunk);
        // What nobody took has not changed since it was seen to be zero.
        self.claims.lock().take(zero);
        let chunks = piece.data.start / self.chunk..piece.data.end.div_ceil(self.chunk);
        while let Some(claim) = self.claim(chunks.clone()) {
            // A panic is a bug, of this copy alone: the request that came by to change the chunk goes on.
            let copied = catch_unwind(AssertUnwindSafe(|| self.copy(disk, &claim.chunks, buffer)));
            match copied {
                Ok(Ok(())) => {}
                // An error ends the clone before anyone relies on the chunk.
                Ok(Err(error)) => self.fail(error),
                Err(_) => self.fail(Error::new(ErrorKind::Internal, "a copy of a clone panicked")),
            }
            drop(claim);
        }
        Ok(())
    }

    fn claim(&self, chunks: Range<u64>) -> Option<Claim<'_>> {
        let mut claims = self.claims.lock();
        if claims.over {
            return None;
        }
        let run = claims.untaken(chunks)?;
        claims.take(run.clone());
        claims.active.insert(run.start, run.end);
        Some(Claim { copying: self, chunks: run })
    }

    fn copy(&self, disk: &dyn GuestSource, chunks: &Range<u64>, buffer: &mut Vec<u8>) -> Result<()> {
        let end = chunks.end.saturating_mul(self.chunk).min(self.size);
        let step = STEP.max(self.sink.cluster_size());
        let mut at = chunks.start * self.chunk;
        while at < end {
            let length = step.min(end - at);
            buffer.resize(length as usize, 0);
            disk.read_at(MemMut::from(buffer.as_mut_slice()), at)?;
            self.read.fetch_add(length, Ordering::Relaxed);
            let written = self.sink.write(buffer, at)?;
            self.written.fetch_add(written, Ordering::Relaxed);
            at += length;
        }
        Ok(())
    }
}

impl LiveCopy for Copying {
    /// Copies what is not copied of the chunks that `range` touches, and waits for what others are copying.
    fn preserve(&self, disk: &dyn GuestSource, range: &Range<u64>) {
        let chunks = range.start / self.chunk..range.end.min(self.size).div_ceil(self.chunk);
        if chunks.is_empty() {
            return;
        }
        let untaken = {
            let claims = self.claims.lock();
            if claims.over { None } else { claims.untaken(chunks.clone()) }
        };
        if let Some(first) = untaken {
            let rest = first.start * self.chunk..chunks.end.saturating_mul(self.chunk).min(self.size);
            if let Err(error) = self.copy_range(disk, rest) {
                self.fail(error);
            }
        }
        let mut claims = self.claims.lock();
        while !claims.over && claims.is_active(&chunks) {
            self.moved.wait(&mut claims);
        }
    }

    fn fail(&self, error: Error) {
        let mut claims = self.claims.lock();
        claims.over = true;
        claims.failure.get_or_insert(error);
        drop(claims);
        self.moved.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_of_chunks_are_taken_once() {
        let mut claims = Claims { taken: vec![0; 4], active: BTreeMap::new(), failure: None, over: false };
        claims.take(60..70);
        claims.take(128..192);
        assert_eq!(claims.untaken(0..256), Some(0..60));
        assert_eq!(claims.untaken(60..256), Some(70..128));
        assert_eq!(claims.untaken(64..70), None);
        assert_eq!(claims.untaken(130..256), Some(192..256));
        claims.take(0..256);
        assert_eq!(claims.untaken(0..256), None);
        claims.active.insert(10, 20);
        assert!(claims.is_active(&(19..30)));
        assert!(claims.is_active(&(0..11)));
        assert!(!claims.is_active(&(20..30)));
        assert!(!claims.is_active(&(0..10)));
    }
}
