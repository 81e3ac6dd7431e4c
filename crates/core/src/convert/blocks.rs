//! A target whose guest data lies in blocks of one size, each at a place that the format's table says. Blocks get their places in
//! guest order, whatever the number of workers; those without data get none.

use std::sync::Arc;

use qcow2_transform::zero;

use super::copy::{Ahead, Copier};
use super::scan::{Chunk, Rules, Zeroes};
use super::turns::Turns;
use super::{Context, ConvertOptions, Delta, Sink, Worker};
use crate::{Job, Mem, Result, Storage, StorageExt};

/// Bytes of a chunk, as far as blocks allow.
const CHUNK: u64 = 1 << 20;
/// Bytes of a write from which on taking its space first costs less than it gains.
const WORTH_ALLOCATING: usize = 64 << 10;

/// What a format does with blocks.
pub trait BlockTarget: Send {
    /// Bytes of a block, a multiple of 512.
    fn block_size(&self) -> u64;

    /// Takes a place for the block with this number, and notes it: the offset in the file of its first byte. Asked once for each block
    /// that has data, in guest order. The place reads as zeroes unless the file is stale (see [`BlockSink::new`]).
    ///
    /// # Errors
    /// `Limit` where the format's offsets end; `Io`.
    fn place(&mut self, block: u64) -> Result<u64>;

    /// All blocks are written: writes the tables, and makes the file an image at the very end; `durable`: in this order also on stable
    /// storage.
    ///
    /// # Errors
    /// `Io`; `Aborted`.
    fn finish(self: Box<Self>, durable: bool, job: &Job) -> Result<()>;
}

/// Into blocks.
pub struct BlockSink {
    storage: Arc<dyn Storage>,
    /// Granularity in bytes at which zeroes are left out; 0 writes them.
    sparse_size: usize,
    /// The file holds something where nothing was written: a device.
    stale: bool,
    block: u64,
    chunk: u64,
    /// What a parent has already is left out, and zeroes are data. A block is there as a whole, also with what the parent has of it.
    delta: Option<Delta>,
    ahead: Ahead,
    turns: Turns<Places>,
}

struct Places {
    /// The last block that got a place: the next chunk may go on in it.
    last: Option<(u64, u64)>,
    target: Box<dyn BlockTarget>,
}

/// Bytes of a chunk that go to one place.
struct Part {
    /// In the chunk.
    start: usize,
    end: usize,
    /// In the file.
    host: u64,
}

impl BlockSink {
    /// Into `storage`, which reads as zeroes where the target has written nothing, unless it is a device.
    pub fn new(context: &Context<'_>, storage: Arc<dyn Storage>, target: Box<dyn BlockTarget>) -> Self {
        let block = target.block_size().max(1);
        let stale = storage.traits().block_device;
        // Whole blocks, or a whole part of one.
        let delta = context.options.delta;
        let chunk = match block {
            _ if delta.is_some() => block,
            ..=CHUNK => CHUNK / block * block,
            _ if block.is_multiple_of(CHUNK) => CHUNK,
            _ => block,
        };
        Self {
            ahead: Ahead::new(!stale),
            storage,
            sparse_size: match delta {
                Some(_) => 0,
                None => usize::try_from(context.options.sparse_size).unwrap_or(usize::MAX),
            },
            delta,
            stale,
            block,
            chunk,
            turns: Turns::new(Places { last: None, target }),
        }
    }

    fn write(&self, copier: &mut Copier<'_>, chunk: &Chunk) -> Result<()> {
        copier.with_chunk(chunk, |copier, bytes| {
            let blocks = self.blocks_with_data(chunk.start, bytes);
            for part in self.places(chunk, &blocks)? {
                let data = bytes.get(part.start..part.end).unwrap_or_default();
                self.put_sparse(copier, data, part.host)?;
            }
            Ok(())
        })
    }

    /// The ranges of the chunk, a block's each, that are not all zeroes.
    fn blocks_with_data(&self, start: u64, bytes: &[u8]) -> Vec<(usize, usize)> {
        let mut blocks = Vec::new();
        let mut at = 0;
        while at < bytes.len() {
            let rest = self.block - (start + at as u64) % self.block;
            let end = bytes.len().min(at + rest as usize);
            let part = bytes.get(at..end).unwrap_or_default();
            if self.sparse_size == 0 || !zero::is_zero(part) {
                blocks.push((at, end));
            }
            at = end;
        }
        blocks
    }

    /// Where they go, neighbours together.
    fn places(&self, chunk: &Chunk, blocks: &[(usize, usize)]) -> Result<Vec<Part>> {
        self.turns.take(chunk.ticket, |places| {
            let mut parts: Vec<Part> = Vec::new();
            for &(start, end) in blocks {
                let guest = chunk.start + start as u64;
                let place = self.place(places, guest / self.block)?;
                let host = place + guest % self.block;
                match parts.last_mut() {
                    Some(last) if last.end == start && last.host + (start - last.start) as u64 == host => {
                        last.end = end;
                    }
                    _ => parts.push(Part { start, end, host }),
                }
            }
            Ok(parts)
        })
    }

    fn place(&self, places: &mut Places, block: u64) -> Result<u64> {
        if let Some((_, place)) = places.last.filter(|(last, _)| *last == block) {
            return Ok(place);
        }
        let place = places.target.place(block)?;
        places.last = Some((block, place));
        if self.stale {
            self.storage.zero(place, self.block, false)?;
        }
        Ok(place)
    }

    fn put_sparse(&self, copier: &Copier<'_>, bytes: &[u8], host: u64) -> Result<()> {
        if self.sparse_size == 0 {
            return self.put(copier, bytes, host);
        }
        zero::runs(bytes, self.sparse_size).filter(|run| !run.zero).try_for_each(|run| {
            let data = bytes.get(run.start..run.start + run.length).unwrap_or_default();
            self.put(copier, data, host + run.start as u64)
        })
    }

    fn put(&self, copier: &Copier<'_>, bytes: &[u8], host: u64) -> Result<()> {
        copier.context.count_written(bytes.len() as u64);
        if bytes.len() >= WORTH_ALLOCATING {
            self.ahead.take(&*self.storage, host, bytes.len() as u64);
        }
        self.storage.write_all_at(Mem::from(bytes), host)
    }
}

impl Sink for BlockSink {
    fn rules(&self) -> Rules {
        let zeroes = if self.sparse_size == 0 { Zeroes::Written } else { Zeroes::Skip };
        Rules { chunk: self.chunk, zeroes, delta: self.delta }
    }

    fn worker(&self) -> Result<Worker<'_>> {
        Ok(Box::new(|copier, chunk| {
            let chunk = if self.delta.is_some() { chunk.whole() } else { chunk };
            self.write(copier, &chunk)
        }))
    }

    fn stop(&self) {
        self.turns.stop();
    }

    fn finish(self: Box<Self>, options: &ConvertOptions, job: &Job) -> Result<()> {
        self.turns.into_inner().target.finish(options.durable, job)
    }
}
