//! Writing: what a guest asks for, the log behind it, another size.
//!
//! The order that keeps a power cut from losing or mixing up anything: the bytes of a new block, and the length of the file, are durable
//! before an entry of the table refers to them; a change of the table is durable in the log before it is made in its place; and it is
//! durable in its place before the log gives it up. What a block had is used for nothing else before the entry that lost it is durable.

mod child;
mod commit;
mod grow;

use std::sync::atomic::AtomicBool;
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;
use qcow2_core::disk::{DiskOptions, OldBytes, WriteLayer};
use qcow2_core::layer::Pin;
use qcow2_core::parts::{self, Part};
use qcow2_core::space::Preallocation;
use qcow2_core::storage::RangeLock;
use qcow2_core::{Error, ErrorKind, Job, Layer, Mem, MemMut, Result, StorageExt};

use self::commit::LogState;
use crate::Vhdx;
use crate::file::{new_guid, replay_on_disk, write_headers};
use crate::space::{Room, Space, Used};
use crate::structures::{Guid, Header, MIB, Payload, anchor, bitmap_block, encode_payload};

/// Bytes of the table that are read at once where all of it is looked at.
const SCAN: usize = 1 << 20;

/// The state of writing.
#[derive(Debug)]
pub(crate) struct Writer {
    options: DiskOptions,
    /// Blocks that requests are working on: shared by those that write in place, alone to change its entry.
    blocks: RangeLock,
    space: Mutex<Space>,
    /// Held where a chunk gets its sector bitmap.
    bitmaps: Mutex<()>,
    log: Mutex<LogState>,
    /// The headers say that the file was changed.
    begun: AtomicBool,
    /// Why nobody knows what is in the file: a sync or a change of the headers failed.
    lost: OnceLock<(ErrorKind, String)>,
}

impl Writer {
    pub(crate) fn pin(&self) -> Pin {
        self.space.lock().pin()
    }

    fn usable(&self) -> Result<()> {
        match self.lost.get() {
            None => Ok(()),
            Some((kind, why)) => {
                let message = format!("the image refuses writes since an earlier error, reopen it: {why}");
                Err(Error::new(*kind, message))
            }
        }
    }

    /// Nothing is written any more: after such an error memory and file differ in unknown ways.
    fn lose(&self, error: &Error) {
        self.lost.get_or_init(|| (error.kind(), error.to_string()));
    }
}

impl Vhdx {
    fn writer(&self) -> Result<&Writer> {
        let writer = self.writer.as_ref().ok_or_else(|| {
            self.storage().located(Error::new(ErrorKind::ReadOnly, "the image is open for reading only"))
        })?;
        writer.usable().map_err(|e| self.storage().located(e))?;
        Ok(writer)
    }

    /// Makes the image take requests; brings its log in on disk.
    pub(crate) fn begin_writing(&mut self, options: DiskOptions) -> Result<()> {
        let refuse = |kind, message: &str| Err(self.storage().located(Error::new(kind, message)));
        let traits = self.storage().traits();
        if !traits.writable {
            return refuse(ErrorKind::ReadOnly, "the file is open for reading only");
        }
        if self.front.header.log_length == 0 {
            let message = "the image has no log, and cannot be written to: convert it to a new image";
            return refuse(ErrorKind::UnsupportedFeature, message);
        }
        self.replay()?;
        let used = self.used()?;
        let length = self.storage().size()?;
        let space = Space::new(&used, self.geometry().block_size, length, traits.block_device);
        self.writer = Some(Writer {
            options,
            blocks: RangeLock::default(),
            space: Mutex::new(space),
            bitmaps: Mutex::default(),
            log: Mutex::new(LogState::new(self.front.header, self.front.slot)),
            begun: AtomicBool::new(false),
            lost: OnceLock::new(),
        });
        Ok(())
    }

    /// Brings the log in on disk, where there is one.
    fn replay(&mut self) -> Result<()> {
        let Some(log) = &self.front.log else { return Ok(()) };
        let storage = Arc::clone(self.storage());
        replay_on_disk(&*storage, log)?;
        let clean = changed_header(&self.front.header)?;
        self.front.header = write_headers(&*storage, &clean, self.front.slot)?;
        self.front.log = None;
        self.data = storage;
        Ok(())
    }

    /// What of the file is in use.
    ///
    /// # Errors
    /// `Corrupt` for entries that cannot be, and where two blocks have the same bytes: nothing is written then.
    fn used(&self) -> Result<Used> {
        let geometry = self.geometry();
        let mut used = Used::new(self.data.size()?);
        for range in &self.places.read().reserved {
            used.add(range.start, range.end);
        }
        let mut has_anchors = false;
        self.for_each_entry(&mut |index, entry| {
            let Some(block) = geometry.block_of(index) else {
                // Of an image without a parent they mean nothing.
                if geometry.has_parent {
                    let bitmap = self.judged_bitmap(index, entry).map_err(|e| self.storage().located(e))?;
                    if let Some(bitmap) = bitmap
                        && !used.add(bitmap, bitmap + MIB)
                    {
                        return Err(self.shared(index - index / (geometry.chunk_ratio() + 1), bitmap));
                    }
                    return Ok(());
                }
                if let Some(bitmap) = bitmap_block(entry).ok().flatten() {
                    used.add(bitmap, bitmap.saturating_add(MIB));
                }
                return Ok(());
            };
            match self.judged(block, entry)? {
                Payload::Present(offset) | Payload::Partial(offset) => {
                    if !used.add(offset, offset + geometry.block_size) {
                        return Err(self.shared(block, offset));
                    }
                }
                Payload::Zero | Payload::NotPresent => has_anchors |= anchor(entry).is_some(),
            }
            Ok(())
        })?;
        if has_anchors {
            // Who wrote them may come back to these places, which are no blocks yet.
            self.for_each_entry(&mut |_, entry| {
                if let Some(offset) = anchor(entry) {
                    used.add(offset, offset.saturating_add(geometry.block_size));
                }
                Ok(())
            })?;
        }
        Ok(used)
    }

    fn shared(&self, block: u64, offset: u64) -> Error {
        let guest = block * self.geometry().block_size;
        let message = format!(
            "the block of guest offset {guest:#x} overlaps another one: check the image before it is written to"
        );
        let error = Error::new(ErrorKind::Corrupt, message).with_field("BAT entry");
        self.storage().located(error.with_offset(offset))
    }

    /// Calls `f` with the number and the value of every entry of the table, as the file has it.
    pub(crate) fn for_each_entry(&self, f: &mut dyn FnMut(u64, u64) -> Result<()>) -> Result<()> {
        let (bat, entries) = (self.places.read().bat, self.geometry().entries(self.virtual_size()));
        let mut bytes = vec![0; SCAN.min(entries as usize * 8)];
        let mut index = 0;
        while index < entries {
            let count = (SCAN as u64 / 8).min(entries - index);
            let part = bytes.get_mut(..count as usize * 8).unwrap_or_default();
            self.data.read_exact_at(MemMut::from(&mut *part), bat + index * 8)?;
            for entry in part.as_chunks::<8>().0 {
                f(index, u64::from_le_bytes(*entry))?;
                index += 1;
            }
        }
        Ok(())
    }

    /// Cuts a request at blocks.
    fn parts(&self, offset: u64, length: u64) -> impl Iterator<Item = Part> + use<> {
        parts::cut(self.geometry().block_size, offset, length)
    }

    /// Changes a block's entry, in memory.
    fn set_payload(&self, block: u64, payload: Payload) -> Result<()> {
        let at = self.entry_at(self.geometry().entry_of(block));
        self.change(&[(at, &encode_payload(payload).to_le_bytes())])
    }

    fn write_part(&self, writer: &Writer, part: &Part, bytes: Mem<'_>) -> Result<()> {
        {
            let _shared = writer.blocks.hold(part.block, part.block + 1, false);
            if let Payload::Present(offset) = self.payload(part.block)? {
                return self.storage().write_all_at(bytes, offset + part.inside);
            }
        }
        let _alone = writer.blocks.hold(part.block, part.block + 1, true);
        if let Payload::Present(offset) = self.payload(part.block)? {
            return self.storage().write_all_at(bytes, offset + part.inside);
        }
        let room = self.take_room(writer)?;
        let stored = self.fill(room, part, bytes);
        let linked = stored.and_then(|()| self.set_payload(part.block, Payload::Present(room.offset)));
        if linked.is_err() {
            writer.space.lock().put_back(room);
        }
        linked
    }

    /// Takes a place for a block; the file is as long as that needs.
    fn take_room(&self, writer: &Writer) -> Result<Room> {
        let located = |e| self.storage().located(e);
        let mut space = writer.space.lock();
        let room = space.take().map_err(located)?;
        let end = room.offset + self.geometry().block_size;
        // With the lock: a file that others made longer is never cut.
        let longer =
            if room.is_new && self.storage().size()? < end { self.storage().resize(end) } else { Ok(()) };
        if longer.is_err() {
            space.put_back(room);
        }
        longer?;
        self.file_grew(end);
        Ok(room)
    }

    /// Makes a block of zeroes and the part's bytes.
    fn fill(&self, room: Room, part: &Part, bytes: Mem<'_>) -> Result<()> {
        if !room.is_new {
            self.storage().zero(room.offset, self.geometry().block_size, true)?;
        }
        self.storage().write_all_at(bytes, room.offset + part.inside)
    }

    /// Whether blocks can be given up: those of a fixed disk stay.
    fn keeps_blocks(&self) -> bool {
        self.tables.metadata.leave_blocks_allocated
    }

    /// Gives up a block of which nothing is left to be read.
    fn give_up(&self, writer: &Writer, block: u64) -> Result<()> {
        let _alone = writer.blocks.hold(block, block + 1, true);
        if let Payload::Present(offset) | Payload::Partial(offset) = self.payload(block)? {
            self.set_payload(block, Payload::Zero)?;
            writer.space.lock().give_up(offset);
        }
        Ok(())
    }

    /// Refuses a request that does not say what the disk holds, on an image that needs it.
    fn check_alone(&self) -> Result<()> {
        if !self.geometry().has_parent {
            return Ok(());
        }
        let message = "a differencing image is written to with what shows through it";
        Err(self.storage().located(Error::new(ErrorKind::Internal, message)))
    }

    /// Whether all of a block that the disk has is in the part.
    fn is_whole(&self, part: &Part) -> bool {
        let block_size = self.geometry().block_size;
        part.inside == 0
            && (part.length == block_size || part.block * block_size + part.length == self.virtual_size())
    }
}

/// The header of a file that is changed from now on, with an empty log.
fn changed_header(header: &Header) -> Result<Header> {
    Ok(Header {
        file_write_guid: new_guid()?,
        data_write_guid: new_guid()?,
        log_guid: Guid::default(),
        ..*header
    })
}

impl WriteLayer for Vhdx {
    fn is_writable(&self) -> bool {
        self.writer.is_some()
    }

    fn disk_options(&self) -> DiskOptions {
        self.writer.as_ref().map_or_else(DiskOptions::default, |writer| writer.options)
    }

    fn write_over(&self, buf: Mem<'_>, offset: u64, old: OldBytes<'_>) -> Result<()> {
        match self.geometry().has_parent {
            true => self.write_child(self.writer()?, buf, offset, old),
            false => self.write_at(buf, offset),
        }
    }

    fn zero_over(&self, offset: u64, length: u64, unmap: bool, old: OldBytes<'_>) -> Result<()> {
        match self.geometry().has_parent {
            true => self.zero_child(self.writer()?, offset, length, unmap, old),
            false => self.write_zeroes(offset, length, unmap),
        }
    }

    fn write_at(&self, buf: Mem<'_>, offset: u64) -> Result<()> {
        self.check_alone()?;
        let writer = self.writer()?;
        let mut rest = buf;
        for part in self.parts(offset, buf.len() as u64) {
            self.begin(writer)?;
            let bytes;
            (bytes, rest) = rest.split_at(part.length as usize);
            self.write_part(writer, &part, bytes)?;
        }
        Ok(())
    }

    fn write_zeroes(&self, offset: u64, length: u64, unmap: bool) -> Result<()> {
        self.check_alone()?;
        let (writer, unmap) = (self.writer()?, unmap && !self.keeps_blocks());
        for part in self.parts(offset, length) {
            self.begin(writer)?;
            if unmap && self.is_whole(&part) {
                self.give_up(writer, part.block)?;
                continue;
            }
            let _shared = writer.blocks.hold(part.block, part.block + 1, false);
            if let Payload::Present(place) = self.payload(part.block)? {
                self.storage().zero(place + part.inside, part.length, unmap)?;
            }
        }
        Ok(())
    }

    fn discard(&self, offset: u64, length: u64) -> Result<()> {
        let writer = self.writer()?;
        if self.keeps_blocks() {
            return Ok(());
        }
        for part in self.parts(offset, length) {
            self.begin(writer)?;
            if self.is_whole(&part) {
                self.give_up(writer, part.block)?;
                continue;
            }
            let _shared = writer.blocks.hold(part.block, part.block + 1, false);
            match self.payload(part.block)? {
                // What is left of it is zero, the old bytes, or the parent's.
                Payload::Present(place) | Payload::Partial(place) if self.geometry().has_parent => {
                    self.storage().zero(place + part.inside, part.length, true)?;
                }
                Payload::Present(place) => self.storage().free(place + part.inside, part.length)?,
                Payload::Partial(_) | Payload::Zero | Payload::NotPresent => {}
            }
        }
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        self.commit()
    }

    /// What was lost before stays lost: the error that said so was told.
    fn close(&self) -> Result<()> {
        let usable = self.writer.as_ref().is_some_and(|writer| writer.usable().is_ok());
        if usable { self.settle_log() } else { Ok(()) }
    }

    fn resize(&self, size: u64, preallocation: Preallocation, job: &Job) -> Result<()> {
        if self.geometry().has_parent && size != self.virtual_size() {
            let message = "a differencing vhdx image keeps the size that its parent has";
            let error = Error::new(ErrorKind::UnsupportedFeature, message).with_field("size");
            return Err(self.storage().located(error));
        }
        self.grow(size, preallocation, job)
    }
}

impl Drop for Vhdx {
    /// An image that nobody closed: what was flushed is there in any case, but others would have to bring the log in first.
    fn drop(&mut self) {
        if self.writer.as_ref().is_some_and(|writer| writer.log.lock().is_in_use()) {
            let _ = self.close();
        }
    }
}
