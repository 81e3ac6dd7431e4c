//! A larger disk. What says so becomes durable with one entry of the log.

use std::sync::atomic::Ordering;

use qcow2_core::space::Preallocation;
use qcow2_core::{Error, ErrorKind, Job, Layer, Mem, MemMut, Result, StorageExt};

use super::Writer;
use crate::Vhdx;
use crate::structures::{
    LOG_SECTOR, MAX_VIRTUAL_SIZE, MIB, Payload, REGION_TABLE_OFFSETS, Region, RegionTable,
};

/// Bytes of the table that are copied at once.
const COPY: u64 = 1 << 20;

/// Metadata that changes: bytes for places in the file.
type Change = Vec<(u64, Vec<u8>)>;

impl Vhdx {
    fn refuse(&self, kind: ErrorKind, message: impl Into<String>) -> Error {
        self.storage().located(Error::new(kind, message.into()).with_field("size"))
    }

    fn judge_size(&self, size: u64, preallocation: Preallocation) -> Result<()> {
        let sector = self.geometry().sector_size;
        if preallocation != Preallocation::Off {
            let message = "a vhdx image is resized without preallocation";
            return Err(self.refuse(ErrorKind::InvalidArgument, message));
        }
        if !size.is_multiple_of(sector) {
            let message = format!("{size} is no multiple of {sector} bytes");
            return Err(self.refuse(ErrorKind::InvalidArgument, message));
        }
        if size > MAX_VIRTUAL_SIZE {
            return Err(self.refuse(ErrorKind::Limit, format!("{size} bytes are more than 64 TiB")));
        }
        Ok(())
    }

    pub(super) fn grow(&self, size: u64, preallocation: Preallocation, job: &Job) -> Result<()> {
        self.judge_size(size, preallocation)?;
        if size == self.virtual_size() {
            return Ok(());
        }
        let writer = self.writer()?;
        self.begin(writer)?;
        self.commit()?;
        let old = self.virtual_size();
        if size > old {
            self.zero_behind_end()?;
        }
        let (mut change, moved) = match self.room_for(size) {
            // Entries behind the end of a smaller disk say nothing, and are cleared before it grows again.
            true => {
                self.clear_entries(size, job)?;
                (Change::new(), None)
            }
            false => self.move_table(writer, size, job)?,
        };
        let at = self.tables.regions.metadata.offset + self.tables.metadata.virtual_size_at;
        change.push((at, size.to_le_bytes().to_vec()));
        let parts: Vec<(u64, &[u8])> = change.iter().map(|(at, bytes)| (*at, &bytes[..])).collect();
        self.change(&parts)?;
        // In memory the disk has its new size already: whether the file has it is not known after an error.
        self.commit().inspect_err(|e| writer.lose(e))?;
        if let Some(moved) = moved {
            let mut places = self.places.write();
            places.bat = moved.offset;
            places.reserved.push(moved.range());
        }
        self.size.store(size, Ordering::Release);
        if size > old && self.tables.metadata.leave_blocks_allocated {
            self.allocate_all(job)
        } else {
            Ok(())
        }
    }

    /// Whether the table has entries for a disk of `size` bytes.
    fn room_for(&self, size: u64) -> bool {
        let bat = self.places.read().bat;
        let reserved = &self.places.read().reserved;
        let room =
            reserved.iter().find(|range| range.start == bat).map_or(0, |range| range.end - range.start);
        self.geometry().entries(size) * 8 <= room
    }

    /// The last block can have more than the disk: that reads as zeroes from now on.
    fn zero_behind_end(&self) -> Result<()> {
        let (size, block_size) = (self.virtual_size(), self.geometry().block_size);
        let inside = size % block_size;
        if inside != 0
            && let Payload::Present(offset) = self.payload(size / block_size)?
        {
            self.storage().zero(offset + inside, block_size - inside, false)?;
            self.file_grew(offset + block_size);
        }
        Ok(())
    }

    /// Entries of the table that are none yet can have any bytes.
    fn clear_entries(&self, size: u64, job: &Job) -> Result<()> {
        let (start, end) = (
            self.entry_at(self.geometry().entries(self.virtual_size())),
            self.entry_at(self.geometry().entries(size)),
        );
        let mut at = start;
        while at < end {
            job.checkpoint()?;
            let next = (at - at % LOG_SECTOR + LOG_SECTOR).min(end);
            let sector = self.sectors.get(&*self.data, at)?;
            let inside = (at % LOG_SECTOR) as usize;
            let part = sector.get(inside..inside + (next - at) as usize).unwrap_or_default();
            if part.iter().any(|byte| *byte != 0) {
                self.change(&[(at, &vec![0; part.len()])])?;
            }
            at = next;
        }
        self.commit()
    }

    /// Copies the table to the end of the file, with room for a disk of `size` bytes. Gives the region tables that say so.
    fn move_table(&self, writer: &Writer, size: u64, job: &Job) -> Result<(Change, Option<Region>)> {
        let old = self.places.read().bat;
        let length = (self.geometry().entries(size) * 8).next_multiple_of(MIB);
        let Ok(length_field) = u32::try_from(length) else {
            return Err(self.refuse(ErrorKind::Limit, format!("the table of {length} bytes is too long")));
        };
        let offset = writer.space.lock().take_at_end(length).map_err(|e| self.storage().located(e))?;
        self.storage().resize(offset + length)?;
        self.file_grew(offset + length);
        let (mut at, end) = (0, self.geometry().entries(self.virtual_size()) * 8);
        let mut bytes = vec![0; COPY as usize];
        while at < end {
            job.checkpoint()?;
            let part = bytes.get_mut(..COPY.min(end - at) as usize).unwrap_or_default();
            self.storage().read_exact_at(MemMut::from(&mut *part), old + at)?;
            self.storage().write_all_at(Mem::from(&*part), offset + at)?;
            at += part.len() as u64;
        }
        let bat = Region { offset, length: length_field, ..self.tables.regions.bat };
        let encoded = RegionTable { bat, ..self.tables.regions.clone() }.encode();
        let sectors = |table: u64| {
            (table..)
                .step_by(LOG_SECTOR as usize)
                .zip(encoded.chunks(LOG_SECTOR as usize).map(<[u8]>::to_vec))
        };
        Ok((REGION_TABLE_OFFSETS.into_iter().flat_map(sectors).collect(), Some(bat)))
    }

    /// Gives every block of a fixed disk its place.
    fn allocate_all(&self, job: &Job) -> Result<()> {
        let writer = self.writer()?;
        for block in 0..self.geometry().blocks(self.virtual_size()) {
            job.checkpoint()?;
            if !matches!(self.payload(block)?, Payload::Present(_)) {
                let room = self.take_room(writer)?;
                if !room.is_new {
                    self.storage().zero(room.offset, self.geometry().block_size, true)?;
                }
                self.set_payload(block, Payload::Present(room.offset))?;
            }
        }
        self.commit()
    }
}
