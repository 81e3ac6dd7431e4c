//! Growing the virtual disk, and the rules of resizing it. Shrinking is in `shrink.rs`.

use std::ops::{ControlFlow, Range};

use qcow2_format::bitmap::BitmapFlags;
use qcow2_format::limits::MAX_L1_BYTES;
use qcow2_format::{L2Mapping, words};

use super::session::Session;
use crate::alloc::Allocation;
use crate::create::Preallocation;
use crate::image::{Image, Qcow2, SegmentKind};
use crate::walk::{Steps, for_each_extent};
use crate::write::{Active, Payload, Top};
use crate::writer::Writer;
use crate::{Error, ErrorKind, Job, Mem, Result, StorageExt};

/// How many extents are looked at together.
const STEPS: Steps = Steps::of(u64::MAX, 4096);

/// How to resize a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ResizeOptions {
    /// A smaller size is meant: what lies behind the new end is lost.
    pub shrink: bool,
    /// What the new part of the disk has from the start.
    pub preallocation: Preallocation,
}

impl Image {
    /// Grows the disk to `size` bytes; the new part reads as zeroes, also where a backing file is longer.
    ///
    /// # Errors
    /// As [`Image::resize_with`].
    pub fn resize(&self, size: u64) -> Result<()> {
        self.resize_with(size, ResizeOptions::default())
    }

    /// Gives the disk `size` bytes, durably. A new part reads as zeroes, also where a backing file is longer; what lies
    /// behind a smaller size is lost, and its clusters are freed. Snapshots keep their own size. After a crash the disk
    /// has the old size or the new one, with leaked clusters at worst.
    ///
    /// # Errors
    /// `InvalidArgument` unless `size` is a multiple of 512, for a preallocation where nothing grows, for a device that is not as
    /// long, and for a data file on a device that is shorter; `DataLoss` for a
    /// smaller size without `shrink`, saying how much is stored behind it; `UnsupportedFeature` for a version 2
    /// image with snapshots, which do not know their size, and for no bytes where there are bitmaps; `Corrupt` for
    /// an inconsistent bitmap, which cannot be resized; `Limit` where the format ends; else as [`Image::write_at`].
    pub fn resize_with(&self, size: u64, options: ResizeOptions) -> Result<()> {
        self.resize_as(&Job::new(), size, options)
    }

    /// As [`Image::resize_with`]. Cancelled while it preallocates, or while it looks at what a smaller size would lose, the
    /// disk has its old size.
    ///
    /// # Errors
    /// As [`Image::resize_with`], and `Aborted`.
    pub fn resize_as(&self, job: &Job, size: u64, options: ResizeOptions) -> Result<()> {
        if !size.is_multiple_of(512) {
            let message = format!("the size {size} is not a multiple of 512 bytes");
            return Err(Error::new(ErrorKind::InvalidArgument, message).with_field("size"));
        }
        match self.top()? {
            Top::Layer(layer) => {
                let _alone = self.clones.layer_gate.write();
                self.judge_size(size, options, job)?;
                self.preserve(&(size..self.virtual_size()));
                layer.resize(size, options.preallocation, job)
            }
            Top::Qcow2(active) => {
                // Once before anything is touched, once when nobody else changes it.
                self.judge_size(size, options, job)?;
                refuse_resize(active, size)?;
                let session = Session::begin_as(self, job)?;
                self.judge_size(size, options, job)?;
                refuse_resize(active, size)?;
                let old = self.virtual_size();
                if size < old {
                    self.preserve(&(size..old));
                    session.shrink(size)?;
                    active.writer.give_back(active.image)
                } else {
                    active.grow(old..size, options.preallocation, job)
                }
            }
        }
    }

    /// Refuses what the options do not allow.
    fn judge_size(&self, size: u64, options: ResizeOptions, job: &Job) -> Result<()> {
        let old = self.virtual_size();
        if size <= old && options.preallocation != Preallocation::Off {
            let message = format!(
                "preallocation is for the new part of a disk that grows: it has {old} bytes, not {size}"
            );
            return Err(Error::new(ErrorKind::InvalidArgument, message).with_field("preallocation"));
        }
        if size >= old || options.shrink {
            return Ok(());
        }
        let lost = self.stored_behind(size, job)?;
        let message = format!(
            "shrinking from {old} to {size} bytes would lose {lost} bytes of data: set shrink if that is meant"
        );
        Err(Error::new(ErrorKind::DataLoss, message).with_field("size"))
    }

    /// Guest bytes from `size` on that are stored, here or in a backing file.
    fn stored_behind(&self, size: u64, job: &Job) -> Result<u64> {
        let mut stored = 0;
        for_each_extent(self, size..self.virtual_size(), STEPS, job, |extent| {
            stored += if extent.zero { 0 } else { extent.length };
            Ok(ControlFlow::Continue(()))
        })?;
        Ok(stored)
    }
}

impl<'a> Active<'a> {
    fn grow(&self, new: Range<u64>, mode: Preallocation, job: &Job) -> Result<()> {
        let Self { image, writer, .. } = *self;
        let Range { start: old, end: size } = new;
        if size == old {
            return Ok(());
        }
        let g = *image.geometry();
        let entries = g.l1_entries_for(size);
        if entries * 8 > MAX_L1_BYTES || size > image.limits().max_virtual_size {
            let message = format!(
                "a disk of {size} bytes exceeds the limit for clusters of {} bytes",
                g.cluster_size()
            );
            return Err(image.error(ErrorKind::Limit, message).with_field("size"));
        }
        if writer.load_bitmaps(image, true)? {
            image.storage().flush().map_err(|e| writer.poison(e))?;
        }
        // Later, it would be too late to refuse: what is written there must be recorded.
        writer.bitmaps.check_size(size, image.limits().max_memory)?;
        self.drop_behind(old)?;
        if entries > image.mapping().l1().len() as u64 {
            // What refers to the old table must be in the file before it is copied.
            self.flush_metadata()?;
            writer.grow_l1(image, entries)?;
        }
        self.zero_behind(old..size, mode != Preallocation::Off)?;
        self.grow_data_file(old..size)?;
        let preallocated =
            self.preallocate_tail(old, mode, job).and_then(|()| self.preallocate(old..size, mode, job));
        if let Err(error) = preallocated {
            // Nothing may be mapped behind the end that stays.
            self.drop_behind(old)?;
            return Err(error);
        }
        self.flush_metadata()?;
        writer.write_size(image, size)?;
        image.storage().flush().map_err(|e| writer.poison(e))?;
        image.set_virtual_size(size);
        writer.bitmaps.resize(size, image.limits().max_memory)
    }

    /// Gives up what is mapped behind the end: the state of a virtual machine that a snapshot brought, or what another
    /// program left. It must not become part of the disk.
    fn drop_behind(&self, end: u64) -> Result<()> {
        let Self { image, .. } = *self;
        let g = image.geometry();
        let mapped = (image.mapping().l1().len() as u64).saturating_mul(g.l2_coverage());
        let Some(start) = end.checked_next_multiple_of(g.cluster_size()).filter(|start| *start < mapped)
        else {
            return Ok(());
        };
        self.change_range(start..mapped, !image.header().has_data_file(), &|_, old| {
            (*old != L2Mapping::Unallocated).then_some(L2Mapping::Unallocated)
        })
    }

    /// Extends an external data file that is a raw image by itself: nothing of it may show up behind the old end.
    fn grow_data_file(&self, new: Range<u64>) -> Result<()> {
        let Self { image, .. } = *self;
        if !image.header().data_file_raw() {
            return Ok(());
        }
        // Without a door: there is none to a raw data file.
        let data = image.data_host()?;
        let length = data.size()?;
        if length > new.start {
            data.zero(new.start, length.min(new.end) - new.start, true)?;
        }
        if length < new.end { data.resize(new.end) } else { Ok(()) }
    }

    /// Makes sure that the bytes behind the old end read as zeroes once they are inside: the rest of the last cluster
    /// may hold anything, and a longer backing file would show through. With `allocate`, it is stored in any case: it is
    /// part of what is preallocated.
    fn zero_behind(&self, new: Range<u64>, allocate: bool) -> Result<()> {
        let Self { disk, image, .. } = *self;
        let Range { start: old, end: size } = new;
        let g = image.geometry();
        let cluster_end = old.next_multiple_of(g.cluster_size());
        let backing = disk.layers().get(1).map_or(0, |below| below.virtual_size());
        let mut segments = Vec::new();
        let head = old..cluster_end.min(size);
        if !head.is_empty() {
            image.plan_read(head.clone(), &mut segments)?;
            let stored = segments.iter().any(|s| !matches!(s.kind, SegmentKind::Unallocated(_)));
            if stored || backing > old || allocate {
                self.write_range(Payload::Zeroes, head)?;
            }
        }
        let end = backing.min(size);
        if end > cluster_end {
            let end = end.next_multiple_of(g.cluster_size()).min(size.next_multiple_of(g.cluster_size()));
            self.zero_range(cluster_end..end, false)?;
        }
        Ok(())
    }
}

impl Writer {
    /// Moves the L1 table to where it has room for `entries`. One header write switches over.
    pub(super) fn grow_l1(&self, image: &Qcow2, entries: u64) -> Result<()> {
        let g = *image.geometry();
        let clusters = g.clusters_for(entries * 8);
        let mut l1 = image.l1();
        l1.resize(entries as usize, 0);
        let cluster = self.write_beside(image, clusters, &l1).map_err(|e| self.poison_unless_full(e))?;
        let offset = cluster * g.cluster_size();
        // At most 4 Mi entries: the limit was checked.
        let switched =
            self.write_l1_place(image, entries as u32, offset).and_then(|()| image.storage().flush());
        switched.map_err(|e| self.poison(e))?;
        self.metadata.lock().set_l1(&g, offset, entries);
        let (old, old_offset) = (image.changing().replace_l1(l1), self.l1_offset());
        self.set_l1_offset(offset);
        let mut alloc = self.alloc.lock();
        for cluster in 0..g.clusters_for(old.len() as u64 * 8) {
            alloc.drop_reference(g.cluster_index(old_offset) + cluster).map_err(|e| self.poison(e))?;
        }
        Ok(())
    }

    /// Writes an L1 table to `clusters` clusters of its own, durably with their refcounts; returns the first. An error gives
    /// them back.
    fn write_beside(&self, image: &Qcow2, clusters: u64, l1: &[u64]) -> Result<u64> {
        let size = image.geometry().cluster_size();
        let cluster = self.alloc.lock().allocate_contiguous(clusters, &mut self.metadata.lock())?;
        let mut bytes = words::encode(l1);
        bytes.resize((clusters * size) as usize, 0);
        let storage = image.storage();
        storage
            .write_all_at(Mem::from(bytes.as_slice()), cluster * size)
            .and_then(|()| self.alloc.lock().refcounts.write_dirty())
            .and_then(|()| storage.flush())
            .inspect_err(|_| {
                self.alloc.lock().abandon(Allocation {
                    cluster,
                    count: clusters,
                    durable: false,
                    host_zero: false,
                });
            })?;
        Ok(cluster)
    }
}

/// Refuses what QEMU refuses, too: what belongs to the disk and cannot follow its size.
fn refuse_resize(Active { image, writer, .. }: Active<'_>, size: u64) -> Result<()> {
    if image.header().version < 3 && !image.snapshots().is_empty() {
        let message = "a version 2 image with snapshots cannot be resized: they do not say their size";
        return Err(image.error(ErrorKind::UnsupportedFeature, message));
    }
    image.refuse_empty_disk(size)?;
    if image.header().has_data_file() {
        let data = image.data_host()?;
        let room = data.size()?;
        if data.traits().block_device && size > image.virtual_size() && size > room {
            let message = format!(
                "the data file is a device of {room} bytes, which cannot hold a disk of {size}: extend the device first"
            );
            return Err(data.located(Error::new(ErrorKind::InvalidArgument, message).with_field("size")));
        }
    }
    for record in image.bitmaps()? {
        let entry = &record.entry;
        if entry.flags.contains(BitmapFlags::IN_USE) && !writer.bitmaps.tracks(&entry.name) {
            let name = String::from_utf8_lossy(&entry.name);
            let message =
                format!("the bitmap '{name}' is inconsistent: remove it before the disk is resized");
            return Err(image.error(ErrorKind::Corrupt, message));
        }
    }
    Ok(())
}
