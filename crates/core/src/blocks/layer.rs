//! An open image, as a layer that is read.

use std::any::Any;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::Mutex;

use super::bitmaps::SECTOR;
use super::layout::{Entry, Layout, Scheme};
use super::places::Places;
use super::table::{Slice, Table};
use crate::check::{CheckLayer, CheckReport, Repair};
use crate::disk::{DiskOptions, WriteLayer};
use crate::layer::{Holes, Layer, Place, PlanBuilder, References, Segment, SegmentKind};
use crate::storage::{RangeLock, ReadTransfer};
use crate::{Error, ErrorKind, Job, MemMut, Result, Storage, StorageExt};

/// Bytes of the table that are kept unless the caller says otherwise.
const DEFAULT_CACHE_BYTES: u64 = 4 << 20;

/// An image of a format `S`. The same image can be open as several layers.
#[derive(Debug)]
pub struct BlockLayer<S> {
    pub(super) shared: Arc<Shared<S>>,
    /// Whether it takes requests, and how.
    pub(super) options: Option<DiskOptions>,
}

#[derive(Debug)]
pub(super) struct Shared<S> {
    pub(super) scheme: S,
    pub(super) storage: Arc<dyn Storage>,
    pub(super) table: Table,
    pub(super) size: AtomicU64,
    /// The file has this length, or a place that was given out ends here.
    pub(super) length: AtomicU64,
    /// Where new places are, once that is known. Held while one is given out.
    pub(super) places: Mutex<Option<Places>>,
    /// Held by the flush, one at a time.
    pub(super) flushing: Mutex<()>,
    /// Of a differencing image, the blocks that requests are on: alone where what is around their bytes is copied.
    pub(super) requests: RangeLock,
    /// A sync failed: what the file has is unknown.
    pub(super) failed: AtomicBool,
}

impl<S: Scheme> BlockLayer<S> {
    /// The image in `storage`, whose header was read. At most `cache_bytes` of the table are kept.
    ///
    /// # Errors
    /// As [`Layout::check`]; `Corrupt` for a table that is not in the file; `Io`.
    pub fn new(storage: Arc<dyn Storage>, scheme: S, cache_bytes: Option<u64>) -> Result<Self> {
        let layout = scheme.layout();
        layout.check().map_err(|e| storage.located(e))?;
        let (length, bytes) = (storage.size()?, layout.table_bytes());
        if bytes > 0 && layout.table.checked_add(bytes).is_none_or(|end| end > length) {
            let message = format!(
                "the table of {bytes} bytes at {:#x} lies outside the file ({length} bytes)",
                layout.table
            );
            let error = Error::new(ErrorKind::Corrupt, message).with_field(scheme.entry_name());
            return Err(storage.located(error.with_offset(layout.table)));
        }
        let shared = Shared {
            table: Table::new(layout.entries, cache_bytes.unwrap_or(DEFAULT_CACHE_BYTES)),
            size: AtomicU64::new(layout.size),
            length: AtomicU64::new(length),
            places: Mutex::new(None),
            flushing: Mutex::new(()),
            requests: RangeLock::default(),
            failed: AtomicBool::new(false),
            scheme,
            storage,
        };
        Ok(Self { shared: Arc::new(shared), options: None })
    }

    /// What is special about the image.
    #[must_use]
    pub fn scheme(&self) -> &S {
        &self.shared.scheme
    }

    /// The image that a layer is, if it is one of this format.
    #[must_use]
    pub fn of(layer: &dyn Layer) -> Option<&Self> {
        (layer as &dyn Any).downcast_ref()
    }

    /// Writes entries, which are neighbours or not, in order. Nobody has read the table before, or reads it later.
    ///
    /// # Errors
    /// `Io`.
    pub fn write_entries(&self, entries: &[(u32, u32)]) -> Result<()> {
        let shared = &*self.shared;
        shared.table.write(&*shared.storage, shared.layout(), entries)?;
        shared.table.forget();
        Ok(())
    }

    /// Calls `f` with every entry of the table and its index, as the file has it.
    ///
    /// # Errors
    /// Those of `f`; `Io`.
    pub fn walk(&self, f: impl FnMut(u32, Entry) -> Result<()>) -> Result<()> {
        self.shared.walk(f)
    }
}

impl<S: Scheme> Shared<S> {
    pub(super) fn layout(&self) -> &Layout {
        self.scheme.layout()
    }

    pub(super) fn walk(&self, mut f: impl FnMut(u32, Entry) -> Result<()>) -> Result<()> {
        let layout = self.layout();
        self.table.walk(&*self.storage, layout, |index, entry| f(index, layout.entry(entry)))
    }

    /// An entry that names what cannot be a place.
    pub(super) fn bad_place(&self, index: u32, place: u64, reason: &str) -> Error {
        let layout = self.layout();
        let guest = u64::from(index) * layout.block;
        let name = self.scheme.entry_name();
        let message = format!("guest offset {guest:#x}: {name} {index} names {place:#x}, which {reason}");
        let error = Error::new(ErrorKind::Corrupt, message).with_field(name);
        self.storage.located(error.with_offset(layout.table + u64::from(index) * 4))
    }

    /// What is wrong with the place of a block.
    fn fault_of(&self, place: u64) -> Result<Option<&'static str>> {
        let layout = self.layout();
        let end = place.saturating_add(layout.stride());
        if layout.metadata.iter().any(|part| part.start < end && place < part.end) {
            return Ok(Some("overlaps the format's own structures"));
        }
        if place < self.length.load(Ordering::Acquire) {
            return Ok(None);
        }
        // Others may have extended the file.
        let length = self.length.fetch_max(self.storage.size()?, Ordering::AcqRel);
        let length = length.max(self.length.load(Ordering::Acquire));
        Ok((place >= length).then_some("lies behind the end of the file"))
    }

    /// What the entry `entry` of the block `index` says, where that can be.
    pub(super) fn judged(&self, index: u32, entry: u32) -> Result<Entry> {
        let entry = self.layout().entry(entry);
        if let Entry::At(place) = entry
            && let Some(reason) = self.fault_of(place)?
        {
            return Err(self.bad_place(index, place, reason));
        }
        Ok(entry)
    }

    /// What the table says about the block `index`.
    pub(super) fn entry(&self, index: u32) -> Result<Entry> {
        if index >= self.table.entries() {
            return Ok(Entry::Absent);
        }
        self.judged(index, self.table.get(&*self.storage, self.layout(), index)?)
    }

    /// Plans `length` bytes from `inside` on of the block `index`, which has a place.
    fn plan_block(&self, index: u32, place: u64, part: Range<u64>, plan: &mut PlanBuilder<'_>) -> Result<()> {
        let layout = self.layout();
        let start = u64::from(index) * layout.block;
        let data = |inside: u64| SegmentKind::Data(Place { file: 0, host: place + layout.lead + inside });
        let Some(bitmaps) = self.scheme.bitmaps() else {
            plan.push(start + part.start, part.end - part.start, data(part.start));
            return Ok(());
        };
        let bits = bitmaps.get(&*self.storage, index, place)?;
        let mut at = part.start;
        while at < part.end {
            let sector = at / SECTOR;
            let there = bits.has(sector);
            let end = ((sector + 1) * SECTOR).min(part.end);
            plan.push(start + at, end - at, if there { data(at) } else { self.scheme.absent() });
            at = end;
        }
        Ok(())
    }
}

impl<S: Scheme> Layer for BlockLayer<S> {
    fn format(&self) -> &'static str {
        self.shared.scheme.format()
    }

    fn virtual_size(&self) -> u64 {
        self.shared.size.load(Ordering::Acquire)
    }

    fn unit(&self) -> Option<u64> {
        let block = self.shared.layout().block;
        block.is_power_of_two().then_some(block)
    }

    fn takes_backing(&self) -> bool {
        self.shared.scheme.is_differencing()
    }

    fn references(&self) -> References {
        self.shared.scheme.references()
    }

    fn judge_below(&self, below: Option<&dyn Layer>) -> Result<()> {
        self.shared.scheme.judge_below(below).map_err(|e| self.shared.storage.located(e))
    }

    fn content_id(&self) -> Option<String> {
        self.shared.scheme.content_id()
    }

    fn storage(&self) -> &Arc<dyn Storage> {
        &self.shared.storage
    }

    fn file(&self, index: u32) -> Option<&Arc<dyn Storage>> {
        (index == 0).then_some(&self.shared.storage)
    }

    fn plan(&self, range: Range<u64>, segments: &mut Vec<Segment>) -> Result<()> {
        let (shared, layout) = (&*self.shared, self.shared.layout());
        let mut plan = PlanBuilder::new(segments);
        let mut slice: (u32, Option<Arc<Slice>>) = (0, None);
        let mut at = range.start;
        while at < range.end {
            // A disk has no more blocks than the table has entries.
            let (index, inside) = ((at / layout.block) as u32, at % layout.block);
            let end = (inside + (range.end - at)).min(layout.block);
            let known = slice.1.as_ref().and_then(|s| s.get(index.wrapping_sub(slice.0) as usize));
            let entry = match known {
                Some(slot) => slot.load(Ordering::Acquire),
                None if index >= shared.table.entries() => layout.absent,
                None => {
                    let (first, found) = shared.table.slice(&*shared.storage, layout, index)?;
                    let slot = found.get((index - first) as usize);
                    let entry = slot.map_or(layout.absent, |slot| slot.load(Ordering::Acquire));
                    slice = (first, Some(found));
                    entry
                }
            };
            match shared.judged(index, entry)? {
                Entry::Absent => plan.push(at, end - inside, shared.scheme.absent()),
                Entry::Zero => plan.push(at, end - inside, SegmentKind::Zero(None)),
                Entry::At(place) => shared.plan_block(index, place, inside..end, &mut plan)?,
            }
            at += end - inside;
        }
        Ok(())
    }

    fn read_segment(&self, segment: &Segment, buf: MemMut<'_>) -> Result<()> {
        self.shared.storage.read_padded_at(buf, place_of(segment)?)
    }

    fn read_segments(&self, parts: Vec<(Segment, MemMut<'_>)>) -> Result<()> {
        let transfers =
            parts.into_iter().map(|(segment, buf)| Ok(ReadTransfer::new(buf, place_of(&segment)?)));
        let mut transfers = transfers.collect::<Result<Vec<_>>>()?;
        self.shared.storage.read_padded_batch(&mut transfers)
    }

    fn as_writable(&self) -> Option<&dyn WriteLayer> {
        self.options.is_some().then_some(self)
    }

    fn as_checkable(&self) -> Option<&dyn CheckLayer> {
        Some(self)
    }

    fn make_writable(&mut self, options: DiskOptions) -> Result<()> {
        let shared = &*self.shared;
        if !shared.storage.traits().writable {
            let error = Error::new(ErrorKind::ReadOnly, "the file is open for reading only");
            return Err(shared.storage.located(error));
        }
        S::begin(self)?;
        self.options = Some(options);
        Ok(())
    }

    fn reopen(&self) -> Result<Box<dyn Layer>> {
        Ok(Box::new(Self { shared: Arc::clone(&self.shared), options: None }))
    }

    fn holes(&self) -> Result<Holes> {
        Ok(self.shared.scheme.holes())
    }
}

impl<S: Scheme> CheckLayer for BlockLayer<S> {
    fn check(&self, max_findings: usize, job: &Job) -> Result<CheckReport> {
        S::check(self, None, max_findings, job)
    }

    fn repair(&self, repair: Repair, max_findings: usize, job: &Job) -> Result<CheckReport> {
        S::check(self, Some(repair), max_findings, job)
    }
}

/// Where a segment's bytes are in the file.
fn place_of(segment: &Segment) -> Result<u64> {
    match segment.kind {
        SegmentKind::Data(place) => Ok(place.host),
        _ => Err(Error::new(ErrorKind::Internal, "a segment without bytes was read")),
    }
}
