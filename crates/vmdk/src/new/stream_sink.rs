//! Copying a disk into a stream. Chunks are compressed side by side, and get their places in guest order: the bytes of the file do not
//! depend on the number of workers. Lock: `state`, alone.

use std::collections::BTreeMap;
use std::sync::Arc;

use parking_lot::{Condvar, Mutex};
use qcow2_core::convert::{Chunk, Context, ConvertOptions, Copier, Rules, Sink, Worker, Zeroes};
use qcow2_core::{Error, ErrorKind, Job, Mem, Result, Storage, StorageExt};
use qcow2_transform::{StreamDeflater, is_zero, zlib};

use super::{GRAIN, NewVmdk};
use crate::fields::SECTOR;
use crate::sparse::GRAIN_MARKER_BYTES;
use crate::stream::{self, Placed, Stream};

/// Bytes of a chunk: whole tables have whole chunks, so that the grains of one lie one behind the other.
const CHUNK: u64 = 1 << 20;

/// Into a streamOptimized extent.
pub(super) struct StreamSink {
    new: Arc<NewVmdk>,
    own: Arc<dyn Storage>,
    level: u32,
    /// Grains of zeroes are written: they hide what the parent has, or are asked for.
    zeroes: bool,
    delta: Option<qcow2_core::convert::Delta>,
    /// Most chunks between the first that has no place and the last that was begun.
    ahead: u64,
    state: Mutex<State>,
    moved: Condvar,
    /// Buffers for reuse.
    buffers: Mutex<Vec<Vec<u8>>>,
}

struct State {
    stream: Stream,
    /// Next chunk to place.
    turn: u64,
    /// Chunks that workers began.
    begun: u64,
    pending: BTreeMap<u64, Packed>,
    stopped: bool,
}

/// The grains of a chunk, compressed, each with its marker and padded to a sector.
struct Packed {
    /// Numbers of the grains, and their sectors.
    grains: Vec<(u64, u64)>,
    bytes: Vec<u8>,
}

impl StreamSink {
    pub(super) fn new(
        new: Arc<NewVmdk>,
        own: Arc<dyn Storage>,
        context: &Context<'_>,
        workers: usize,
    ) -> Result<Self> {
        let stream = Stream::new(new.sectors(), new.options().zeroed_grain)?;
        let delta = context.options.delta;
        Ok(Self {
            level: context.options.compression.and_then(|c| c.level).unwrap_or(zlib::DEFAULT_LEVEL),
            zeroes: delta.is_some() || context.options.sparse_size == 0,
            delta,
            new,
            own,
            ahead: 2 * workers as u64 + 2,
            state: Mutex::new(State { stream, turn: 0, begun: 0, pending: BTreeMap::new(), stopped: false }),
            moved: Condvar::new(),
            buffers: Mutex::default(),
        })
    }

    fn write(&self, copier: &mut Copier<'_>, deflater: &mut StreamDeflater, chunk: &Chunk) -> Result<()> {
        let mut packed = Packed { grains: Vec::new(), bytes: self.buffers.lock().pop().unwrap_or_default() };
        packed.bytes.clear();
        copier.with_chunk(chunk, |_, bytes| {
            for (number, grain) in (chunk.start / GRAIN..).zip(bytes.chunks(GRAIN as usize)) {
                if self.zeroes || !is_zero(grain) {
                    packed.push(number, grain, deflater)?;
                }
            }
            Ok(())
        })?;
        for (place, Packed { bytes, .. }, tables) in self.place(chunk.ticket, packed)? {
            for (sector, table) in tables {
                self.own.write_all_at(Mem::from(&table[..]), sector * SECTOR)?;
            }
            copier.context.count_written(bytes.len() as u64);
            self.own.write_all_at(Mem::from(&bytes[..]), place * SECTOR)?;
            self.buffers.lock().push(bytes);
        }
        Ok(())
    }

    /// Places this chunk if it is its turn, and all that waited for it: the first sector of each, and the tables in front.
    fn place(&self, ticket: u64, packed: Packed) -> Result<Vec<(u64, Packed, Vec<Placed>)>> {
        let mut state = self.state.lock();
        let state = &mut *state;
        state.pending.insert(ticket, packed);
        let mut placed = Vec::new();
        while let Some(next) = state.pending.remove(&state.turn) {
            state.turn += 1;
            let (mut tables, mut first) = (Vec::new(), None);
            for &(number, sectors) in &next.grains {
                let place = state.stream.place(number, sectors, &mut tables)?;
                first.get_or_insert(place);
            }
            placed.extend(first.map(|first| (first, next, tables)));
        }
        self.moved.notify_all();
        Ok(placed)
    }
}

impl Packed {
    /// Compresses a grain; the last one of a disk is filled up with zeroes.
    fn push(&mut self, number: u64, grain: &[u8], deflater: &mut StreamDeflater) -> Result<()> {
        let mut whole = Vec::new();
        let grain = if (grain.len() as u64) < GRAIN {
            whole.extend_from_slice(grain);
            whole.resize(GRAIN as usize, 0);
            &whole[..]
        } else {
            grain
        };
        let start = self.bytes.len();
        let data = start + GRAIN_MARKER_BYTES as usize;
        self.bytes.resize(data + deflater.bound(grain.len()), 0);
        let room = self.bytes.get_mut(data..).unwrap_or_default();
        let length = deflater
            .deflate(grain, room)
            .map_err(|e| Error::new(ErrorKind::Internal, e.to_string()).with_source(e))?;
        let marker =
            [&(number * (GRAIN / SECTOR)).to_le_bytes()[..], &(length as u32).to_le_bytes()].concat();
        if let Some(place) = self.bytes.get_mut(start..data) {
            place.copy_from_slice(&marker);
        }
        // The room behind the stream may hold anything.
        self.bytes.truncate(data + length);
        self.bytes.resize((data + length).next_multiple_of(SECTOR as usize), 0);
        self.grains.push((number, (self.bytes.len() - start) as u64 / SECTOR));
        Ok(())
    }
}

impl Sink for StreamSink {
    fn rules(&self) -> Rules {
        let zeroes = if self.zeroes { Zeroes::Written } else { Zeroes::Skip };
        Rules { chunk: if self.delta.is_some() { GRAIN } else { CHUNK }, zeroes, delta: self.delta }
    }

    fn worker(&self) -> Result<Worker<'_>> {
        let mut deflater = StreamDeflater::new(self.level).map_err(|e| {
            Error::new(ErrorKind::InvalidArgument, e.to_string()).with_field("compress").with_source(e)
        })?;
        Ok(Box::new(move |copier, chunk| {
            let chunk = if self.delta.is_some() { chunk.whole() } else { chunk };
            self.write(copier, &mut deflater, &chunk)
        }))
    }

    /// Waits until another chunk may be begun: what has no place yet takes memory.
    fn admit(&self) {
        let mut state = self.state.lock();
        while !state.stopped && state.begun - state.turn >= self.ahead {
            self.moved.wait(&mut state);
        }
        state.begun += 1;
    }

    fn stop(&self) {
        self.state.lock().stopped = true;
        self.moved.notify_all();
    }

    fn finish(self: Box<Self>, options: &ConvertOptions, job: &Job) -> Result<()> {
        job.checkpoint()?;
        stream::finish(&self.new, self.state.into_inner().stream, &*self.own, options.durable)
    }
}
