//! Requests on a writable image: see the order in the module's description.

use std::sync::atomic::Ordering;

use super::layer::{BlockLayer, Shared};
use super::layout::{Entry, Scheme};
use super::places::Places;
use crate::disk::{DiskOptions, WriteLayer};
use crate::space::{Preallocation, lengthen};
use crate::{Error, ErrorKind, Job, Layer, Mem, Result, StorageExt};

/// New entries that are kept in memory before they are written without being asked.
const MOST_PENDING: usize = 1 << 16;
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

    fn allocate(&self, index: u32) -> Result<u64> {
        let layout = self.layout();
        let mut guard = self.places.lock();
        // Another request may have been here first.
        if let Entry::At(place) = self.entry(index)? {
            return Ok(place);
        }
        let places = match &mut *guard {
            Some(places) => places,
            none => none.insert(Places::survey(self)?),
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
        self.scheme.fresh(&*self.storage, place, places.free.is_empty())?;
        if places.free.pop().is_none() {
            places.end = layout.next_place(end);
        }
        self.length.fetch_max(end, Ordering::AcqRel);
        self.table.set(index, entry);
        Ok(place)
    }

    /// Writes the new entries, and makes all durable that was written.
    fn publish(&self) -> Result<()> {
        let _one = self.flushing.lock();
        self.check_sound()?;
        let batch = self.table.pending();
        if batch.is_empty() {
            return self.sync();
        }
        {
            // Nobody gets a place where the format's structures are written.
            let places = self.places.lock();
            if let Some(places) = &*places {
                lengthen(&*self.storage, places.end)?;
                self.scheme.settle(&*self.storage, places.end)?;
            }
        }
        self.sync()?;
        self.table.write(&*self.storage, self.layout(), &batch)?;
        self.sync()?;
        self.table.settled(&batch);
        Ok(())
    }

    /// Calls `f` with the parts of a range that blocks with a place have: where they are in the file, and their length.
    fn stored(&self, offset: u64, length: u64, mut f: impl FnMut(u64, u64) -> Result<()>) -> Result<()> {
        let layout = self.layout();
        let (mut at, end) = (offset, offset + length);
        while at < end {
            let (index, inside) = ((at / layout.block) as u32, at % layout.block);
            let part = (layout.block - inside).min(end - at);
            if let Entry::At(place) = self.entry(index)? {
                f(place + layout.lead + inside, part)?;
            }
            at += part;
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
        if !size.is_multiple_of(SECTOR) {
            return refuse(
                ErrorKind::InvalidArgument,
                "size",
                format!("{size} is no multiple of {SECTOR} bytes"),
            );
        }
        if size < self.size.load(Ordering::Acquire) {
            let message =
                format!("a {format} image is not made smaller: convert its disk into another image");
            return refuse(ErrorKind::UnsupportedFeature, "size", message);
        }
        let room = layout.data.saturating_sub(layout.table) / 4;
        let entries = size.div_ceil(layout.block);
        match u32::try_from(entries).ok().filter(|_| entries <= room.max(layout.entries.into())) {
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
            none => none.insert(Places::survey(self)?),
        };
        // The new part of the disk is zero, what its last block had there or not.
        let rest = old.next_multiple_of(layout.block).min(size) - old;
        self.stored(old, rest, |host, length| self.storage.zero(host, length, true))?;
        let new: Vec<_> = (self.table.entries()..entries).map(|index| (index, layout.absent)).collect();
        self.table.write(&*self.storage, layout, &new)?;
        self.sync()?;
        self.scheme.resize(&*self.storage, size, entries, places.end)?;
        self.sync()?;
        self.table.grow(entries);
        self.size.store(size, Ordering::Release);
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
        shared.check_sound()?;
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
        if shared.table.pending_count() > MOST_PENDING { shared.publish() } else { Ok(()) }
    }

    fn write_zeroes(&self, offset: u64, length: u64, unmap: bool) -> Result<()> {
        self.shared.check_sound()?;
        self.shared.stored(offset, length, |host, part| self.shared.storage.zero(host, part, unmap))
    }

    /// A block stays where it is: what is left of it is zero, and not what the storage makes of a discard.
    fn discard(&self, offset: u64, length: u64) -> Result<()> {
        self.write_zeroes(offset, length, true)
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
        shared.grow(size, entries)
    }
}
