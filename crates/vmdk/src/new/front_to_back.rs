//! A streamOptimized image as a stream of bytes: the grains are compressed twice, once to know where each of them lies.

use qcow2_core::front_to_back::{
    FrontToBack, Latest, Lengths, Part, Planning, Pool, Runs, changed, read_padded,
};
use qcow2_core::{Error, ErrorKind, GuestSource, Job, MemMut, Result};
use qcow2_transform::{StreamDeflater, is_zero, zlib};

use super::{GRAIN, NewVmdk};
use crate::fields::SECTOR;
use crate::sparse::{GRAIN_MARKER_BYTES, Marker};
use crate::stream::{OVERHEAD, Stream};

/// A planned stream.
pub(super) struct Streamed {
    level: u32,
    /// Header and descriptor.
    head: Vec<u8>,
    /// The grains, and the lengths of their zlib streams.
    grains: Lengths,
    /// Grains that one table maps.
    table_entries: u64,
    /// Tables that map something.
    tables: Runs,
    /// First sector of the first grain of each of these.
    starts: Vec<u64>,
    /// The last table, the directory and the footer, from this sector on.
    tail: (u64, Vec<u8>),
    deflaters: Pool<StreamDeflater>,
    latest: Latest,
}

/// What is made as a whole.
struct Piece {
    /// First byte in the file.
    begin: u64,
    bytes: Vec<u8>,
    /// Which grain it is, if it is one.
    grain: Option<u64>,
}

/// Sectors of a grain with its marker.
fn sectors(length: u32) -> u64 {
    (GRAIN_MARKER_BYTES + u64::from(length)).div_ceil(SECTOR)
}

fn deflater(level: u32) -> Result<StreamDeflater> {
    StreamDeflater::new(level).map_err(|e| {
        Error::new(ErrorKind::InvalidArgument, e.to_string()).with_field("compress").with_source(e)
    })
}

/// The zlib stream of a grain, in `room`.
fn deflate(deflater: &mut StreamDeflater, grain: &[u8], room: &mut Vec<u8>) -> Result<u32> {
    room.resize(deflater.bound(grain.len()), 0);
    let length = deflater
        .deflate(grain, room)
        .map_err(|e| Error::new(ErrorKind::Internal, e.to_string()).with_source(e))?;
    room.truncate(length);
    Ok(length as u32)
}

impl Streamed {
    /// Compresses the disk once, to know.
    pub(super) fn plan(new: &NewVmdk, planning: &Planning<'_>) -> Result<Self> {
        let level = planning.compression.and_then(|c| c.level).unwrap_or(zlib::DEFAULT_LEVEL);
        let Planning { source, max_memory, job, .. } = *planning;
        let units = Runs::of_data(source, GRAIN, max_memory, job)?;
        let grains = Lengths::count(planning, units, GRAIN, || {
            let (mut deflater, mut room) = (deflater(level)?, Vec::new());
            Ok(Box::new(
                move |grain: &[u8]| {
                    if is_zero(grain) { Ok(0) } else { deflate(&mut deflater, grain, &mut room) }
                },
            ))
        })?;
        let mut stream = Stream::new(new.sectors(), new.options().zeroed_grain)?;
        let table_entries = stream.table_entries();
        let mut head = stream.header().encode();
        head.extend(new.described(cid_of(planning.uuid()?)));
        head.resize((OVERHEAD * SECTOR) as usize, 0);
        let tables = grains.units.groups(table_entries);
        let (mut starts, mut written, mut lengths) = (Vec::new(), Vec::new(), grains.bytes.iter());
        let mut last = None;
        for number in grains.units.iter().flat_map(|part| part.first..part.first + part.count) {
            let place =
                stream.place(number, sectors(lengths.next().copied().unwrap_or_default()), &mut written)?;
            // Made again when it is wanted.
            written.clear();
            if last.replace(number / table_entries) != Some(number / table_entries) {
                starts.push(place);
            }
        }
        let end = stream.end()?;
        let from = end.first().map_or(OVERHEAD, |(sector, _)| *sector);
        let tail = (from, end.into_iter().flat_map(|(_, bytes)| bytes).collect());
        let (deflaters, latest) = (Pool::default(), Latest::default());
        Ok(Self { level, head, grains, table_entries, tables, starts, tail, deflaters, latest })
    }

    /// The grains of a table, by its place among those that map something: number, length, and first sector of each.
    fn table(&self, rank: usize) -> impl Iterator<Item = (u64, u32, u64)> + '_ {
        let index = self.tables.at(rank as u64).map_or(0, |part| part.first);
        let first = index * self.table_entries;
        let numbered = |part: Part| (0..part.count).map(move |i| (part.first + i, part.rank + i));
        let mut sector = self.starts.get(rank).copied().unwrap_or_default();
        self.grains.units.within(first, first + self.table_entries).flat_map(numbered).map(
            move |(number, rank)| {
                let length = self.grains.bytes.get(rank as usize).copied().unwrap_or_default();
                let place = sector;
                sector += sectors(length);
                (number, length, place)
            },
        )
    }

    /// The bytes of a piece of the file that `offset` is in, and where that begins; of a grain with its number.
    fn piece(&self, source: &dyn GuestSource, offset: u64) -> Result<Piece> {
        let sector = offset / SECTOR;
        let rank = self.starts.partition_point(|start| *start <= sector).saturating_sub(1);
        let (mut entries, mut end) = (vec![0u32; self.table_entries as usize], 0);
        for (number, length, place) in self.table(rank) {
            end = place + sectors(length);
            if sector < end {
                let kept = self.latest.take(number);
                let bytes = kept.map_or_else(|| self.grain(source, number, length), Ok)?;
                return Ok(Piece { begin: place * SECTOR, bytes, grain: Some(number) });
            }
            if let Some(entry) = entries.get_mut((number % self.table_entries) as usize) {
                *entry = place as u32;
            }
        }
        let table: Vec<u8> = entries.iter().flat_map(|entry| entry.to_le_bytes()).collect();
        let marker = Marker::GrainTable.encode((table.len() as u64).div_ceil(SECTOR));
        Ok(Piece { begin: end * SECTOR, bytes: [marker, table].concat(), grain: None })
    }

    /// A grain with its marker, padded to a sector.
    fn grain(&self, source: &dyn GuestSource, number: u64, length: u32) -> Result<Vec<u8>> {
        let mut grain = vec![0; GRAIN as usize];
        read_padded(source, MemMut::from(&mut grain[..]), number * GRAIN)?;
        let mut room = Vec::new();
        let found =
            self.deflaters.with(|| deflater(self.level), |deflater| deflate(deflater, &grain, &mut room))?;
        if found != length {
            return Err(changed(number * GRAIN));
        }
        let mut bytes =
            [&(number * (GRAIN / SECTOR)).to_le_bytes()[..], &length.to_le_bytes(), &room].concat();
        bytes.resize((sectors(length) * SECTOR) as usize, 0);
        Ok(bytes)
    }
}

/// A content identifier that depends on the disk alone.
fn cid_of([a, b, c, d, ..]: [u8; 16]) -> u32 {
    // 0 and all ones mean something else.
    (u32::from_be_bytes([a, b, c, d]) & 0x7fff_ffff).max(1)
}

impl FrontToBack for Streamed {
    fn length(&self) -> u64 {
        self.tail.0 * SECTOR + self.tail.1.len() as u64
    }

    fn fill(&self, source: &dyn GuestSource, mut offset: u64, mut buf: MemMut<'_>, job: &Job) -> Result<()> {
        let end = self.tail.0 * SECTOR;
        while !buf.is_empty() {
            job.checkpoint()?;
            if (OVERHEAD * SECTOR..end).contains(&offset) {
                let piece = self.piece(source, offset)?;
                let copied = copy(&piece.bytes, offset - piece.begin, &mut buf);
                offset += copied;
                if let (Some(number), true) = (piece.grain, offset < piece.begin + piece.bytes.len() as u64) {
                    self.latest.keep(number, piece.bytes);
                }
                continue;
            }
            let (begin, bytes) = if offset < end { (0, &self.head) } else { (end, &self.tail.1) };
            let copied = copy(bytes, offset - begin, &mut buf);
            if copied == 0 {
                let message = format!("offset {offset} is behind the end of the stream, {}", self.length());
                return Err(Error::new(ErrorKind::InvalidArgument, message));
            }
            offset += copied;
        }
        Ok(())
    }
}

/// Copies bytes from one of them on to the front of `buf`; how many.
fn copy(bytes: &[u8], from: u64, buf: &mut MemMut<'_>) -> u64 {
    let rest = bytes.get(from as usize..).unwrap_or_default();
    let mut front = buf.take_front(rest.len());
    front.copy_from(rest) as u64
}
