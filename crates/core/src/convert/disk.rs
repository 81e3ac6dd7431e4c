//! A disk that is open for writing: every chunk is a guest write. Chunks are read side by side and written in order, so
//! that the target's clusters follow each other; those that are compressed are written as they are ready. Lock: `turn`, alone.

use parking_lot::{Condvar, Mutex};
use qcow2_transform::zero;

use super::copy::Copier;
use super::scan::{Chunk, Rules, Zeroes};
use super::{Context, ConvertOptions, Delta, Sink, Worker};
use crate::{Disk, Durability, Error, ErrorKind, Job, Mem, Result};

/// Bytes of a chunk, at least a cluster: two workers seldom meet in one.
const CHUNK: u64 = 1 << 20;
/// Bytes that are zeroed in one call.
const ZERO_CHUNK: u64 = 1 << 30;

/// Into a disk that is written to.
pub struct DiskSink<'a> {
    disk: &'a dyn Disk,
    /// Granularity in bytes at which zeroes are found; 0 writes them.
    sparse_size: usize,
    /// Zeroes have to be put there: the target holds something else.
    stale: bool,
    /// Bytes of a cluster, for compressed writes.
    compressed: Option<u64>,
    chunk: u64,
    /// What lies deeper in the source is in the target's backing file already.
    delta: Option<Delta>,
    turn: Mutex<Turn>,
    moved: Condvar,
}

#[derive(Default)]
struct Turn {
    /// Number of the chunk to write next.
    ticket: u64,
    stopped: bool,
}

/// The right to write a chunk; the next one follows when it is dropped.
struct Held<'a>(&'a DiskSink<'a>);

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.0.turn.lock().ticket += 1;
        self.0.moved.notify_all();
    }
}

impl<'a> DiskSink<'a> {
    /// The disk keeps what it has behind the source's end. `unit` is the granularity in bytes at which it allocates.
    ///
    /// # Errors
    /// `InvalidArgument` for a disk that is smaller than the source.
    pub fn new(context: &Context<'_>, disk: &'a dyn Disk, unit: Option<u64>) -> Result<Self> {
        let (size, room) = (context.source.virtual_size(), disk.virtual_size());
        if room < size {
            let message = format!("the target's disk holds {room} bytes, the source's {size}");
            return Err(Error::new(ErrorKind::InvalidArgument, message).with_field("target"));
        }
        let cluster = unit.unwrap_or(CHUNK);
        Ok(Self {
            disk,
            sparse_size: usize::try_from(context.options.sparse_size).unwrap_or(usize::MAX),
            stale: !context.options.target_is_zero,
            compressed: context.options.compression.map(|_| cluster),
            chunk: CHUNK.max(cluster),
            // What the target has behind the end of the base is not known to be zeroes.
            delta: context.options.delta.map(|delta| Delta { base_size: u64::MAX, ..delta }),
            turn: Mutex::default(),
            moved: Condvar::new(),
        })
    }

    /// The same, for a disk whose format cannot say that what a backing file has there reads as zeroes: they are written.
    #[must_use]
    pub fn with_zeroes_as_data(self) -> Self {
        let sparse_size = if self.stale { 0 } else { self.sparse_size };
        Self { sparse_size, ..self }
    }

    /// Waits until all chunks before this one are written.
    fn wait(&self, chunk: &Chunk) -> Result<Option<Held<'_>>> {
        if self.compressed.is_some() {
            return Ok(None);
        }
        let mut turn = self.turn.lock();
        while !turn.stopped && turn.ticket != chunk.ticket {
            self.moved.wait(&mut turn);
        }
        if turn.stopped { Err(Error::aborted()) } else { Ok(Some(Held(self))) }
    }

    fn write(&self, copier: &mut Copier<'_>, chunk: &Chunk) -> Result<()> {
        if self.sparse_size != 0 && chunk.is_zero() {
            let _turn = self.wait(chunk)?;
            return self.disk.write_zeroes(chunk.start, chunk.length(), true, Durability::AtFlush);
        }
        copier.with_chunk(chunk, |copier, bytes| {
            let _turn = self.wait(chunk)?;
            if let Some(cluster) = self.compressed {
                return self.put_compressed(copier, chunk.start, bytes, cluster);
            }
            if self.delta.is_none() {
                return self.put_runs(copier, chunk.start, bytes);
            }
            // Between the pieces the target has its own.
            chunk.pieces.iter().try_for_each(|piece| {
                let start = (piece.start - chunk.start) as usize;
                let data = bytes.get(start..start + piece.length as usize).unwrap_or_default();
                self.put_runs(copier, piece.start, data)
            })
        })
    }

    /// Writes bytes, those that are zeroes as such.
    fn put_runs(&self, copier: &Copier<'_>, start: u64, bytes: &[u8]) -> Result<()> {
        if self.sparse_size == 0 {
            return self.put(copier, bytes, start);
        }
        zero::runs(bytes, self.sparse_size).try_for_each(|run| {
            let offset = start + run.start as u64;
            let data = bytes.get(run.start..run.start + run.length).unwrap_or_default();
            if run.zero { self.zero(offset, run.length as u64) } else { self.put(copier, data, offset) }
        })
    }

    /// Writes whole clusters compressed; one that the source ends in, and the target does not, as it is.
    fn put_compressed(&self, copier: &Copier<'_>, start: u64, bytes: &[u8], cluster: u64) -> Result<()> {
        let mut at = start;
        for part in bytes.chunks(cluster as usize) {
            let end = at + part.len() as u64;
            if self.sparse_size != 0 && zero::is_zero(part) {
                self.zero(at, part.len() as u64)?;
            } else if part.len() as u64 == cluster || end == self.disk.virtual_size() {
                copier.context.count_written(part.len() as u64);
                self.disk.write_compressed_at(Mem::from(part), at)?;
            } else {
                self.put(copier, part, at)?;
            }
            at = end;
        }
        Ok(())
    }

    fn put(&self, copier: &Copier<'_>, bytes: &[u8], offset: u64) -> Result<()> {
        copier.context.count_written(bytes.len() as u64);
        self.disk.write_at(Mem::from(bytes), offset, Durability::AtFlush)
    }

    fn zero(&self, offset: u64, length: u64) -> Result<()> {
        if self.stale { self.disk.write_zeroes(offset, length, true, Durability::AtFlush) } else { Ok(()) }
    }
}

impl Sink for DiskSink<'_> {
    fn rules(&self) -> Rules {
        let zeroes = match (self.sparse_size, self.stale) {
            (0, _) => Zeroes::Written,
            (_, true) => Zeroes::Explicit(ZERO_CHUNK),
            (_, false) => Zeroes::Skip,
        };
        Rules { chunk: self.chunk, zeroes, delta: self.delta }
    }

    fn stop(&self) {
        self.turn.lock().stopped = true;
        self.moved.notify_all();
    }

    fn worker(&self) -> Result<Worker<'_>> {
        Ok(Box::new(|copier, chunk| self.write(copier, &chunk)))
    }

    fn finish(self: Box<Self>, options: &ConvertOptions, _: &Job) -> Result<()> {
        if options.durable { self.disk.flush() } else { Ok(()) }
    }
}
