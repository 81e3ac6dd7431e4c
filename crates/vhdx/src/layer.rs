//! An open image: a layer of a chain. What it names is opened by nobody here.

use std::any::Any;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::RwLock;
use qcow2_core::check::CheckLayer;
use qcow2_core::disk::{DiskOptions, WriteLayer};
use qcow2_core::layer::{
    BackingReference, Holes, Layer, Pin, Place, PlanBuilder, References, Segment, SegmentKind,
};
use qcow2_core::{Error, ErrorKind, MemMut, Result, Storage, StorageExt};

use crate::file::{Front, Tables};
use crate::new::ParentId;
use crate::sectors::{Sector, Sectors, number};
use crate::structures::{Geometry, Header, LOG_SECTOR, MIB, Metadata, Payload, bitmap_block, payload};
use crate::write::Writer;

/// Sectors of metadata that are kept unless the caller says otherwise, in bytes.
const DEFAULT_CACHE_BYTES: u64 = 4 << 20;
const ENTRY: u64 = 8;

/// How to open an image. Sizes are bytes.
#[derive(Debug, Clone)]
pub struct OpenOptions {
    /// Largest virtual size.
    pub max_virtual_size: u64,
    /// Longest log that is replayed: it is read as a whole.
    pub max_metadata_bytes: u64,
    /// Most bytes of the block allocation table and of sector bitmaps to cache. Default: 4 MiB.
    pub cache_bytes: Option<u64>,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self { max_virtual_size: i64::MAX as u64, max_metadata_bytes: 128 << 20, cache_bytes: None }
    }
}

/// Where things are in the file.
#[derive(Debug, Clone)]
pub(crate) struct Places {
    /// The block allocation table.
    pub(crate) bat: u64,
    /// What cannot be a block.
    pub(crate) reserved: Vec<Range<u64>>,
}

/// An image, without its parent.
#[derive(Debug)]
pub struct Vhdx {
    storage: Arc<dyn Storage>,
    /// As it is read: the file, or the file with its log brought in.
    pub(crate) data: Arc<dyn Storage>,
    pub(crate) front: Front,
    pub(crate) tables: Tables,
    pub(crate) places: RwLock<Places>,
    pub(crate) sectors: Sectors,
    pub(crate) size: AtomicU64,
    /// Bytes of the file, as far as they were looked at.
    file_length: AtomicU64,
    pub(crate) options: OpenOptions,
    pub(crate) writer: Option<Writer>,
}

impl Vhdx {
    /// Opens the image in `storage`, whose log is brought in in memory: the file is not changed.
    ///
    /// # Errors
    /// `InvalidHeader`; `UnsupportedFeature` for what the image needs and is not known, by name; `Corrupt` for structures that
    /// overlap or lie outside the file; `Limit`; `Io`.
    pub fn open(storage: Arc<dyn Storage>, options: &OpenOptions) -> Result<Self> {
        let located = |e| storage.located(e);
        let front = Front::read(&*storage, options).map_err(located)?;
        let data: Arc<dyn Storage> = match &front.log {
            Some(log) => Arc::new(log.over(Arc::clone(&storage)).map_err(located)?),
            None => Arc::clone(&storage),
        };
        let tables = Tables::read(&*data, &front.header, Some(data.size()?), options).map_err(located)?;
        let places = Places { bat: tables.regions.bat.offset, reserved: tables.reserved.clone() };
        Ok(Self {
            sectors: Sectors::new(options.cache_bytes.unwrap_or(DEFAULT_CACHE_BYTES)),
            size: AtomicU64::new(tables.metadata.virtual_size),
            file_length: AtomicU64::new(data.size()?),
            places: RwLock::new(places),
            options: options.clone(),
            writer: None,
            storage,
            data,
            front,
            tables,
        })
    }

    /// The header that counted when the image was opened.
    pub fn header(&self) -> &Header {
        &self.front.header
    }

    /// What the metadata said when the image was opened.
    pub fn metadata(&self) -> &Metadata {
        &self.tables.metadata
    }

    /// Whether there is a log that has to be brought in on disk: the image was not closed cleanly.
    pub fn is_dirty(&self) -> bool {
        self.front.log.is_some()
    }

    pub(crate) fn geometry(&self) -> Geometry {
        self.tables.geometry
    }

    /// The byte of the file where a block's entry is.
    pub(crate) fn entry_at(&self, entry: u64) -> u64 {
        self.places.read().bat + entry * ENTRY
    }

    /// The file was made longer.
    pub(crate) fn file_grew(&self, length: u64) {
        self.file_length.fetch_max(length, Ordering::AcqRel);
    }

    fn damaged(&self, guest: u64, error: Error) -> Error {
        let message = format!("guest offset {guest:#x}: {}", error.message());
        let new = Error::new(error.kind(), message).with_field("BAT entry");
        self.storage.located(error.offset().into_iter().fold(new, Error::with_offset))
    }

    /// Refuses a place of `length` bytes that cannot be one of a block.
    pub(crate) fn check_place(&self, offset: u64, length: u64) -> Result<()> {
        let refuse = |why: String| {
            let message = format!("the block at {offset:#x} with {length} bytes {why}");
            Err(Error::new(ErrorKind::Corrupt, message).with_offset(offset))
        };
        let Some(end) = offset.checked_add(length) else { return refuse("is nowhere".to_owned()) };
        let places = self.places.read();
        if let Some(other) = places.reserved.iter().find(|other| other.start < end && offset < other.end) {
            return refuse(format!("overlaps what lies from {:#x} to {:#x}", other.start, other.end));
        }
        drop(places);
        if end > self.file_length.load(Ordering::Acquire) {
            let now = self.data.size()?;
            self.file_grew(now);
            if end > now {
                return refuse(format!("lies outside the file, which has {now} bytes"));
            }
        }
        Ok(())
    }

    /// Bytes that a block has of the disk: the last one can be cut.
    fn part_of_disk(&self, block: u64) -> u64 {
        let geometry = self.geometry();
        let rest = self.virtual_size().saturating_sub(block * geometry.block_size);
        rest.min(geometry.block_size)
    }

    /// What an entry says of a block, judged.
    pub(crate) fn judged(&self, block: u64, entry: u64) -> Result<Payload> {
        let found = payload(entry).and_then(|found| {
            match found {
                Payload::Present(offset) => self.check_place(offset, self.part_of_disk(block))?,
                Payload::Partial(offset) => {
                    self.check_place(offset, self.part_of_disk(block))?;
                    if !self.geometry().has_parent {
                        let message = "a block is partially present, in an image without a parent";
                        return Err(Error::new(ErrorKind::Corrupt, message));
                    }
                }
                Payload::NotPresent | Payload::Zero => {}
            }
            Ok(found)
        });
        found.map_err(|e| match e.kind() {
            ErrorKind::Io => e,
            _ => self.damaged(block * self.geometry().block_size, e),
        })
    }

    /// What the table says of a block now.
    pub(crate) fn payload(&self, block: u64) -> Result<Payload> {
        let at = self.entry_at(self.geometry().entry_of(block));
        let sector = self.sectors.get(&*self.data, at)?;
        self.judged(block, number(&sector, at))
    }

    /// Plans the part `start..end` of a block.
    fn plan_block(&self, start: u64, end: u64, entry: u64, plan: &mut PlanBuilder<'_>) -> Result<()> {
        let block_size = self.geometry().block_size;
        let block = start / block_size;
        let place = |offset: u64| Place { file: 0, host: offset + start % block_size };
        let kind = match self.judged(block, entry)? {
            Payload::NotPresent => SegmentKind::Unallocated(None),
            Payload::Zero => SegmentKind::Zero(None),
            Payload::Present(offset) => SegmentKind::Data(place(offset)),
            Payload::Partial(offset) => return self.plan_partial(start, end, place(offset), plan),
        };
        plan.push(start, end - start, kind);
        Ok(())
    }

    /// Where the sector bitmap of the chunk with the byte `start` of the disk is, if there is one.
    pub(crate) fn bitmap_of(&self, start: u64) -> Result<Option<u64>> {
        let geometry = self.geometry();
        let block = start / geometry.block_size;
        let at = self.entry_at(geometry.bitmap_entry_of(block));
        let entry = number(&self.sectors.get(&*self.data, at)?, at);
        let bitmap = bitmap_block(entry).and_then(|found| match found {
            Some(offset) => self.check_place(offset, MIB).map(|()| Some(offset)),
            None => Ok(None),
        });
        bitmap.map_err(|e| if e.kind() == ErrorKind::Io { e } else { self.damaged(start, e) })
    }

    /// Plans a part of a block whose sectors are here or in the parent, as the bitmap of its chunk says.
    fn plan_partial(&self, start: u64, end: u64, place: Place, plan: &mut PlanBuilder<'_>) -> Result<()> {
        let geometry = self.geometry();
        let chunk = geometry.chunk_ratio() * geometry.block_size;
        let bitmap = self.bitmap_of(start)?.ok_or_else(|| {
            let message = "a block is partially present, its chunk has no sector bitmap";
            self.damaged(start, Error::new(ErrorKind::Corrupt, message))
        })?;
        let mut guest = start;
        let mut bits = None::<(u64, Sector)>;
        while guest < end {
            let index = guest % chunk / geometry.sector_size;
            let byte = bitmap + index / 8;
            let sector = match bits.take() {
                Some((first, sector)) if first == byte - byte % LOG_SECTOR => sector,
                _ => self.sectors.get(&*self.data, byte)?,
            };
            let value = sector.get((byte % LOG_SECTOR) as usize).copied().unwrap_or_default();
            let next = (guest - guest % geometry.sector_size + geometry.sector_size).min(end);
            let kind = match value >> (index % 8) & 1 {
                0 => SegmentKind::Unallocated(None),
                _ => SegmentKind::Data(place.after(guest - start)),
            };
            plan.push(guest, next - guest, kind);
            bits = Some((byte - byte % LOG_SECTOR, sector));
            guest = next;
        }
        Ok(())
    }
}

impl Layer for Vhdx {
    fn format(&self) -> &'static str {
        "vhdx"
    }

    fn virtual_size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    fn unit(&self) -> Option<u64> {
        Some(self.geometry().block_size)
    }

    fn takes_backing(&self) -> bool {
        self.geometry().has_parent
    }

    fn references(&self) -> References {
        let name = self.tables.metadata.parent.as_ref().and_then(|parent| parent.name());
        let backing = name.map(|name| BackingReference {
            filename: name.into_bytes(),
            format: Some(self.format().as_bytes().to_vec()),
        });
        References { backing, ..References::default() }
    }

    fn judge_below(&self, below: Option<&dyn Layer>) -> Result<()> {
        let Some(parent) = &self.tables.metadata.parent else { return Ok(()) };
        let refuse = |kind, message: String| {
            Err(self.storage.located(Error::new(kind, message).with_field("parent_linkage")))
        };
        let Some(below) = below else {
            // Whether it is read without a parent that it names is not for the image to decide.
            let message = "the image has a parent, and does not say where";
            return if parent.name().is_some() {
                Ok(())
            } else {
                refuse(ErrorKind::UnsupportedFeature, message.to_owned())
            };
        };
        let mut wanted = parent.linkages().peekable();
        if wanted.peek().is_none() {
            return Ok(());
        }
        let Some(below) = (below as &dyn Any).downcast_ref::<Self>() else {
            let message = format!("the parent of a vhdx image is one, too, not {}", below.format());
            return refuse(ErrorKind::Chain, message);
        };
        let found = below.front.header.data_write_guid.to_string();
        let same = |linkage: &str| linkage.trim_matches(['{', '}']).eq_ignore_ascii_case(&found);
        if wanted.any(same) {
            return Ok(());
        }
        let known = parent.linkages().next().unwrap_or_default();
        let message = format!(
            "its parent has the DataWriteGuid {known}, the image below has {{{found}}}: it was changed since, or is another one"
        );
        refuse(ErrorKind::Chain, message)
    }

    fn content_id(&self) -> Option<String> {
        let id = ParentId {
            data_write_guid: self.front.header.data_write_guid,
            size: self.virtual_size(),
            sector_size: self.tables.metadata.logical_sector_size,
        };
        Some(id.to_string())
    }

    fn storage(&self) -> &Arc<dyn Storage> {
        &self.storage
    }

    fn file(&self, index: u32) -> Option<&Arc<dyn Storage>> {
        (index == 0).then_some(&self.data)
    }

    fn plan(&self, range: Range<u64>, segments: &mut Vec<Segment>) -> Result<()> {
        let (geometry, mut plan) = (self.geometry(), PlanBuilder::new(segments));
        let mut kept = None::<(u64, Sector)>;
        let mut start = range.start;
        while start < range.end {
            let block = start / geometry.block_size;
            let end = ((block + 1) * geometry.block_size).min(range.end);
            let at = self.entry_at(geometry.entry_of(block));
            let sector = match kept.take() {
                Some((first, sector)) if first == at - at % LOG_SECTOR => sector,
                _ => self.sectors.get(&*self.data, at)?,
            };
            self.plan_block(start, end, number(&sector, at), &mut plan)?;
            kept = Some((at - at % LOG_SECTOR, sector));
            start = end;
        }
        Ok(())
    }

    fn read_segment(&self, segment: &Segment, buf: MemMut<'_>) -> Result<()> {
        match segment.kind {
            SegmentKind::Data(place) => self.data.read_exact_at(buf, place.host),
            _ => Err(Error::new(ErrorKind::Internal, "a segment without bytes was read")),
        }
    }

    fn as_writable(&self) -> Option<&dyn WriteLayer> {
        Some(self)
    }

    fn as_checkable(&self) -> Option<&dyn CheckLayer> {
        Some(self)
    }

    fn make_writable(&mut self, options: DiskOptions) -> Result<()> {
        self.begin_writing(options)
    }

    fn reopen(&self) -> Result<Box<dyn Layer>> {
        Ok(Box::new(Self::open(Arc::clone(&self.storage), &self.options)?))
    }

    /// Blocks are large, and written to in part.
    fn holes(&self) -> Result<Holes> {
        Ok(Holes::Preallocated)
    }

    fn pin(&self) -> Option<Pin> {
        self.writer.as_ref().map(Writer::pin)
    }
}
