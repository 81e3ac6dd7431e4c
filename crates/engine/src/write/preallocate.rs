//! Clusters for the new part of a disk that grows, before anything is written there.

use std::ops::Range;

use qcow2_format::{HostOffset, L2Mapping, SubclusterBitmap};

use super::active::Active;
use super::link::Change;
use crate::alloc::{Allocation, Wish};
use crate::create::{Preallocation, write_zero_bytes};
use crate::image::{Qcow2, SegmentKind};
use crate::{Job, Result, StorageExt};

impl<'a> Active<'a> {
    /// Gives every cluster that `new`, behind the disk's end, touches first a host cluster that reads as zeroes.
    pub(crate) fn preallocate(&self, new: Range<u64>, mode: Preallocation, job: &Job) -> Result<()> {
        let Self { disk, image, writer } = *self;
        let g = *image.geometry();
        let raw_data = image.header().data_file_raw();
        // Readers of a raw data file's image must see what readers of the raw file see.
        let mode = if mode == Preallocation::Off && raw_data { Preallocation::Metadata } else { mode };
        if mode == Preallocation::Off {
            return Ok(());
        }
        let backing = disk.layers().get(1).map_or(0, |below| below.virtual_size());
        // Zero bytes of the file are none to the guest behind a door: there, a flag says that it reads zeroes.
        let flagged = !image.host_is_guest() && image.header().version >= 3 && mode != Preallocation::Full;
        let bitmap = match raw_data || backing > new.start {
            true if flagged => SubclusterBitmap::ALL_ZERO,
            true => SubclusterBitmap::ALL_DATA,
            false => SubclusterBitmap::default(),
        };
        let mapped = |host: u64| match (HostOffset(host), g.extended_l2()) {
            (host, true) => L2Mapping::Subclusters { host: Some(host), copied: true, bitmap },
            (host, false) if flagged => L2Mapping::Zero { host: Some(host), copied: true },
            (host, false) => L2Mapping::Data { host, copied: true },
        };
        let end = new.end.next_multiple_of(g.cluster_size());
        let mut at = new.start.next_multiple_of(g.cluster_size());
        while at < end {
            job.checkpoint()?;
            // One slice of one table at a time.
            let slice = image.slices().entries() * g.cluster_size();
            let wanted = (slice - at % slice).min(end - at) / g.cluster_size();
            writer.prepare_table(image, at)?;
            let wanted = at..at + wanted * g.cluster_size();
            let space = self.space(wanted, (mode, flagged), job)?;
            let barrier = !(space.guest_zero(image) && space.durable);
            let change = Change { guest: at, clusters: space.count, barrier, punch: false };
            let host = space.cluster * g.cluster_size();
            writer.link(image, change, |n, _| Some(mapped(host + n * g.cluster_size())))?;
            at += space.count * g.cluster_size();
            self.limit_dirty()?;
        }
        Ok(())
    }

    /// Gives the rest of the cluster in which the disk ended before its space as `mode` says: it is part of what is
    /// preallocated. The cluster is allocated, the image's own, and reads as zeroes behind `old`.
    pub(crate) fn preallocate_tail(&self, old: u64, mode: Preallocation, job: &Job) -> Result<()> {
        let Self { image, .. } = *self;
        let size = image.geometry().cluster_size();
        if old.is_multiple_of(size) || !matches!(mode, Preallocation::Falloc | Preallocation::Full) {
            return Ok(());
        }
        let mut segments = Vec::new();
        image.plan_read(old..old + 1, &mut segments)?;
        let tail = segments.iter().find_map(|segment| match segment.kind {
            SegmentKind::Data(place) => Some(place.host),
            _ => None,
        });
        let Some(host) = tail else { return Ok(()) };
        let start = host - old % size;
        image.data_host()?.reserve(start, size)?;
        if mode == Preallocation::Full {
            write_zero_bytes(&**image.data_at(old, host)?, host, start + size - host, job)?;
        }
        Ok(())
    }

    /// Clusters for the start of `guest`, with their space reserved as `mode` says. They read as zeroes, unless a flag says
    /// that the guest does.
    fn space(
        &self,
        guest: Range<u64>,
        (mode, flagged): (Preallocation, bool),
        job: &Job,
    ) -> Result<Allocation> {
        let Self { image, writer, .. } = *self;
        let g = *image.geometry();
        let (guest, count) = (guest.start, (guest.end - guest.start) / g.cluster_size());
        let external = image.header().has_data_file();
        let mut space = if external {
            let host_zero = image.data_host()?.size()? <= guest || image.header().data_file_raw();
            Allocation { cluster: g.cluster_index(guest), count, host_zero, durable: true }
        } else {
            let mut alloc = writer.alloc.lock();
            let wish = Wish { sparse: true, ..Wish::default() };
            let allocated = alloc.allocate(count, false, wish, &mut writer.metadata.lock());
            allocated.map_err(|e| writer.poison_unless_full(e))?
        };
        let prepared = prepare(image, guest, &space, (mode, flagged), job);
        if prepared.is_err() && !external {
            writer.alloc.lock().abandon(space);
        }
        prepared?;
        // What was written or reserved must be there before the link, as zeroes must be.
        space.host_zero &= mode == Preallocation::Metadata;
        Ok(space)
    }
}

/// Makes the clusters of `guest`, and behind it, read as zeroes unless that is `flagged`, with their space reserved as `mode` says.
fn prepare(
    image: &Qcow2,
    guest: u64,
    space: &Allocation,
    (mode, flagged): (Preallocation, bool),
    job: &Job,
) -> Result<()> {
    let size = image.geometry().cluster_size();
    let (start, length) = (space.cluster * size, space.count * size);
    let (data, host) = (image.data_at(guest, start)?, image.data_host()?);
    if mode == Preallocation::Full || !(flagged || image.host_is_guest()) {
        return write_zero_bytes(&**data, start, length, job);
    }
    if !(flagged || space.host_zero) {
        data.zero(start, length, true)?;
    }
    match mode {
        Preallocation::Falloc => host.reserve(start, length),
        // A mapped cluster lies inside the file.
        _ if host.size()? < start + length => host.resize(start + length),
        _ => Ok(()),
    }
}
