//! Requests on a differencing image, whose parent shows through what it does not have ([MS-VHDX] 2.4.2, 2.5.1.1).
//!
//! A block that is written to in part is partially present: its chunk's sector bitmap says which sectors are the image's. Nothing is copied
//! but the rest of a sector. Bits are changed as the block allocation table is: in memory until data is durable, and then by the log, together
//! with the entries.

use std::ops::Range;

use qcow2_core::disk::OldBytes;
use qcow2_core::parts::{NewBytes, Part};
use qcow2_core::{Layer, Mem, MemMut, Result, StorageExt};

use super::Writer;
use crate::Vhdx;
use crate::structures::{LOG_SECTOR, MIB, Payload, encode_bitmap, encode_payload};

impl Vhdx {
    pub(super) fn write_child(
        &self,
        writer: &Writer,
        buf: Mem<'_>,
        offset: u64,
        old: OldBytes<'_>,
    ) -> Result<()> {
        let mut rest = buf;
        for part in self.parts(offset, buf.len() as u64) {
            self.begin(writer)?;
            let bytes;
            (bytes, rest) = rest.split_at(part.length as usize);
            self.store(writer, &part, NewBytes::Bytes(bytes), old)?;
        }
        Ok(())
    }

    pub(super) fn zero_child(
        &self,
        writer: &Writer,
        offset: u64,
        length: u64,
        unmap: bool,
        old: OldBytes<'_>,
    ) -> Result<()> {
        for part in self.parts(offset, length) {
            self.begin(writer)?;
            if self.is_whole(&part) {
                self.zero_block(writer, part.block)?;
            } else {
                self.store(writer, &part, NewBytes::Zeroes(unmap), old)?;
            }
        }
        Ok(())
    }

    /// A block of zeroes, which has no bytes.
    fn zero_block(&self, writer: &Writer, block: u64) -> Result<()> {
        {
            let _alone = writer.blocks.hold(block, block + 1, true);
            if self.payload(block)? == Payload::NotPresent {
                return self.set_payload(block, Payload::Zero);
            }
        }
        self.give_up(writer, block)
    }

    fn store(&self, writer: &Writer, part: &Part, content: NewBytes<'_>, old: OldBytes<'_>) -> Result<()> {
        {
            let _shared = writer.blocks.hold(part.block, part.block + 1, false);
            match self.payload(part.block)? {
                Payload::Present(offset) => return self.put(offset, part, content),
                Payload::Partial(offset) if self.has_all(part, self.sectors_of(part))? => {
                    return self.put(offset, part, content);
                }
                Payload::Zero if matches!(content, NewBytes::Zeroes(_)) => return Ok(()),
                Payload::Zero | Payload::NotPresent | Payload::Partial(_) => {}
            }
        }
        let _alone = writer.blocks.hold(part.block, part.block + 1, true);
        let now = self.payload(part.block)?;
        match now {
            Payload::Present(offset) => return self.put(offset, part, content),
            Payload::Zero if matches!(content, NewBytes::Zeroes(_)) => return Ok(()),
            Payload::Partial(offset) => {
                self.put_sectors(offset, part, content, old, true)?;
                return self.set_bits(part, None);
            }
            Payload::Zero | Payload::NotPresent => {}
        }
        let room = self.take_room(writer)?;
        let zeroed = if room.is_new {
            Ok(())
        } else {
            self.storage().zero(room.offset, self.geometry().block_size, true)
        };
        let stored = zeroed.and_then(|()| match now {
            Payload::NotPresent if !self.is_whole(part) => {
                self.put_sectors(room.offset, part, content, old, false)?;
                self.need_bitmap(writer, part)?;
                self.set_bits(part, Some(room.offset))
            }
            _ => {
                self.put(room.offset, part, content)?;
                self.set_payload(part.block, Payload::Present(room.offset))
            }
        });
        if stored.is_err() {
            writer.space.lock().put_back(room);
        }
        stored
    }

    /// Brings the bytes to where the block is.
    fn put(&self, offset: u64, part: &Part, content: NewBytes<'_>) -> Result<()> {
        content.put(&**self.storage(), offset + part.inside, part.length)
    }

    /// Brings the bytes, and what the disk has around them in the first and last sector, where the image has not: `judged` asks.
    fn put_sectors(
        &self,
        offset: u64,
        part: &Part,
        content: NewBytes<'_>,
        old: OldBytes<'_>,
        judged: bool,
    ) -> Result<()> {
        let sectors = self.sectors_of(part);
        let size = self.geometry().sector_size;
        let end = part.end();
        let front = sectors.start * size..part.inside;
        let back = end..sectors.end * size;
        for (range, sector) in [(front, sectors.start), (back, sectors.end - 1)] {
            if range.is_empty() || (judged && self.has_all(part, sector..sector + 1)?) {
                continue;
            }
            let mut bytes = vec![0; (range.end - range.start) as usize];
            old(MemMut::from(&mut bytes[..]), part.block * self.geometry().block_size + range.start)?;
            self.storage().write_all_at(Mem::from(&bytes[..]), offset + range.start)?;
        }
        self.put(offset, part, content)
    }

    /// The sectors of the block that a part touches.
    fn sectors_of(&self, part: &Part) -> Range<u64> {
        let size = self.geometry().sector_size;
        part.inside / size..part.end().div_ceil(size)
    }

    /// Where the bits of a block are in the bitmap of its chunk, in bytes, and how many.
    fn bits_of(&self, block: u64) -> (u64, u64) {
        let geometry = self.geometry();
        // Blocks have whole bytes: at least 256 sectors.
        let bytes = geometry.block_size / geometry.sector_size / 8;
        (block % geometry.chunk_ratio() * bytes, bytes)
    }

    /// The bytes of the bitmap from `first` on of those of the block.
    fn read_bits(&self, block: u64, bytes: Range<u64>) -> Result<Vec<u8>> {
        let (at, _) = self.bits_of(block);
        let Some(bitmap) = self.bitmap_of(block * self.geometry().block_size)? else { return Ok(Vec::new()) };
        let mut found = Vec::new();
        let mut byte = bitmap + at + bytes.start;
        let end = bitmap + at + bytes.end;
        while byte < end {
            let sector = self.sectors.get(&*self.data, byte)?;
            let inside = (byte % LOG_SECTOR) as usize;
            let count = ((LOG_SECTOR - byte % LOG_SECTOR).min(end - byte)) as usize;
            found.extend_from_slice(sector.get(inside..inside + count).unwrap_or_default());
            byte += count as u64;
        }
        Ok(found)
    }

    /// Whether the image has these sectors of a block that is partially present.
    fn has_all(&self, part: &Part, sectors: Range<u64>) -> Result<bool> {
        let first = sectors.start / 8;
        let bits = self.read_bits(part.block, first..sectors.end.div_ceil(8))?;
        let has = |sector: u64| {
            let byte = bits.get((sector / 8 - first) as usize).copied().unwrap_or(0);
            byte >> (sector % 8) & 1 == 1
        };
        Ok(sectors.into_iter().all(has))
    }

    /// Sets the bits of a part's sectors; with a place, the block is partially present there from now on, and has no other sectors.
    fn set_bits(&self, part: &Part, place: Option<u64>) -> Result<()> {
        let (at, length) = self.bits_of(part.block);
        let sectors = self.sectors_of(part);
        let bytes = match place {
            Some(_) => 0..length,
            None => sectors.start / 8..sectors.end.div_ceil(8),
        };
        let mut bits = match place {
            Some(_) => vec![0; length as usize],
            None => self.read_bits(part.block, bytes.clone())?,
        };
        for sector in sectors {
            if let Some(byte) = bits.get_mut((sector / 8 - bytes.start) as usize) {
                *byte |= 1 << (sector % 8);
            }
        }
        let bitmap = self.bitmap_of(part.block * self.geometry().block_size)?.unwrap_or_default();
        let start = bitmap + at + bytes.start;
        // Cut at sectors of the log, and changed at once.
        let mut parts: Vec<(u64, &[u8])> = Vec::new();
        let (mut byte, mut rest) = (start, &bits[..]);
        while !rest.is_empty() {
            let count = ((LOG_SECTOR - byte % LOG_SECTOR) as usize).min(rest.len());
            let (front, behind) = rest.split_at(count);
            parts.push((byte, front));
            (byte, rest) = (byte + count as u64, behind);
        }
        let entry = place.map(|place| encode_payload(Payload::Partial(place)).to_le_bytes());
        if let Some(entry) = &entry {
            parts.push((self.entry_at(self.geometry().entry_of(part.block)), entry));
        }
        self.change(&parts)
    }

    /// Gives the chunk of a block its sector bitmap, all of whose bits say the parent's.
    fn need_bitmap(&self, writer: &Writer, part: &Part) -> Result<()> {
        let geometry = self.geometry();
        let start = part.block * geometry.block_size;
        if self.bitmap_of(start)?.is_some() {
            return Ok(());
        }
        let _one = writer.bitmaps.lock();
        if self.bitmap_of(start)?.is_some() {
            return Ok(());
        }
        let end = {
            let mut space = writer.space.lock();
            let offset = space.take_at_end(MIB).map_err(|e| self.storage().located(e))?;
            let end = offset + MIB;
            if self.storage().size()? < end {
                self.storage().resize(end)?;
            }
            end
        };
        self.file_grew(end);
        let at = self.entry_at(geometry.bitmap_entry_of(part.block));
        self.change(&[(at, &encode_bitmap(end - MIB).to_le_bytes())])
    }
}
