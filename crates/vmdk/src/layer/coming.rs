//! A streamOptimized extent that is read while it comes: its directory is at the end, and until then the markers in front of its grains say
//! where these are. Grains come in guest order; the list of those that came is all that is kept of the extent.

use std::ops::Range;

use parking_lot::Mutex;
use qcow2_core::layer::{PlanBuilder, SegmentKind, Token};
use qcow2_core::{Error, ErrorKind, Result, Storage, StorageExt, check_limit};

use super::grains::front;
use crate::fields::SECTOR;
use crate::geometry::Geometry;
use crate::sparse::{self, GRAIN_MARKER_BYTES, Mark};

/// Most sectors of zeroes in a row where a marker could stand: what pads the metadata in front.
const MAX_PADDING: u64 = 64 << 10;

/// Bytes of a grain in the list.
const ENTRY: u64 = 8;

/// The grains of an extent, as far as it came.
#[derive(Debug)]
pub(super) struct Coming {
    header: sparse::Header,
    max_metadata_bytes: u64,
    walk: Mutex<Walk>,
}

/// How far the markers were followed.
#[derive(Debug)]
struct Walk {
    /// The byte of the next one.
    next: u64,
    /// In guest order: the number of the grain, and the sector of its marker.
    grains: Vec<(u32, u32)>,
    /// Sectors of zeroes in front of it.
    padding: u64,
    /// No more grains come: the byte of the footer's marker.
    footer: Option<u64>,
}

impl Coming {
    /// Whether an extent with this header is read so, from a storage whose bytes are still coming.
    pub(super) fn suits(storage: &dyn Storage, header: &sparse::Header) -> bool {
        let numbered = header.capacity.div_ceil(header.grain.max(1)) <= u64::from(u32::MAX);
        storage.arriving().is_some()
            && header.is_at_end()
            && header.is_compressed()
            && header.has_markers()
            && numbered
    }

    /// One whose first grain lies behind the header's metadata.
    pub(super) fn new(header: sparse::Header, max_metadata_bytes: u64) -> Self {
        let behind = header.descriptor_offset.saturating_add(header.descriptor_size);
        let next = header.overhead.max(behind).saturating_mul(SECTOR);
        let walk = Walk { next, grains: Vec::new(), padding: 0, footer: None };
        Self { header, max_metadata_bytes, walk: Mutex::new(walk) }
    }

    /// Plans `range` of the extent, whose bytes are the guest's from `base` on: waits until all of its grains came.
    pub(super) fn plan(
        &self,
        storage: &dyn Storage,
        geometry: &Geometry,
        range: Range<u64>,
        base: u64,
        plan: &mut PlanBuilder<'_>,
    ) -> Result<()> {
        let grain = geometry.grain_bytes();
        let mut walk = self.walk.lock();
        let behind = range.end.div_ceil(grain);
        while walk.footer.is_none() && walk.grains.last().is_none_or(|&(last, _)| u64::from(last) < behind) {
            self.step(storage, geometry, &mut walk)?;
        }
        let first = walk.grains.partition_point(|&(number, _)| u64::from(number) < range.start / grain);
        let mut at = range.start;
        for &(number, sector) in walk.grains.get(first..).unwrap_or_default() {
            let (start, end) = (u64::from(number) * grain, (u64::from(number) + 1) * grain);
            if start >= range.end {
                break;
            }
            plan.push(base + at, start.saturating_sub(at), SegmentKind::Unallocated(None));
            let (start, end) = (start.max(at), end.min(range.end));
            plan.push(base + start, end - start, SegmentKind::Opaque(Token(u64::from(sector) * SECTOR)));
            at = end;
        }
        plan.push(base + at, range.end.saturating_sub(at), SegmentKind::Unallocated(None));
        Ok(())
    }

    /// Follows one marker.
    fn step(&self, storage: &dyn Storage, geometry: &Geometry, walk: &mut Walk) -> Result<()> {
        let at = walk.next;
        let wrong = |kind, message: String| {
            storage.located(Error::new(kind, message).with_field("marker").with_offset(at))
        };
        let bytes = front(storage, at, Mark::BYTES)?;
        let mark = Mark::parse(&bytes).ok_or_else(|| {
            wrong(ErrorKind::Corrupt, "the extent is cut off: there is no marker of its end".to_owned())
        })?;
        match mark {
            Mark::Grain { sector, size } => {
                let number = sector / self.header.grain;
                if sector % self.header.grain != 0 || sector >= geometry.capacity {
                    let message = format!("a grain of sector {sector} is none of the disk");
                    return Err(wrong(ErrorKind::Corrupt, message));
                }
                if walk.grains.last().is_some_and(|&(last, _)| u64::from(last) >= number) {
                    let message = format!(
                        "the grain of sector {sector} comes behind later ones, and a stream is read once: write it to a file, and convert that"
                    );
                    return Err(wrong(ErrorKind::UnsupportedFeature, message));
                }
                check_limit("grains", (walk.grains.len() as u64 + 1) * ENTRY, self.max_metadata_bytes)
                    .map_err(|e| storage.located(e))?;
                let place = u32::try_from(at / SECTOR).map_err(|_| {
                    wrong(ErrorKind::Limit, "the extent is larger than its tables can say".to_owned())
                })?;
                walk.grains.push((number as u32, place));
                walk.next = at + (GRAIN_MARKER_BYTES + u64::from(size)).next_multiple_of(SECTOR);
            }
            Mark::Footer => walk.footer = Some(at),
            // The end is behind the footer. In front of it zeroes pad.
            Mark::EndOfStream if walk.padding < MAX_PADDING => {
                walk.padding += 1;
                walk.next = at + SECTOR;
                return Ok(());
            }
            Mark::EndOfStream => {
                return Err(wrong(ErrorKind::Corrupt, "zeroes are no grains".to_owned()));
            }
            Mark::Tables { sectors } => {
                // No table or directory has more.
                check_limit("marker", sectors.saturating_mul(SECTOR), self.max_metadata_bytes)
                    .map_err(|e| storage.located(e))?;
                walk.next = at + (1 + sectors) * SECTOR;
            }
        }
        walk.padding = 0;
        Ok(())
    }

    /// All grains were read: what comes behind them is what the header in front said.
    pub(super) fn complete(&self, storage: &dyn Storage, geometry: &Geometry) -> Result<()> {
        let mut walk = self.walk.lock();
        let at = loop {
            match walk.footer {
                Some(at) => break at,
                None => self.step(storage, geometry, &mut walk)?,
            }
        };
        let bytes = front(storage, at, sparse::FOOTER_BYTES)?;
        let footer = sparse::footer(&bytes).map_err(|e| storage.located(e))?;
        if footer.capacity == self.header.capacity && footer.grain == self.header.grain {
            return Ok(());
        }
        let message = format!(
            "the header in front says {} sectors in grains of {}, the footer {} in grains of {}",
            self.header.capacity, self.header.grain, footer.capacity, footer.grain
        );
        Err(storage.located(Error::new(ErrorKind::Corrupt, message).with_field("capacity")))
    }
}
