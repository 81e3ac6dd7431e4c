//! Guest writes.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use qcow2_core::disk::WriteLayer;
use qcow2_format::{L2Mapping, SubclusterBitmap};
use qcow2_transform::is_zero;

use super::active::Active;
use super::batch::{Batch, Bytes, NewRun, Piece};
use super::cluster::{Run, Step};
use super::cow::plan_cow;
use crate::alloc::Allocation;
use crate::image::{Image, Loaded, Qcow2};
use crate::writer::Writer;
use crate::{DetectZeroes, Error, ErrorKind, Mem, MemMut, Result, StorageExt};

/// Milliseconds that a request without space waits for those that still use what is free otherwise.
const PATIENCE: u32 = 2000;

/// What a request writes.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Payload<'a> {
    Bytes(Mem<'a>),
    Zeroes,
}

impl<'a> Payload<'a> {
    /// The part behind the first `n` bytes, and the part before.
    fn split(self, n: u64) -> (Payload<'a>, Payload<'a>) {
        match self {
            Self::Bytes(mem) => {
                let (front, rest) = mem.split_at(n as usize);
                (Self::Bytes(front), Self::Bytes(rest))
            }
            Self::Zeroes => (Self::Zeroes, Self::Zeroes),
        }
    }
}

/// The top layer of a writable image.
pub(crate) enum Top<'a> {
    /// One that nothing shows through.
    Layer(&'a dyn WriteLayer),
    Qcow2(Active<'a>),
}

impl Image {
    /// Writes `buf` to the guest bytes at `offset`. Durable after the next [`Image::flush`].
    ///
    /// # Errors
    /// `InvalidArgument` beyond the end of the disk, `ReadOnly`, `Corrupt`, `Io` (`ENOSPC` among them). After an error
    /// of a data write, the old contents or the new ones are there, and the image works on; after an error of a
    /// metadata write, the image refuses writes until it is reopened.
    pub fn write_at(&self, buf: Mem<'_>, offset: u64) -> Result<()> {
        let range = self.guest_range(offset, buf.len() as u64)?;
        let old = |buf: MemMut<'_>, offset| self.read_at(buf, offset);
        self.guest_request(&range.clone(), |top| match top {
            Top::Layer(layer) => match layer.disk_options().detect_zeroes {
                DetectZeroes::Off => layer.write_over(buf, offset, &old),
                detect if !buf.is_empty() && buf.is_zero() => {
                    layer.zero_over(offset, buf.len() as u64, detect == DetectZeroes::Unmap, &old)
                }
                _ => layer.write_over(buf, offset, &old),
            },
            Top::Qcow2(active) => {
                let range = range.clone();
                match active.writer.options.detect_zeroes {
                    DetectZeroes::Off => active.write_range(Payload::Bytes(buf), range)?,
                    _ if !buf.is_zero() => active.write_range(Payload::Bytes(buf), range)?,
                    detect => active.zero_range(range, detect == DetectZeroes::Unmap)?,
                }
                active.limit_dirty()
            }
        })
    }

    /// Runs one guest request on `range`: shared with others, apart from maintenance; with the flush of the write-through
    /// modes. The disk may have shrunk while it waited for the gate. Where there is no space, `request` is done once more when all
    /// that waits for a sync is free: others may have begun to wait, or have freed something, since it looked.
    pub(super) fn guest_request(
        &self,
        range: &Range<u64>,
        mut request: impl FnMut(Top<'_>) -> Result<()>,
    ) -> Result<()> {
        match self.top()? {
            Top::Layer(layer) => {
                let _shared = self.clones.layer_gate.read();
                self.guest_range(range.start, range.end - range.start)?;
                self.preserve(range);
                request(Top::Layer(layer))?;
                if layer.disk_options().flush_each { layer.flush() } else { Ok(()) }
            }
            Top::Qcow2(active) => {
                let Active { image, writer, .. } = active;
                let _shared = writer.gate.read();
                self.guest_range(range.start, range.end - range.start)?;
                writer.begin(image)?;
                self.preserve(range);
                writer.bitmaps.mark(range);
                let done = match request(Top::Qcow2(active)) {
                    Err(error) if error.is_no_space() => {
                        active.reclaim()?;
                        request(Top::Qcow2(active))
                    }
                    done => done,
                };
                done.map_err(|e| writer.note_corruption(image, e))?;
                // QEMU gives what is freed to the next request; here that is durable first.
                if writer.options.first_fit && image.mapping().unlinked() > 0 {
                    active.reclaim()?;
                }
                if writer.options.flush_each { active.flush_guest() } else { Ok(()) }
            }
        }
    }

    pub(crate) fn top(&self) -> Result<Top<'_>> {
        match (self.top_qcow2(), self.top_writable()) {
            (Some(image), _) => Ok(Top::Qcow2(Active { disk: self, image, writer: image.writer()? })),
            (_, Some(layer)) => Ok(Top::Layer(layer)),
            _ => Err(Error::new(ErrorKind::ReadOnly, "the image is open for reading only")),
        }
    }

    /// Checks that a request lies inside the disk.
    pub(super) fn guest_range(&self, offset: u64, length: u64) -> Result<Range<u64>> {
        let size = self.virtual_size();
        match offset.checked_add(length) {
            Some(end) if end <= size => Ok(offset..end),
            _ => {
                let message = format!("{length} bytes at {offset} reach beyond the disk of {size} bytes");
                Err(Error::new(ErrorKind::InvalidArgument, message))
            }
        }
    }

    /// The guest bytes of `range` before the write; what lies behind the end of the disk is zero, but for the state of a virtual machine.
    fn old_bytes(&self, range: Range<u64>, zero: bool) -> Result<Vec<u8>> {
        let mut bytes = vec![0u8; (range.end - range.start) as usize];
        let inside = self.virtual_size().clamp(range.start, range.end) - range.start;
        match self.top_qcow2().filter(|image| range.start >= image.state_start()) {
            _ if zero => {}
            Some(image) => image.read_own(MemMut::from(&mut bytes[..]), range.start)?,
            None => {
                if let Some(part) = bytes.get_mut(..inside as usize).filter(|part| !part.is_empty()) {
                    self.read_at(MemMut::from(part), range.start)?;
                }
            }
        }
        Ok(bytes)
    }

    /// Whether the run's clusters read as zeroes now, by their mapping.
    fn read_zero(&self, image: &Qcow2, run: &Run<'_>) -> Result<bool> {
        let mut deeper = false;
        for old in &run.old {
            match old {
                L2Mapping::Zero { .. } => {}
                L2Mapping::Unallocated => deeper = true,
                L2Mapping::Subclusters { bitmap, .. } if !bitmap.has_data() => {
                    deeper |= *bitmap != SubclusterBitmap::ALL_ZERO;
                }
                _ => return Ok(false),
            }
        }
        // No layer below has any of a state.
        if !deeper || self.layers().len() == 1 || run.guest >= image.state_start() {
            return Ok(true);
        }
        let end = run.guest + run.clusters * image.geometry().cluster_size();
        self.all_extents(run.guest..end, |extent| extent.zero)
    }
}

impl<'a> Active<'a> {
    /// Makes durable what lost its references, and frees it as soon as no request can reach it. The caller holds no host
    /// offset that it planned.
    fn reclaim(&self) -> Result<()> {
        let Self { writer, .. } = *self;
        self.flush_guest()?;
        for _ in 0..PATIENCE {
            if writer.with_alloc(|alloc, _| alloc.drain())? {
                break;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// Writes what no guest sees, behind the disk: no bitmap records it, and no clone has it. The caller holds the gate.
    pub(crate) fn write_unseen(&self, payload: Payload<'_>, range: Range<u64>) -> Result<()> {
        match self.write_range(payload, range.clone()) {
            Err(error) if error.is_no_space() => {
                self.reclaim()?;
                self.write_range(payload, range)?;
            }
            done => done?,
        }
        self.limit_dirty()?;
        if self.writer.options.flush_each { self.flush_guest() } else { Ok(()) }
    }

    /// Writes `payload` to `range`, step by step; steps whose places in the file follow each other share one call.
    pub(crate) fn write_range(&self, payload: Payload<'_>, range: Range<u64>) -> Result<()> {
        let Self { image, writer, .. } = *self;
        let mut batch = Batch::default();
        let steps = self.write_steps(payload, range, &mut batch);
        let written = steps.and_then(|()| writer.issue(image, &mut batch));
        if written.is_err() {
            writer.give_up(image, &mut batch);
        }
        written
    }

    fn write_steps(&self, mut payload: Payload<'a>, range: Range<u64>, batch: &mut Batch<'a>) -> Result<()> {
        let Self { image, writer, .. } = *self;
        let mut at = range.start;
        let mut loaded = Loaded::default();
        while at < range.end {
            // Held until the step's bytes are written: until then its host offsets stay out of other hands.
            let pin = image.pin();
            match writer.plan_write(image, at..range.end, &loaded)? {
                Step::InPlace { host, length, registration } => {
                    let (part, rest) = payload.split(length);
                    writer.check_overlap(image, host, length)?;
                    match part {
                        Payload::Bytes(mem) => {
                            let piece = Piece { guest: at, host, bytes: Bytes::Guest(mem) };
                            writer.add(image, batch, pin, vec![piece])?;
                            batch.registrations.extend(registration);
                        }
                        Payload::Zeroes => {
                            writer.issue(image, batch)?;
                            image.data_at(at, host)?.zero(host, length, false)?;
                        }
                    }
                    payload = rest;
                    at += length;
                }
                Step::Change(run) => {
                    let room = run.guest + run.clusters * image.geometry().cluster_size();
                    let range = at..range.end.min(room);
                    let written = self.write_run(run, payload, range, pin, batch)?;
                    payload = payload.split(written).1;
                    at += written;
                }
                Step::NeedsTable => {
                    writer.issue(image, batch)?;
                    writer.prepare_table(image, at)?;
                }
                // Nobody waits while registered: who is waited for may wait for this one.
                Step::Busy(clusters) => {
                    writer.issue(image, batch)?;
                    writer.inflight.wait(&clusters);
                }
                Step::Missing(missing) => loaded = image.load_slice(missing)?,
            }
        }
        Ok(())
    }

    /// Takes host clusters for the start of `range`, which lies in the run (or keeps the one that the entry has), and
    /// adds what is to be written to the batch. Returns how many bytes: fewer than asked where fewer contiguous
    /// clusters were had.
    fn write_run(
        &self,
        run: Run<'a>,
        payload: Payload<'a>,
        range: Range<u64>,
        pin: Option<Arc<()>>,
        batch: &mut Batch<'a>,
    ) -> Result<u64> {
        let Self { disk, image, writer } = *self;
        let g = *image.geometry();
        let was_zero = run.reuse.is_none() && disk.read_zero(image, &run)?;
        let target = writer.target(image, &run, !was_zero)?;
        let end = range.end.min(run.guest + target.count * g.cluster_size());
        let range = range.start..end;
        let length = end - range.start;
        let pieces = self.pieces(&run, target, was_zero, payload, range.clone());
        let added = pieces.and_then(|pieces| {
            writer.check_overlap(
                image,
                target.cluster * g.cluster_size(),
                target.count * g.cluster_size(),
            )?;
            writer.add(image, batch, pin, pieces)
        });
        // In the batch in any case: that is where it is given up.
        batch.runs.push_back(NewRun { run, target, was_zero, range });
        added.map(|()| length)
    }

    /// COW and data of one run, in the order of their places.
    fn pieces(
        &self,
        run: &Run<'_>,
        target: Allocation,
        was_zero: bool,
        payload: Payload<'a>,
        range: Range<u64>,
    ) -> Result<Vec<Piece<'a>>> {
        let Self { disk, image, .. } = *self;
        let g = *image.geometry();
        let piece = |guest: u64, bytes| {
            let host = target.cluster * g.cluster_size() + (guest - run.guest);
            Piece { guest, host, bytes }
        };
        let last = g.cluster_start(range.end - 1);
        let mut pieces: Vec<Piece<'a>> = Vec::new();
        for cluster in [run.guest, last].into_iter().take(if last == run.guest { 1 } else { 2 }) {
            let within =
                range.start.max(cluster) - cluster..range.end.min(cluster + g.cluster_size()) - cluster;
            let old = run.old.get(((cluster - run.guest) / g.cluster_size()) as usize);
            let cow = plan_cow(&g, old.unwrap_or(&L2Mapping::Unallocated), within, run.reuse.is_some());
            for copy in cow.copy {
                let copy = cluster + copy.start..cluster + copy.end;
                let bytes = disk.old_bytes(copy.clone(), was_zero)?;
                if !(target.guest_zero(image) && is_zero(&bytes)) {
                    pieces.push(piece(copy.start, Bytes::Owned(bytes)));
                }
            }
        }
        match payload {
            Payload::Bytes(mem) => {
                let part = mem.split_at((range.end - range.start) as usize).0;
                pieces.push(piece(range.start, Bytes::Guest(part)));
            }
            Payload::Zeroes if target.guest_zero(image) => {}
            Payload::Zeroes => {
                let zeroes = vec![0; (range.end - range.start) as usize];
                pieces.push(piece(range.start, Bytes::Owned(zeroes)));
            }
        }
        pieces.sort_by_key(|piece| piece.host);
        Ok(pieces)
    }
}

impl Writer {
    /// Host clusters for the start of a run.
    fn target(&self, image: &Qcow2, run: &Run<'_>, covered: bool) -> Result<Allocation> {
        let g = image.geometry();
        let kept = |host: u64, count| Allocation {
            cluster: g.cluster_index(host),
            count,
            host_zero: false,
            durable: true,
        };
        if let Some(host) = run.reuse {
            return Ok(kept(host.0, 1));
        }
        if image.header().has_data_file() {
            // In an external data file, host offsets are guest offsets.
            return Ok(kept(run.guest, run.clusters));
        }
        // Where zeroes in the file are none to the guest, all is written.
        let covered = covered || !image.host_is_guest();
        let mut alloc = self.alloc.lock();
        let allocation = alloc.allocate(run.clusters, covered, run.wish, &mut self.metadata.lock());
        allocation.map_err(|e| self.poison_unless_full(e))
    }
}
