//! What `BLOCK_STATUS` tells of a range, for each context.

use std::ops::Range;
use std::time::{Duration, Instant};

use qcow2_core::{Extent, ExtentKind, Job, Result};

use super::export::{Bitmap, Export};
use crate::protocol::transmission::Descriptor;
use crate::protocol::{DIRTY, allocation};

/// Descriptors of one reply, for one context: half a megabyte. A client asks again for what is left.
const MOST: usize = 32 << 10;

/// Extents that are looked at at once.
const STEP: usize = 1024;

/// Bytes of the disk that are looked at at once: all of a large one would be many tables.
const LOOK: u64 = 4 << 30;

/// How long to look for the end of what one request asks about. A client asks again for what is left.
const PATIENCE: Duration = Duration::from_secs(1);

/// What can be told of an export.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Context {
    /// `base:allocation`.
    Allocation,
    /// `qemu:allocation-depth`.
    Depth,
    /// `qemu:dirty-bitmap:NAME`: the number among the export's.
    Bitmap(usize),
}

const BITMAP: &[u8] = b"qemu:dirty-bitmap:";

impl Context {
    /// All that an export has, in the order in which they are told of.
    pub(super) fn of(export: &Export) -> impl Iterator<Item = Self> {
        let depth = export.allocation_depth.then_some(Self::Depth);
        [Self::Allocation].into_iter().chain(depth).chain((0..export.bitmaps.len()).map(Self::Bitmap))
    }

    pub(super) fn name(self, export: &Export) -> Vec<u8> {
        match self {
            Self::Allocation => b"base:allocation".to_vec(),
            Self::Depth => b"qemu:allocation-depth".to_vec(),
            Self::Bitmap(number) => {
                let name = export.bitmaps.get(number).map(|bitmap| bitmap.name.as_slice());
                [BITMAP, name.unwrap_or_default()].concat()
            }
        }
    }

    /// Whether a query means it. `listing`: a name space stands for all that is in it.
    pub(super) fn is_meant_by(self, query: &[u8], listing: bool, export: &Export) -> bool {
        let name = self.name(export);
        let space = query == b"base:" || query == b"qemu:" || query == BITMAP;
        name == query || (listing && space && name.starts_with(query))
    }

    /// The number by which chunks name it. Never the same for two.
    pub(super) fn id(self) -> u32 {
        match self {
            Self::Allocation => 0,
            Self::Depth => 1,
            Self::Bitmap(number) => u32::try_from(number).map_or(u32::MAX, |number| number.saturating_add(2)),
        }
    }

    /// What `range` of the disk is, from its start on: all of it, or a part where it is of many pieces, or `one` is enough.
    pub(super) fn status(self, export: &Export, range: Range<u64>, one: bool) -> Result<Vec<Descriptor>> {
        let mut found = Found { ranges: Vec::new(), end: range.end, most: if one { 1 } else { MOST } };
        match self {
            Self::Allocation => of_extents(export, range, &mut found, allocation_of)?,
            Self::Depth => of_extents(export, range, &mut found, depth_of)?,
            Self::Bitmap(number) => {
                if let Some(bitmap) = export.bitmaps.get(number) {
                    of_bitmap(bitmap, range, &mut found)?;
                }
            }
        }
        Ok(found.ranges)
    }
}

fn allocation_of(extent: &Extent) -> u64 {
    let hole = matches!(extent.kind, ExtentKind::Zero | ExtentKind::Unallocated);
    (if hole { allocation::HOLE } else { 0 }) | (if extent.zero { allocation::ZERO } else { 0 })
}

fn depth_of(extent: &Extent) -> u64 {
    if extent.kind == ExtentKind::Unallocated { 0 } else { u64::from(extent.depth) + 1 }
}

/// Collects descriptors, neighbours of one status merged.
struct Found {
    ranges: Vec<Descriptor>,
    end: u64,
    most: usize,
}

impl Found {
    /// Appends a range that begins where the last one ended; `false` where there is no room for it, or no need.
    fn push(&mut self, range: Range<u64>, status: u64) -> bool {
        let length = range.end.min(self.end).saturating_sub(range.start);
        if length == 0 {
            return range.end < self.end;
        }
        let full = self.ranges.len() >= self.most;
        match self.ranges.last_mut() {
            Some(last) if last.status == status => last.length = last.length.saturating_add(length),
            _ if full => return false,
            _ => self.ranges.push(Descriptor { length, status }),
        }
        range.end < self.end
    }
}

fn of_extents(
    export: &Export,
    range: Range<u64>,
    found: &mut Found,
    status: fn(&Extent) -> u64,
) -> Result<()> {
    let (job, begin) = (Job::new(), Instant::now());
    let (mut at, mut extents) = (range.start, Vec::new());
    while at < range.end {
        extents.clear();
        let length = (range.end - at).min(LOOK);
        let covered = export.disk.extents_up_to(at, length, STEP, &job, &mut extents)?;
        for extent in &extents {
            if !found.push(extent.start..extent.start + extent.length, status(extent)) {
                return Ok(());
            }
        }
        // The disk has become smaller, or it takes long.
        if covered <= at || begin.elapsed() >= PATIENCE {
            return Ok(());
        }
        at = covered;
    }
    Ok(())
}

fn of_bitmap(bitmap: &Bitmap, range: Range<u64>, found: &mut Found) -> Result<()> {
    let mut at = range.start;
    let mut goes_on = true;
    bitmap.ranges.dirty(range.start, &mut |dirty| {
        let dirty = dirty.start.max(at)..dirty.end.max(at);
        goes_on = dirty.start <= at || found.push(at..dirty.start, 0);
        goes_on = goes_on && found.push(dirty.clone(), DIRTY);
        at = dirty.end;
        goes_on
    })?;
    if goes_on && at < range.end {
        found.push(at..range.end, 0);
    }
    Ok(())
}
