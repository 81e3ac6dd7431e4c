//! Copying a disk into a new image. Chunks are read and compressed side by side, and get their places in guest order: the bytes of
//! the file do not depend on the number of workers.

use std::sync::Arc;

use qcow2_core::convert::{
    Chunk, Compression, Content, Context, ConvertOptions, Copier, Delta, Piece, Rules,
};
use qcow2_core::convert::{Sink, Turns, Worker, Zeroes};
use qcow2_core::space::lengthen;
use qcow2_core::{Error, ErrorKind, Job, Mem, Result, Storage, StorageExt};
use qcow2_transform::is_zero;
use qcow2_transform::zlib::{self, Deflater};

use super::NewQcow1;

/// Bytes of a chunk, of which an L2 table has a whole number, as a chunk has of clusters.
const CHUNK: u64 = 1 << 20;
/// L1 entries that are written at once.
const L1_ENTRIES: u64 = 8192;

/// Into clusters.
pub(super) struct ClusterSink {
    new: Arc<NewQcow1>,
    host: Arc<dyn Storage>,
    compression: Option<Compression>,
    /// Clusters of zeroes are written: they hide what the backing file has, or are asked for.
    zeroes: bool,
    delta: Option<Delta>,
    places: Turns<Places>,
}

/// What is handed out.
#[derive(Debug)]
struct Places {
    /// End of the file.
    next: u64,
    /// The L2 table that is being filled.
    table: Option<Table>,
    /// Numbers and offsets of those that there are.
    l1: Vec<(u64, u64)>,
}

#[derive(Debug)]
struct Table {
    index: u64,
    offset: u64,
    entries: Vec<u64>,
}

impl Table {
    fn write(&self, host: &dyn Storage) -> Result<()> {
        host.write_all_at(Mem::from(&words(&self.entries)[..]), self.offset)
    }
}

/// A cluster of a chunk, as bytes of a buffer.
struct Cluster {
    number: u64,
    start: usize,
    length: usize,
    compressed: bool,
}

/// Bytes of that buffer, and where they go.
struct Part {
    start: usize,
    end: usize,
    host: u64,
}

impl ClusterSink {
    pub(super) fn new(new: Arc<NewQcow1>, host: Arc<dyn Storage>, context: &Context<'_>) -> Self {
        let delta = context.options.delta;
        Self {
            places: Turns::new(Places { next: new.data(), table: None, l1: Vec::new() }),
            compression: context.options.compression,
            zeroes: delta.is_some() || context.options.sparse_size == 0,
            delta,
            new,
            host,
        }
    }

    fn write(&self, copier: &mut Copier<'_>, deflater: Option<&mut Deflater>, chunk: Chunk) -> Result<()> {
        let size = self.new.header.cluster_size();
        let chunk = if self.delta.is_some() { whole_clusters(chunk, size) } else { chunk };
        copier.with_chunk(&chunk, |copier, bytes| {
            let clusters = self.clusters(&chunk, bytes);
            let Some(deflater) = deflater else {
                return self.put(copier, &chunk, &clusters, bytes);
            };
            let (clusters, packed) = pack(&clusters, bytes, deflater, size as usize)?;
            self.put(copier, &chunk, &clusters, &packed)
        })
    }

    /// Those that are written.
    fn clusters(&self, chunk: &Chunk, bytes: &[u8]) -> Vec<Cluster> {
        let size = self.new.header.cluster_size();
        let first = chunk.start / size;
        let mut pieces = chunk.pieces.iter().peekable();
        let all = (first..).zip(bytes.chunks(size as usize)).filter(|(number, cluster)| {
            let start = number * size;
            while pieces.next_if(|piece| piece.end() <= start).is_some() {}
            let touched = pieces.peek().is_some_and(|piece| piece.start < start + size);
            touched && (self.zeroes || !is_zero(cluster))
        });
        let found = all.map(|(number, cluster)| {
            let start = ((number - first) * size) as usize;
            Cluster { number, start, length: cluster.len(), compressed: false }
        });
        found.collect()
    }

    /// Writes clusters that lie in `bytes`, and the tables that are full.
    fn put(&self, copier: &Copier<'_>, chunk: &Chunk, clusters: &[Cluster], bytes: &[u8]) -> Result<()> {
        let (parts, tables) = self.places.take(chunk.ticket, |places| self.place(places, clusters))?;
        for table in tables {
            table.write(&*self.host)?;
        }
        for part in parts {
            let data = bytes.get(part.start..part.end).unwrap_or_default();
            copier.context.count_written(data.len() as u64);
            self.host.write_all_at(Mem::from(data), part.host)?;
        }
        Ok(())
    }

    /// Where clusters go, neighbours together, and the tables in which nothing more is entered.
    fn place(&self, places: &mut Places, clusters: &[Cluster]) -> Result<(Vec<Part>, Vec<Table>)> {
        let header = &self.new.header;
        let (mut parts, mut full): (Vec<Part>, Vec<Table>) = Default::default();
        for cluster in clusters {
            let (index, inside) =
                (cluster.number / header.l2_entries(), cluster.number % header.l2_entries());
            if places.table.as_ref().is_none_or(|table| table.index != index) {
                full.extend(places.table.take());
                let offset = places.next.next_multiple_of(header.cluster_size());
                let entries = vec![0; header.l2_entries() as usize];
                places.next = offset + header.l2_entries() * 8;
                places.l1.push((index, offset));
                places.table = Some(Table { index, offset, entries });
            }
            let (host, entry) = if cluster.compressed {
                let entry = header.compressed_entry(places.next, cluster.length as u64);
                let message = "the file is too long for the entries of compressed clusters";
                (places.next, entry.ok_or_else(|| Error::new(ErrorKind::Limit, message))?)
            } else {
                let host = places.next.next_multiple_of(header.cluster_size());
                (host, host)
            };
            // What a last cluster lacks is a hole.
            places.next =
                host + if cluster.compressed { cluster.length as u64 } else { header.cluster_size() };
            if let Some(slot) = places.table.as_mut().and_then(|table| table.entries.get_mut(inside as usize))
            {
                *slot = entry;
            }
            let (start, end) = (cluster.start, cluster.start + cluster.length);
            match parts.last_mut() {
                Some(last) if last.end == start && last.host + (start - last.start) as u64 == host => {
                    last.end = end;
                }
                _ => parts.push(Part { start, end, host }),
            }
        }
        Ok((parts, full))
    }
}

impl Sink for ClusterSink {
    fn rules(&self) -> Rules {
        let zeroes = if self.zeroes { Zeroes::Written } else { Zeroes::Skip };
        Rules { chunk: CHUNK, zeroes, delta: self.delta }
    }

    /// Whatever the window: a stream reaches no further back than its cluster, which is no larger than the small one.
    fn worker(&self) -> Result<Worker<'_>> {
        let deflater = self.compression.map(|Compression { level, window }| {
            Deflater::new(level.unwrap_or(zlib::DEFAULT_LEVEL), window).map_err(|e| {
                Error::new(ErrorKind::InvalidArgument, e.to_string()).with_field("compress").with_source(e)
            })
        });
        let mut deflater = deflater.transpose()?;
        Ok(Box::new(move |copier, chunk| self.write(copier, deflater.as_mut(), chunk)))
    }

    fn stop(&self) {
        self.places.stop();
    }

    fn finish(self: Box<Self>, options: &ConvertOptions, job: &Job) -> Result<()> {
        job.checkpoint()?;
        let Self { new, host, places, .. } = *self;
        let Places { next, table, l1 } = places.into_inner();
        if let Some(table) = &table {
            table.write(&*host)?;
        }
        write_l1(&*host, new.header.l1_table_offset, &l1)?;
        lengthen(&*host, next)?;
        new.complete(&*host, options.durable)
    }
}

/// Compresses clusters into a buffer of their own. One that does not shrink is there as it is.
fn pack(
    clusters: &[Cluster],
    bytes: &[u8],
    deflater: &mut Deflater,
    size: usize,
) -> Result<(Vec<Cluster>, Vec<u8>)> {
    let mut packed = Vec::with_capacity(clusters.len() * size);
    let mut whole = vec![0; size];
    let mut done = Vec::with_capacity(clusters.len());
    for Cluster { number, start, length, .. } in clusters {
        // The last one of a disk is filled up with zeroes.
        let (data, rest) = whole.split_at_mut(*length);
        data.copy_from_slice(bytes.get(*start..start + length).unwrap_or_default());
        rest.fill(0);
        let at = packed.len();
        packed.resize(at + size, 0);
        let room = packed.get_mut(at..).unwrap_or_default();
        let shrunk = deflater
            .deflate(&whole, room)
            .map_err(|e| Error::new(ErrorKind::Internal, e.to_string()).with_source(e))?;
        if shrunk.is_none() {
            room.copy_from_slice(&whole);
        }
        packed.truncate(at + shrunk.unwrap_or(size));
        done.push(Cluster {
            number: *number,
            start: at,
            length: packed.len() - at,
            compressed: shrunk.is_some(),
        });
    }
    Ok((done, packed))
}

/// The pieces of a chunk, widened to whole clusters: what is around them is read, too.
fn whole_clusters(chunk: Chunk, size: u64) -> Chunk {
    let mut pieces: Vec<Piece> = Vec::with_capacity(chunk.pieces.len());
    for piece in chunk.pieces {
        let start = piece.start / size * size;
        let end = piece.end().next_multiple_of(size).min(chunk.end);
        let whole = (start, end) == (piece.start, piece.end());
        match pieces.last_mut() {
            // Two in one cluster.
            Some(last) if last.end() > start => {
                last.length = end.max(last.end()) - last.start;
                last.content = Content::Read;
            }
            _ if whole => pieces.push(piece),
            _ => pieces.push(Piece { start, length: end - start, content: Content::Read }),
        }
    }
    Chunk { pieces, ..chunk }
}

fn words(table: &[u64]) -> Vec<u8> {
    table.iter().flat_map(|word| word.to_be_bytes()).collect()
}

/// Writes the L1 table at `place`, where nothing but zeroes is.
fn write_l1(host: &dyn Storage, place: u64, entries: &[(u64, u64)]) -> Result<()> {
    let piece = |entry: &(u64, u64)| entry.0 / L1_ENTRIES;
    for part in entries.chunk_by(|a, b| piece(a) == piece(b)) {
        let Some(((first, _), (last, _))) = part.first().zip(part.last()) else { continue };
        let mut table = vec![0; (last - first + 1) as usize];
        for (index, offset) in part {
            if let Some(slot) = table.get_mut((index - first) as usize) {
                *slot = *offset;
            }
        }
        host.write_all_at(Mem::from(&words(&table)[..]), place + first * 8)?;
    }
    Ok(())
}
