//! An open image: a layer of a chain. What it names is opened by nobody here.

mod check;
mod coming;
mod extent;
mod grains;
mod inflate;
mod resize;
mod tables;
mod write;
mod writing;

use std::any::Any;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use qcow2_core::check::CheckLayer;
use qcow2_core::disk::{DiskOptions, WriteLayer};
use qcow2_core::layer::{
    BackingReference, ExtentReference, Holes, Layer, Place, PlanBuilder, References, Segment, SegmentKind,
};
use qcow2_core::{Error, ErrorKind, MemMut, Result, Storage, StorageExt, check_limit};

use self::coming::Coming;
use self::extent::{Data, Extent};
use self::grains::{Grains, front, hosted};
use self::inflate::Inflated;
use self::tables::TableCache;
use self::writing::Writing;
use crate::descriptor::{self, Access, Descriptor, ExtentLine, ExtentType, NO_PARENT};
use crate::fields::{SECTOR, invalid};
use crate::{cowd, sesparse, sparse};

/// How to open an image. Sizes are bytes.
#[derive(Debug, Clone)]
pub struct OpenOptions {
    /// Largest virtual size.
    pub max_virtual_size: u64,
    /// Largest grain directory, which is loaded as a whole.
    pub max_metadata_bytes: u64,
    /// Most bytes of grain tables to cache, as they are in memory. Default: 32 MiB.
    pub l2_cache_bytes: Option<u64>,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self { max_virtual_size: i64::MAX as u64, max_metadata_bytes: 128 << 20, l2_cache_bytes: None }
    }
}

/// An image without its parent. Its extents are attached one by one, but for one that is in the image's own file; what is not
/// attached cannot be read.
#[derive(Debug)]
pub struct Vmdk {
    storage: Arc<dyn Storage>,
    descriptor: Descriptor,
    /// Where the descriptor may be in the file.
    descriptor_room: Range<u64>,
    /// The header of the file, where the extent is in it.
    own: Option<sparse::Header>,
    extents: Vec<Extent>,
    tables: TableCache,
    inflated: Inflated,
    options: OpenOptions,
    writing: Option<Writing>,
    /// Bytes of the disk below, as far as one is known.
    below: AtomicU64,
}

/// An extent as it is, for who shows it.
#[derive(Debug, Clone, Copy)]
pub struct ExtentInfo<'a> {
    /// Its file, where it is open.
    pub storage: Option<&'a Arc<dyn Storage>>,
    /// Its line in the descriptor.
    pub line: &'a ExtentLine,
    /// The image's own file holds it.
    pub own: bool,
    /// Bytes of the disk.
    pub size: u64,
    /// Whether its grains are compressed.
    pub compressed: bool,
    /// Bytes of a grain.
    pub grain: Option<u64>,
}

impl Vmdk {
    /// Opens the image in `storage`.
    ///
    /// # Errors
    /// `InvalidHeader`, `UnsupportedFeature`, `Limit` with the field at fault; `Corrupt` for a grain directory that is not in the
    /// file; `Io`.
    pub fn open(storage: Arc<dyn Storage>, options: &OpenOptions) -> Result<Self> {
        let bytes = front(&*storage, 0, sparse::HEADER_BYTES)?;
        let located = |e| storage.located(e);
        if bytes.starts_with(&sparse::MAGIC) {
            let header = sparse::Header::parse(&bytes).map_err(located)?;
            let (descriptor, room) = embedded(&*storage, &header).map_err(located)?;
            if header.is_wrapper() {
                return Self::apart(storage, descriptor, room, options);
            }
            let coming = Coming::suits(&*storage, &header);
            let header = if coming { header } else { hosted(&*storage, &bytes).map_err(located)? };
            return Self::whole(storage, descriptor, room, header, options);
        }
        if bytes.starts_with(&cowd::MAGIC) || bytes.starts_with(&sesparse::MAGIC) {
            let message = "this is an extent of a disk: open the descriptor that names it";
            return Err(located(
                Error::new(ErrorKind::UnsupportedFeature, message).with_field("magicNumber"),
            ));
        }
        let length = storage.size()?;
        if bytes.starts_with(descriptor::MARK) {
            check_limit("descriptor", length, descriptor::MAX_BYTES).map_err(located)?;
        }
        if length > descriptor::MAX_BYTES {
            let message = format!(
                "not a VMDK image: no magic number, and {length} bytes are too many for a descriptor"
            );
            return Err(located(Error::new(ErrorKind::InvalidHeader, message).with_field("magicNumber")));
        }
        let text = front(&*storage, 0, length as usize)?;
        let descriptor = Descriptor::parse(&text).map_err(located)?;
        Self::apart(storage, descriptor, 0..descriptor::MAX_BYTES, options)
    }

    /// The image whose extents are in other files.
    fn apart(
        storage: Arc<dyn Storage>,
        descriptor: Descriptor,
        room: Range<u64>,
        options: &OpenOptions,
    ) -> Result<Self> {
        let lines = descriptor.extents.iter().filter(|line| line.sectors > 0).cloned();
        let extents = extent::placed(lines.map(|line| {
            let data = if line.kind == ExtentType::Zero { Data::Zero } else { Data::Missing };
            (line, data)
        }));
        Self::new(storage, descriptor, room, None, extents, options)
    }

    /// The image that is one file.
    fn whole(
        storage: Arc<dyn Storage>,
        descriptor: Descriptor,
        room: Range<u64>,
        header: sparse::Header,
        options: &OpenOptions,
    ) -> Result<Self> {
        let coming = header.is_at_end();
        // The front one does not say where the directory is, which nobody asks for then.
        let directory = if coming { 0 } else { header.directory };
        let geometry = sparse::Header { directory, ..header }.geometry().map_err(|e| storage.located(e))?;
        let listed = descriptor.extents.len();
        if listed > 1 {
            let reason = "the file itself is the only extent of a disk whose descriptor is inside it";
            return Err(storage.located(invalid(ErrorKind::InvalidHeader, "extents", listed, reason)));
        }
        let grains = match coming {
            true => Grains::coming(
                Arc::clone(&storage),
                geometry,
                Coming::new(header, options.max_metadata_bytes),
            ),
            false => Grains::with_geometry(Arc::clone(&storage), geometry, options)?,
        };
        // The header counts, as with QEMU: the line is the descriptor's to be wrong.
        let line = ExtentLine {
            access: descriptor.extents.first().map_or(Access::ReadWrite, |line| line.access),
            sectors: geometry.capacity,
            kind: ExtentType::Sparse,
            filename: descriptor.extents.first().and_then(|line| line.filename.clone()),
            offset: 0,
        };
        let extents = extent::placed([(line, Data::Grains(Box::new(grains)))]);
        Self::new(storage, descriptor, room, Some(header), extents, options)
    }

    fn new(
        storage: Arc<dyn Storage>,
        descriptor: Descriptor,
        descriptor_room: Range<u64>,
        own: Option<sparse::Header>,
        extents: Vec<Extent>,
        options: &OpenOptions,
    ) -> Result<Self> {
        let vmdk = Self {
            storage,
            descriptor,
            descriptor_room,
            own,
            extents,
            tables: TableCache::new(options.l2_cache_bytes),
            inflated: Inflated::new(),
            options: options.clone(),
            writing: None,
            below: AtomicU64::new(0),
        };
        check_limit("size", vmdk.virtual_size(), options.max_virtual_size)
            .map_err(|e| vmdk.storage.located(e))?;
        Ok(vmdk)
    }

    /// The descriptor as it was read.
    pub fn descriptor(&self) -> &Descriptor {
        &self.descriptor
    }

    /// Of what kind the disk is, as QEMU says it: what a file with grains is shows in its header.
    pub fn create_type(&self) -> &str {
        match &self.own {
            Some(header) if header.is_compressed() => "streamOptimized",
            Some(_) => "monolithicSparse",
            None => &self.descriptor.create_type,
        }
    }

    /// The content identifier as it is now.
    pub fn cid(&self) -> u32 {
        self.writing.as_ref().and_then(Writing::cid).unwrap_or(self.descriptor.cid)
    }

    /// The extents, in guest order.
    pub fn extents(&self) -> impl Iterator<Item = ExtentInfo<'_>> {
        self.extents.iter().map(|extent| {
            let geometry = extent.grains().map(Grains::geometry);
            ExtentInfo {
                storage: extent.storage(),
                line: &extent.line,
                own: self.own.is_some(),
                size: extent.size(),
                compressed: geometry.is_some_and(|geometry| geometry.compressed),
                grain: geometry.map(|geometry| geometry.grain_bytes()),
            }
        })
    }

    /// The extents from the one with the guest byte `at` on.
    fn from(&self, at: u64) -> impl Iterator<Item = (usize, &Extent)> {
        let first = self.extents.partition_point(|extent| extent.end() <= at);
        self.extents.iter().enumerate().skip(first)
    }

    fn not_open(&self, extent: &Extent) -> Error {
        let name = String::from_utf8_lossy(extent.line.filename.as_deref().unwrap_or_default()).into_owned();
        let message = match extent.line.access {
            Access::None => format!("the descriptor allows no access to the extent '{name}'"),
            _ => format!("the extent '{name}' was not opened"),
        };
        self.storage.located(Error::new(ErrorKind::ReferenceDenied, message).with_field("extent"))
    }

    fn read_compressed(&self, start: u64, host: u64, mut buf: MemMut<'_>) -> Result<()> {
        let found =
            self.from(start).next().and_then(|(index, extent)| Some((index, extent, extent.grains()?)));
        let Some((index, extent, grains)) = found else {
            return Err(Error::new(ErrorKind::Internal, "a compressed grain is none"));
        };
        let grain = grains.geometry().grain_bytes();
        let at = start - extent.start;
        let inside = (at % grain) as usize;
        // The last one may hold no more than the disk has.
        let held = grain.min(extent.size() - (at - at % grain)) as usize;
        let short = |length: usize| {
            let message = format!("a compressed grain holds {length} bytes, not {held}");
            let error = Error::new(ErrorKind::Corrupt, message).with_field("grain").with_offset(host);
            Err(grains.storage.located(error))
        };
        let whole = inside == 0 && buf.len() as u64 == grain;
        let stream = grains.stream(host);
        match buf.exclusive() {
            Some(bytes) if whole => match inflate::run(stream, bytes)? {
                length if length < held => short(length),
                _ => grains.taken(host),
            },
            _ => {
                let bytes = self.inflated.get(index, stream)?;
                if bytes.len() < held {
                    return short(bytes.len());
                }
                buf.copy_from(bytes.get(inside..).unwrap_or_default());
                Ok(())
            }
        }
    }

    /// The files in which the disk is, each once, and how: the numbers of its extents.
    fn named(&self) -> impl Iterator<Item = (usize, &Extent)> {
        let is_named = |extent: &Extent| {
            self.own.is_none() && extent.line.filename.is_some() && extent.line.access != Access::None
        };
        self.extents.iter().enumerate().filter(move |(_, extent)| is_named(extent))
    }
}

/// The descriptor inside a sparse extent, and the room for it.
fn embedded(storage: &dyn Storage, header: &sparse::Header) -> Result<(Descriptor, Range<u64>)> {
    if header.descriptor_offset == 0 || header.descriptor_size == 0 {
        let message =
            "the file has no descriptor: it is an extent of a disk, open the descriptor that names it";
        return Err(Error::new(ErrorKind::UnsupportedFeature, message).with_field("descriptorOffset"));
    }
    check_limit("descriptorOffset", header.descriptor_offset, i64::MAX as u64 / SECTOR)?;
    let start = header.descriptor_offset * SECTOR;
    let length = header.descriptor_size.saturating_mul(SECTOR);
    check_limit("descriptorSize", length, descriptor::MAX_BYTES + 1)?;
    let text = front(storage, start, length as usize)?;
    Ok((Descriptor::parse(&text)?, start..start + length))
}

impl Layer for Vmdk {
    fn format(&self) -> &'static str {
        "vmdk"
    }

    fn virtual_size(&self) -> u64 {
        self.extents.last().map_or(0, Extent::end)
    }

    fn unit(&self) -> Option<u64> {
        self.extents.iter().filter_map(Extent::grains).map(|grains| grains.geometry().grain_bytes()).min()
    }

    fn takes_backing(&self) -> bool {
        true
    }

    fn references(&self) -> References {
        let backing = self.descriptor.parent.clone();
        let extents = self.named().map(|(_, extent)| ExtentReference {
            filename: extent.line.filename.clone().unwrap_or_default(),
            writable: extent.line.access == Access::ReadWrite,
        });
        References {
            backing: backing.map(|filename| BackingReference { filename, format: Some(b"vmdk".to_vec()) }),
            data_file: None,
            extents: extents.collect(),
        }
    }

    fn storage(&self) -> &Arc<dyn Storage> {
        &self.storage
    }

    fn files(&self) -> Vec<&Arc<dyn Storage>> {
        let mut files = vec![&self.storage];
        let apart = self.extents.iter().filter(|_| self.own.is_none());
        files.extend(apart.filter_map(Extent::storage));
        files
    }

    fn file(&self, index: u32) -> Option<&Arc<dyn Storage>> {
        let extent = (index as usize).checked_sub(1)?;
        self.extents.get(extent)?.storage()
    }

    fn plan(&self, range: Range<u64>, segments: &mut Vec<Segment>) -> Result<()> {
        let mut plan = PlanBuilder::new(segments);
        for (index, extent) in self.from(range.start) {
            let (start, end) = (range.start.max(extent.start), range.end.min(extent.end()));
            if start >= end {
                break;
            }
            let inside = start - extent.start..end - extent.start;
            let stored = |host| SegmentKind::Data(Place { file: index as u32 + 1, host });
            match &extent.data {
                Data::Zero => plan.push(start, end - start, SegmentKind::Zero(None)),
                Data::Missing => plan.push(start, end - start, stored(inside.start)),
                Data::Plain(_) => {
                    plan.push(start, end - start, stored(extent.line.offset * SECTOR + inside.start));
                }
                Data::Grains(grains) => grains.plan(&self.tables, index, inside, extent.start, &mut plan)?,
            }
        }
        Ok(())
    }

    fn read_segment(&self, segment: &Segment, buf: MemMut<'_>) -> Result<()> {
        match segment.kind {
            SegmentKind::Data(place) => match self.file(place.file) {
                Some(file) => file.read_padded_at(buf, place.host),
                None => match self.from(segment.start).next() {
                    Some((_, extent)) => Err(self.not_open(extent)),
                    None => Err(Error::new(ErrorKind::Internal, "a segment of no extent was read")),
                },
            },
            SegmentKind::Opaque(token) => self.read_compressed(segment.start, token.0, buf),
            SegmentKind::Zero(_) | SegmentKind::Unallocated(_) => {
                Err(Error::new(ErrorKind::Internal, "a segment without bytes was read"))
            }
        }
    }

    fn attach_extent(&mut self, index: usize, file: Arc<dyn Storage>) -> Result<()> {
        let number = self.named().nth(index).map(|(number, _)| number);
        let Some(number) = number else {
            return Err(Error::new(ErrorKind::Internal, format!("there is no extent {index} to attach")));
        };
        self.refuse_again(number, &*file)?;
        let is_last = number + 1 == self.extents.len();
        if let Some(extent) = self.extents.get_mut(number) {
            extent.attach(file, is_last, &self.options)?;
        }
        Ok(())
    }

    fn content_id(&self) -> Option<String> {
        Some(self.cid().to_string())
    }

    fn judge_below(&self, below: Option<&dyn Layer>) -> Result<()> {
        let Some(below) = below else { return Ok(()) };
        self.below.store(below.virtual_size(), Ordering::Release);
        let parent = (below as &dyn Any).downcast_ref::<Self>();
        let reason = match parent {
            // QEMU, too, takes no other parent: nothing tells whether it is the same as it was.
            None => format!("its parent is a {} image, which has no CID", below.format()),
            Some(parent) if parent.cid() == self.descriptor.parent_cid => return Ok(()),
            Some(parent) => format!(
                "its parent changed since, or is another one: it has CID {:08x}, and parentCID is {:08x}",
                parent.cid(),
                self.descriptor.parent_cid
            ),
        };
        Err(self.storage.located(Error::new(ErrorKind::Chain, reason).with_field("parentCID")))
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
        let mut fresh = Self::open(Arc::clone(&self.storage), &self.options)?;
        let numbers: Vec<usize> = self.named().map(|(number, _)| number).collect();
        for (index, number) in numbers.into_iter().enumerate() {
            if let Some(file) = self.extents.get(number).and_then(Extent::storage) {
                fresh.attach_extent(index, Arc::clone(file))?;
            }
        }
        Ok(Box::new(fresh))
    }

    fn complete(&self) -> Result<()> {
        self.extents.iter().filter_map(Extent::grains).try_for_each(Grains::complete)
    }

    fn absent_from(&self, at: u64) -> u64 {
        let Some((_, extent)) = self.from(at).next() else { return 0 };
        extent.grains().map_or(0, |grains| grains.absent_from(at - extent.start))
    }

    fn holes(&self) -> Result<Holes> {
        let plain = |extent: &Extent| matches!(extent.data, Data::Plain(_) | Data::Zero);
        // A hole of a flat extent is allocated all the same, as QEMU has it.
        Ok(if self.extents.iter().all(plain) { Holes::Preallocated } else { Holes::Ignored })
    }
}

impl Vmdk {
    /// Refuses a file that the disk is made of already: its bytes would be in two places of the disk. Plain extents may lie one
    /// behind the other in one file.
    fn refuse_again(&self, number: usize, file: &dyn Storage) -> Result<()> {
        let Some(identity) = file.identity() else { return Ok(()) };
        let line = self.extents.get(number).map(|extent| &extent.line);
        let apart = |a: &ExtentLine, b: &ExtentLine| {
            let plain = a.kind.is_plain() && b.kind.is_plain();
            plain && (a.offset + a.sectors <= b.offset || b.offset + b.sectors <= a.offset)
        };
        let others = self.extents.iter().enumerate().filter(|(other, _)| *other != number);
        let twice = others
            .filter(|(_, other)| other.storage().is_some_and(|s| s.identity().as_ref() == Some(&identity)));
        let clash =
            twice.map(|(_, other)| &other.line).any(|other| !line.is_some_and(|line| apart(line, other)));
        if !clash && self.storage.identity().as_ref() != Some(&identity) {
            return Ok(());
        }
        let message = "the disk is made of this file already: an extent names it again";
        Err(file.located(Error::new(ErrorKind::Chain, message).with_field("extent")))
    }

    /// Whether it has a parent.
    pub fn has_parent(&self) -> bool {
        self.descriptor.parent.is_some() || self.descriptor.parent_cid != NO_PARENT
    }
}
