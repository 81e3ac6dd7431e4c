//! Requests on a differencing image, whose parent shows through what it does not have.
//!
//! Nothing is copied where the format says for each sector whether it is there ([`SectorBitmaps`](super::SectorBitmaps)), but the rest of a
//! sector that is written in part; else a block gets what the parent has of it when it gets its place.

use std::ops::Range;

use super::bitmaps::SECTOR;
use super::layer::Shared;
use super::layout::{Entry, Scheme};
use crate::disk::OldBytes;
use crate::parts::{NewBytes, Part, cut};
use crate::{Error, ErrorKind, Mem, MemMut, Result, StorageExt};

/// Bytes that are copied at once.
const PIECE: u64 = 1 << 20;

/// A disk has no more blocks than the table has entries.
fn index_of(part: &Part) -> u32 {
    part.block as u32
}

impl<S: Scheme> Shared<S> {
    /// Writes `buf` to the guest bytes at `offset`; `old` is what the disk holds.
    pub(super) fn write_child(&self, buf: Mem<'_>, offset: u64, old: OldBytes<'_>) -> Result<()> {
        let mut rest = buf;
        for part in cut(self.layout().block, offset, buf.len() as u64) {
            let (bytes, behind) = rest.split_at(part.length as usize);
            rest = behind;
            self.store(&part, NewBytes::Bytes(bytes), old)?;
        }
        Ok(())
    }

    /// Makes the guest bytes read as zeroes, over what the parent has.
    pub(super) fn zero_child(&self, offset: u64, length: u64, unmap: bool, old: OldBytes<'_>) -> Result<()> {
        cut(self.layout().block, offset, length)
            .try_for_each(|part| self.store(&part, NewBytes::Zeroes(unmap), old))
    }

    /// What the image itself has of a range becomes zeroes; the rest stays the parent's.
    pub(super) fn discard_child(&self, offset: u64, length: u64) -> Result<()> {
        for part in cut(self.layout().block, offset, length) {
            let _shared = self.requests.hold(part.block, part.block + 1, false);
            let index = index_of(&part);
            let Entry::At(place) = self.entry(index)? else { continue };
            let host = place + self.layout().lead;
            let Some(bitmaps) = self.scheme.bitmaps() else {
                self.storage.zero(host + part.inside, part.length, true)?;
                continue;
            };
            let bits = bitmaps.get(&*self.storage, index, place)?;
            let (mut at, end) = (part.inside, part.end());
            while at < end {
                let there = bits.has(at / SECTOR);
                let from = at;
                while at < end && bits.has(at / SECTOR) == there {
                    at = (at - at % SECTOR + SECTOR).min(end);
                }
                if there {
                    self.storage.zero(host + from, at - from, true)?;
                }
            }
        }
        Ok(())
    }

    fn store(&self, part: &Part, content: NewBytes<'_>, old: OldBytes<'_>) -> Result<()> {
        let (start, end, index) = (part.block, part.block + 1, index_of(part));
        {
            let _shared = self.requests.hold(start, end, false);
            if let Entry::At(place) = self.entry(index)?
                && self.lacks(part, place)?.into_iter().all(|range| range.is_empty())
            {
                return self.put(part, place, content);
            }
        }
        let _alone = self.requests.hold(start, end, true);
        let entry = self.entry(index)?;
        match (entry, content, self.layout().zero) {
            (Entry::Zero, NewBytes::Zeroes(_), _) => Ok(()),
            (Entry::Absent, NewBytes::Zeroes(_), Some(zero)) if self.is_whole(part) => {
                self.table.set(index, zero);
                Ok(())
            }
            (Entry::Absent, ..) if self.scheme.bitmaps().is_none() => self.fill(part, content, old),
            (Entry::Absent | Entry::Zero | Entry::At(_), ..) => {
                let place = match entry {
                    Entry::At(place) => place,
                    Entry::Absent | Entry::Zero => self.allocate(index)?,
                };
                for range in self.lacks(part, place)? {
                    self.copy(part.block, place, range, old)?;
                }
                self.put(part, place, content)
            }
        }
    }

    /// What is around a part in its first and last sector that the image does not have.
    fn lacks(&self, part: &Part, place: u64) -> Result<[Range<u64>; 2]> {
        let (start, end) = (part.inside, part.end());
        let Some(bitmaps) = self.scheme.bitmaps() else { return Ok([0..0, 0..0]) };
        if start.is_multiple_of(SECTOR) && end.is_multiple_of(SECTOR) {
            return Ok([0..0, 0..0]);
        }
        let bits = bitmaps.get(&*self.storage, index_of(part), place)?;
        let front = if bits.has(start / SECTOR) { start..start } else { start - start % SECTOR..start };
        let behind = end.next_multiple_of(SECTOR);
        let back = if bits.has((end - 1) / SECTOR) { end..end } else { end..behind };
        Ok([front, back])
    }

    /// Whether all of a block that the disk has is in the part.
    fn is_whole(&self, part: &Part) -> bool {
        part.inside == 0 && part.end() == self.block_end(part.block)
    }

    /// Bytes of a block that the disk has.
    fn block_end(&self, block: u64) -> u64 {
        let layout = self.layout();
        layout.size.saturating_sub(block * layout.block).min(layout.block)
    }

    /// Brings the bytes to a block that has its place, and then says that they are there.
    fn put(&self, part: &Part, place: u64, content: NewBytes<'_>) -> Result<()> {
        content.put(&*self.storage, place + self.layout().lead + part.inside, part.length)?;
        match self.scheme.bitmaps() {
            Some(bitmaps) => {
                let sectors = part.inside / SECTOR..part.end().div_ceil(SECTOR);
                bitmaps.set(&*self.storage, index_of(part), place, sectors)
            }
            None => Ok(()),
        }
    }

    /// Copies a range of a block, as the disk has it, to its place.
    fn copy(&self, block: u64, place: u64, range: Range<u64>, old: OldBytes<'_>) -> Result<()> {
        let layout = self.layout();
        let (mut at, end) = (range.start, range.end.min(self.block_end(block)));
        let mut bytes = vec![0; end.saturating_sub(at).min(PIECE) as usize];
        while at < end {
            let length = (end - at).min(PIECE);
            let piece = bytes.get_mut(..length as usize).unwrap_or_default();
            old(MemMut::from(&mut *piece), block * layout.block + at)?;
            self.storage.write_all_at(Mem::from(&*piece), place + layout.lead + at)?;
            at += length;
        }
        Ok(())
    }

    /// Gives a block its place, with all that the disk has of it, and the request's bytes over that. Nobody reads it before.
    fn fill(&self, part: &Part, content: NewBytes<'_>, old: OldBytes<'_>) -> Result<()> {
        let place = self.take()?;
        let filled = self
            .copy(part.block, place, 0..part.inside, old)
            .and_then(|()| self.copy(part.block, place, part.end()..self.layout().block, old))
            .and_then(|()| match content {
                // A new place is zero.
                NewBytes::Zeroes(_) => Ok(()),
                NewBytes::Bytes(_) => self.put(part, place, content),
            });
        if let Err(error) = filled {
            self.give_back(place);
            return Err(error);
        }
        let Some(entry) = self.layout().entry_of(place) else {
            return Err(Error::new(ErrorKind::Internal, "a place has no entry"));
        };
        self.table.set(index_of(part), entry);
        Ok(())
    }
}
