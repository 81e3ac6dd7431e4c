//! An open image: what is special about VHD.

use std::any::Any;
use std::collections::HashSet;
use std::sync::Arc;

use parking_lot::Mutex;
use qcow2_core::blocks::{BlockLayer, Layout, OpenOptions, Scheme, SectorBitmaps};
use qcow2_core::check::{CheckReport, Repair};
use qcow2_core::layer::{References, SegmentKind};
use qcow2_core::{Error, ErrorKind, Job, Layer, Mem, MemMut, Result, Storage, StorageExt, check_limit};

use crate::awaited::Awaited;
use crate::check::check;
use crate::fixed::Fixed;
use crate::footers::read_footers;
use crate::parent::{self, ParentId};
use crate::structures::{
    DiskType, FOOTER_LENGTH, Footer, Geometry, HEADER_LENGTH, Header, MAX_SECTORS, SECTOR,
};

/// How much later than a child says its parent can have been made, in seconds: clocks of other places are up to a day ahead.
const CLOCKS: u32 = 24 * 60 * 60;

/// An open dynamic or differencing disk.
pub type Vpc = BlockLayer<VpcScheme>;

/// What is special about VHD.
#[derive(Debug)]
pub struct VpcScheme {
    footer: Mutex<Footer>,
    header: Mutex<Header>,
    header_offset: u64,
    layout: Layout,
    references: References,
    /// Of a differencing disk.
    bitmaps: Option<SectorBitmaps>,
    /// Blocks whose bitmap says that all sectors are there.
    complete: Mutex<HashSet<u32>>,
}

/// Opens the image in `storage`.
///
/// # Errors
/// As [`Footer::parse`] and [`Header::parse`]; `Limit`; `Corrupt` for a BAT that is not in the file; `Io`.
pub fn open(storage: Arc<dyn Storage>, options: &OpenOptions) -> Result<Box<dyn Layer>> {
    if let Some(fixed) = Awaited::new(&storage, options.max_virtual_size).map_err(|e| storage.located(e))? {
        return Ok(Box::new(fixed));
    }
    let footers = read_footers(&*storage)?;
    let footer = footers.chosen().map_err(|e| storage.located(e))?;
    check_limit("size", footer.virtual_size(), options.max_virtual_size).map_err(|e| storage.located(e))?;
    if footer.disk_type() == DiskType::Fixed {
        return Ok(Box::new(Fixed::new(storage, footer, footers.back_offset)?));
    }
    let header = read_header(&*storage, footer.data_offset()).map_err(|e| storage.located(e))?;
    let is_differencing = footer.disk_type() == DiskType::Differencing;
    let references = match is_differencing {
        true => parent::references(&*storage, &header)?,
        false => References::default(),
    };
    let scheme = VpcScheme::new(footer, header, references);
    check_limit("BAT", scheme.layout.table_bytes(), options.max_metadata_bytes)
        .map_err(|e| storage.located(e))?;
    Ok(Box::new(Vpc::new(storage, scheme, options.cache_bytes)?))
}

pub(crate) fn read_header(storage: &dyn Storage, offset: u64) -> Result<Header> {
    if offset > i64::MAX as u64 {
        let message = format!("invalid data_offset {offset:#x}: no file has it");
        return Err(Error::new(ErrorKind::InvalidHeader, message).with_field("data_offset"));
    }
    let mut bytes = [0; HEADER_LENGTH];
    let got = storage.read_up_to_at(MemMut::from(&mut bytes[..]), offset)?;
    Header::parse(bytes.get(..got).unwrap_or_default()).map_err(|e| e.with_offset(offset))
}

/// The footer of a layer that is an image of this format.
#[must_use]
pub fn footer_of(layer: &dyn Layer) -> Option<Footer> {
    if let Some(fixed) = (layer as &dyn Any).downcast_ref::<Fixed>() {
        return Some(fixed.footer());
    }
    Some(Vpc::of(layer)?.scheme().footer.lock().clone())
}

/// Refuses a size that no disk with such a footer has.
pub(crate) fn judge_size(footer: &Footer, size: u64) -> Result<()> {
    let refuse = |kind, message: String| Err(Error::new(kind, message).with_field("size"));
    if !size.is_multiple_of(SECTOR) {
        return refuse(ErrorKind::InvalidArgument, format!("{size} is no multiple of {SECTOR} bytes"));
    }
    if size > MAX_SECTORS * SECTOR {
        return refuse(ErrorKind::Limit, format!("a VHD has at most 2040 GiB, not {size} bytes"));
    }
    let next = geometry_for(footer, size);
    if footer.is_by_geometry() && next != Geometry::LARGEST && next.total() * SECTOR != size {
        let message = format!(
            "the disk has the size of its geometry, as {:?} has it, and no geometry has {size} bytes: the next one has {}",
            String::from_utf8_lossy(&footer.creator_app()),
            next.total() * SECTOR
        );
        return refuse(ErrorKind::InvalidArgument, message);
    }
    Ok(())
}

/// The geometry of a disk that gets another size.
pub(crate) fn geometry_for(footer: &Footer, size: u64) -> Geometry {
    match footer.geometry() {
        Geometry::LARGEST => Geometry::LARGEST,
        _ if footer.is_by_geometry() => Geometry::at_least(size / SECTOR),
        _ => Geometry::of(size / SECTOR),
    }
}

impl VpcScheme {
    pub(crate) fn new(footer: &Footer, header: Header, references: References) -> Self {
        let header_offset = footer.data_offset();
        let is_differencing = footer.disk_type() == DiskType::Differencing;
        let mut layout = header.layout(header_offset, footer.virtual_size());
        if is_differencing {
            layout.metadata.extend(header.locators().filter_map(|locator| locator.range()));
        }
        Self {
            bitmaps: is_differencing.then(|| SectorBitmaps::new(layout.block)),
            layout,
            footer: Mutex::new(footer.clone()),
            header: Mutex::new(header),
            header_offset,
            references,
            complete: Mutex::default(),
        }
    }

    /// The footer as the file has it.
    #[must_use]
    pub fn footer(&self) -> Footer {
        self.footer.lock().clone()
    }

    /// The header as the file has it.
    #[must_use]
    pub fn header(&self) -> Header {
        self.header.lock().clone()
    }

    /// Bytes of a bitmap that mean something.
    fn bitmap_bytes(&self) -> usize {
        (self.layout.block / SECTOR).div_ceil(8) as usize
    }

    pub(crate) fn write_footer(&self, storage: &dyn Storage, at: u64) -> Result<()> {
        storage.write_all_at(Mem::from(&self.footer.lock().bytes()[..]), at)
    }

    /// Writes the number of entries, durably.
    fn write_entries(&self, storage: &dyn Storage, entries: u32) -> Result<()> {
        let header = self.header.lock().with_entries(entries);
        let (first, _) = header.bytes().split_at(SECTOR as usize);
        storage.write_all_at(Mem::from(first), self.header_offset)?;
        storage.flush()?;
        *self.header.lock() = header;
        Ok(())
    }

    /// Ends the file with the footer behind the last place.
    pub(crate) fn end_with_footer(&self, storage: &dyn Storage, end: u64) -> Result<()> {
        self.write_footer(storage, end)?;
        let length = end + FOOTER_LENGTH as u64;
        if storage.traits().block_device || storage.size()? <= length {
            return Ok(());
        }
        storage.flush()?;
        storage.resize(length)
    }
}

impl Scheme for VpcScheme {
    fn format(&self) -> &'static str {
        "vpc"
    }

    fn entry_name(&self) -> &'static str {
        "BAT entry"
    }

    fn layout(&self) -> &Layout {
        &self.layout
    }

    fn absent(&self) -> SegmentKind {
        if self.is_differencing() { SegmentKind::Unallocated(None) } else { SegmentKind::Zero(None) }
    }

    fn references(&self) -> References {
        self.references.clone()
    }

    fn is_differencing(&self) -> bool {
        self.bitmaps.is_some()
    }

    fn judge_below(&self, below: Option<&dyn Layer>) -> Result<()> {
        if !self.is_differencing() {
            return Ok(());
        }
        let refuse = |field, kind, message: String| Err(Error::new(kind, message).with_field(field));
        let id = "parent_unique_id";
        let Some(below) = below else {
            // Whether it is read without a parent that it names is not for the image to decide.
            if self.references.backing.is_some() {
                return Ok(());
            }
            let message =
                "a differencing VHD is read with its parent, and this one does not say where that is";
            return refuse(id, ErrorKind::UnsupportedFeature, message.to_owned());
        };
        let Some(parent) = footer_of(below) else {
            let message = format!("the parent of a differencing VHD is one, too, not {}", below.format());
            return refuse(id, ErrorKind::Chain, message);
        };
        let header = self.header.lock();
        if parent.uuid() != header.parent_uuid() {
            let message = format!(
                "its parent has the UUID {:032x}, but the image below has {:032x}: it is another one",
                u128::from_be_bytes(header.parent_uuid()),
                u128::from_be_bytes(parent.uuid())
            );
            return refuse(id, ErrorKind::Chain, message);
        }
        // When a file was changed is lost as it is copied: what the parent says of itself is held against the child.
        let (known, made) = (header.parent_time_stamp(), parent.time_stamp());
        if known != 0 && made > known.saturating_add(CLOCKS) {
            let message = format!(
                "its parent was last changed {known} seconds after 2000, but the image below was made {made} seconds after it: it is another one"
            );
            return refuse("parent_time_stamp", ErrorKind::Chain, message);
        }
        Ok(())
    }

    fn content_id(&self) -> Option<String> {
        Some(ParentId::of(&self.footer.lock()).to_string())
    }

    /// Of a dynamic disk all sectors of a block count, as for QEMU: those that were never written are zero.
    fn bitmaps(&self) -> Option<&SectorBitmaps> {
        self.bitmaps.as_ref()
    }

    fn check(layer: &Vpc, repair: Option<Repair>, max_findings: usize, job: &Job) -> Result<CheckReport> {
        check(layer, repair, max_findings, job)
    }

    /// All sectors of a new block are there; of a differencing disk, none. A footer ends the file at any time, so that a guest's bytes
    /// never do.
    fn fresh(&self, storage: &dyn Storage, place: u64, last: bool, whole: bool) -> Result<()> {
        let there = if whole || !self.is_differencing() { 0xff } else { 0 };
        let bitmap = vec![there; self.layout.lead as usize];
        storage.write_all_at(Mem::from(&bitmap[..]), place)?;
        if last { self.write_footer(storage, place + self.layout.stride()) } else { Ok(()) }
    }

    /// Programs that look at bitmaps take a sector for zero whose bit is not set.
    fn touch(&self, storage: &dyn Storage, index: u32, place: u64) -> Result<()> {
        let mut complete = self.complete.lock();
        if complete.contains(&index) {
            return Ok(());
        }
        let mut bitmap = vec![0; self.bitmap_bytes()];
        storage.read_padded_at(MemMut::from(&mut bitmap[..]), place)?;
        if bitmap.iter().any(|byte| *byte != 0xff) {
            bitmap.fill(0xff);
            storage.write_all_at(Mem::from(&bitmap[..]), place)?;
        }
        complete.insert(index);
        Ok(())
    }

    fn resized(&self, size: u64) -> Result<()> {
        judge_size(&self.footer.lock(), size)
    }

    /// The larger table is one for either disk, and the copy of the footer at the start decides. The one at the end can lie where blocks
    /// were that are given up: it is written when nothing names them.
    fn resize(&self, storage: &dyn Storage, size: u64, entries: u32, end: u64) -> Result<()> {
        let footer = self.footer();
        let resized = footer.resized(size, geometry_for(&footer, size));
        if size > footer.virtual_size() {
            self.write_entries(storage, entries)?;
            *self.footer.lock() = resized;
            self.write_footer(storage, 0)?;
            storage.flush()?;
        } else {
            *self.footer.lock() = resized;
            self.write_footer(storage, 0)?;
            storage.flush()?;
            self.write_entries(storage, entries)?;
        }
        self.end_with_footer(storage, end)
    }

    fn finish(&self, storage: &dyn Storage, end: Option<u64>) -> Result<()> {
        match end {
            Some(end) => self.end_with_footer(storage, end),
            None => Ok(()),
        }
    }
}
