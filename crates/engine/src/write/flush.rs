//! Flushing: which bytes reach the file, in which order, with how few syncs.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use qcow2_format::{L1Entry, words};

use super::active::Active;
use crate::alloc::Unlinked;
use crate::image::{Image, Pending, Qcow2, Slice};
use crate::writer::Writer;
use crate::{Mem, Result, StorageExt};

/// Bytes of changed L2 slices that a request may leave behind; more are written without waiting for a flush.
const DIRTY_BYTES: u64 = 8 << 20;

impl Image {
    /// Makes everything durable that was written before. In the common case this is one `fdatasync`.
    ///
    /// # Errors
    /// `Io` when a write or sync fails; the image then refuses further writes.
    pub fn flush(&self) -> Result<()> {
        match (self.top_qcow2(), self.top_writable()) {
            (Some(image), _) if image.is_writable() => {
                let writer = image.writer()?;
                let _shared = writer.gate.read();
                writer.check()?;
                Active { disk: self, image, writer }.flush_guest()
            }
            (None, Some(layer)) => layer.flush(),
            _ => Ok(()),
        }
    }

    /// Runs `look` while the file is complete by itself: everything that was written is in it, nothing is reserved, and
    /// no request changes it. For a check of an image that is open for writing.
    ///
    /// # Errors
    /// As [`Image::flush`], and those of `look`.
    pub fn settled<T>(&self, look: impl FnOnce() -> Result<T>) -> Result<T> {
        let writable = self.top_qcow2();
        let Some((image, writer)) = writable.and_then(|image| Some((image, image.open_writer()?))) else {
            return look();
        };
        let _alone = writer.gate.write();
        if writer.begun.get().is_some() && writer.check().is_ok() {
            Active { disk: self, image, writer }.flush_metadata()?;
            writer.give_back(image)?;
        }
        look()
    }
}

impl<'a> Active<'a> {
    /// Writes metadata early when much of it is waiting.
    pub(super) fn limit_dirty(&self) -> Result<()> {
        let Self { image, .. } = *self;
        let waiting = image.mapping().dirty_slices() * image.slices().slice_bytes();
        if waiting > DIRTY_BYTES { self.flush_guest() } else { Ok(()) }
    }

    /// A guest's flush: refcounts stay behind where they are lazy.
    pub(super) fn flush_guest(&self) -> Result<()> {
        let Self { image, writer, .. } = *self;
        flush_pending(image, writer, writer.options.lazy_refcounts)
    }

    /// Makes everything durable, refcounts too.
    pub(crate) fn flush_metadata(&self) -> Result<()> {
        let Self { image, writer, .. } = *self;
        flush_pending(image, writer, false)
    }
}

fn flush_pending(image: &Qcow2, writer: &Writer, lazy: bool) -> Result<()> {
    let _one = writer.flushing.lock();
    writer.check()?;
    let pending = image.changing().take_pending();
    let written = writer.write_pending(image, pending, lazy).map_err(|e| writer.poison(e));
    written.map_err(|e| writer.note_corruption(image, e))
}

impl Writer {
    /// Refcounts, then L2 slices, then L1 entries; a sync between two of them only where the later one must not be
    /// durable first; a sync at the end.
    fn write_pending(&self, image: &Qcow2, pending: Pending, lazy: bool) -> Result<()> {
        let storage = image.storage();
        let refcounts = self.alloc.lock().begin_flush(&mut self.metadata.lock(), lazy)?;
        let unchanged = refcounts.is_empty() && pending.slices.is_empty() && pending.l1.is_empty();
        for (offset, bytes) in refcounts {
            storage.write_all_at(Mem::from(bytes.as_slice()), offset)?;
        }
        let data = image.data_file().filter(|_| image.header().has_data_file());
        if let Some(data) = data {
            data.flush()?;
        }
        let l1_waits = pending.tables_need_barrier && !pending.l1.is_empty();
        if pending.links_need_barrier && !pending.slices.is_empty() && data.is_none() {
            storage.flush()?;
        }
        write_slices(image, &pending.slices)?;
        if l1_waits {
            storage.flush()?;
        }
        for (start, entries) in &pending.l1 {
            let bytes = words::encode(entries);
            let l1 = self.l1_offset();
            storage.write_all_at(Mem::from(bytes.as_slice()), l1 + *start as u64 * 8)?;
        }
        if data.is_none() || !unchanged {
            storage.flush()?;
        }
        image.changing().settle(&pending.slices);
        self.forget_tables(image, &pending.unlinked);
        self.alloc.lock().end_flush(pending.epoch, pending.unlinked)
    }

    /// Tables that the active disk no longer refers to leave the overlap check and the cache. One that lost a snapshot's
    /// reference alone stays.
    fn forget_tables(&self, image: &Qcow2, unlinked: &[Unlinked]) {
        let g = *image.geometry();
        let mut gone: BTreeSet<u64> = {
            let metadata = self.metadata.lock();
            let clusters = unlinked.iter().flat_map(|run| run.cluster..run.cluster + run.count);
            clusters.filter(|cluster| metadata.has(*cluster)).collect()
        };
        if gone.is_empty() {
            return;
        }
        let mapping = image.mapping();
        for entry in mapping.l1() {
            gone.remove(&g.cluster_index(L1Entry(*entry).offset_bits()));
        }
        let mut metadata = self.metadata.lock();
        for cluster in gone {
            metadata.remove(cluster);
            image.forget_slices(cluster * g.cluster_size(), g.cluster_size());
        }
    }

    /// As at the beginning: nothing is reserved, no host cluster waits for more compressed data, and the file ends with
    /// what is in use.
    pub(crate) fn restart_allocation(&self, image: &Qcow2) -> Result<()> {
        self.check()?;
        self.alloc.lock().packing = None;
        self.give_back(image)
    }

    /// Frees what waits in quarantine. Reads that planned before may still use it: they end soon, and later ones plan
    /// anew.
    pub(crate) fn drain(&self) -> Result<()> {
        while !self.with_alloc(|alloc, _| alloc.drain())? {
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// Waits for all reads that planned before the last flush: nobody uses places any more that the tables do not name.
    pub(crate) fn end_reads(&self) -> Result<()> {
        while !self.with_alloc(|alloc, _| alloc.drain_requests())? {
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// Gives the reservations back and cuts the file. Behind a flush, and nothing is being written.
    pub(crate) fn give_back(&self, image: &Qcow2) -> Result<()> {
        // What would stay in quarantine would stay in the file, as a leak, and be freed once more later.
        self.drain()?;
        let storage = image.storage();
        let (length, writes) = {
            let mut alloc = self.alloc.lock();
            let length = alloc.give_back()?;
            (length, alloc.refcounts.take_dirty())
        };
        for (offset, bytes) in &writes {
            storage.write_all_at(Mem::from(bytes.as_slice()), *offset).map_err(|e| self.poison(e))?;
        }
        self.alloc.lock().refcounts.note_written();
        if !storage.traits().block_device && storage.size()? > length {
            storage.resize(length).map_err(|e| self.poison(e))?;
        } else if writes.is_empty() {
            return Ok(());
        }
        storage.flush().map_err(|e| self.poison(e))
    }
}

/// Writes slices in the order of their places, neighbours in one request.
fn write_slices(image: &Qcow2, slices: &BTreeMap<u64, Slice>) -> Result<()> {
    let mut run: Option<(u64, Vec<u8>)> = None;
    for (&offset, slice) in slices {
        match &mut run {
            Some((start, data)) if *start + data.len() as u64 == offset => words::append(data, slice),
            _ => {
                if let Some((start, data)) = run.replace((offset, words::encode(slice))) {
                    image.storage().write_all_at(Mem::from(data.as_slice()), start)?;
                }
            }
        }
    }
    match run {
        Some((start, data)) => image.storage().write_all_at(Mem::from(data.as_slice()), start),
        None => Ok(()),
    }
}
