//! The footer and the header of a dynamic disk: bytes to typed values and back. No I/O.

use qcow2_core::blocks::{Fields, Layout, put};
use qcow2_core::{Error, ErrorKind, Result};

/// Bytes of a footer.
pub const FOOTER_LENGTH: usize = 512;
/// Bytes of the footers that Virtual PC wrote before 2004: the last one is missing.
pub const OLD_FOOTER_LENGTH: usize = 511;
/// Bytes of the header of a dynamic disk.
pub const HEADER_LENGTH: usize = 1024;
/// The first bytes of a footer.
pub const COOKIE: [u8; 8] = *b"conectix";
/// The first bytes of a header.
pub const HEADER_COOKIE: [u8; 8] = *b"cxsparse";
/// Most sectors of a disk: 2040 GiB.
pub const MAX_SECTORS: u64 = 0xff00_0000;
/// Most sectors of a fixed disk, which has no table: 32 TiB, what Azure takes.
pub const MAX_FIXED_SECTORS: u64 = (32 << 40) / SECTOR;
/// Bytes of a sector.
pub const SECTOR: u64 = 512;
/// Bytes of a block of new images.
pub const BLOCK_SIZE: u32 = 2 << 20;
/// The BAT entry of a block that is not there.
pub const UNUSED: u32 = 0xffff_ffff;

/// Block sizes that are read, all powers of two.
const BLOCK_SIZES: std::ops::RangeInclusive<u32> = 512..=256 << 20;
const VERSION: u32 = 0x0001_0000;
/// Programs whose disks have the size of their geometry. QEMU marks images that have the exact size as `qem2`.
const BY_GEOMETRY: [[u8; 4]; 2] = [*b"vpc ", *b"qemu"];

const DATA_OFFSET: usize = 16;
const TIMESTAMP: usize = 24;
const CREATOR_APP: usize = 28;
const CREATOR_VERSION: usize = 32;
const CREATOR_OS: usize = 36;
const ORIGINAL_SIZE: usize = 40;
const CURRENT_SIZE: usize = 48;
const CYLINDERS: usize = 56;
const HEADS: usize = 58;
const SECTORS_PER_TRACK: usize = 59;
const DISK_TYPE: usize = 60;
const CHECKSUM: usize = 64;
const UNIQUE_ID: usize = 68;

const TABLE_OFFSET: usize = 16;
const HEADER_VERSION: usize = 24;
const MAX_TABLE_ENTRIES: usize = 28;
const BLOCK_SIZE_FIELD: usize = 32;
const HEADER_CHECKSUM: usize = 36;
const PARENT_UNIQUE_ID: usize = 40;
const PARENT_TIMESTAMP: usize = 56;
const PARENT_NAME: usize = 64;
const LOCATORS: usize = 576;
const LOCATOR_LENGTH: usize = 24;
/// Most units of a parent's file name: a zero is behind it.
pub const MAX_PARENT_NAME: usize = 255;
/// Most bytes of the name behind a locator.
pub const MAX_LOCATED_NAME: u32 = 4096;

/// The kind of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskType {
    /// 2.
    Fixed,
    /// 3.
    Dynamic,
    /// 4.
    Differencing,
}

/// Cylinders, heads and sectors of a track.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// Cylinders.
    pub cylinders: u16,
    /// Heads of a cylinder.
    pub heads: u8,
    /// Sectors of a track.
    pub sectors: u8,
}

impl Geometry {
    /// The largest one: disks that are larger have the exact size.
    pub const LARGEST: Self = Self { cylinders: 65535, heads: 16, sectors: 255 };

    /// Sectors of the disk.
    #[must_use]
    pub fn total(self) -> u64 {
        u64::from(self.cylinders) * u64::from(self.heads) * u64::from(self.sectors)
    }

    /// The geometry of a disk of so many sectors, as the specification's appendix has it: most often a smaller one.
    #[must_use]
    pub fn of(sectors: u64) -> Self {
        let total = sectors.min(Self::LARGEST.total());
        let rows = |per_track: u64| total / per_track;
        let (per_track, heads) = if total >= 65535 * 16 * 63 {
            (255, 16)
        } else {
            let heads = rows(17).div_ceil(1024).max(4);
            if rows(17) < heads * 1024 && heads <= 16 {
                (17, heads)
            } else if rows(31) < 16 * 1024 {
                (31, 16)
            } else {
                (63, 16)
            }
        };
        // All of them are in range: the total is at most that of the largest.
        Self {
            cylinders: u16::try_from(rows(per_track) / heads).unwrap_or(u16::MAX),
            heads: u8::try_from(heads).unwrap_or(u8::MAX),
            sectors: u8::try_from(per_track).unwrap_or(u8::MAX),
        }
    }

    /// The smallest geometry with at least so many sectors, as far as there is one.
    #[must_use]
    pub fn at_least(sectors: u64) -> Self {
        let wanted = sectors.min(Self::LARGEST.total());
        if wanted == 0 {
            return Self { cylinders: 0, heads: 0, sectors: 0 };
        }
        let mut more = 0;
        loop {
            let geometry = Self::of(wanted + more);
            if geometry.total() >= wanted {
                return geometry;
            }
            more += 1;
        }
    }
}

/// A footer that keeps to the limits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Footer {
    bytes: [u8; FOOTER_LENGTH],
    disk_type: DiskType,
}

fn invalid(kind: ErrorKind, field: &'static str, value: impl std::fmt::Display, reason: &str) -> Error {
    Error::new(kind, format!("invalid {field} {value}: {reason}")).with_field(field)
}

/// The one's complement of the sum of all bytes but those of the checksum at `at`.
fn checksum(bytes: &[u8], at: usize) -> u32 {
    let others = bytes.iter().enumerate().filter(|(index, _)| !(at..at + 4).contains(index));
    !others.map(|(_, byte)| u32::from(*byte)).sum::<u32>()
}

impl Footer {
    /// Reads the footer at the start of `bytes`: [`OLD_FOOTER_LENGTH`] of them at least.
    ///
    /// # Errors
    /// `InvalidHeader` with the field at fault; `Corrupt` for one whose checksum is another; `UnsupportedFeature`.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let length = bytes.len().min(FOOTER_LENGTH);
        let mut whole = [0; FOOTER_LENGTH];
        put(&mut whole, 0, bytes.get(..length).unwrap_or_default());
        let fields = Fields::big_endian(&whole);
        if length < OLD_FOOTER_LENGTH || fields.bytes(0) != COOKIE {
            let message = "not a VHD footer: it does not begin with 'conectix'";
            return Err(Error::new(ErrorKind::InvalidHeader, message).with_field("cookie"));
        }
        let (has, is) = (fields.u32(CHECKSUM), checksum(&whole, CHECKSUM));
        if has != is {
            let message = format!("the footer's checksum is {has:#010x}, its bytes have {is:#010x}");
            return Err(Error::new(ErrorKind::Corrupt, message).with_field("checksum"));
        }
        let disk_type = match fields.u32(DISK_TYPE) {
            2 => DiskType::Fixed,
            3 => DiskType::Dynamic,
            4 => DiskType::Differencing,
            other => {
                let reason = "neither fixed (2), dynamic (3) nor differencing (4)";
                return Err(invalid(ErrorKind::UnsupportedFeature, "disk_type", other, reason));
            }
        };
        let footer = Self { bytes: whole, disk_type };
        let (most, reason) = match disk_type {
            DiskType::Fixed => (MAX_FIXED_SECTORS, "a fixed disk has at most 32 TiB"),
            DiskType::Dynamic | DiskType::Differencing => (MAX_SECTORS, "a disk has at most 2040 GiB"),
        };
        if footer.sectors() > most {
            return Err(invalid(ErrorKind::Limit, "current_size", footer.virtual_size(), reason));
        }
        Ok(footer)
    }

    /// The footer of a new disk of `size` bytes, whole sectors, with `geometry`.
    #[must_use]
    pub fn new(
        disk_type: DiskType,
        size: u64,
        geometry: Geometry,
        creator: [u8; 4],
        uuid: [u8; 16],
        seconds: u32,
    ) -> Self {
        let mut bytes = [0; FOOTER_LENGTH];
        let (kind, data_offset) = match disk_type {
            DiskType::Fixed => (2u32, u64::MAX),
            DiskType::Dynamic => (3, FOOTER_LENGTH as u64),
            DiskType::Differencing => (4, FOOTER_LENGTH as u64),
        };
        put(&mut bytes, 0, &COOKIE);
        // A bit that is always set.
        put(&mut bytes, 8, &2u32.to_be_bytes());
        put(&mut bytes, 12, &VERSION.to_be_bytes());
        put(&mut bytes, DATA_OFFSET, &data_offset.to_be_bytes());
        put(&mut bytes, TIMESTAMP, &seconds.to_be_bytes());
        put(&mut bytes, CREATOR_APP, &creator);
        // What QEMU says: Virtual PC 2007 on Windows.
        put(&mut bytes, CREATOR_VERSION, &0x0005_0003u32.to_be_bytes());
        put(&mut bytes, CREATOR_OS, b"Wi2k");
        put(&mut bytes, ORIGINAL_SIZE, &size.to_be_bytes());
        put(&mut bytes, DISK_TYPE, &kind.to_be_bytes());
        put(&mut bytes, UNIQUE_ID, &uuid);
        Self { bytes, disk_type }.resized(size, geometry)
    }

    /// The same with another identity, made so many seconds after 2000.
    #[must_use]
    pub fn made_as(&self, uuid: [u8; 16], seconds: u32) -> Self {
        let mut bytes = self.bytes;
        put(&mut bytes, TIMESTAMP, &seconds.to_be_bytes());
        put(&mut bytes, UNIQUE_ID, &uuid);
        let sum = checksum(&bytes, CHECKSUM);
        put(&mut bytes, CHECKSUM, &sum.to_be_bytes());
        Self { bytes, disk_type: self.disk_type }
    }

    /// The same with another size.
    #[must_use]
    pub fn resized(&self, size: u64, geometry: Geometry) -> Self {
        let mut bytes = self.bytes;
        put(&mut bytes, CURRENT_SIZE, &size.to_be_bytes());
        put(&mut bytes, CYLINDERS, &geometry.cylinders.to_be_bytes());
        put(&mut bytes, HEADS, &[geometry.heads, geometry.sectors]);
        let sum = checksum(&bytes, CHECKSUM);
        put(&mut bytes, CHECKSUM, &sum.to_be_bytes());
        Self { bytes, disk_type: self.disk_type }
    }

    fn fields(&self) -> Fields<'_> {
        Fields::big_endian(&self.bytes)
    }

    /// Its bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8; FOOTER_LENGTH] {
        &self.bytes
    }

    /// The kind of the disk.
    #[must_use]
    pub fn disk_type(&self) -> DiskType {
        self.disk_type
    }

    /// Where the header of a dynamic or differencing disk is.
    #[must_use]
    pub fn data_offset(&self) -> u64 {
        self.fields().u64(DATA_OFFSET)
    }

    /// The program that made the image.
    #[must_use]
    pub fn creator_app(&self) -> [u8; 4] {
        self.fields().bytes(CREATOR_APP)
    }

    /// The size that the footer says, in bytes.
    #[must_use]
    pub fn current_size(&self) -> u64 {
        self.fields().u64(CURRENT_SIZE)
    }

    /// The geometry.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        let fields = self.fields();
        Geometry {
            cylinders: fields.u16(CYLINDERS),
            heads: fields.u8(HEADS),
            sectors: fields.u8(SECTORS_PER_TRACK),
        }
    }

    /// The image's UUID, which its children name.
    #[must_use]
    pub fn uuid(&self) -> [u8; 16] {
        self.fields().bytes(UNIQUE_ID)
    }

    /// When the image was made, in seconds since 2000.
    #[must_use]
    pub fn time_stamp(&self) -> u32 {
        self.fields().u32(TIMESTAMP)
    }

    /// Whether the geometry says how large the disk is.
    #[must_use]
    pub fn is_by_geometry(&self) -> bool {
        BY_GEOMETRY.contains(&self.creator_app()) && self.geometry() != Geometry::LARGEST
    }

    fn sectors(&self) -> u64 {
        if self.is_by_geometry() { self.geometry().total() } else { self.current_size() / SECTOR }
    }

    /// Bytes of the disk.
    #[must_use]
    pub fn virtual_size(&self) -> u64 {
        self.sectors() * SECTOR
    }
}

/// Where a parent may be found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Locator {
    /// What kind of a name it is.
    pub platform: [u8; 4],
    /// Bytes of the name.
    pub length: u32,
    /// Where the name is, in bytes.
    pub offset: u64,
}

impl Locator {
    /// Whole sectors that hold the name, in bytes.
    #[must_use]
    pub fn space(&self) -> u32 {
        self.length.min(MAX_LOCATED_NAME).next_multiple_of(SECTOR as u32)
    }

    /// Where the name is in the file; nothing where there is none.
    #[must_use]
    pub fn range(&self) -> Option<std::ops::Range<u64>> {
        let there = self.platform != [0; 4] && self.length > 0;
        let end = self.offset.checked_add(self.space().into()).filter(|_| there)?;
        Some(self.offset..end)
    }
}

/// The header of a dynamic or differencing disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    bytes: Box<[u8; HEADER_LENGTH]>,
}

impl Header {
    /// Reads the header at the start of `bytes`.
    ///
    /// # Errors
    /// `InvalidHeader`, `Corrupt` for another checksum.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let Some(whole) = bytes.first_chunk::<HEADER_LENGTH>() else {
            let message =
                format!("the header is truncated: {} of {HEADER_LENGTH} bytes are there", bytes.len());
            return Err(Error::new(ErrorKind::InvalidHeader, message).with_field("header"));
        };
        let fields = Fields::big_endian(whole);
        if fields.bytes(0) != HEADER_COOKIE {
            let message = "not the header of a dynamic VHD: it does not begin with 'cxsparse'";
            return Err(Error::new(ErrorKind::InvalidHeader, message).with_field("cookie"));
        }
        let (has, is) = (fields.u32(HEADER_CHECKSUM), checksum(whole, HEADER_CHECKSUM));
        if has != is {
            let message = format!("the header's checksum is {has:#010x}, its bytes have {is:#010x}");
            return Err(Error::new(ErrorKind::Corrupt, message).with_field("header checksum"));
        }
        let block_size = fields.u32(BLOCK_SIZE_FIELD);
        if !block_size.is_power_of_two() || !BLOCK_SIZES.contains(&block_size) {
            let reason = "no power of two from 512 bytes to 256 MiB";
            return Err(invalid(ErrorKind::InvalidHeader, "block_size", block_size, reason));
        }
        let header = Self { bytes: Box::new(*whole) };
        if header.table_offset() > i64::MAX as u64 || !header.table_offset().is_multiple_of(SECTOR) {
            let reason = "no offset of a sector";
            return Err(invalid(ErrorKind::InvalidHeader, "table_offset", header.table_offset(), reason));
        }
        Ok(header)
    }

    /// The header of a new disk without a parent, with a BAT of `entries` behind it.
    #[must_use]
    pub fn new(entries: u32) -> Self {
        let mut bytes = Box::new([0; HEADER_LENGTH]);
        put(&mut bytes[..], 0, &HEADER_COOKIE);
        // The specification says 0xffffffff; Microsoft's programs want all 64 bits.
        put(&mut bytes[..], 8, &u64::MAX.to_be_bytes());
        put(&mut bytes[..], TABLE_OFFSET, &((FOOTER_LENGTH + HEADER_LENGTH) as u64).to_be_bytes());
        put(&mut bytes[..], HEADER_VERSION, &VERSION.to_be_bytes());
        put(&mut bytes[..], BLOCK_SIZE_FIELD, &BLOCK_SIZE.to_be_bytes());
        Self { bytes }.with_entries(entries)
    }

    /// The same with another number of entries.
    #[must_use]
    pub fn with_entries(&self, entries: u32) -> Self {
        let mut bytes = self.bytes.clone();
        put(&mut bytes[..], MAX_TABLE_ENTRIES, &entries.to_be_bytes());
        let sum = checksum(&bytes[..], HEADER_CHECKSUM);
        put(&mut bytes[..], HEADER_CHECKSUM, &sum.to_be_bytes());
        Self { bytes }
    }

    /// The same of a differencing disk, whose BAT is at `table_offset`: behind the names that its locators say. The parent has this UUID
    /// and file name, and was last changed so many seconds after 2000.
    #[must_use]
    pub fn with_parent(
        &self,
        table_offset: u64,
        uuid: [u8; 16],
        time_stamp: u32,
        name: &[u16],
        locators: &[Locator],
    ) -> Self {
        let mut bytes = self.bytes.clone();
        put(&mut bytes[..], TABLE_OFFSET, &table_offset.to_be_bytes());
        put(&mut bytes[..], PARENT_UNIQUE_ID, &uuid);
        put(&mut bytes[..], PARENT_TIMESTAMP, &time_stamp.to_be_bytes());
        let units: Vec<u8> = name.iter().take(MAX_PARENT_NAME).flat_map(|unit| unit.to_be_bytes()).collect();
        put(&mut bytes[..], PARENT_NAME, &units);
        for (locator, at) in locators.iter().zip((LOCATORS..).step_by(LOCATOR_LENGTH)).take(8) {
            put(&mut bytes[..], at, &locator.platform);
            // The specification counts sectors here; the programs that write it, bytes.
            put(&mut bytes[..], at + 4, &locator.space().to_be_bytes());
            put(&mut bytes[..], at + 8, &locator.length.to_be_bytes());
            put(&mut bytes[..], at + 16, &locator.offset.to_be_bytes());
        }
        Self { bytes }.with_entries(self.max_table_entries())
    }

    fn fields(&self) -> Fields<'_> {
        Fields::big_endian(&self.bytes[..])
    }

    /// Its bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8; HEADER_LENGTH] {
        &self.bytes
    }

    /// Where the BAT is, in bytes.
    #[must_use]
    pub fn table_offset(&self) -> u64 {
        self.fields().u64(TABLE_OFFSET)
    }

    /// Entries of the BAT: enough for the disk, and often one more.
    #[must_use]
    pub fn max_table_entries(&self) -> u32 {
        self.fields().u32(MAX_TABLE_ENTRIES)
    }

    /// Guest bytes of a block.
    #[must_use]
    pub fn block_size(&self) -> u32 {
        self.fields().u32(BLOCK_SIZE_FIELD)
    }

    /// Bytes of the bitmap in front of a block: a bit for each sector, in whole sectors.
    #[must_use]
    pub fn bitmap_size(&self) -> u64 {
        (u64::from(self.block_size()) / SECTOR).div_ceil(8).next_multiple_of(SECTOR)
    }

    /// The UUID of the parent.
    #[must_use]
    pub fn parent_uuid(&self) -> [u8; 16] {
        self.fields().bytes(PARENT_UNIQUE_ID)
    }

    /// When the parent was last changed before the image was made on it, in seconds since 2000; 0 where that is not known.
    #[must_use]
    pub fn parent_time_stamp(&self) -> u32 {
        self.fields().u32(PARENT_TIMESTAMP)
    }

    /// The parent's file name, in UTF-16.
    #[must_use]
    pub fn parent_name(&self) -> Vec<u16> {
        let fields = self.fields();
        let units = (0..256).map(|index| fields.u16(PARENT_NAME + index * 2));
        units.take_while(|unit| *unit != 0).collect()
    }

    /// Where else it may be found.
    pub fn locators(&self) -> impl Iterator<Item = Locator> + '_ {
        let fields = self.fields();
        (0..8).map(move |index| {
            let at = LOCATORS + index * LOCATOR_LENGTH;
            Locator { platform: fields.bytes(at), length: fields.u32(at + 8), offset: fields.u64(at + 16) }
        })
    }

    /// Where things are in an image whose header is at `offset`, with a disk of `size` bytes.
    #[must_use]
    pub fn layout(&self, offset: u64, size: u64) -> Layout {
        let (table, entries) = (self.table_offset(), self.max_table_entries());
        let table_end = table.saturating_add(u64::from(entries) * 4);
        Layout {
            size,
            block: self.block_size().into(),
            lead: self.bitmap_size(),
            table,
            entries,
            big_endian: true,
            origin: 0,
            grain: SECTOR,
            absent: UNUSED,
            zero: None,
            data: table_end.checked_next_multiple_of(SECTOR).unwrap_or(table_end),
            metadata: vec![
                0..FOOTER_LENGTH as u64,
                offset..offset.saturating_add(HEADER_LENGTH as u64),
                table..table_end,
            ],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn footer() -> Footer {
        let geometry = Geometry::at_least(20480);
        Footer::new(DiskType::Dynamic, geometry.total() * SECTOR, geometry, *b"qemu", [3; 16], 7)
    }

    fn with(at: usize, field: &[u8]) -> Vec<u8> {
        let mut bytes = footer().bytes().to_vec();
        put(&mut bytes, at, field);
        let sum = checksum(&bytes, CHECKSUM);
        put(&mut bytes, CHECKSUM, &sum.to_be_bytes());
        bytes
    }

    #[test]
    fn footers_are_read_as_they_were_written() {
        let footer = footer();
        assert_eq!(Footer::parse(footer.bytes()).unwrap(), footer);
        // As the byte that is missing is zero, one of 511 bytes says the same.
        assert_eq!(Footer::parse(&footer.bytes()[..511]).unwrap(), footer);
        assert_eq!(footer.virtual_size(), 10_514_432);
        for length in 0..511 {
            assert_eq!(
                Footer::parse(&footer.bytes()[..length]).unwrap_err().kind(),
                ErrorKind::InvalidHeader
            );
        }
        for at in 0..FOOTER_LENGTH {
            let mut bytes = *footer.bytes();
            bytes[at] ^= 1;
            let kind = Footer::parse(&bytes).unwrap_err().kind();
            let expected = if at < 8 { ErrorKind::InvalidHeader } else { ErrorKind::Corrupt };
            assert_eq!(kind, expected, "{at}");
        }
    }

    #[test]
    fn which_size_counts() {
        let size = |creator: &[u8]| Footer::parse(&with(CREATOR_APP, creator)).map(|f| f.virtual_size());
        let exact = |creator: &[u8]| {
            let mut bytes = with(CREATOR_APP, creator);
            put(&mut bytes, CURRENT_SIZE, &10_485_760u64.to_be_bytes());
            let sum = checksum(&bytes, CHECKSUM);
            put(&mut bytes, CHECKSUM, &sum.to_be_bytes());
            Footer::parse(&bytes).unwrap().virtual_size()
        };
        assert_eq!(size(b"vpc ").unwrap(), 10_514_432);
        for creator in [b"vpc ", b"qemu"] {
            assert_eq!(exact(creator), 10_514_432);
        }
        for creator in [b"win ", b"qem2", b"d2v\0", b"d2v ", b"tap\0", b"CTXS", b"wa\0\0", b"vbox", b"vs  "] {
            assert_eq!(exact(creator), 10_485_760, "{creator:?}");
        }
        let largest = Footer::new(DiskType::Fixed, 1 << 40, Geometry::LARGEST, *b"qemu", [0; 16], 0);
        assert_eq!(largest.virtual_size(), 1 << 40);
        for (kind, most) in [(DiskType::Fixed, 32 << 40), (DiskType::Dynamic, 2040 << 30)] {
            let of = |size| {
                let footer = Footer::new(kind, size, Geometry::LARGEST, *b"win ", [0; 16], 0);
                Footer::parse(footer.bytes())
            };
            assert_eq!(of(most).unwrap().virtual_size(), most);
            assert_eq!(of(most + 512).unwrap_err().kind(), ErrorKind::Limit);
        }
    }

    #[test]
    fn geometries() {
        for (sectors, cylinders, heads, per_track) in [
            (0, 0, 4, 17),
            (2048, 30, 4, 17),
            (20480, 301, 4, 17),
            (20536, 302, 4, 17),
            (1_048_576, 1040, 16, 63),
            (266_338_320, 65279, 16, 255),
            (u64::MAX, 65535, 16, 255),
        ] {
            let expected = Geometry { cylinders, heads, sectors: per_track };
            assert_eq!(Geometry::of(sectors), expected, "{sectors}");
        }
    }

    #[test]
    fn headers_are_read_as_they_were_written() {
        let header = Header::new(6);
        assert_eq!(Header::parse(header.bytes()).unwrap(), header);
        let layout = header.layout(512, 10 << 20);
        layout.check().unwrap();
        assert_eq!((layout.table, layout.data, layout.lead), (1536, 2048, 512));
        for at in 0..HEADER_LENGTH {
            let mut bytes = *header.bytes();
            bytes[at] ^= 1;
            Header::parse(&bytes).unwrap_err();
        }
        for length in 0..HEADER_LENGTH {
            Header::parse(&header.bytes()[..length]).unwrap_err();
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_footer_and_a_header_or_an_error(
            noise in prop::collection::vec(any::<u8>(), 0..1100),
            fields in prop::collection::vec((8usize..1000, any::<u8>()), 0..8),
        ) {
            let (_, _) = (Footer::parse(&noise), Header::parse(&noise));
            let (mut bytes, mut header) = (footer().bytes().to_vec(), Header::new(6).bytes().to_vec());
            for (at, byte) in fields {
                put(&mut bytes, at, &[byte]);
                put(&mut header, at, &[byte]);
            }
            for (bytes, at) in [(&mut bytes, CHECKSUM), (&mut header, HEADER_CHECKSUM)] {
                let sum = checksum(bytes, at);
                put(bytes, at, &sum.to_be_bytes());
            }
            if let (Ok(footer), Ok(header)) = (Footer::parse(&bytes), Header::parse(&header)) {
                prop_assert!(footer.virtual_size() <= MAX_FIXED_SECTORS * SECTOR);
                let layout = header.layout(footer.data_offset(), footer.virtual_size());
                if layout.check().is_ok() {
                    prop_assert!(layout.lead >= SECTOR && layout.capacity() >= footer.virtual_size());
                }
                let _ = (header.parent_name(), header.locators().count());
            }
        }

        #[test]
        fn a_geometry_is_large_enough(sectors in 0u64..300_000_000) {
            let geometry = Geometry::at_least(sectors);
            prop_assert!(geometry.total() >= sectors.min(Geometry::LARGEST.total()));
        }
    }
}
