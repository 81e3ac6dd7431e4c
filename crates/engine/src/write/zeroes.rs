//! Writing zeroes and discarding: changes of mappings, with data only at unaligned edges.

use std::cell::{Cell, RefCell};
use std::ops::{ControlFlow, Range};

use qcow2_format::{Geometry, L1Entry, L2Mapping, SubclusterBitmap, SubclusterKind};

use super::active::Active;
use super::cluster::Step;
use super::link::Change;
use super::request::{Payload, Top};
use crate::image::{Image, Qcow2};
use crate::walk::{Steps, for_each_extent};
use crate::{Discard, ErrorKind, Extent, ExtentKind, Job, MemMut, Result, StorageExt};

/// How many extents are looked at together.
const STEPS: Steps = Steps::of(u64::MAX, 256);

impl Image {
    /// Makes the guest bytes read as zeroes. `unmap` gives up their clusters; else allocated clusters stay allocated.
    ///
    /// # Errors
    /// As [`Image::write_at`].
    pub fn write_zeroes(&self, offset: u64, length: u64, unmap: bool) -> Result<()> {
        let range = self.guest_range(offset, length)?;
        if range.is_empty() {
            return Ok(());
        }
        self.guest_request(&range.clone(), |top| match top {
            Top::Layer(layer) => {
                let old = |buf: MemMut<'_>, offset| self.read_at(buf, offset);
                layer.zero_over(offset, length, unmap, &old)
            }
            Top::Qcow2(active) => {
                active.zero_range(range.clone(), unmap)?;
                active.limit_dirty()
            }
        })
    }

    /// Gives up the contents of the guest bytes. With `Discard::Unmap`, whole clusters read as zeroes afterwards and
    /// their space is freed; parts of clusters stay as they are. With `Discard::Ignore` nothing happens.
    ///
    /// # Errors
    /// As [`Image::write_at`].
    pub fn discard(&self, offset: u64, length: u64) -> Result<()> {
        let range = self.guest_range(offset, length)?;
        // What does nothing marks nothing either.
        match self.top()? {
            Top::Layer(layer) if layer.disk_options().discard == Discard::Ignore => return Ok(()),
            Top::Qcow2(active) if active.writer.options.discard == Discard::Ignore => {
                return active.writer.check();
            }
            _ => {}
        }
        self.guest_request(&range.clone(), |top| match top {
            Top::Layer(layer) => layer.discard(offset, length),
            Top::Qcow2(active) => {
                active.discard_range(range.clone())?;
                active.limit_dirty()
            }
        })
    }

    fn is_known_zero(&self, range: Range<u64>) -> Result<bool> {
        self.all_extents(range, |extent| extent.zero && extent.kind != ExtentKind::Data)
    }

    /// Whether all extents of a range are so; looks at few at a time, and no further than the first that is not.
    pub(super) fn all_extents(&self, range: Range<u64>, so: impl Fn(&Extent) -> bool) -> Result<bool> {
        let range = range.start..range.end.min(self.virtual_size());
        let mut all = true;
        for_each_extent(self, range, STEPS, &Job::new(), |extent| {
            all = so(extent);
            Ok(if all { ControlFlow::Continue(()) } else { ControlFlow::Break(()) })
        })?;
        Ok(all)
    }
}

impl<'a> Active<'a> {
    pub(crate) fn zero_range(&self, range: Range<u64>, unmap: bool) -> Result<()> {
        let Self { disk, image, .. } = *self;
        let g = *image.geometry();
        let raw_data = image.header().data_file_raw();
        if image.header().version < 3 {
            // No zero flag: where no backing file can show through, clusters can be given up; else zeroes are data.
            if !(unmap && disk.layers().len() == 1) {
                return self.write_range(Payload::Zeroes, range);
            }
            let whole = whole_clusters(&g, &range, disk.virtual_size());
            for edge in edges(&range, &whole, g.cluster_size()) {
                if !disk.is_known_zero(edge.clone())? {
                    self.write_range(Payload::Zeroes, edge)?;
                }
            }
            return self.change_range(whole, true, &|_, old| give_up(&g, old, 2, false));
        }
        let unit = g.subcluster_size();
        let whole = whole_units(unit, &range, disk.virtual_size());
        let keep = raw_data || !unmap;
        for edge in edges(&range, &whole, unit) {
            if !self.zero_unit(&edge, unmap, keep)? {
                self.write_range(Payload::Zeroes, edge)?;
            }
        }
        // Compressed clusters have no subclusters: a part of one must be written as data.
        let parts = RefCell::new(Vec::new());
        self.change_range(whole.clone(), unmap, &|cluster, old| {
            let part = whole.start.max(cluster)..whole.end.min(cluster + g.cluster_size());
            let within = part.start - cluster..part.end - cluster;
            if matches!(old, L2Mapping::Compressed(_)) && within != (0..g.cluster_size()) {
                parts.borrow_mut().push(part);
                return None;
            }
            Some(zeroed(&g, old, &within, !keep))
        })?;
        let parts = parts.into_inner();
        parts.into_iter().try_for_each(|part| self.write_range(Payload::Zeroes, part))
    }

    fn discard_range(&self, range: Range<u64>) -> Result<()> {
        let Self { disk, image, .. } = *self;
        let g = *image.geometry();
        let header = image.header();
        let has_backing = disk.layers().len() > 1;
        if header.version < 3 && has_backing {
            // Without a zero flag, giving clusters up would show the backing file's old bytes.
            return Ok(());
        }
        let whole = whole_clusters(&g, &range, disk.virtual_size());
        if whole.is_empty() {
            return Ok(());
        }
        if header.data_file_raw() {
            return self.zero_range(whole.start..whole.end.min(disk.virtual_size()), true);
        }
        let version = header.version;
        self.change_range(whole, true, &|_, old| give_up(&g, old, version, has_backing))
    }

    /// Maps the unit (a cluster, or a subcluster) of which `edge` is a part as zero, where the rest of it reads as zeroes
    /// and this layer has no data there. Returns whether it did.
    fn zero_unit(&self, edge: &Range<u64>, unmap: bool, keep: bool) -> Result<bool> {
        let Self { disk, image, .. } = *self;
        let g = *image.geometry();
        let unit = g.subcluster_size();
        let start = edge.start - edge.start % unit;
        let end = start + unit;
        for rest in [start..edge.start, edge.end..end.min(disk.virtual_size())] {
            if !rest.is_empty() && !disk.all_extents(rest, |extent| extent.zero)? {
                return Ok(false);
            }
        }
        let zero = Cell::new(false);
        // A request may have written to the rest since, and has its data here then. Nothing gives up a zero in favour of
        // what is below. Only the edge is given: a raw data file may have that data, too.
        self.change_range(edge.clone(), unmap, &|cluster, old| {
            let within = start - cluster..end - cluster;
            zero.set(has_no_data(old, (within.start / unit) as u32));
            zero.get().then(|| zeroed(&g, old, &within, !keep))
        })?;
        Ok(zero.get())
    }

    /// Replaces the mappings of the clusters that `range` touches, slice by slice. `replace` gets the guest offset of
    /// the cluster. `punch`: the clusters' space is given up. A raw data file becomes zeroes there.
    pub(crate) fn change_range(
        &self,
        range: Range<u64>,
        punch: bool,
        replace: &dyn Fn(u64, &L2Mapping) -> Option<L2Mapping>,
    ) -> Result<()> {
        let Self { disk, image, writer } = *self;
        let g = *image.geometry();
        let raw_data = image.header().data_file_raw();
        let mut at = g.cluster_start(range.start);
        while at < range.end {
            if replace(at, &L2Mapping::Unallocated).is_none_or(|new| new == L2Mapping::Unallocated)
                && let Some(next) = unmapped_until(image, at)?
            {
                at = next;
                continue;
            }
            match writer.plan_change(image, at..range.end)? {
                Step::Change(run) => {
                    let clusters = run.clusters;
                    let pinned = run.guest;
                    if image.host_is_guest() && (raw_data || punch && image.header().has_data_file()) {
                        // Host offsets are guest offsets there: the space must be freed before a later write, and a
                        // raw data file reads as zeroes before the table says so. Behind a door, a hole would not be
                        // zeroes to a read that planned before: the space stays until the image is compacted.
                        // A part of a cluster stays when subclusters are given up.
                        let start = pinned.max(range.start);
                        let end =
                            (pinned + clusters * g.cluster_size()).min(range.end).min(disk.virtual_size());
                        if start < end {
                            image.data_at(start, start)?.zero(start, end - start, punch)?;
                        }
                    }
                    let change = Change { guest: pinned, clusters, barrier: false, punch };
                    writer.link(image, change, |n, old| replace(pinned + n * g.cluster_size(), old))?;
                    at = pinned + clusters * g.cluster_size();
                    drop(run.registration);
                    // A range can need more tables than may wait in memory.
                    self.limit_dirty()?;
                }
                Step::Busy(clusters) => writer.inflight.wait(&clusters),
                Step::NeedsTable => writer.prepare_table(image, at)?,
                Step::InPlace { .. } | Step::Missing(_) => {
                    return Err(image.error(ErrorKind::Internal, "a change of mappings planned I/O"));
                }
            }
        }
        Ok(())
    }
}

/// The end of the L2 table's range if `at` has no L2 table.
fn unmapped_until(image: &Qcow2, at: u64) -> Result<Option<u64>> {
    let g = image.geometry();
    let mapping = image.mapping();
    let entry = L1Entry(mapping.l1().get((at / g.l2_coverage()) as usize).copied().unwrap_or(0));
    let table = entry.table(g).map_err(|e| image.corrupt_entry(e, at))?;
    Ok(table.is_none().then(|| (at - at % g.l2_coverage()).saturating_add(g.l2_coverage())))
}

/// The units that `range` covers wholly; one that the end of the disk cuts counts as whole when the range ends there.
fn whole_units(unit: u64, range: &Range<u64>, disk: u64) -> Range<u64> {
    let start = range.start.next_multiple_of(unit);
    let end = if range.end == disk { disk.next_multiple_of(unit) } else { range.end - range.end % unit };
    start..end.max(start)
}

fn whole_clusters(g: &Geometry, range: &Range<u64>, disk: u64) -> Range<u64> {
    whole_units(g.cluster_size(), range, disk)
}

/// What `range` has outside `whole`, its whole units: at most a part of two.
fn edges(range: &Range<u64>, whole: &Range<u64>, unit: u64) -> impl Iterator<Item = Range<u64>> {
    let middle = if whole.is_empty() {
        let boundary = range.start.next_multiple_of(unit).clamp(range.start, range.end);
        boundary..boundary
    } else {
        whole.clone()
    };
    [range.start..middle.start, middle.end.min(range.end)..range.end]
        .into_iter()
        .filter(|edge| !edge.is_empty())
}

/// Whether a subcluster (or the cluster, where there are none) has no data of this layer's.
fn has_no_data(mapping: &L2Mapping, subcluster: u32) -> bool {
    match mapping {
        L2Mapping::Unallocated | L2Mapping::Zero { .. } => true,
        L2Mapping::Subclusters { bitmap, .. } => bitmap.kind(subcluster) != SubclusterKind::Data,
        L2Mapping::Data { .. } | L2Mapping::Compressed(_) => false,
    }
}

/// The mapping whose bytes `within` (whole subclusters) read as zeroes.
fn zeroed(g: &Geometry, old: &L2Mapping, within: &Range<u64>, unmap: bool) -> L2Mapping {
    let whole = *within == (0..g.cluster_size());
    let (host, copied) = match *old {
        L2Mapping::Data { host, copied } => (Some(host), copied),
        L2Mapping::Zero { host, copied } | L2Mapping::Subclusters { host, copied, .. } => (host, copied),
        L2Mapping::Unallocated | L2Mapping::Compressed(_) => (None, false),
    };
    // A shared cluster is not kept as a preallocation: the first write would copy it anyway.
    let host = host.filter(|_| copied && !(unmap && whole));
    let copied = copied && host.is_some();
    if !g.extended_l2() {
        return L2Mapping::Zero { host, copied };
    }
    if whole {
        return L2Mapping::Subclusters { host, copied, bitmap: SubclusterBitmap::ALL_ZERO };
    }
    match *old {
        L2Mapping::Subclusters { host, copied, bitmap } => {
            let unit = g.subcluster_size();
            let bitmap = bitmap.with_zero((within.start / unit) as u32, (within.end / unit) as u32);
            L2Mapping::Subclusters { host, copied, bitmap }
        }
        L2Mapping::Unallocated => {
            let unit = g.subcluster_size();
            let bitmap =
                SubclusterBitmap(0).with_zero((within.start / unit) as u32, (within.end / unit) as u32);
            L2Mapping::Subclusters { host: None, copied: false, bitmap }
        }
        other => other,
    }
}

/// The mapping of a cluster that the guest gave up; `None` to leave it.
pub(crate) fn give_up(g: &Geometry, old: &L2Mapping, version: u32, has_backing: bool) -> Option<L2Mapping> {
    match old {
        L2Mapping::Unallocated if !has_backing => None,
        L2Mapping::Zero { host: None, .. } => None,
        _ if version < 3 => Some(L2Mapping::Unallocated),
        _ if g.extended_l2() => {
            Some(L2Mapping::Subclusters { host: None, copied: false, bitmap: SubclusterBitmap::ALL_ZERO })
        }
        _ => Some(L2Mapping::Zero { host: None, copied: false }),
    }
}
