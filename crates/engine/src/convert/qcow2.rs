//! A new qcow2 target. Lock: `state` alone, held for allocation and for metadata that became final, never for
//! data. A chunk's host clusters are allocated when all chunks before it have theirs; chunks that are ready
//! early wait in `pending`, not their workers.

use std::collections::BTreeMap;
use std::sync::Arc;

use parking_lot::{Condvar, Mutex};
use qcow2_core::convert::{
    Ahead, Chunk, Context, Copier, Piece, Rules, SHARED_BLOCK, Sink, Worker, Zeroes, shares_blocks,
};
use qcow2_format::HostOffset;
use qcow2_transform::{CompressOptions, Compressor};

use super::ConvertOptions;
use super::prepare::{Payload, Planner, Prepared, Unit};
use crate::create::{
    CreateOptions, ImageBuilder, NewCluster, Preallocation, Preallocator, lengthen, size_data_file, zero_out,
};
use crate::door::GuestData;
use crate::invalid::transform;
use crate::{Job, Mem, Result, Storage, StorageExt};

/// Bytes of a chunk: small enough to stay in the core's cache between its read and its write.
const CHUNK: u64 = 512 << 10;
/// Bytes of a chunk that is compressed: its clusters are written in one piece.
const COMPRESSED_CHUNK: u64 = 1 << 20;
/// Bytes of space that are taken ahead of the writes at once: as much as there is already, within these.
const AHEAD: std::ops::RangeInclusive<u64> = 1 << 20..=64 << 20;
/// Clusters of a chunk that is shared or zero, which takes no memory for data.
const LONG_CHUNK_CLUSTERS: u64 = 8192;

pub(super) struct Qcow2Sink {
    /// Where data goes: the image, or its external data file.
    host: Arc<dyn Storage>,
    /// What it goes through: the same, behind the door if there is one.
    data: GuestData,
    has_data_file: bool,
    planner: Planner,
    shared: bool,
    chunk: u64,
    compression: Option<CompressOptions>,
    preallocation: Preallocation,
    preallocator: Option<Preallocator>,
    space: Ahead,
    /// Most chunks between the first that is not placed and the last that was begun.
    ahead: u64,
    state: Mutex<State>,
    moved: Condvar,
    /// Buffers for reuse.
    buffers: Mutex<Vec<Vec<u8>>>,
}

struct State {
    builder: ImageBuilder,
    /// Next chunk to place.
    turn: u64,
    /// Chunks that workers began.
    begun: u64,
    pending: BTreeMap<u64, Prepared>,
    /// End of what is placed.
    placed: u64,
    /// End of the space that was taken ahead.
    taken: u64,
    stopped: bool,
}

/// A chunk with its host clusters.
type Placed = (Prepared, Vec<Option<HostOffset>>);

impl Qcow2Sink {
    pub(super) fn new(
        context: &Context<'_>,
        storage: Arc<dyn Storage>,
        data_file: Option<Arc<dyn Storage>>,
        create: CreateOptions,
        workers: usize,
    ) -> Result<Self> {
        let options = context.options;
        let compression = options.compression.map(|c| create.compress_options(c));
        let preallocation = create.effective_preallocation();
        let builder = ImageBuilder::new(storage.clone(), &create, compression.is_some())?;
        let geometry = builder.geometry();
        if let Some(file) = &data_file {
            let (size, keep) = (builder.size(), create.keep_data_file);
            // What is mapped and not written must read as zeroes. A preallocation zeroes a device by itself.
            if keep {
                zero_out(&**file, 0..size.min(file.size()?), true, context.job)?;
            } else if file.traits().block_device && preallocation == Preallocation::Off {
                zero_out(&**file, 0..size, true, context.job)?;
            }
            match keep {
                true => lengthen(&**file, size)?,
                false => size_data_file(file, size, &create, context.job)?,
            }
        }
        let has_data_file = data_file.is_some();
        let host = Arc::clone(data_file.as_ref().unwrap_or(&storage));
        let data = GuestData::behind(create.data_door.as_ref(), &host);
        // With a data file, this would be tried out on what size_raw made.
        let shared = compression.is_none()
            && options.delta.is_none()
            && options.sparse_size != 0
            && preallocation == Preallocation::Off
            && !has_data_file
            && create.data_door.is_none()
            && geometry.cluster_size() >= SHARED_BLOCK
            && shares_blocks(context.source, &*host, context.job)?;
        builder.extend();
        let whole_clusters = compression.is_some() || shared;
        let preallocator =
            (preallocation != Preallocation::Off).then(|| Preallocator::new(&create, &storage));
        let planner = Planner {
            geometry,
            unit: if whole_clusters { geometry.cluster_size() } else { geometry.subcluster_size() },
            sparse_size: match compression {
                // A cluster that is compressed is zero as a whole, or written as a whole.
                Some(_) => options.sparse_size.min(geometry.cluster_size()),
                None => options.sparse_size,
            },
            delta: options.delta,
            has_zero_flag: create.version >= 3,
            map_all: preallocator.as_ref().map(Preallocator::bitmap),
            reserve: preallocator.as_ref().is_some_and(Preallocator::reserves),
            fill: preallocator.as_ref().is_some_and(Preallocator::zeroes),
        };
        let chunk = match (shared, compression.is_some()) {
            (true, _) => geometry.cluster_size() * LONG_CHUNK_CLUSTERS,
            (_, true) => COMPRESSED_CHUNK.max(geometry.cluster_size()),
            (_, false) => CHUNK.max(geometry.cluster_size()),
        };
        Ok(Self {
            host,
            data,
            has_data_file,
            planner,
            shared,
            chunk,
            compression,
            preallocation,
            preallocator,
            space: Ahead::new(!shared && !has_data_file && preallocation == Preallocation::Off),
            ahead: 2 * workers as u64 + 2,
            state: Mutex::new(State {
                builder,
                turn: 0,
                begun: 0,
                pending: BTreeMap::new(),
                placed: 0,
                taken: 0,
                stopped: false,
            }),
            moved: Condvar::new(),
            buffers: Mutex::default(),
        })
    }

    fn write(
        &self,
        copier: &mut Copier<'_>,
        compressor: Option<&mut Compressor>,
        chunk: Chunk,
    ) -> Result<()> {
        let prepared = self.prepare(copier, compressor, chunk)?;
        for (prepared, places) in self.place(prepared, copier.context.job)? {
            self.store(copier, prepared, &places)?;
        }
        Ok(())
    }

    fn prepare(
        &self,
        copier: &mut Copier<'_>,
        compressor: Option<&mut Compressor>,
        chunk: Chunk,
    ) -> Result<Prepared> {
        if self.planner.sparse_size != 0 && self.planner.has_zero_flag && chunk.is_zero() {
            return Ok(self.planner.zeroes(&chunk));
        }
        if self.shared {
            return Ok(self.planner.shared(chunk));
        }
        let plain = self.planner.plain(copier, &chunk, self.buffer())?;
        let Some(compressor) = compressor else { return Ok(plain) };
        let (packed, buffer) = self.planner.pack(plain, compressor, self.buffer())?;
        self.give_back(buffer);
        Ok(packed)
    }

    /// Allocates for this chunk if it is its turn, and for all that waited for it.
    fn place(&self, prepared: Prepared, job: &Job) -> Result<Vec<Placed>> {
        let mut state = self.state.lock();
        state.pending.insert(prepared.ticket, prepared);
        let mut placed = Vec::new();
        while let Some(next) = {
            let turn = state.turn;
            state.pending.remove(&turn)
        } {
            let state = &mut *state;
            if let Some(preallocator) = &self.preallocator {
                preallocator.place(&mut state.builder, state.placed, next.start, job)?;
            }
            let mut places = Vec::with_capacity(next.clusters.len());
            state.builder.place(next.start, &next.clusters, &mut places)?;
            state.placed = next.end;
            state.turn += 1;
            placed.push((next, places));
        }
        let end = state.builder.end();
        if end > state.taken {
            let more = end.clamp(*AHEAD.start(), *AHEAD.end());
            self.space.take(&*self.host, state.taken, end - state.taken + more);
            state.taken = end + more;
        }
        if !placed.is_empty() {
            self.moved.notify_all();
        }
        Ok(placed)
    }

    fn store(
        &self,
        copier: &mut Copier<'_>,
        prepared: Prepared,
        places: &[Option<HostOffset>],
    ) -> Result<()> {
        match prepared.payload {
            Payload::Plain(buffer) => {
                let length = (prepared.end - prepared.start) as usize;
                for run in plain_runs(&self.planner, &prepared.units, places, length) {
                    let data = self.data.at(prepared.start + run.from as u64, run.host);
                    put(copier, &data, buffer.get(run.from..run.from + run.length), run.host)?;
                }
                self.give_back(buffer);
            }
            Payload::Packed(buffer) => {
                let size = self.planner.geometry.cluster_len();
                for run in packed_runs(&prepared.clusters, places, size) {
                    put(copier, &self.host, buffer.get(run.from..run.from + run.length), run.host)?;
                }
                self.give_back(buffer);
            }
            Payload::Shared(pieces) => {
                for piece in &pieces {
                    self.share(copier, piece, prepared.start, places)?;
                }
            }
        }
        Ok(())
    }

    /// Shares a piece, host run by host run.
    fn share(
        &self,
        copier: &mut Copier<'_>,
        piece: &Piece,
        chunk_start: u64,
        places: &[Option<HostOffset>],
    ) -> Result<()> {
        let g = self.planner.geometry;
        let first = g.cluster_index(piece.start - chunk_start);
        let last = g.cluster_index(piece.end() - 1 - chunk_start);
        let hosts = places.get(first as usize..=last as usize).unwrap_or_default();
        let mut start = piece.start;
        let contiguous = |a: &Option<HostOffset>, b: &Option<HostOffset>| {
            a.zip(*b).is_some_and(|(a, b)| a.get() + g.cluster_size() == b.get())
        };
        for run in hosts.chunk_by(contiguous) {
            let end = g.cluster_start(start) + run.len() as u64 * g.cluster_size();
            let length = end.min(piece.end()) - start;
            if let Some(Some(host)) = run.first() {
                let part = piece.part(start - piece.start, length);
                copier.share(&part, &*self.host, host.get() + g.in_cluster(start))?;
            }
            start += length;
        }
        Ok(())
    }

    fn buffer(&self) -> Vec<u8> {
        self.buffers.lock().pop().unwrap_or_default()
    }

    fn give_back(&self, buffer: Vec<u8>) {
        self.buffers.lock().push(buffer);
    }
}

impl Sink for Qcow2Sink {
    fn rules(&self) -> Rules {
        let long = self.planner.geometry.cluster_size() * LONG_CHUNK_CLUSTERS;
        let zeroes = match (self.planner.sparse_size, self.planner.delta) {
            (0, _) => Zeroes::Written,
            (_, None) => Zeroes::Skip,
            (_, Some(_)) if self.planner.has_zero_flag => Zeroes::Explicit(long),
            (_, Some(_)) => Zeroes::Written,
        };
        Rules { chunk: self.chunk, zeroes, delta: self.planner.delta }
    }

    fn worker(&self) -> Result<Worker<'_>> {
        let compressor = self.compression.as_ref().map(|o| Compressor::new(o).map_err(transform));
        let mut compressor = compressor.transpose()?;
        Ok(Box::new(move |copier, chunk| self.write(copier, compressor.as_mut(), chunk)))
    }

    /// Waits until another chunk may be begun: what is ready but not placed takes memory.
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
        let Self { state, preallocator, preallocation, has_data_file, host, .. } = *self;
        let State { mut builder, placed, .. } = state.into_inner();
        if let Some(preallocator) = &preallocator {
            let size = builder.size();
            preallocator.place(&mut builder, placed, size, job)?;
        }
        job.checkpoint()?;
        if options.durable && has_data_file {
            host.flush()?;
        }
        builder.finish(preallocation, options.durable).map(drop)
    }
}

fn put(copier: &Copier<'_>, data: &Arc<dyn Storage>, bytes: Option<&[u8]>, host: u64) -> Result<()> {
    let bytes = bytes.unwrap_or_default();
    copier.context.count_written(bytes.len() as u64);
    data.write_all_at(Mem::from(bytes), host)
}

/// Bytes of a payload that go to one place.
#[derive(Debug, PartialEq, Eq)]
struct WriteRun {
    from: usize,
    length: usize,
    host: u64,
}

fn push_run(runs: &mut Vec<WriteRun>, from: usize, length: usize, host: u64) {
    match runs.last_mut() {
        Some(last) if last.from + last.length == from && last.host + last.length as u64 == host => {
            last.length += length;
        }
        _ => runs.push(WriteRun { from, length, host }),
    }
}

/// The data units of a plain chunk of `length` guest bytes, neighbours in guest and host together.
fn plain_runs(
    planner: &Planner,
    units: &[Unit],
    places: &[Option<HostOffset>],
    length: usize,
) -> Vec<WriteRun> {
    let unit = planner.unit as usize;
    let per_cluster = planner.geometry.cluster_len() / unit;
    let mut runs = Vec::new();
    for (index, _) in units.iter().enumerate().filter(|(_, u)| **u == Unit::Data) {
        if let Some(Some(host)) = places.get(index / per_cluster) {
            let from = index * unit;
            let inside = (index % per_cluster * unit) as u64;
            push_run(&mut runs, from, unit.min(length - from), host.get() + inside);
        }
    }
    runs
}

/// The clusters of a packed chunk, neighbours in the file together.
fn packed_runs(clusters: &[NewCluster], places: &[Option<HostOffset>], cluster_size: usize) -> Vec<WriteRun> {
    let mut runs = Vec::new();
    let mut from = 0;
    for (cluster, place) in clusters.iter().zip(places) {
        let length = match cluster {
            NewCluster::Compressed(length) => *length as usize,
            NewCluster::Data(_) => cluster_size,
            NewCluster::Zero(_) | NewCluster::Reserved | NewCluster::Unallocated => continue,
        };
        if let Some(host) = place {
            push_run(&mut runs, from, length, host.get());
        }
        from += length;
    }
    runs
}
