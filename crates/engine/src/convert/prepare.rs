//! What becomes of a chunk in a qcow2 target: which units are data, which read as zeroes, and the bytes.

use qcow2_core::convert::{Chunk, Content, Copier, Piece};
use qcow2_format::{Geometry, SubclusterBitmap};
use qcow2_transform::{Compressor, zero};

use super::Delta;
use crate::create::NewCluster;
use crate::invalid::transform;
use crate::{MemMut, Result};

/// State of one unit of allocation: a cluster, or a subcluster with extended L2 entries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unit {
    /// Nothing to say: the base, or zeroes.
    Absent,
    /// Reads as zeroes, which the target must say.
    Zero,
    /// Bytes.
    Data,
}

/// The bytes of a chunk.
#[derive(Debug)]
pub(super) enum Payload {
    /// The chunk as the guest sees it.
    Plain(Vec<u8>),
    /// The data of its clusters one behind the other, compressed or not.
    Packed(Vec<u8>),
    /// Not read: to be shared with the source.
    Shared(Vec<Piece>),
}

/// A chunk that is ready to be placed.
#[derive(Debug)]
pub(super) struct Prepared {
    pub(super) ticket: u64,
    pub(super) start: u64,
    pub(super) end: u64,
    pub(super) clusters: Vec<NewCluster>,
    /// For `Plain`, the units to write; for `Shared`, all that have data.
    pub(super) units: Vec<Unit>,
    pub(super) payload: Payload,
}

/// The target's side of the decisions.
#[derive(Debug, Clone, Copy)]
pub(super) struct Planner {
    pub(super) geometry: Geometry,
    /// Bytes of a unit.
    pub(super) unit: u64,
    /// Zeroes shorter than this stay data, but for those of whole clusters that are compressed; 0 keeps all.
    pub(super) sparse_size: u64,
    pub(super) delta: Option<Delta>,
    /// Version 2 has no zero flag.
    pub(super) has_zero_flag: bool,
    /// Every cluster gets its host cluster; the bitmap of those that hold nothing.
    pub(super) map_all: Option<SubclusterBitmap>,
    /// A flag says that what is mapped and holds nothing reads as zeroes.
    pub(super) reserve: bool,
    /// What is mapped but holds nothing must be written as zeroes.
    pub(super) fill: bool,
}

impl Planner {
    /// A chunk of nothing but zeroes that the target must state.
    pub(super) fn zeroes(&self, chunk: &Chunk) -> Prepared {
        let cluster = match self.map_all {
            Some(_) => NewCluster::Data(SubclusterBitmap::ALL_ZERO),
            None => NewCluster::Zero(SubclusterBitmap::ALL_ZERO),
        };
        let count = self.geometry.clusters_for(chunk.length()) as usize;
        Prepared {
            ticket: chunk.ticket,
            start: chunk.start,
            end: chunk.end,
            clusters: vec![cluster; count],
            units: Vec::new(),
            payload: Payload::Plain(Vec::new()),
        }
    }

    /// A chunk whose data is shared with the source.
    pub(super) fn shared(&self, chunk: Chunk) -> Prepared {
        let units = self.classify(&chunk);
        Prepared {
            ticket: chunk.ticket,
            start: chunk.start,
            end: chunk.end,
            clusters: self.clusters(&units),
            units,
            payload: Payload::Shared(chunk.pieces),
        }
    }

    /// Reads a chunk into `buffer` and decides about its zeroes.
    pub(super) fn plain(&self, copier: &Copier<'_>, chunk: &Chunk, mut buffer: Vec<u8>) -> Result<Prepared> {
        let mut units = self.classify(chunk);
        // Whole clusters, zeroes behind the end of the disk: compressors want them.
        let length = chunk.length() as usize;
        let whole = length.next_multiple_of(self.geometry.cluster_len());
        buffer.resize(whole, 0);
        let (bytes, behind) = buffer.split_at_mut(length);
        behind.fill(0);
        match self.delta {
            // Units that the base has in part are read through the whole chain.
            Some(_) => self.read_units(copier, chunk, &units, bytes)?,
            None => copier.read_chunk(chunk, bytes)?,
        }
        self.find_zeroes(chunk, bytes, &mut units);
        let clusters = self.clusters(&units);
        let payload = Payload::Plain(buffer);
        Ok(Prepared { ticket: chunk.ticket, start: chunk.start, end: chunk.end, clusters, units, payload })
    }

    /// Compresses the clusters of a plain chunk into `packed`. Returns the plain buffer, too.
    pub(super) fn pack(
        &self,
        mut prepared: Prepared,
        compressor: &mut Compressor,
        mut packed: Vec<u8>,
    ) -> Result<(Prepared, Vec<u8>)> {
        let Payload::Plain(plain) = prepared.payload else { return Ok((prepared, packed)) };
        let size = self.geometry.cluster_len();
        packed.resize(plain.len(), 0);
        let mut used = 0;
        for (cluster, bytes) in prepared.clusters.iter_mut().zip(plain.chunks_exact(size)) {
            if !matches!(cluster, NewCluster::Data(_)) {
                continue;
            }
            // Nothing grows, so there is always room for a cluster.
            let room = packed.get_mut(used..used + size).unwrap_or_default();
            let length = compressor.compress(bytes, room).map_err(transform)?;
            used += match length {
                Some(length) => {
                    *cluster = NewCluster::Compressed(length as u32);
                    length
                }
                None => {
                    room.copy_from_slice(bytes);
                    size
                }
            };
        }
        packed.truncate(used);
        prepared.payload = Payload::Packed(packed);
        Ok((prepared, plain))
    }

    fn classify(&self, chunk: &Chunk) -> Vec<Unit> {
        let count = chunk.length().div_ceil(self.unit) as usize;
        let mut units = vec![Unit::Absent; count];
        for piece in &chunk.pieces {
            let first = (piece.start - chunk.start) / self.unit;
            let last = (piece.end() - 1 - chunk.start) / self.unit;
            for index in first..=last {
                let start = chunk.start + index * self.unit;
                let end = (start + self.unit).min(chunk.end);
                let covered = piece.start <= start && end <= piece.end();
                let zero = matches!(piece.content, Content::Zero) && self.states_zeroes();
                if let Some(unit) = units.get_mut(index as usize) {
                    *unit = if zero && covered { Unit::Zero } else { Unit::Data };
                }
            }
        }
        units
    }

    /// Whether there are zeroes that are neither left out nor written.
    fn states_zeroes(&self) -> bool {
        self.delta.is_some() && self.has_zero_flag && self.sparse_size != 0
    }

    fn read_units(&self, copier: &Copier<'_>, chunk: &Chunk, units: &[Unit], bytes: &mut [u8]) -> Result<()> {
        let runs = units.chunk_by(|a, b| a == b);
        let mut at = 0;
        for run in runs {
            let length = (run.len() as u64 * self.unit).min(chunk.length() - at);
            let part = bytes.get_mut(at as usize..(at + length) as usize).unwrap_or_default();
            if run.first() == Some(&Unit::Data) {
                copier.context.source.read_at(MemMut::from(part), chunk.start + at)?;
                copier.context.count_read(length);
            } else {
                part.fill(0);
            }
            at += length;
        }
        Ok(())
    }

    /// Finds data that is zero, in blocks as QEMU has them: of the largest power of two of bytes that the sparse size has. Runs
    /// count across neighbours that are no data anyway.
    fn find_zeroes(&self, chunk: &Chunk, bytes: &[u8], units: &mut [Unit]) {
        if self.sparse_size != 0 && (self.delta.is_none() || self.has_zero_flag) {
            let block = (1u64 << self.sparse_size.ilog2()).div_ceil(self.unit).min(units.len() as u64);
            let mut is_zero = Vec::with_capacity(units.len());
            for (units, bytes) in units.chunks(block as usize).zip(bytes.chunks((block * self.unit) as usize))
            {
                let parts = units.iter().zip(bytes.chunks(self.unit as usize));
                let zero = parts.into_iter().all(|(unit, bytes)| *unit != Unit::Data || zero::is_zero(bytes));
                is_zero.resize(is_zero.len() + units.len(), zero);
            }
            let mut first = 0usize;
            for run in is_zero.chunk_by(|a, b| a == b) {
                let end = first + run.len();
                if run.first() == Some(&true) && run.len() as u64 * self.unit >= self.sparse_size {
                    for (index, unit) in units.iter_mut().enumerate().take(end).skip(first) {
                        self.drop_zero(chunk.start + index as u64 * self.unit, unit);
                    }
                }
                first = end;
            }
        }
        if self.fill && self.delta.is_none() {
            units.fill(Unit::Data);
        }
    }

    fn drop_zero(&self, start: u64, unit: &mut Unit) {
        if *unit == Unit::Data {
            // Behind the end of the base there is nothing to hide.
            let hides = self.delta.is_some_and(|delta| start < delta.base_size);
            *unit = if hides { Unit::Zero } else { Unit::Absent };
        }
    }

    /// The clusters that units make.
    fn clusters(&self, units: &[Unit]) -> Vec<NewCluster> {
        let per_cluster = (self.geometry.cluster_size() / self.unit) as usize;
        units.chunks(per_cluster).map(|units| self.cluster(units, per_cluster)).collect()
    }

    fn cluster(&self, units: &[Unit], per_cluster: usize) -> NewCluster {
        let any = |kind| units.contains(&kind);
        let bitmap = match per_cluster {
            1 if any(Unit::Data) => SubclusterBitmap::ALL_DATA,
            1 if any(Unit::Zero) => SubclusterBitmap::ALL_ZERO,
            1 => SubclusterBitmap::default(),
            _ => (0u32..).zip(units).fold(SubclusterBitmap::default(), |map, (i, unit)| match unit {
                Unit::Absent => map,
                Unit::Zero => map.with_zero(i, i + 1),
                Unit::Data => map.with_data(i, i + 1),
            }),
        };
        match self.map_all {
            // A raw data file is mapped in full; elsewhere the bits of what is absent stay clear.
            Some(_) if self.reserve && !any(Unit::Data) => NewCluster::Reserved,
            Some(whole) if whole.has_data() => NewCluster::Data(whole),
            Some(_) => NewCluster::Data(bitmap),
            None if any(Unit::Data) => NewCluster::Data(bitmap),
            None if any(Unit::Zero) => NewCluster::Zero(bitmap),
            None => NewCluster::Unallocated,
        }
    }
}
