//! An open extent with grain tables.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::RwLock;
use qcow2_core::layer::{Place, PlanBuilder, SegmentKind, Token};
use qcow2_core::{Error, ErrorKind, MemMut, Result, Storage, StorageExt, check_limit};

use super::OpenOptions;
use super::coming::Coming;
use super::inflate::Stream;
use super::tables::{Table, TableCache};
use super::write::GrainWriter;
use crate::fields::SECTOR;
use crate::geometry::{Geometry, Grain};
use crate::sparse::{GRAIN_MARKER_BYTES, Mark};
use crate::{cowd, sesparse, sparse};

/// An extent with grain tables. The tables are read when they are used; the directory is in memory.
#[derive(Debug)]
pub(super) struct Grains {
    pub(super) storage: Arc<dyn Storage>,
    /// As it was opened: the capacity may have grown since.
    base: Geometry,
    capacity: AtomicU64,
    /// Entries change in place; the whole is another one when the extent grew.
    pub(super) directory: RwLock<Directory>,
    /// The file's length when it was asked for last: it only grows here.
    length: AtomicU64,
    pub(super) writer: Option<GrainWriter>,
    /// Of an extent that is read while it comes, and has no directory yet.
    coming: Option<Coming>,
}

/// A grain directory.
#[derive(Debug)]
pub(super) struct Directory {
    /// Its sector in the file.
    pub(super) sector: u64,
    entries: Box<[AtomicU64]>,
}

impl Directory {
    pub(super) fn new(sector: u64, entries: impl IntoIterator<Item = u64>) -> Self {
        Self { sector, entries: entries.into_iter().map(AtomicU64::new).collect() }
    }

    /// An entry; 0 for one that it does not have.
    pub(super) fn get(&self, index: u64) -> u64 {
        self.entries.get(index as usize).map_or(0, |entry| entry.load(Ordering::Acquire))
    }

    pub(super) fn set(&self, index: u64, value: u64) {
        if let Some(entry) = self.entries.get(index as usize) {
            entry.store(value, Ordering::Release);
        }
    }

    pub(super) fn all(&self) -> impl Iterator<Item = u64> {
        self.entries.iter().map(|entry| entry.load(Ordering::Acquire))
    }

    /// Entries of 0 from the first on.
    fn empty_from(&self, index: u64) -> u64 {
        self.all().skip(index as usize).take_while(|entry| *entry == 0).count() as u64
    }
}

/// Reads the header of a sparse extent.
fn sparse_geometry(storage: &dyn Storage) -> Result<Geometry> {
    let bytes = front(storage, 0, sparse::HEADER_BYTES)?;
    if bytes.starts_with(&cowd::MAGIC) { cowd::parse(&bytes) } else { hosted(storage, &bytes)?.geometry() }
}

/// The header that counts of a hosted sparse extent whose first bytes are given.
pub(super) fn hosted(storage: &dyn Storage, bytes: &[u8]) -> Result<sparse::Header> {
    let header = sparse::Header::parse(bytes)?;
    if !header.is_at_end() {
        return Ok(header);
    }
    // QEMU counts in whole sectors, of which the last one may be there in part.
    let end = storage.size()?.div_ceil(SECTOR) * SECTOR;
    let footer = front(storage, end.saturating_sub(sparse::FOOTER_BYTES as u64), sparse::FOOTER_BYTES)?;
    sparse::footer(&footer)
}

/// Reads the headers of a seSparse extent.
fn se_sparse_geometry(storage: &dyn Storage) -> Result<Geometry> {
    let header = sesparse::parse(&front(storage, 0, sesparse::HEADER_BYTES)?)?;
    sesparse::judge_volatile(&front(storage, header.volatile * SECTOR, sesparse::HEADER_BYTES)?)?;
    Ok(header.geometry)
}

/// `length` bytes at `offset`, fewer where the file ends before.
pub(super) fn front(storage: &dyn Storage, offset: u64, length: usize) -> Result<Vec<u8>> {
    let mut bytes = vec![0; length];
    let got = storage.read_up_to_at(MemMut::from(&mut bytes[..]), offset)?;
    bytes.truncate(got);
    Ok(bytes)
}

impl Grains {
    /// Opens the extent in `storage`.
    ///
    /// # Errors
    /// As its header; `Corrupt` for a directory that is not in the file; `Limit`; `Io`.
    pub(super) fn open(storage: Arc<dyn Storage>, is_se_sparse: bool, options: &OpenOptions) -> Result<Self> {
        let read = if is_se_sparse { se_sparse_geometry } else { sparse_geometry };
        let geometry = read(&*storage).map_err(|e| storage.located(e))?;
        Self::with_geometry(storage, geometry, options)
    }

    pub(super) fn with_geometry(
        storage: Arc<dyn Storage>,
        geometry: Geometry,
        options: &OpenOptions,
    ) -> Result<Self> {
        let length = storage.size()?;
        let directory = read_directory(&*storage, "gdOffset", geometry, geometry.directory, options)?;
        Ok(Self {
            storage,
            base: geometry,
            capacity: AtomicU64::new(geometry.capacity),
            directory: RwLock::new(directory),
            length: AtomicU64::new(length),
            writer: None,
            coming: None,
        })
    }

    /// The extent in `storage`, whose directory has not come yet.
    pub(super) fn coming(storage: Arc<dyn Storage>, geometry: Geometry, coming: Coming) -> Self {
        Self {
            storage,
            base: geometry,
            capacity: AtomicU64::new(geometry.capacity),
            directory: RwLock::new(Directory::new(0, [])),
            length: AtomicU64::new(0),
            writer: None,
            coming: Some(coming),
        }
    }

    /// All of the disk was read.
    pub(super) fn complete(&self) -> Result<()> {
        self.coming.as_ref().map_or(Ok(()), |coming| coming.complete(&*self.storage, &self.base))
    }

    /// The compressed grain at `host` was read as a whole: nobody asks for it again.
    pub(super) fn taken(&self, host: u64) -> Result<()> {
        let Some(arriving) = self.storage.arriving().filter(|_| self.base.markers) else { return Ok(()) };
        let marker = front(&*self.storage, host, Mark::BYTES)?;
        let Some(Mark::Grain { size, .. }) = Mark::parse(&marker) else { return Ok(()) };
        // A grain is padded to a sector: what pads the last one may be missing where it ends the stream.
        arriving.taken(host, (GRAIN_MARKER_BYTES + u64::from(size)).next_multiple_of(SECTOR))
    }

    /// How it is cut now.
    pub(super) fn geometry(&self) -> Geometry {
        Geometry { capacity: self.capacity.load(Ordering::Acquire), ..self.base }
    }

    /// It has more sectors.
    pub(super) fn set_capacity(&self, sectors: u64) {
        self.capacity.store(sectors, Ordering::Release);
    }

    pub(super) fn error(&self, kind: ErrorKind, message: String, field: &'static str) -> Error {
        self.storage.located(Error::new(kind, message).with_field(field))
    }

    /// Whether the file reaches behind `byte`.
    pub(super) fn reaches(&self, byte: u64) -> Result<bool> {
        if byte < self.length.load(Ordering::Relaxed) {
            return Ok(true);
        }
        let length = self.storage.size()?;
        self.length.fetch_max(length, Ordering::Relaxed);
        Ok(byte < length)
    }

    /// Table `index`, if there is one.
    ///
    /// # Errors
    /// `Corrupt` for one that is not in the file; `Io`.
    pub(super) fn table(&self, cache: &TableCache, extent: usize, index: u64) -> Result<Option<Arc<Table>>> {
        if let Some(table) = self.writer.as_ref().and_then(|writer| writer.changed(index)) {
            return Ok(Some(table));
        }
        let place = self.base.table(self.entry(index)).map_err(|e| self.storage.located(e))?;
        let Some(place) = place else { return Ok(None) };
        cache.get((extent, index), || self.load(index, place)).map(Some)
    }

    /// Entry `index` of the directory.
    pub(super) fn entry(&self, index: u64) -> u64 {
        self.directory.read().get(index)
    }

    fn load(&self, index: u64, place: u64) -> Result<Table> {
        let used = self.geometry().used_table_bytes(index);
        if place.checked_add(used).is_none_or(|end| end == 0)
            || !self.reaches(place + used.saturating_sub(1))?
        {
            let message =
                format!("the grain table {index} at {place:#x} with {used} bytes lies outside the file");
            return Err(self.error(ErrorKind::Corrupt, message, "grain directory entry").with_offset(place));
        }
        let mut bytes = vec![0; self.base.table_bytes() as usize];
        // Entries behind the end of the disk may not be there.
        self.storage.read_padded_at(MemMut::from(&mut bytes[..]), place)?;
        Ok(Table::new(self.base.decode(&bytes)))
    }

    /// Where the grain of an entry is, which maps the byte `at` of the extent.
    pub(super) fn grain(&self, entry: u64, at: u64) -> Result<Grain> {
        let located = |e: Error| {
            let message = format!("byte {at:#x} of the extent: {}", e.message());
            self.error(e.kind(), message, "grain table entry")
        };
        let grain = self.base.grain(entry).map_err(located)?;
        if let Grain::Data(host) = grain
            && !self.reaches(host)?
        {
            let message = format!("byte {at:#x} of the extent: the grain at {host:#x} lies outside the file");
            return Err(self.error(ErrorKind::Corrupt, message, "grain table entry").with_offset(host));
        }
        Ok(grain)
    }

    /// Plans `range` of the extent, whose bytes are the guest's from `base` on.
    pub(super) fn plan(
        &self,
        cache: &TableCache,
        extent: usize,
        range: Range<u64>,
        base: u64,
        plan: &mut PlanBuilder<'_>,
    ) -> Result<()> {
        if let Some(coming) = &self.coming {
            return coming.plan(&*self.storage, &self.base, range, base, plan);
        }
        let (grain, coverage) = (self.base.grain_bytes(), self.base.coverage());
        let mut at = range.start;
        while at < range.end {
            let end = (at - at % coverage).saturating_add(coverage).min(range.end);
            let Some(table) = self.table(cache, extent, at / coverage)? else {
                plan.push(base + at, end - at, SegmentKind::Unallocated(None));
                at = end;
                continue;
            };
            while at < end {
                let index = at % coverage / grain;
                let inside = at % grain;
                let length = (grain - inside).min(end - at);
                let entry = table.get(index);
                if entry == 0 {
                    let run = table.empty_from(index).max(1) * grain - inside;
                    let run = run.min(end - at);
                    plan.push(base + at, run, SegmentKind::Unallocated(None));
                    at += run;
                    continue;
                }
                let kind = match self.grain(entry, at - inside)? {
                    Grain::Unallocated => SegmentKind::Unallocated(None),
                    Grain::Zero => SegmentKind::Zero(None),
                    Grain::Data(host) if self.base.compressed => SegmentKind::Opaque(Token(host)),
                    Grain::Data(host) => {
                        SegmentKind::Data(Place { file: extent as u32 + 1, host: host + inside })
                    }
                };
                plan.push(base + at, length, kind);
                at += length;
            }
        }
        Ok(())
    }

    /// The compressed grain at `host`.
    pub(super) fn stream(&self, host: u64) -> Stream<'_> {
        Stream {
            storage: &*self.storage,
            host,
            marker: self.base.markers,
            grain: self.base.grain_bytes() as usize,
        }
    }

    /// Bytes from `at` on for which there are no tables.
    pub(super) fn absent_from(&self, at: u64) -> u64 {
        let coverage = self.base.coverage();
        let run = self.directory.read().empty_from(at / coverage);
        // The extent can end inside the last table.
        run.saturating_mul(coverage)
            .min(self.geometry().size().saturating_sub(at - at % coverage))
            .saturating_sub(at % coverage)
    }
}

/// The directory at a sector of the file, which must have it: checked before it is allocated.
pub(super) fn read_directory(
    storage: &dyn Storage,
    field: &'static str,
    geometry: Geometry,
    sector: u64,
    options: &OpenOptions,
) -> Result<Directory> {
    let length = geometry.directory_bytes();
    check_limit("grain directory size", length, options.max_metadata_bytes)
        .map_err(|e| storage.located(e))?;
    let offset = sector.saturating_mul(SECTOR);
    let file_size = storage.size()?;
    if length != 0 && offset.checked_add(length).is_none_or(|end| end > file_size) {
        let message = format!(
            "invalid {field} {sector}: the {length} bytes of the grain directory lie outside the file ({file_size} bytes)"
        );
        let error = Error::new(ErrorKind::Corrupt, message).with_field(field).with_offset(offset);
        return Err(storage.located(error));
    }
    let mut bytes = vec![0; length as usize];
    storage.read_exact_at(MemMut::from(&mut bytes[..]), offset).map_err(|e| e.with_field(field))?;
    Ok(Directory::new(sector, geometry.decode(&bytes)))
}
