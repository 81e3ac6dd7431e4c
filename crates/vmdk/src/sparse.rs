//! The header of a hosted sparse extent, and the markers of a stream: "Virtual Disk Format 5.0", VMware's specification.

use qcow2_core::{ErrorKind, Result};

use crate::fields::{Fields, SECTOR, invalid};
use crate::geometry::{Encoding, Geometry};

/// The first four bytes.
pub const MAGIC: [u8; 4] = *b"KDMV";
/// Bytes of a header, with what pads it.
pub const HEADER_BYTES: usize = 512;
/// `gdOffset` of an extent whose directory, and a copy of whose header, stand at the end.
pub const GD_AT_END: u64 = u64::MAX;
/// Most entries of a grain table.
const MAX_TABLE_ENTRIES: u32 = 512;

/// `flags`: the check bytes for line ends are there.
const FLAG_NEWLINES: u32 = 1;
/// `flags`: there is a copy of the grain tables.
const FLAG_REDUNDANT: u32 = 1 << 1;
/// `flags`: an entry of 1 is a grain of zeroes.
const FLAG_ZERO_GRAIN: u32 = 1 << 2;
/// `flags`: grains are compressed.
const FLAG_COMPRESSED: u32 = 1 << 16;
/// `flags`: markers stand in front of grains and tables.
const FLAG_MARKERS: u32 = 1 << 17;
/// What a transfer as text would change.
const NEWLINES: [u8; 4] = *b"\n \r\n";
/// `compressAlgorithm`: deflate.
const DEFLATE: u16 = 1;

/// A header that can be understood. Places are sectors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// 1 to 3.
    pub version: u32,
    /// As it is stored.
    pub flags: u32,
    /// Sectors of the extent.
    pub capacity: u64,
    /// Sectors of a grain.
    pub grain: u64,
    /// Where the descriptor is.
    pub descriptor_offset: u64,
    /// Its sectors; 0 where there is none.
    pub descriptor_size: u64,
    /// Entries of a grain table.
    pub table_entries: u32,
    /// Where the copy of the directory is.
    pub redundant: u64,
    /// Where the directory is, or [`GD_AT_END`].
    pub directory: u64,
    /// Sectors of metadata.
    pub overhead: u64,
    /// Whether it was open for writing when it was stored.
    pub unclean: bool,
    /// 0 or 1 (deflate).
    pub compression: u16,
}

impl Header {
    /// Reads the header at the start of `bytes`.
    ///
    /// # Errors
    /// `InvalidHeader` with the field at fault; `UnsupportedFeature` for another version or compression.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let mut fields = Fields(bytes);
        if fields.bytes(4, "magicNumber")? != MAGIC {
            return Err(invalid(
                ErrorKind::InvalidHeader,
                "magicNumber",
                "of the extent",
                "not a sparse extent of VMDK",
            ));
        }
        let header = Self {
            version: fields.u32("version")?,
            flags: fields.u32("flags")?,
            capacity: fields.u64("capacity")?,
            grain: fields.u64("grainSize")?,
            descriptor_offset: fields.u64("descriptorOffset")?,
            descriptor_size: fields.u64("descriptorSize")?,
            table_entries: fields.u32("numGTEsPerGT")?,
            redundant: fields.u64("rgdOffset")?,
            directory: fields.u64("gdOffset")?,
            overhead: fields.u64("overHead")?,
            unclean: fields.bytes(1, "uncleanShutdown")? != [0],
            compression: {
                let newlines = fields.bytes(4, "singleEndLineChar")?;
                let flags =
                    u32::from_le_bytes(bytes.get(8..12).and_then(|b| b.try_into().ok()).unwrap_or_default());
                if flags & FLAG_NEWLINES != 0 && newlines != NEWLINES {
                    let reason = "line ends were changed: the file was transferred as text";
                    return Err(invalid(
                        ErrorKind::InvalidHeader,
                        "singleEndLineChar",
                        format_args!("{newlines:x?}"),
                        reason,
                    ));
                }
                fields.u16("compressAlgorithm")?
            },
        };
        header.check()
    }

    fn check(self) -> Result<Self> {
        let unsupported = ErrorKind::UnsupportedFeature;
        if !(1..=3).contains(&self.version) {
            return Err(invalid(unsupported, "version", self.version, "not 1 to 3"));
        }
        if self.compression > DEFLATE {
            return Err(invalid(
                unsupported,
                "compressAlgorithm",
                self.compression,
                "neither 0 nor 1 (deflate)",
            ));
        }
        if self.table_entries > MAX_TABLE_ENTRIES {
            return Err(invalid(
                ErrorKind::InvalidHeader,
                "numGTEsPerGT",
                self.table_entries,
                "more than 512",
            ));
        }
        Ok(self)
    }

    /// Whether the directory, and the header that counts, are at the end of the file.
    pub fn is_at_end(&self) -> bool {
        self.directory == GD_AT_END
    }

    /// Whether it stands for extents of its descriptor, and has no grains itself.
    pub fn is_wrapper(&self) -> bool {
        self.capacity == 0 && self.descriptor_offset != 0
    }

    /// Whether grains are compressed.
    pub fn is_compressed(&self) -> bool {
        self.compression == DEFLATE
    }

    /// Whether markers stand in front of grains and tables.
    pub fn has_markers(&self) -> bool {
        self.flags & FLAG_MARKERS != 0
    }

    /// How the extent is cut.
    ///
    /// # Errors
    /// `InvalidHeader`, `Limit`.
    pub fn geometry(&self) -> Result<Geometry> {
        let geometry = Geometry {
            capacity: self.capacity,
            grain: self.grain,
            table_entries: u64::from(self.table_entries),
            directory: self.directory,
            redundant: (self.flags & FLAG_REDUNDANT != 0 && self.redundant != 0).then_some(self.redundant),
            overhead: self.overhead,
            encoding: Encoding::Sectors { zero_grains: self.flags & FLAG_ZERO_GRAIN != 0 },
            compressed: self.is_compressed(),
            markers: self.has_markers(),
        };
        geometry.checked()
    }

    /// A header as QEMU makes it: with a copy of the tables, check bytes, and a descriptor of 20 sectors behind it. Its places are
    /// the caller's to set.
    pub fn new(capacity: u64, compressed: bool, zero_grains: bool) -> Self {
        let mut flags = FLAG_REDUNDANT | FLAG_NEWLINES;
        if compressed {
            flags |= FLAG_COMPRESSED | FLAG_MARKERS;
        }
        if zero_grains {
            flags |= FLAG_ZERO_GRAIN;
        }
        Self {
            version: if compressed { 3 } else { 1 + u32::from(zero_grains) },
            flags,
            capacity,
            grain: 128,
            descriptor_offset: 1,
            descriptor_size: 20,
            table_entries: MAX_TABLE_ENTRIES,
            redundant: 0,
            directory: 0,
            overhead: 0,
            unclean: false,
            compression: if compressed { DEFLATE } else { 0 },
        }
    }

    /// Without a copy of the tables.
    #[must_use]
    pub fn without_redundant(self) -> Self {
        Self { flags: self.flags & !FLAG_REDUNDANT, redundant: 0, ..self }
    }

    /// Its bytes, padded to a sector.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend(self.version.to_le_bytes());
        bytes.extend(self.flags.to_le_bytes());
        for number in [self.capacity, self.grain, self.descriptor_offset, self.descriptor_size] {
            bytes.extend(number.to_le_bytes());
        }
        bytes.extend(self.table_entries.to_le_bytes());
        for number in [self.redundant, self.directory, self.overhead] {
            bytes.extend(number.to_le_bytes());
        }
        bytes.push(u8::from(self.unclean));
        bytes.extend(NEWLINES);
        bytes.extend(self.compression.to_le_bytes());
        bytes.resize(HEADER_BYTES, 0);
        bytes
    }
}

/// Bytes of the marker in front of a compressed grain.
pub const GRAIN_MARKER_BYTES: u64 = 12;

/// What stands in a stream of grains and tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Marker {
    /// The end.
    EndOfStream,
    /// A grain table follows.
    GrainTable,
    /// The grain directory follows.
    GrainDirectory,
    /// The footer follows.
    Footer,
}

impl Marker {
    fn number(self) -> u32 {
        match self {
            Self::EndOfStream => 0,
            Self::GrainTable => 1,
            Self::GrainDirectory => 2,
            Self::Footer => 3,
        }
    }

    /// Its sector, where what follows has `sectors`.
    pub fn encode(self, sectors: u64) -> Vec<u8> {
        let mut bytes = sectors.to_le_bytes().to_vec();
        bytes.extend(0u32.to_le_bytes());
        bytes.extend(self.number().to_le_bytes());
        bytes.resize(SECTOR as usize, 0);
        bytes
    }

    fn is_at(self, sector: &[u8]) -> bool {
        let mut fields = Fields(sector);
        fields.u64("val").is_ok()
            && fields.u32("size").is_ok_and(|size| size == 0)
            && fields.u32("type").is_ok_and(|kind| kind == self.number())
    }
}

/// What a marker says, read front to back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mark {
    /// A grain with its first sector on the disk, and the bytes that follow the marker.
    Grain {
        /// Sector.
        sector: u64,
        /// Bytes.
        size: u32,
    },
    /// A table or the directory: sectors behind the marker's own.
    Tables {
        /// Sectors.
        sectors: u64,
    },
    /// The footer follows.
    Footer,
    /// The end.
    EndOfStream,
}

impl Mark {
    /// Bytes of a marker that say what it is.
    pub const BYTES: usize = 16;

    /// Reads one; `None` where it is none, or not there as a whole.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let mut fields = Fields(bytes);
        let (value, size, kind) =
            (fields.u64("val").ok()?, fields.u32("size").ok()?, fields.u32("type").ok()?);
        match (size, kind) {
            (1.., _) => Some(Self::Grain { sector: value, size }),
            (_, 0) => Some(Self::EndOfStream),
            (_, 1 | 2) => Some(Self::Tables { sectors: value }),
            (_, 3) => Some(Self::Footer),
            _ => None,
        }
    }
}

/// Bytes of the footer with its marker and the end of the stream.
pub const FOOTER_BYTES: usize = 3 * 512;

/// The header in the last [`FOOTER_BYTES`] bytes of an extent whose first one has [`GD_AT_END`].
///
/// # Errors
/// `Corrupt` where there is no footer; as [`Header::parse`].
pub fn footer(bytes: &[u8]) -> Result<Header> {
    let sectors = bytes.as_chunks::<512>().0;
    let whole = match sectors {
        [marker, header, end] => {
            Marker::Footer.is_at(marker)
                && Marker::EndOfStream.is_at(end)
                && end.iter().take(8).all(|byte| *byte == 0)
                && header.starts_with(&MAGIC)
        }
        _ => false,
    };
    let [_, header, _] = sectors else { return Err(no_footer()) };
    if !whole {
        return Err(no_footer());
    }
    let header = Header::parse(header)?;
    if header.is_at_end() { Err(no_footer()) } else { Ok(header) }
}

fn no_footer() -> qcow2_core::Error {
    let reason = "the grain directory is said to be at the end, and no footer is there: the file is cut off";
    invalid(ErrorKind::Corrupt, "gdOffset", format_args!("{GD_AT_END:#x}"), reason)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn header() -> Header {
        Header { redundant: 21, directory: 30, overhead: 128, ..Header::new(1 << 20, false, true) }
    }

    #[test]
    fn a_header_goes_there_and_back() {
        for header in [header(), Header::new(5, true, false).without_redundant()] {
            assert_eq!(Header::parse(&header.encode()).unwrap(), header);
        }
        let geometry = header().geometry().unwrap();
        assert_eq!((geometry.tables(), geometry.coverage(), geometry.redundant), (16, 32 << 20, Some(21)));
        assert_eq!(geometry.encoding, Encoding::Sectors { zero_grains: true });
    }

    #[test]
    fn what_is_refused_is_named() {
        use ErrorKind::{InvalidHeader, Limit, UnsupportedFeature};
        for (offset, bytes, expected) in [
            (0, &b"KDMW"[..], (InvalidHeader, "magicNumber")),
            (4, &4u32.to_le_bytes(), (UnsupportedFeature, "version")),
            (4, &0u32.to_le_bytes(), (UnsupportedFeature, "version")),
            (12, &u64::MAX.to_le_bytes(), (Limit, "capacity")),
            (20, &3u64.to_le_bytes(), (InvalidHeader, "grainSize")),
            (20, &0u64.to_le_bytes(), (InvalidHeader, "grainSize")),
            (20, &(1u64 << 40).to_le_bytes(), (Limit, "grainSize")),
            (44, &0u32.to_le_bytes(), (InvalidHeader, "numGTEsPerGT")),
            (44, &513u32.to_le_bytes(), (InvalidHeader, "numGTEsPerGT")),
            (48, &u64::MAX.to_le_bytes(), (Limit, "rgdOffset")),
            (64, &u64::MAX.to_le_bytes(), (Limit, "overHead")),
            // As a transfer as text leaves it.
            (73, &b"\n \n\n"[..], (InvalidHeader, "singleEndLineChar")),
            (77, &2u16.to_le_bytes(), (UnsupportedFeature, "compressAlgorithm")),
        ] {
            let mut forged = header().encode();
            forged[offset..offset + bytes.len()].copy_from_slice(bytes);
            let error = Header::parse(&forged).and_then(|header| header.geometry()).unwrap_err();
            assert_eq!((error.kind(), error.field()), (expected.0, Some(expected.1)), "{offset}");
        }
        for length in 0..79 {
            assert_eq!(
                Header::parse(&header().encode()[..length]).unwrap_err().kind(),
                InvalidHeader,
                "{length}"
            );
        }
    }

    #[test]
    fn marks_are_those_of_the_markers() {
        for (marker, mark) in [
            (Marker::EndOfStream.encode(0), Mark::EndOfStream),
            (Marker::GrainTable.encode(4), Mark::Tables { sectors: 4 }),
            (Marker::GrainDirectory.encode(1), Mark::Tables { sectors: 1 }),
            (Marker::Footer.encode(1), Mark::Footer),
            (
                [&7u64.to_le_bytes()[..], &[9, 0, 0, 0], &[0xff; 4]].concat(),
                Mark::Grain { sector: 7, size: 9 },
            ),
        ] {
            assert_eq!(Mark::parse(&marker), Some(mark));
            assert_eq!(Mark::parse(&marker[..Mark::BYTES - 1]), None);
        }
        let mut unknown = Marker::Footer.encode(1);
        unknown[12] = 4;
        assert_eq!(Mark::parse(&unknown), None);
    }

    #[test]
    fn a_footer_is_whole_or_none() {
        let whole = [Marker::Footer.encode(1), header().encode(), Marker::EndOfStream.encode(0)].concat();
        assert_eq!(footer(&whole).unwrap(), header());
        for (at, byte) in [(12, 1), (8, 1), (512, 0), (1024, 1), (1036, 3)] {
            let mut damaged = whole.clone();
            damaged[at] = byte;
            assert_eq!(footer(&damaged).unwrap_err().kind(), ErrorKind::Corrupt, "{at}");
        }
        let again = [
            Marker::Footer.encode(1),
            Header { directory: GD_AT_END, ..header() }.encode(),
            Marker::EndOfStream.encode(0),
        ];
        assert_eq!(footer(&again.concat()).unwrap_err().kind(), ErrorKind::Corrupt);
        assert_eq!(footer(&whole[..1500]).unwrap_err().kind(), ErrorKind::Corrupt);
    }

    proptest! {
        #[test]
        fn any_header_keeps_to_the_limits_or_is_refused(
            rest in prop::collection::vec(any::<u8>(), 75),
            grain in 0u32..70,
            entries in 0u32..514,
            entry in any::<u64>(),
        ) {
            let mut bytes = header().encode();
            bytes[4..79].copy_from_slice(&rest);
            let _ = Header::parse(&bytes);
            bytes[4] = 1 + rest[0] % 3;
            bytes[5..8].fill(0);
            bytes[8] &= !1;
            bytes[20..28].copy_from_slice(&1u64.checked_shl(grain).unwrap_or(0).to_le_bytes());
            bytes[44..48].copy_from_slice(&entries.to_le_bytes());
            bytes[77..79].copy_from_slice(&[rest[73] & 1, 0]);
            if let Ok(geometry) = Header::parse(&bytes).and_then(|header| header.geometry()) {
                prop_assert!(geometry.directory_bytes() <= 128 << 20 && geometry.table_bytes() <= 4096);
                prop_assert!(geometry.size() <= i64::MAX as u64);
                prop_assert!(geometry.used_table_bytes(u64::MAX) == 0);
                let _ = (geometry.grain(entry), geometry.table(u64::from(entry as u32)));
            }
        }
    }
}
