//! An open image: what is special about VDI.

use std::sync::Arc;

use qcow2_core::blocks::{BlockLayer, Layout, OpenOptions, Scheme};
use qcow2_core::check::{CheckReport, Repair};
use qcow2_core::layer::{BackingReference, Holes, References, SegmentKind};
use qcow2_core::{Error, ErrorKind, Job, Layer, Mem, MemMut, Result, Storage, StorageExt, check_limit};

use crate::check::check;
use crate::parent::ParentId;
use crate::structures::{BLOCKS_ALLOCATED, DISK_SIZE, HEADER_LENGTH, Header, ImageType, MAX_BLOCKS};

/// An open image.
pub type Vdi = BlockLayer<VdiScheme>;

/// What is special about VDI.
#[derive(Debug)]
pub struct VdiScheme {
    header: Header,
    layout: Layout,
}

/// Opens the image in `storage`.
///
/// # Errors
/// As [`Header::parse`]; `Limit`; `Corrupt` for a block map that is not in the file; `Io`.
pub fn open(storage: Arc<dyn Storage>, options: &OpenOptions) -> Result<Vdi> {
    let scheme = VdiScheme::new(read_header(&*storage)?);
    let layout = &scheme.layout;
    check_limit("size", layout.size, options.max_virtual_size)
        .and_then(|()| check_limit("block map", layout.table_bytes(), options.max_metadata_bytes))
        .map_err(|e| storage.located(e))?;
    Vdi::new(storage, scheme, options.cache_bytes)
}

/// The header of the file.
pub(crate) fn read_header(storage: &dyn Storage) -> Result<Header> {
    let mut bytes = [0; HEADER_LENGTH];
    let got = storage.read_up_to_at(MemMut::from(&mut bytes[..]), 0)?;
    Header::parse(bytes.get(..got).unwrap_or_default()).map_err(|e| storage.located(e))
}

impl VdiScheme {
    pub(crate) fn new(header: Header) -> Self {
        Self { layout: header.layout(), header }
    }

    /// The header as it was read.
    #[must_use]
    pub fn header(&self) -> &Header {
        &self.header
    }
}

impl Scheme for VdiScheme {
    fn format(&self) -> &'static str {
        "vdi"
    }

    fn entry_name(&self) -> &'static str {
        "block map entry"
    }

    fn layout(&self) -> &Layout {
        &self.layout
    }

    fn absent(&self) -> SegmentKind {
        if self.is_differencing() { SegmentKind::Unallocated(None) } else { SegmentKind::Zero(None) }
    }

    fn holes(&self) -> Holes {
        match self.header.image_type {
            ImageType::Static => Holes::Preallocated,
            ImageType::Dynamic | ImageType::Differencing => Holes::Ignored,
        }
    }

    /// The format names no file: the parent is named by its UUID.
    fn references(&self) -> References {
        let backing = self.is_differencing().then(|| BackingReference {
            filename: format!("uuid:{}", text_of(&self.header.uuid_link)).into_bytes(),
            format: Some(b"vdi".to_vec()),
        });
        References { backing, ..References::default() }
    }

    fn content_id(&self) -> Option<String> {
        Some(ParentId::of(&self.header).to_string())
    }

    fn is_differencing(&self) -> bool {
        self.header.is_differencing()
    }

    fn judge_below(&self, below: Option<&dyn Layer>) -> Result<()> {
        if !self.is_differencing() {
            return Ok(());
        }
        // Whether it is read without its parent is not for the image to decide.
        let Some(below) = below else { return Ok(()) };
        let Some(parent) = Vdi::of(below) else {
            let message =
                format!("the parent of a differencing VDI image is one, too, not {}", below.format());
            return Err(Error::new(ErrorKind::Chain, message).with_field("uuid_link"));
        };
        let found = &parent.scheme().header;
        let pairs = [
            ("uuid_link", self.header.uuid_link, found.uuid_image),
            ("uuid_parent", self.header.uuid_parent, found.uuid_last_snap),
        ];
        for (field, named, has) in pairs {
            if named != has && named != [0; 16] {
                let what = if field == "uuid_link" { "the UUID" } else { "the modification UUID" };
                let message = format!(
                    "its parent has {what} {}, but the image below has {}: it is another one, or was changed since",
                    text_of(&named),
                    text_of(&has)
                );
                return Err(Error::new(ErrorKind::Chain, message).with_field(field));
            }
        }
        Ok(())
    }

    fn check(layer: &Vdi, repair: Option<Repair>, max_findings: usize, job: &Job) -> Result<CheckReport> {
        check(layer, repair, max_findings, job)
    }

    /// New blocks follow behind the number of blocks that the header has: one that is too small would have others write over them.
    fn settle(&self, storage: &dyn Storage, end: u64) -> Result<()> {
        let blocks = (end - self.layout.origin) / self.layout.stride();
        let blocks = u32::try_from(blocks).unwrap_or(u32::MAX);
        storage.write_all_at(Mem::from(&blocks.to_le_bytes()[..]), BLOCKS_ALLOCATED as u64)
    }

    fn resized(&self, size: u64) -> Result<()> {
        let most = u64::from(MAX_BLOCKS) * self.layout.block;
        if size <= most {
            return Ok(());
        }
        let message = format!("a VDI image has a disk of at most {most} bytes, not of {size}");
        Err(Error::new(ErrorKind::Limit, message).with_field("size"))
    }

    /// The number of blocks in the header is that of the entries, and where the next block goes.
    fn judge_shrunk(&self, kept: u64, end: u64) -> Result<()> {
        if end <= self.layout.origin + kept * self.layout.stride() {
            return Ok(());
        }
        let message = format!(
            "blocks of the smaller disk would lie behind unused ones, which a VDI image does not have: {kept} of them are left, and the last one ends at {end:#x}: convert its disk into another image"
        );
        Err(Error::new(ErrorKind::UnsupportedFeature, message).with_field("size"))
    }

    /// The size of the disk, the block size and the number of blocks are in one sector.
    fn resize(&self, storage: &dyn Storage, size: u64, entries: u32, end: u64) -> Result<()> {
        let blocks = u32::try_from((end - self.layout.origin) / self.layout.stride()).unwrap_or(u32::MAX);
        let mut bytes = Vec::new();
        bytes.extend(size.to_le_bytes());
        for value in [self.header.block_size, self.header.block_extra, entries, blocks] {
            bytes.extend(value.to_le_bytes());
        }
        storage.write_all_at(Mem::from(&bytes[..]), DISK_SIZE as u64)
    }
}

/// A UUID as VirtualBox shows it: its first three numbers lie in the file in the other byte order.
pub(crate) fn text_of(uuid: &[u8; 16]) -> String {
    let order = [3, 2, 1, 0, 5, 4, 7, 6, 8, 9, 10, 11, 12, 13, 14, 15];
    let mut text = String::new();
    for (position, index) in order.into_iter().enumerate() {
        if [4, 6, 8, 10].contains(&position) {
            text.push('-');
        }
        let byte = uuid.get(index).copied().unwrap_or(0);
        text.push_str(&format!("{byte:02x}"));
    }
    text
}
