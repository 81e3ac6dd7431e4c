//! The header: bytes to typed values and back. No I/O.

use qcow2_core::blocks::{Fields, Layout, put};
use qcow2_core::{Error, ErrorKind, Result};

/// Bytes of the header; the BAT is behind it.
pub const HEADER_LENGTH: usize = 64;
/// The magic of images whose BAT counts sectors.
pub const MAGIC_SECTORS: [u8; 16] = *b"WithoutFreeSpace";
/// The magic of images whose BAT counts clusters.
pub const MAGIC_CLUSTERS: [u8; 16] = *b"WithouFreSpacExt";
/// What the header has where the image is in use.
pub const IN_USE: u32 = 0x746f_6e59;
/// Where that is.
pub const IN_USE_OFFSET: u64 = 44;
/// Bytes of a sector.
pub const SECTOR: u64 = 512;
/// Bytes of a cluster of new images, unless the caller says otherwise.
pub const DEFAULT_CLUSTER_SIZE: u64 = 1 << 20;
/// Most sectors of a cluster, which is QEMU's limit.
pub const MAX_TRACKS: u32 = i32::MAX as u32 / 513;
/// Most entries of a BAT.
pub const MAX_BAT_ENTRIES: u32 = i32::MAX as u32 / 4;

const VERSION: u32 = 2;
/// What QEMU says of disks that have no geometry.
const GEOMETRY_HEADS: u32 = 16;
const GEOMETRY_SECTORS: u64 = 32;
/// Where the fields begin that another size changes.
pub(crate) const SIZE_FIELDS: usize = 24;
/// Where they end.
pub(crate) const SIZE_FIELDS_END: usize = 52;

const VERSION_FIELD: usize = 16;
const HEADS: usize = 20;
const CYLINDERS: usize = 24;
const TRACKS: usize = 28;
const BAT_ENTRIES: usize = 32;
const NB_SECTORS: usize = 36;
const IN_USE_FIELD: usize = 44;
/// Where the field with the start of the data is.
pub(crate) const DATA_OFF: usize = 48;
/// Where the field with the place of the format extension is.
pub(crate) const EXT_OFF: usize = 56;

/// A header that keeps to the limits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// Whether the BAT counts clusters, and not sectors.
    pub counts_clusters: bool,
    /// Sectors of a cluster.
    pub tracks: u32,
    /// Entries of the BAT.
    pub bat_entries: u32,
    /// Sectors of the disk.
    pub nb_sectors: u64,
    /// The mark of an image that is in use.
    pub in_use: u32,
    /// Where the data begins, in sectors: 0 where it follows the BAT.
    pub data_off: u32,
    /// Where the format extension is, in sectors: 0 without one.
    pub ext_off: u64,
}

fn invalid(kind: ErrorKind, field: &'static str, value: impl std::fmt::Display, reason: &str) -> Error {
    Error::new(kind, format!("invalid {field} {value}: {reason}")).with_field(field)
}

impl Header {
    /// Reads the header at the start of `bytes`.
    ///
    /// # Errors
    /// `InvalidHeader` with the field at fault; `UnsupportedFeature` for another version; `Limit`.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let Some(bytes) = bytes.get(..HEADER_LENGTH) else {
            let message =
                format!("the header is truncated: {} of {HEADER_LENGTH} bytes are there", bytes.len());
            return Err(Error::new(ErrorKind::InvalidHeader, message).with_field("header"));
        };
        let fields = Fields::little_endian(bytes);
        let counts_clusters = match fields.bytes(0) {
            MAGIC_SECTORS => false,
            MAGIC_CLUSTERS => true,
            _ => {
                let message = "not a Parallels image: the file begins with none of its magics";
                return Err(Error::new(ErrorKind::InvalidHeader, message).with_field("magic"));
            }
        };
        let version = fields.u32(VERSION_FIELD);
        if version != VERSION {
            let message = format!("unsupported version {version} of a Parallels image");
            return Err(Error::new(ErrorKind::UnsupportedFeature, message).with_field("version"));
        }
        let nb_sectors = match counts_clusters {
            true => fields.u64(NB_SECTORS),
            false => fields.u32(NB_SECTORS).into(),
        };
        let header = Self {
            counts_clusters,
            tracks: fields.u32(TRACKS),
            bat_entries: fields.u32(BAT_ENTRIES),
            nb_sectors,
            in_use: fields.u32(IN_USE_FIELD),
            data_off: fields.u32(DATA_OFF),
            ext_off: fields.u64(EXT_OFF),
        };
        header.check()?;
        Ok(header)
    }

    fn check(&self) -> Result<()> {
        use ErrorKind::{InvalidHeader, Limit};
        if self.tracks == 0 {
            return Err(invalid(InvalidHeader, "tracks", 0, "a cluster has sectors"));
        }
        if self.tracks > MAX_TRACKS {
            return Err(invalid(Limit, "tracks", self.tracks, "the cluster is too big"));
        }
        if self.bat_entries > MAX_BAT_ENTRIES {
            return Err(invalid(Limit, "bat_entries", self.bat_entries, "the BAT is too large"));
        }
        if self.ext_off > i64::MAX as u64 / SECTOR {
            return Err(invalid(Limit, "ext_off", self.ext_off, "no file has it"));
        }
        let most = u64::from(self.bat_entries) * u64::from(self.tracks);
        if self.nb_sectors > most || self.nb_sectors > i64::MAX as u64 / SECTOR {
            return Err(invalid(
                InvalidHeader,
                "nb_sectors",
                self.nb_sectors,
                "larger than the clusters of the BAT",
            ));
        }
        Ok(())
    }

    /// Bytes of the disk.
    #[must_use]
    pub fn virtual_size(&self) -> u64 {
        self.nb_sectors * SECTOR
    }

    /// Bytes of a cluster.
    #[must_use]
    pub fn cluster_size(&self) -> u64 {
        u64::from(self.tracks) * SECTOR
    }

    /// Whether it was not closed, or is in use.
    #[must_use]
    pub fn is_in_use(&self) -> bool {
        self.in_use == IN_USE
    }

    /// Behind the BAT.
    #[must_use]
    pub fn bat_end(&self) -> u64 {
        HEADER_LENGTH as u64 + u64::from(self.bat_entries) * 4
    }

    /// Where the data begins at the earliest, in bytes.
    #[must_use]
    pub fn least_data_start(&self) -> u64 {
        let grain = if self.counts_clusters { self.cluster_size() } else { SECTOR };
        self.bat_end().next_multiple_of(SECTOR).next_multiple_of(grain)
    }

    /// Whether the field with the start of the data can be right, in a file of `length` bytes.
    #[must_use]
    pub fn has_data_start(&self, length: u64) -> bool {
        let start = u64::from(self.data_off) * SECTOR;
        (self.data_off == 0 && !self.counts_clusters)
            || (start >= self.least_data_start() && start <= length.next_multiple_of(SECTOR))
    }

    /// Where the data begins, in bytes: as the header says, where that can be.
    #[must_use]
    pub fn data_start(&self, length: u64) -> u64 {
        match self.data_off {
            0 => self.least_data_start(),
            sectors if self.has_data_start(length) => u64::from(sectors) * SECTOR,
            _ => self.least_data_start(),
        }
    }

    /// Where things are in an image whose file has `length` bytes.
    #[must_use]
    pub fn layout(&self, length: u64) -> Layout {
        Layout {
            size: self.virtual_size(),
            block: self.cluster_size(),
            lead: 0,
            table: HEADER_LENGTH as u64,
            entries: self.bat_entries,
            big_endian: false,
            origin: 0,
            grain: if self.counts_clusters { self.cluster_size() } else { SECTOR },
            absent: 0,
            zero: None,
            data: self.data_start(length),
            metadata: std::iter::once(0..self.bat_end()).collect(),
        }
    }

    /// The header of a new image, whose BAT counts clusters.
    ///
    /// # Errors
    /// `InvalidArgument` for a size or cluster size that is not whole sectors; `Limit`.
    pub fn new(size: u64, cluster_size: u64) -> Result<Self> {
        let refuse =
            |kind, field: &'static str, message: String| Err(Error::new(kind, message).with_field(field));
        if !size.is_multiple_of(SECTOR) {
            let message = format!("the size of a disk is a multiple of {SECTOR} bytes, not {size}");
            return refuse(ErrorKind::InvalidArgument, "size", message);
        }
        if cluster_size == 0 || !cluster_size.is_multiple_of(SECTOR) {
            let message =
                format!("the size of a cluster is a multiple of {SECTOR} bytes, not {cluster_size}");
            return refuse(ErrorKind::InvalidArgument, "clusterSize", message);
        }
        let tracks = u32::try_from(cluster_size / SECTOR).ok().filter(|tracks| *tracks <= MAX_TRACKS);
        let Some(tracks) = tracks else {
            return refuse(
                ErrorKind::Limit,
                "clusterSize",
                format!("a cluster of {cluster_size} bytes is too big"),
            );
        };
        let entries =
            u32::try_from(size.div_ceil(cluster_size)).ok().filter(|entries| *entries <= MAX_BAT_ENTRIES);
        let Some(bat_entries) = entries.filter(|_| size <= i64::MAX as u64) else {
            let message = format!("a disk of {size} bytes is too large for clusters of {cluster_size}");
            return refuse(ErrorKind::Limit, "size", message);
        };
        let mut header = Self {
            counts_clusters: true,
            tracks,
            bat_entries,
            nb_sectors: size / SECTOR,
            in_use: 0,
            data_off: 0,
            ext_off: 0,
        };
        let start = header.least_data_start() / SECTOR;
        match u32::try_from(start) {
            Ok(start) => header.data_off = start,
            Err(_) => {
                return refuse(
                    ErrorKind::Limit,
                    "size",
                    format!("the table of {bat_entries} clusters is too large"),
                );
            }
        }
        Ok(header)
    }

    /// The header as bytes.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; HEADER_LENGTH] {
        let mut bytes = [0; HEADER_LENGTH];
        put(&mut bytes, 0, if self.counts_clusters { &MAGIC_CLUSTERS } else { &MAGIC_SECTORS });
        let cylinders = self.nb_sectors / u64::from(GEOMETRY_HEADS) / GEOMETRY_SECTORS;
        for (at, value) in [
            (VERSION_FIELD, VERSION),
            (HEADS, GEOMETRY_HEADS),
            // Nothing depends on it.
            (CYLINDERS, cylinders as u32),
            (TRACKS, self.tracks),
            (BAT_ENTRIES, self.bat_entries),
            (IN_USE_FIELD, self.in_use),
            (DATA_OFF, self.data_off),
        ] {
            put(&mut bytes, at, &value.to_le_bytes());
        }
        put(&mut bytes, NB_SECTORS, &self.nb_sectors.to_le_bytes());
        put(&mut bytes, EXT_OFF, &self.ext_off.to_le_bytes());
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn header() -> Header {
        Header::new(10 << 20, DEFAULT_CLUSTER_SIZE).unwrap()
    }

    fn with(at: usize, field: &[u8]) -> Vec<u8> {
        let mut bytes = header().to_bytes().to_vec();
        put(&mut bytes, at, field);
        bytes
    }

    #[test]
    fn headers_are_read_as_they_were_written() {
        let header = header();
        assert_eq!(Header::parse(&header.to_bytes()).unwrap(), header);
        assert_eq!((header.bat_entries, header.data_off), (10, 2048));
        let layout = header.layout(1 << 20);
        layout.check().unwrap();
        assert_eq!((layout.data, layout.entry_of(3 << 20)), (1 << 20, Some(3)));
        let sectors = Header {
            counts_clusters: false,
            data_off: 0,
            tracks: 63,
            bat_entries: 400,
            nb_sectors: 63 * 400,
            ..header
        };
        assert_eq!(Header::parse(&sectors.to_bytes()).unwrap(), sectors);
        assert_eq!((sectors.data_start(4096), sectors.layout(4096).grain), (2048, 512));
        sectors.layout(4096).check().unwrap();
    }

    #[test]
    fn where_data_begins() {
        let header = header();
        for (data_off, right) in
            [(2048, true), (4096, true), (4097, false), (0, false), (1, false), (u32::MAX, false)]
        {
            let header = Header { data_off, ..header.clone() };
            assert_eq!(header.has_data_start(2 << 20), right, "{data_off}");
            let expected = if right { u64::from(data_off) * 512 } else { 1 << 20 };
            assert_eq!(header.data_start(2 << 20), expected, "{data_off}");
        }
    }

    #[test]
    fn limits() {
        use ErrorKind::{InvalidArgument, InvalidHeader, Limit, UnsupportedFeature};
        for (at, field, expected) in [
            (0, &b"w"[..], (InvalidHeader, "magic")),
            (VERSION_FIELD, &[3], (UnsupportedFeature, "version")),
            (TRACKS, &[0; 4], (InvalidHeader, "tracks")),
            (TRACKS, &[0xff; 4], (Limit, "tracks")),
            (BAT_ENTRIES, &[0xff; 4], (Limit, "bat_entries")),
            (BAT_ENTRIES, &[9], (InvalidHeader, "nb_sectors")),
            (NB_SECTORS, &[0xff; 8], (InvalidHeader, "nb_sectors")),
            (EXT_OFF, &[0xff; 8], (Limit, "ext_off")),
        ] {
            let error = Header::parse(&with(at, field)).unwrap_err();
            assert_eq!((error.kind(), error.field()), (expected.0, Some(expected.1)), "{at} {field:x?}");
        }
        for length in 0..HEADER_LENGTH {
            assert_eq!(Header::parse(&header().to_bytes()[..length]).unwrap_err().kind(), InvalidHeader);
        }
        for (size, cluster_size, kind) in [
            (1, 512, InvalidArgument),
            (512, 0, InvalidArgument),
            (512, 1000, InvalidArgument),
            (512, 1 << 40, Limit),
            (1 << 62, 1 << 20, Limit),
            (u64::MAX - 511, 1 << 30, Limit),
        ] {
            assert_eq!(Header::new(size, cluster_size).unwrap_err().kind(), kind, "{size} {cluster_size}");
        }
        assert!(Header::parse(&with(IN_USE_FIELD, &IN_USE.to_le_bytes())).unwrap().is_in_use());
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_header_or_an_error(
            noise in prop::collection::vec(any::<u8>(), 0..80),
            fields in prop::collection::vec((20usize..64, any::<u8>()), 0..6),
            old in any::<bool>(),
            length in any::<u64>(),
        ) {
            let _ = Header::parse(&noise);
            let mut bytes = header().to_bytes();
            if old {
                put(&mut bytes, 0, &MAGIC_SECTORS);
            }
            for (at, byte) in fields {
                bytes[at] = byte;
            }
            if let Ok(header) = Header::parse(&bytes) {
                let layout = header.layout(length >> 1);
                if layout.check().is_ok() {
                    prop_assert!(layout.capacity() >= header.virtual_size() && layout.data >= header.bat_end());
                }
            }
        }
    }
}
