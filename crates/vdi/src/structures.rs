//! The header: bytes to typed values and back. No I/O.

use qcow2_core::blocks::{Fields, Layout, put};
use qcow2_core::{Error, ErrorKind, Result};

/// Bytes of the header, with what lies in front of the block map.
pub const HEADER_LENGTH: usize = 512;
/// The bytes at [`SIGNATURE_OFFSET`].
pub const SIGNATURE: [u8; 4] = [0x7f, 0x10, 0xda, 0xbe];
/// Where the signature is.
pub const SIGNATURE_OFFSET: usize = 0x40;
/// Block size of new images, and the only one that QEMU reads.
pub const BLOCK_SIZE: u32 = 1 << 20;
/// Block sizes that are read, all powers of two.
pub const BLOCK_SIZES: std::ops::RangeInclusive<u32> = 4096..=256 << 20;
/// Most blocks of an image, which is QEMU's limit.
pub const MAX_BLOCKS: u32 = 0x3fff_ffff;
/// The entry of a block that is not there: zero, or the parent's.
pub const FREE: u32 = 0xffff_ffff;
/// The entry of a block that was discarded: zero.
pub const ZERO: u32 = 0xffff_fffe;

/// Bytes that one entry of the block map has.
const ENTRY: u64 = 4;
const VERSION_1_1: u32 = 0x0001_0001;
const SECTOR: u32 = 512;
/// What QEMU says that its headers have.
const HEADER_SIZE_FIELD: u32 = 0x180;
/// The first bytes are text for whoever looks at the file.
const TEXT: &[u8] = b"<<< QEMU VM Virtual Disk Image >>>\n";

const VERSION: usize = 0x44;
const HEADER_SIZE: usize = 0x48;
const IMAGE_TYPE: usize = 0x4c;
const OFFSET_BMAP: usize = 0x154;
const OFFSET_DATA: usize = 0x158;
const SECTOR_SIZE: usize = 0x168;
/// Where the size of the disk is.
pub(crate) const DISK_SIZE: usize = 0x170;
const BLOCK_SIZE_FIELD: usize = 0x178;
const BLOCK_EXTRA: usize = 0x17c;
const BLOCKS_IN_IMAGE: usize = 0x180;
/// Where the number of blocks with a place is.
pub(crate) const BLOCKS_ALLOCATED: usize = 0x184;
const UUID_IMAGE: usize = 0x188;
const UUID_LAST_SNAP: usize = 0x198;
const UUID_LINK: usize = 0x1a8;
const UUID_PARENT: usize = 0x1b8;

/// A UUID as it lies in the file.
pub type Uuid = [u8; 16];

/// The kind of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ImageType {
    /// 1: blocks have a place when they are written to.
    Dynamic,
    /// 2: all blocks have their place from the start.
    Static,
    /// 3, 4: what has no block is in another image.
    Differencing,
}

/// A header that keeps to the limits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// The kind.
    pub image_type: ImageType,
    /// Where the block map is, in bytes.
    pub offset_bmap: u32,
    /// Where the first block is, in bytes.
    pub offset_data: u32,
    /// Size of the disk in bytes, as it is stored: see [`Header::virtual_size`].
    pub disk_size: u64,
    /// Bytes of a block.
    pub block_size: u32,
    /// Bytes in front of each block.
    pub block_extra: u32,
    /// Entries of the block map.
    pub blocks_in_image: u32,
    /// Blocks with a place: new ones follow behind them.
    pub blocks_allocated: u32,
    /// The image's own UUID.
    pub uuid_image: Uuid,
    /// Changes whenever the disk may have changed.
    pub uuid_last_snap: Uuid,
    /// The parent's own UUID; zero without one.
    pub uuid_link: Uuid,
    /// The parent's [`Header::uuid_last_snap`]; zero without one.
    pub uuid_parent: Uuid,
}

fn invalid(kind: ErrorKind, field: &'static str, value: impl std::fmt::Display, reason: &str) -> Error {
    Error::new(kind, format!("invalid {field} {value}: {reason}")).with_field(field)
}

impl Header {
    /// Reads the header at the start of `bytes`.
    ///
    /// # Errors
    /// `InvalidHeader` with the field at fault; `UnsupportedFeature` for what is another version, or read by nobody.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let Some(bytes) = bytes.get(..HEADER_LENGTH) else {
            let message =
                format!("the header is truncated: {} of {HEADER_LENGTH} bytes are there", bytes.len());
            return Err(Error::new(ErrorKind::InvalidHeader, message).with_field("header"));
        };
        let fields = Fields::little_endian(bytes);
        if fields.bytes::<4>(SIGNATURE_OFFSET) != SIGNATURE {
            let message = "not a VDI image: the file has no VDI signature at 0x40";
            return Err(Error::new(ErrorKind::InvalidHeader, message).with_field("signature"));
        }
        let version = fields.u32(VERSION);
        if version != VERSION_1_1 {
            let message = format!("unsupported VDI version {}.{}", version >> 16, version & 0xffff);
            return Err(Error::new(ErrorKind::UnsupportedFeature, message).with_field("version"));
        }
        let (uuid_link, uuid_parent) = (fields.bytes(UUID_LINK), fields.bytes(UUID_PARENT));
        let image_type = match fields.u32(IMAGE_TYPE) {
            3 | 4 => ImageType::Differencing,
            1 | 2 if uuid_link != [0; 16] || uuid_parent != [0; 16] => ImageType::Differencing,
            1 => ImageType::Dynamic,
            2 => ImageType::Static,
            other => {
                let reason = "neither dynamic (1), static (2) nor differencing (4)";
                return Err(invalid(ErrorKind::UnsupportedFeature, "image_type", other, reason));
            }
        };
        let sector_size = fields.u32(SECTOR_SIZE);
        if sector_size != SECTOR {
            return Err(invalid(ErrorKind::UnsupportedFeature, "sector_size", sector_size, "not 512"));
        }
        let header = Self {
            image_type,
            offset_bmap: fields.u32(OFFSET_BMAP),
            offset_data: fields.u32(OFFSET_DATA),
            disk_size: fields.u64(DISK_SIZE),
            block_size: fields.u32(BLOCK_SIZE_FIELD),
            block_extra: fields.u32(BLOCK_EXTRA),
            blocks_in_image: fields.u32(BLOCKS_IN_IMAGE),
            blocks_allocated: fields.u32(BLOCKS_ALLOCATED),
            uuid_image: fields.bytes(UUID_IMAGE),
            uuid_last_snap: fields.bytes(UUID_LAST_SNAP),
            uuid_link,
            uuid_parent,
        };
        header.check()?;
        Ok(header)
    }

    fn check(&self) -> Result<()> {
        use ErrorKind::{InvalidHeader, UnsupportedFeature};
        for (field, offset) in [("offset_bmap", self.offset_bmap), ("offset_data", self.offset_data)] {
            if !offset.is_multiple_of(SECTOR) {
                return Err(invalid(
                    UnsupportedFeature,
                    field,
                    format_args!("{offset:#x}"),
                    "not aligned to 512 bytes",
                ));
            }
        }
        if (self.offset_bmap as usize) < HEADER_LENGTH {
            return Err(invalid(InvalidHeader, "offset_bmap", self.offset_bmap, "inside the header"));
        }
        if !BLOCK_SIZES.contains(&self.block_size) || !self.block_size.is_power_of_two() {
            let reason = "no power of two from 4 KiB to 256 MiB";
            return Err(invalid(UnsupportedFeature, "block_size", self.block_size, reason));
        }
        if self.block_extra > self.block_size || !self.block_extra.is_multiple_of(SECTOR) {
            let reason = "not aligned to 512 bytes, or larger than a block";
            return Err(invalid(UnsupportedFeature, "block_extra", self.block_extra, reason));
        }
        if self.blocks_in_image > MAX_BLOCKS {
            return Err(invalid(
                ErrorKind::Limit,
                "blocks_in_image",
                self.blocks_in_image,
                "more than 0x3fffffff",
            ));
        }
        let capacity = u64::from(self.blocks_in_image) * u64::from(self.block_size);
        if self.disk_size > capacity || self.virtual_size() > capacity {
            let reason = "larger than the blocks of the block map";
            return Err(invalid(InvalidHeader, "disk_size", self.disk_size, reason));
        }
        if u64::from(self.offset_data) < self.bmap_end() {
            return Err(invalid(InvalidHeader, "offset_data", self.offset_data, "inside the block map"));
        }
        Ok(())
    }

    /// Size of the disk in bytes: whole sectors, as QEMU has it.
    #[must_use]
    pub fn virtual_size(&self) -> u64 {
        self.disk_size.checked_next_multiple_of(SECTOR.into()).unwrap_or(u64::MAX)
    }

    /// Whether it is to be read with its parent.
    #[must_use]
    pub fn is_differencing(&self) -> bool {
        self.image_type == ImageType::Differencing
    }

    /// Behind the block map.
    #[must_use]
    pub fn bmap_end(&self) -> u64 {
        u64::from(self.offset_bmap) + u64::from(self.blocks_in_image) * ENTRY
    }

    /// Where things are in the image.
    #[must_use]
    pub fn layout(&self) -> Layout {
        let place = u64::from(self.block_extra) + u64::from(self.block_size);
        Layout {
            size: self.virtual_size(),
            block: self.block_size.into(),
            lead: self.block_extra.into(),
            table: self.offset_bmap.into(),
            entries: self.blocks_in_image,
            big_endian: false,
            origin: self.offset_data.into(),
            grain: place,
            absent: FREE,
            zero: Some(ZERO),
            data: self.offset_data.into(),
            // All places are behind the structures.
            metadata: Vec::new(),
        }
    }

    /// The header of a new image with blocks of [`BLOCK_SIZE`] bytes for a disk of `size` bytes.
    ///
    /// # Errors
    /// `Limit` for a disk that is too large.
    pub fn new(size: u64, image_type: ImageType, uuids: [Uuid; 2]) -> Result<Self> {
        let blocks = size.div_ceil(BLOCK_SIZE.into());
        let Some(blocks) = u32::try_from(blocks).ok().filter(|blocks| *blocks <= MAX_BLOCKS) else {
            let most = u64::from(MAX_BLOCKS) * u64::from(BLOCK_SIZE);
            let message = format!("a VDI image has a disk of at most {most} bytes, not of {size}");
            return Err(Error::new(ErrorKind::Limit, message).with_field("size"));
        };
        let map = (blocks * ENTRY as u32).next_multiple_of(SECTOR);
        Ok(Self {
            image_type,
            offset_bmap: HEADER_LENGTH as u32,
            offset_data: HEADER_LENGTH as u32 + map,
            disk_size: size,
            block_size: BLOCK_SIZE,
            block_extra: 0,
            blocks_in_image: blocks,
            blocks_allocated: if image_type == ImageType::Static { blocks } else { 0 },
            uuid_image: uuids[0],
            uuid_last_snap: uuids[1],
            uuid_link: [0; 16],
            uuid_parent: [0; 16],
        })
    }

    /// The header as bytes.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; HEADER_LENGTH] {
        let mut bytes = [0; HEADER_LENGTH];
        let kind: u32 = match self.image_type {
            ImageType::Dynamic => 1,
            ImageType::Static => 2,
            ImageType::Differencing => 4,
        };
        put(&mut bytes, 0, TEXT);
        put(&mut bytes, SIGNATURE_OFFSET, &SIGNATURE);
        for (at, value) in [
            (VERSION, VERSION_1_1),
            (HEADER_SIZE, HEADER_SIZE_FIELD),
            (IMAGE_TYPE, kind),
            (OFFSET_BMAP, self.offset_bmap),
            (OFFSET_DATA, self.offset_data),
            (SECTOR_SIZE, SECTOR),
            (BLOCK_SIZE_FIELD, self.block_size),
            (BLOCK_EXTRA, self.block_extra),
            (BLOCKS_IN_IMAGE, self.blocks_in_image),
            (BLOCKS_ALLOCATED, self.blocks_allocated),
        ] {
            put(&mut bytes, at, &value.to_le_bytes());
        }
        put(&mut bytes, DISK_SIZE, &self.disk_size.to_le_bytes());
        for (at, uuid) in [
            (UUID_IMAGE, self.uuid_image),
            (UUID_LAST_SNAP, self.uuid_last_snap),
            (UUID_LINK, self.uuid_link),
            (UUID_PARENT, self.uuid_parent),
        ] {
            put(&mut bytes, at, &uuid);
        }
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn header() -> Header {
        Header::new(3 << 20, ImageType::Dynamic, [[1; 16], [2; 16]]).unwrap()
    }

    fn with(at: usize, field: &[u8]) -> Vec<u8> {
        let mut bytes = header().to_bytes().to_vec();
        bytes[at..at + field.len()].copy_from_slice(field);
        bytes
    }

    #[test]
    fn a_header_is_read_as_it_was_written() {
        let header = header();
        assert_eq!(Header::parse(&header.to_bytes()).unwrap(), header);
        assert_eq!((header.offset_data, header.blocks_in_image), (1024, 3));
        let layout = header.layout();
        layout.check().unwrap();
        assert_eq!(
            (layout.size, layout.stride(), layout.entry_of(1024 + (2 << 20))),
            (3 << 20, 1 << 20, Some(2))
        );
    }

    #[test]
    fn limits() {
        use ErrorKind::{InvalidHeader, Limit, UnsupportedFeature};
        for (at, field, expected) in [
            (SIGNATURE_OFFSET, &[0u8; 4][..], (InvalidHeader, "signature")),
            (VERSION, &[1, 0, 0, 0], (UnsupportedFeature, "version")),
            (IMAGE_TYPE, &[5], (UnsupportedFeature, "image_type")),
            (IMAGE_TYPE, &[0], (UnsupportedFeature, "image_type")),
            (OFFSET_BMAP, &[1, 2], (UnsupportedFeature, "offset_bmap")),
            (OFFSET_BMAP, &[0, 0], (InvalidHeader, "offset_bmap")),
            (OFFSET_DATA, &[1, 4], (UnsupportedFeature, "offset_data")),
            (OFFSET_DATA, &[0, 2], (InvalidHeader, "offset_data")),
            (SECTOR_SIZE, &[0, 4], (UnsupportedFeature, "sector_size")),
            (BLOCK_SIZE_FIELD, &[0, 0, 0x30], (UnsupportedFeature, "block_size")),
            (BLOCK_SIZE_FIELD, &[0; 4], (UnsupportedFeature, "block_size")),
            (BLOCK_EXTRA, &[1], (UnsupportedFeature, "block_extra")),
            (BLOCKS_IN_IMAGE, &[2], (InvalidHeader, "disk_size")),
            (BLOCKS_IN_IMAGE, &[0xff; 4], (Limit, "blocks_in_image")),
            (DISK_SIZE, &[0xff; 8], (InvalidHeader, "disk_size")),
            (DISK_SIZE, &[1, 0, 0x30], (InvalidHeader, "disk_size")),
        ] {
            let error = Header::parse(&with(at, field)).unwrap_err();
            assert_eq!((error.kind(), error.field()), (expected.0, Some(expected.1)), "{at:#x} {field:x?}");
        }
        for length in 0..HEADER_LENGTH {
            assert_eq!(Header::parse(&header().to_bytes()[..length]).unwrap_err().kind(), InvalidHeader);
        }
        for (at, field) in [(IMAGE_TYPE, 4), (UUID_LINK, 1), (UUID_PARENT, 1)] {
            assert!(Header::parse(&with(at, &[field])).unwrap().is_differencing());
        }
        // A disk that ends inside a sector.
        assert_eq!(Header::parse(&with(DISK_SIZE, &[1, 0, 0])).unwrap().virtual_size(), 512);
        assert_eq!(Header::new(u64::MAX, ImageType::Static, [[0; 16]; 2]).unwrap_err().kind(), Limit);
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_header_or_an_error(
            noise in prop::collection::vec(any::<u8>(), 0..600),
            fields in prop::collection::vec((0x44usize..0x1c8, any::<u8>()), 0..6),
        ) {
            let _ = Header::parse(&noise);
            let mut bytes = header().to_bytes();
            for (at, byte) in fields {
                bytes[at] = byte;
            }
            if let Ok(header) = Header::parse(&bytes) {
                header.layout().check().unwrap();
                prop_assert!(header.blocks_in_image <= MAX_BLOCKS);
                prop_assert!(header.virtual_size() <= u64::from(header.blocks_in_image) * u64::from(header.block_size));
            }
        }
    }
}
