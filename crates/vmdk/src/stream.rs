//! A streamOptimized extent, front to back: a header that says that the directory is at the end, the descriptor, compressed grains
//! with markers, each table behind the grains that it maps, the directory, and the footer.
//!
//! It is what exporters of OVF packages write, and ESXi takes: version 3, and nothing that has to be changed later.

use qcow2_core::{ErrorKind, Mem, Result, Storage, StorageExt};

use crate::fields::{SECTOR, invalid};
use crate::geometry::Geometry;
use crate::new::NewVmdk;
use crate::sparse::{GD_AT_END, Header, Marker};

/// Sectors of metadata in front of the first grain.
pub(crate) const OVERHEAD: u64 = 128;
/// Sectors that an entry can name.
const MAX_SECTORS: u64 = 1 << 32;

/// What the places of a stream are decided by. Grains come in guest order.
#[derive(Debug)]
pub(crate) struct Stream {
    header: Header,
    geometry: Geometry,
    /// First sector that is free.
    next: u64,
    /// The table that is being filled.
    index: u64,
    table: Vec<u32>,
    directory: Vec<u32>,
}

/// Bytes with their first sector in the file.
pub(crate) type Placed = (u64, Vec<u8>);

impl Stream {
    pub(crate) fn new(sectors: u64, zero_grains: bool) -> Result<Self> {
        let header =
            Header { directory: GD_AT_END, overhead: OVERHEAD, ..Header::new(sectors, true, zero_grains) };
        let header = header.without_redundant();
        let geometry = Header { directory: 0, ..header }.geometry()?;
        Ok(Self {
            header,
            geometry,
            next: OVERHEAD,
            index: 0,
            table: vec![0; geometry.table_entries as usize],
            directory: vec![0; geometry.tables() as usize],
        })
    }

    /// Grains that one table maps.
    pub(crate) fn table_entries(&self) -> u64 {
        self.geometry.table_entries
    }

    /// The header of the file.
    pub(crate) fn header(&self) -> &Header {
        &self.header
    }

    /// Gives grain `number`, of so many sectors with its marker, its place. What has to be written in front of it comes with it.
    pub(crate) fn place(&mut self, number: u64, sectors: u64, tables: &mut Vec<Placed>) -> Result<u64> {
        let index = number / self.geometry.table_entries;
        if index != self.index {
            tables.extend(self.end_table()?);
            self.index = index;
        }
        let place = self.take(sectors)?;
        if let Some(entry) = self.table.get_mut((number % self.geometry.table_entries) as usize) {
            *entry = place as u32;
        }
        Ok(place)
    }

    fn take(&mut self, sectors: u64) -> Result<u64> {
        let place = self.next;
        self.next += sectors;
        if self.next > MAX_SECTORS {
            let reason = "the file is too large for the entries of its tables, which have 32 bits";
            return Err(invalid(ErrorKind::Limit, "grain table entry", place, reason));
        }
        Ok(place)
    }

    /// The table that was filled, unless it is empty.
    fn end_table(&mut self) -> Result<Option<Placed>> {
        if self.table.iter().all(|entry| *entry == 0) {
            return Ok(None);
        }
        let bytes: Vec<u8> = self.table.iter().flat_map(|entry| entry.to_le_bytes()).collect();
        self.table.fill(0);
        let (marker, place) = self.marked(Marker::GrainTable, bytes)?;
        if let Some(entry) = self.directory.get_mut(self.index as usize) {
            *entry = place as u32;
        }
        Ok(Some(marker))
    }

    /// A structure with its marker, and the sector of the structure.
    fn marked(&mut self, marker: Marker, mut bytes: Vec<u8>) -> Result<(Placed, u64)> {
        bytes.resize(bytes.len().next_multiple_of(SECTOR as usize), 0);
        let sectors = bytes.len() as u64 / SECTOR;
        let place = self.take(1 + sectors)?;
        Ok(((place, [marker.encode(sectors), bytes].concat()), place + 1))
    }

    /// What ends the stream.
    pub(crate) fn end(mut self) -> Result<Vec<Placed>> {
        let mut last: Vec<Placed> = self.end_table()?.into_iter().collect();
        let directory = std::mem::take(&mut self.directory);
        let bytes = directory.iter().flat_map(|entry| entry.to_le_bytes()).collect();
        let (placed, place) = self.marked(Marker::GrainDirectory, bytes)?;
        last.push(placed);
        let footer = Header { directory: place, ..self.header };
        last.push(self.marked(Marker::Footer, footer.encode())?.0);
        last.push((self.take(1)?, Marker::EndOfStream.encode(0)));
        Ok(last)
    }
}

/// Writes a stream without grains.
pub(crate) fn create_empty(new: &NewVmdk, own: &dyn Storage) -> Result<()> {
    let stream = Stream::new(new.sectors(), new.options().zeroed_grain)?;
    finish(new, stream, own, true)
}

/// Completes a stream whose grains are written: the file is an image when its header is there.
pub(crate) fn finish(new: &NewVmdk, stream: Stream, own: &dyn Storage, durable: bool) -> Result<()> {
    let header = *stream.header();
    for (sector, bytes) in stream.end()? {
        own.write_all_at(Mem::from(&bytes[..]), sector * SECTOR)?;
    }
    new.publish_in(own, Some(&header), durable)
}
