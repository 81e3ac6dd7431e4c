//! Requests on a writable image: see the order in the module's description.

use std::sync::atomic::Ordering;

use super::bitmaps::SectorBitmaps;
use super::layer::{BlockLayer, Shared};
use super::layout::{Entry, Scheme};
use super::places::Places;
use crate::disk::{DiskOptions, OldBytes, WriteLayer};
use crate::parts::cut;
use crate::space::{Preallocation, lengthen};
use crate::{Error, ErrorKind, Job, Layer, Mem, Result, StorageExt};

/// New entries that are kept in memory before they are written without being asked.
const MOST_PENDING: usize = 1 << 16;
/// Bitmaps of sectors that are kept in memory before they are written without being asked.
const MOST_WAITING: usize = 1 << 12;
/// Disks are whole sectors.
const SECTOR: u64 = 512;

impl<S: Scheme> Shared<S> {
    fn check_sound(&self) -> Result<()> {
        if !self.failed.load(Ordering::Acquire) {
            return Ok(());
        }
        let message =
            "an earlier flush failed, and what it was to make durable may be lost: open the image again";
        Err(self.storage.located(Error::new(ErrorKind::Io, message)))
    }

    /// Another disk from here on.
    fn begin_change(&self) -> Result<()> {
        self.check_sound()?;
        self.scheme.change(&*self.storage)
    }

    fn sync(&self) -> Result<()> {
        self.storage.flush().inspect_err(|_| self.failed.store(true, Ordering::Release))
    }

    /// Where the guest's bytes of the block `index` are, in a new place where it has none.
    fn writable_block(&self, index: u32) -> Result<u64> {
        let place = match self.entry(index)? {
            Entry::At(place) => place,
            Entry::Absent | Entry::Zero => self.allocate(index)?,
        };
        self.scheme.touch(&*self.storage, index, place)?;
        Ok(place + self.layout().lead)
    }

    /// The place of the block `index`, a new one where it has none.
    pub(super) fn allocate(&self, index: u32) -> Result<u64> {
        let mut guard = self.places.lock();
        // Another request may have been here first.
        if let Entry::At(place) = self.entry(index)? {
            return Ok(place);
        }
        let (place, entry) = self.take_from(&mut guard)?;
        self.table.set(index, entry);
        Ok(place)
    }

    /// A place that no entry names yet.
    pub(super) fn take(&self) -> Result<u64> {
        self.take_from(&mut self.places.lock()).map(|(place, _)| place)
    }

    /// Nothing was stored there after all that counts.
    pub(super) fn give_back(&self, place: u64) {
        if let Some(places) = &mut *self.places.lock() {
            places.stale = places.stale.max(place.saturating_add(self.layout().stride()));
            places.free.push(place);
        }
    }

    /// A new place and its entry.
    fn take_from(&self, places: &mut Option<Places>) -> Result<(u64, u32)> {
        let layout = self.layout();
        let places = match places {
            Some(places) => places,
            none => none.insert(Places::survey(self, u32::MAX)?),
        };
        let place = places.free.last().copied().unwrap_or(places.end);
        let Some(entry) = layout.entry_of(place) else {
            let message = format!(
                "no {} names {place:#x}: the file is as long as the format can have it",
                self.scheme.entry_name()
            );
            return Err(self.storage.located(Error::new(ErrorKind::Limit, message)));
        };
        let end = place + layout.stride();
        if place < places.stale {
            self.storage.zero(place, end.min(places.stale) - place, true)?;
        }
        self.scheme.fresh(&*self.storage, place, places.free.is_empty(), false)?;
        if places.free.pop().is_none() {
            places.end = layout.next_place(end);
        }
        self.length.fetch_max(end, Ordering::AcqRel);
        Ok((place, entry))
    }

    /// Writes the new entries, and makes all durable that was written.
    fn publish(&self) -> Result<()> {
        let _one = self.flushing.lock();
        self.check_sound()?;
        // Before the data is made durable: what comes later waits for the next flush.
        let bits = self.scheme.bitmaps().map(SectorBitmaps::waiting).unwrap_or_default();
        let batch = self.table.pending();
        if batch.is_empty() && bits.is_empty() {
            return self.sync();
        }
        if !batch.is_empty() {
            // Nobody gets a place where the format's structures are written.
            let places = self.places.lock();
            if let Some(places) = &*places {
                lengthen(&*self.storage, places.end)?;
                self.scheme.settle(&*self.storage, places.end)?;
            }
        }
        self.sync()?;
        SectorBitmaps::write(&*self.storage, &bits)?;
        self.table.write(&*self.storage, self.layout(), &batch)?;
        self.sync()?;
        self.table.settled(&batch);
        if let Some(bitmaps) = self.scheme.bitmaps() {
            bitmaps.settled(&bits);
        }
        Ok(())
    }

    /// Keeps what waits for a flush bounded.
    fn publish_if_many(&self) -> Result<()> {
        let bitmaps = self.scheme.bitmaps().map_or(0, SectorBitmaps::waiting_count);
        let many = self.table.pending_count() > MOST_PENDING || bitmaps > MOST_WAITING;
        if many { self.publish() } else { Ok(()) }
    }

    /// Refuses a request that does not say what the disk holds, on an image that needs it.
    fn check_alone(&self) -> Result<()> {
        if !self.scheme.is_differencing() {
            return Ok(());
        }
        let message = "a differencing image is written to with what shows through it";
        Err(self.storage.located(Error::new(ErrorKind::Internal, message)))
    }

    /// Calls `f` with the parts of a range that blocks with a place have: where they are in the file, and their length.
    fn stored(&self, offset: u64, length: u64, mut f: impl FnMut(u64, u64) -> Result<()>) -> Result<()> {
        let layout = self.layout();
        for part in cut(layout.block, offset, length) {
            if let Entry::At(place) = self.entry(part.block as u32)? {
                f(place + layout.lead + part.inside, part.length)?;
            }
        }
        Ok(())
    }

    /// Refuses a size that the disk cannot get; the number of entries that it needs.
    fn judge_size(&self, size: u64, preallocation: Preallocation) -> Result<u32> {
        let (layout, format) = (self.layout(), self.scheme.format());
        let refuse = |kind, field: &'static str, message: String| {
            Err(self.storage.located(Error::new(kind, message).with_field(field)))
        };
        if preallocation != Preallocation::Off {
            let message = format!("a {format} image grows without preallocation");
            return refuse(ErrorKind::InvalidArgument, "preallocation", message);
        }
        if self.scheme.is_differencing() && size != self.size.load(Ordering::Acquire) {
            let message = format!("a differencing {format} image keeps the size that its parent has");
            return refuse(ErrorKind::UnsupportedFeature, "size", message);
        }
        if !size.is_multiple_of(SECTOR) {
            return refuse(
                ErrorKind::InvalidArgument,
                "size",
                format!("{size} is no multiple of {SECTOR} bytes"),
            );
        }
        let room = layout.data.saturating_sub(layout.table) / 4;
        let entries = size.div_ceil(layout.block);
        match u32::try_from(entries).ok().filter(|_| entries <= room.max(layout.entries.into())) {
            Some(entries) if size < self.size.load(Ordering::Acquire) => Ok(entries),
            Some(entries) => Ok(entries.max(self.table.entries())),
            None => {
                let most = room.max(layout.entries.into()).saturating_mul(layout.block);
                let message = format!(
                    "the table has room for a disk of {most} bytes, not of {size}: convert the disk into a larger image"
                );
                refuse(ErrorKind::UnsupportedFeature, "size", message)
            }
        }
    }

    fn grow(&self, size: u64, entries: u32) -> Result<()> {
        let (layout, old) = (self.layout(), self.size.load(Ordering::Acquire));
        self.scheme.resized(size).map_err(|e| self.storage.located(e))?;
        self.publish()?;
        let _one = self.flushing.lock();
        let mut guard = self.places.lock();
        let places = match &mut *guard {
            Some(places) => places,
            none => none.insert(Places::survey(self, u32::MAX)?),
        };
        // The new part of the disk is zero, what its last block had there or not.
        let rest = old.next_multiple_of(layout.block).min(size) - old;
        self.stored(old, rest, |host, length| self.storage.zero(host, length, true))?;
        // A table can have more entries than the disk has blocks: what these name is none of its data.
        let first = u32::try_from(old.div_ceil(layout.block)).unwrap_or(u32::MAX);
        let new: Vec<_> = (first..entries).map(|index| (index, layout.absent)).collect();
        self.table.write(&*self.storage, layout, &new)?;
        self.sync()?;
        self.scheme.resize(&*self.storage, size, entries, places.end)?;
        self.sync()?;
        self.table.resize(entries);
        self.size.store(size, Ordering::Release);
        Ok(())
    }

    /// Makes the disk smaller. Its size and the number of entries change first, durably: a power cut leaves the whole old disk or the new
    /// one. What lay behind the end is given up then. A read of it that was planned before may find what is written there later.
    fn shrink(&self, size: u64, entries: u32) -> Result<()> {
        self.scheme.resized(size).map_err(|e| self.storage.located(e))?;
        self.publish()?;
        let _one = self.flushing.lock();
        let mut guard = self.places.lock();
        let left = Places::survey(self, entries)?;
        let mut lost = Vec::new();
        let mut kept = 0;
        self.walk(|index, entry| {
            match entry {
                Entry::At(place) if index >= entries => lost.push(place),
                Entry::At(_) => kept += 1,
                Entry::Absent | Entry::Zero => {}
            }
            Ok(())
        })?;
        self.scheme.judge_shrunk(kept, left.end).map_err(|e| self.storage.located(e))?;
        let switched = self.scheme.resize(&*self.storage, size, entries, left.end);
        // The file can have the new size already: nothing may count on the old one.
        switched.inspect_err(|_| self.failed.store(true, Ordering::Release))?;
        self.sync()?;
        self.size.store(size, Ordering::Release);
        self.table.resize(entries);
        *guard = Some(left);
        // Only space, which is not worth an error: the disk is as it shall be.
        let (stride, length) = (self.layout().stride(), self.storage.size()?);
        for place in lost.into_iter().filter(|place| place + stride <= length) {
            if self.storage.free(place, stride).is_err() {
                break;
            }
        }
        Ok(())
    }
}

impl<S: Scheme> WriteLayer for BlockLayer<S> {
    fn is_writable(&self) -> bool {
        self.options.is_some()
    }

    fn disk_options(&self) -> DiskOptions {
        self.options.unwrap_or_default()
    }

    fn write_at(&self, buf: Mem<'_>, offset: u64) -> Result<()> {
        let (shared, layout) = (&*self.shared, self.shared.layout());
        shared.begin_change()?;
        shared.check_alone()?;
        let (mut rest, mut at) = (buf, offset);
        // What is written in one piece, and where.
        let mut run: Option<(u64, usize)> = None;
        let mut waiting = buf;
        while !rest.is_empty() {
            let (index, inside) = ((at / layout.block) as u32, at % layout.block);
            let (part, behind) = rest.split_at((layout.block - inside) as usize);
            let host = shared.writable_block(index)? + inside;
            run = match run {
                Some((start, length)) if start + length as u64 == host => Some((start, length + part.len())),
                Some((start, length)) => {
                    let (ready, later) = waiting.split_at(length);
                    shared.storage.write_all_at(ready, start)?;
                    waiting = later;
                    Some((host, part.len()))
                }
                None => Some((host, part.len())),
            };
            at += part.len() as u64;
            rest = behind;
        }
        if let Some((start, _)) = run {
            shared.storage.write_all_at(waiting, start)?;
        }
        shared.publish_if_many()
    }

    fn write_zeroes(&self, offset: u64, length: u64, unmap: bool) -> Result<()> {
        self.shared.begin_change()?;
        self.shared.check_alone()?;
        self.shared.stored(offset, length, |host, part| self.shared.storage.zero(host, part, unmap))
    }

    fn write_over(&self, buf: Mem<'_>, offset: u64, old: OldBytes<'_>) -> Result<()> {
        if !self.shared.scheme.is_differencing() {
            return self.write_at(buf, offset);
        }
        self.shared.begin_change()?;
        self.shared.write_child(buf, offset, old)?;
        self.shared.publish_if_many()
    }

    fn zero_over(&self, offset: u64, length: u64, unmap: bool, old: OldBytes<'_>) -> Result<()> {
        if !self.shared.scheme.is_differencing() {
            return self.write_zeroes(offset, length, unmap);
        }
        self.shared.begin_change()?;
        self.shared.zero_child(offset, length, unmap, old)?;
        self.shared.publish_if_many()
    }

    /// A block stays where it is: what is left of it is zero, and not what the storage makes of a discard.
    fn discard(&self, offset: u64, length: u64) -> Result<()> {
        if !self.shared.scheme.is_differencing() {
            return self.write_zeroes(offset, length, true);
        }
        self.shared.begin_change()?;
        self.shared.discard_child(offset, length)
    }

    fn flush(&self) -> Result<()> {
        self.shared.publish()
    }

    fn close(&self) -> Result<()> {
        self.shared.publish()?;
        let _one = self.shared.flushing.lock();
        let end = self.shared.places.lock().take().map(|places| places.end);
        self.shared.scheme.finish(&*self.shared.storage, end)
    }

    fn resize(&self, size: u64, preallocation: Preallocation, job: &Job) -> Result<()> {
        let shared = &*self.shared;
        job.checkpoint()?;
        let entries = shared.judge_size(size, preallocation)?;
        if size == self.virtual_size() {
            return Ok(());
        }
        shared.begin_change()?;
        if size < self.virtual_size() { shared.shrink(size, entries) } else { shared.grow(size, entries) }
    }
}
