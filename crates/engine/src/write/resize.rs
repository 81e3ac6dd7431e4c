//! Growing the virtual disk.

use qcow2_format::limits::MAX_L1_BYTES;

use super::request::{Payload, Top};
use super::writer::Writer;
use crate::image::{Image, Layer, Qcow2};
use crate::{Error, ErrorKind, Mem, Result, StorageExt};

impl Image {
    /// Grows the disk to `size` bytes; the new part reads as zeroes, also where a backing file is longer.
    ///
    /// # Errors
    /// `InvalidArgument` unless `size` is a multiple of 512; `DataLoss` for a smaller size; `Limit` where the format
    /// ends; else as [`Image::write_at`].
    pub fn resize(&self, size: u64) -> Result<()> {
        let old = self.virtual_size();
        if !size.is_multiple_of(512) {
            let message = format!("the size {size} is not a multiple of 512 bytes");
            return Err(Error::new(ErrorKind::InvalidArgument, message));
        }
        if size < old {
            let message = format!("shrinking from {old} to {size} bytes would lose data");
            return Err(Error::new(ErrorKind::DataLoss, message));
        }
        match self.top()? {
            Top::Raw(raw) => raw.resize(size),
            Top::Qcow2(image, writer) => {
                let _alone = writer.gate.write();
                writer.begin(image)?;
                self.grow(image, writer, old, size)
            }
        }
    }

    fn grow(&self, image: &Qcow2, writer: &Writer, old: u64, size: u64) -> Result<()> {
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
        if writer.bitmaps.load(image, true)? {
            image.storage().flush().map_err(|e| writer.poison(e))?;
        }
        if entries > image.mapping.read().l1.len() as u64 {
            // What refers to the old table must be in the file before it is copied.
            self.flush_metadata(image, writer)?;
            writer.grow_l1(image, entries)?;
        }
        self.zero_behind(image, writer, old, size)?;
        if image.header().data_file_raw() {
            let data = image.data_storage()?;
            if data.size()? < size {
                data.resize(size)?;
            }
        }
        self.flush_metadata(image, writer)?;
        writer.write_size(image, size)?;
        image.storage().flush().map_err(|e| writer.poison(e))?;
        image.set_virtual_size(size);
        writer.bitmaps.resize(size, image.limits().max_memory)
    }

    /// Makes sure that the bytes behind the old end read as zeroes once they are inside: the rest of the last cluster
    /// may hold anything, and a longer backing file would show through.
    fn zero_behind(&self, image: &Qcow2, writer: &Writer, old: u64, size: u64) -> Result<()> {
        let g = image.geometry();
        let cluster_end = old.next_multiple_of(g.cluster_size());
        let backing = self.layers().get(1).map_or(0, Layer::virtual_size);
        let mut segments = Vec::new();
        let head = old..cluster_end.min(size);
        if !head.is_empty() {
            image.plan_read(head.clone(), &mut segments)?;
            let stored =
                segments.iter().any(|s| !matches!(s.kind, crate::image::SegmentKind::Unallocated { .. }));
            if stored || backing > old {
                self.write_range(image, writer, Payload::Zeroes, head)?;
            }
        }
        let end = backing.min(size);
        if end > cluster_end {
            let end = end.next_multiple_of(g.cluster_size()).min(size.next_multiple_of(g.cluster_size()));
            self.zero_range(image, writer, cluster_end..end, false)?;
        }
        Ok(())
    }
}

impl Writer {
    /// Moves the L1 table to where it has room for `entries`. One header write switches over.
    fn grow_l1(&self, image: &Qcow2, entries: u64) -> Result<()> {
        let g = *image.geometry();
        let storage = image.storage();
        let clusters = g.clusters_for(entries * 8);
        let (cluster, refcounts) = {
            let mut alloc = self.alloc.lock();
            let cluster = alloc.allocate_contiguous(clusters, &mut self.metadata.lock());
            let cluster = cluster.map_err(|e| self.poison_unless_full(e))?;
            (cluster, alloc.refcounts.take_dirty())
        };
        let offset = cluster * g.cluster_size();
        let mut l1 = image.mapping.read().l1.clone();
        let (old_entries, old_offset) = (l1.len() as u64, self.l1_offset());
        l1.resize(entries as usize, 0);
        let mut bytes: Vec<u8> = l1.iter().flat_map(|e| e.to_be_bytes()).collect();
        bytes.resize((clusters * g.cluster_size()) as usize, 0);
        let write = || -> Result<()> {
            for (at, bytes) in &refcounts {
                storage.write_all_at(Mem::from(bytes.as_slice()), *at)?;
            }
            storage.write_all_at(Mem::from(bytes.as_slice()), offset)?;
            storage.flush()?;
            // At most 4 Mi entries: the limit was checked.
            self.write_l1_place(image, entries as u32, offset)?;
            storage.flush()
        };
        write().map_err(|e| self.poison(e))?;
        self.metadata.lock().set_l1(&g, offset, entries);
        self.set_l1_offset(offset);
        image.mapping.write().l1 = l1;
        let mut alloc = self.alloc.lock();
        for cluster in 0..g.clusters_for(old_entries * 8) {
            alloc.drop_reference(g.cluster_index(old_offset) + cluster).map_err(|e| self.poison(e))?;
        }
        Ok(())
    }
}
