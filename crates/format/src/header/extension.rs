//! Header extensions (section "Header extensions").

use super::feature::{self, FeatureName};
use super::field::{BACKING_FILE_OFFSET, HEADER_LENGTH};
use crate::bytes::{be32, be64, padded8, slice};
use crate::limits::{MAX_BACKING_FORMAT_NAME, MAX_BITMAP_DIRECTORY_BYTES, MAX_BITMAPS};
use crate::{FormatError, FormatResult, HostOffset};

const END: u32 = 0x0000_0000;
const BACKING_FORMAT: u32 = 0xe279_2aca;
const FEATURE_NAMES: u32 = 0x6803_f857;
const BITMAPS: u32 = 0x2385_2875;
const CRYPTO_HEADER: u32 = 0x0537_be77;
const DATA_FILE: u32 = 0x4441_5441;

/// One header extension, in the image's order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Extension {
    /// Format of the backing file, as QEMU names it (`qcow2`, `raw`).
    BackingFormat(Vec<u8>),
    /// Names of feature bits.
    FeatureNames(Vec<FeatureName>),
    /// Where the bitmap directory is.
    Bitmaps(BitmapsExtension),
    /// Where the encryption header is.
    CryptoHeader {
        /// Start, a multiple of the cluster size.
        offset: HostOffset,
        /// Length in bytes.
        length: u64,
    },
    /// Name of the external data file.
    DataFile(Vec<u8>),
    /// Any other extension: kept as it is on rewrite.
    Unknown {
        /// Its type.
        magic: u32,
        /// Its data, without padding.
        data: Vec<u8>,
    },
}

/// The bitmaps extension (section "Bitmaps extension").
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct BitmapsExtension {
    /// Number of bitmaps, at least 1.
    pub count: u32,
    /// Must be 0 where the extension is consistent.
    pub reserved: u32,
    /// Size of the bitmap directory in bytes.
    pub directory_size: u64,
    /// Start of the bitmap directory.
    pub directory_offset: HostOffset,
}

/// Parses the extensions between the header and `end` (the backing file name, or the end of the first cluster).
///
/// # Errors
/// `Invalid` for an extension that does not fit or whose data is malformed, `Truncated` where the file ends first.
pub(super) fn parse_all(cluster: &[u8], start: usize, end: usize) -> FormatResult<Vec<Extension>> {
    let mut extensions = Vec::new();
    let mut at = start;
    while at < end {
        let magic = be32(cluster, at, "header extension type")?;
        let length = be32(cluster, at.saturating_add(4), "header extension length")?;
        at = at.saturating_add(8);
        let length = length as usize;
        // The end marker too: QEMU refuses one that claims more.
        if at > end || length > end - at {
            return Err(FormatError::invalid(
                "header extension length",
                length as u64,
                "the extension is larger than the space for extensions",
            ));
        }
        if magic == END {
            break;
        }
        let data = slice(cluster, at, length, "header extension data")?;
        extensions.push(Extension::parse(magic, data)?);
        at = at.saturating_add(padded8(length));
    }
    Ok(extensions)
}

impl Extension {
    fn parse(magic: u32, data: &[u8]) -> FormatResult<Self> {
        Ok(match magic {
            BACKING_FORMAT => {
                if data.len() > MAX_BACKING_FORMAT_NAME {
                    return Err(FormatError::Limit {
                        field: "backing file format name",
                        value: data.len() as u64,
                        limit: MAX_BACKING_FORMAT_NAME as u64,
                    });
                }
                Self::BackingFormat(data.to_vec())
            }
            FEATURE_NAMES => Self::FeatureNames(feature::parse_names(data)),
            BITMAPS => Self::Bitmaps(BitmapsExtension::parse(data)?),
            CRYPTO_HEADER => {
                if data.len() != 16 {
                    return Err(FormatError::invalid(
                        "full disk encryption header pointer",
                        data.len() as u64,
                        "the extension must have 16 bytes",
                    ));
                }
                Self::CryptoHeader {
                    offset: HostOffset(be64(data, 0, "encryption header offset")?),
                    length: be64(data, 8, "encryption header length")?,
                }
            }
            DATA_FILE => Self::DataFile(data.to_vec()),
            _ => Self::Unknown { magic, data: data.to_vec() },
        })
    }

    /// Appends the extension with its header and padding.
    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Self::BackingFormat(name) => put(out, BACKING_FORMAT, name),
            Self::FeatureNames(names) => put(out, FEATURE_NAMES, &feature::encode_names(names)),
            Self::Bitmaps(bitmaps) => put(out, BITMAPS, &bitmaps.encode()),
            Self::CryptoHeader { offset, length } => {
                let mut data = Vec::with_capacity(16);
                data.extend_from_slice(&offset.0.to_be_bytes());
                data.extend_from_slice(&length.to_be_bytes());
                put(out, CRYPTO_HEADER, &data);
            }
            Self::DataFile(name) => put(out, DATA_FILE, name),
            Self::Unknown { magic, data } => put(out, *magic, data),
        }
    }

    /// The feature name table that this library writes.
    pub fn known_feature_names() -> Self {
        Self::FeatureNames(feature::known_names())
    }

    /// Appends the end marker.
    pub(super) fn encode_end(out: &mut Vec<u8>) {
        put(out, END, &[]);
    }
}

/// Bytes of an extension's type and length, in front of its data.
pub const HEAD_LENGTH: usize = 8;

/// Where the extensions of a header lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Places {
    /// Offset of the bitmaps extension's data, if there is that extension; of several, the last one's.
    pub bitmaps: Option<u64>,
    /// Offset of the end marker, or of the end of the space.
    pub end: u64,
}

impl Places {
    /// Looks through the first cluster of a version 3 image, whose header was parsed before.
    ///
    /// # Errors
    /// `Truncated` where the cluster ends inside an extension.
    pub fn find(cluster: &[u8]) -> FormatResult<Self> {
        let space = match BACKING_FILE_OFFSET.read(cluster)? {
            0 => cluster.len() as u64,
            offset => offset,
        };
        let mut places = Self { bitmaps: None, end: HEADER_LENGTH.read(cluster)?.into() };
        while places.end + HEAD_LENGTH as u64 <= space {
            let at = places.end as usize;
            let kind = be32(cluster, at, "header extension type")?;
            if kind == END {
                break;
            }
            let data = at + HEAD_LENGTH;
            if kind == BITMAPS {
                places.bitmaps = Some(data as u64);
            }
            let length = be32(cluster, at + 4, "header extension length")? as usize;
            places.end = data.saturating_add(padded8(length)) as u64;
        }
        Ok(places)
    }
}

impl BitmapsExtension {
    /// Bytes of the extension's data.
    pub const LENGTH: usize = 24;

    /// Type and length, which make an extension of the data behind them.
    pub const fn head() -> [u8; HEAD_LENGTH] {
        ((BITMAPS as u64) << 32 | Self::LENGTH as u64).to_be_bytes()
    }

    /// Where in the extension's data to write what to give it another directory of the same size: 8 bytes that lie in one
    /// sector.
    pub const fn directory_patch(directory_offset: HostOffset) -> (u64, [u8; 8]) {
        (16, directory_offset.0.to_be_bytes())
    }

    /// The extension's data.
    pub fn encode(&self) -> [u8; Self::LENGTH] {
        let mut data = [0u8; Self::LENGTH];
        let (count, rest) = data.split_at_mut(4);
        let (reserved, rest) = rest.split_at_mut(4);
        let (size, offset) = rest.split_at_mut(8);
        count.copy_from_slice(&self.count.to_be_bytes());
        reserved.copy_from_slice(&self.reserved.to_be_bytes());
        size.copy_from_slice(&self.directory_size.to_be_bytes());
        offset.copy_from_slice(&self.directory_offset.0.to_be_bytes());
        data
    }

    /// Whether the fields keep the format's rules for an image of this cluster size. Only an extension whose autoclear
    /// bit is set is consistent, and only that one needs to be valid.
    ///
    /// # Errors
    /// `Invalid` or `Limit`, naming the field.
    pub fn validate(&self, cluster_size: u64) -> FormatResult<()> {
        let invalid = |field, value, reason| Err(FormatError::invalid(field, value, reason));
        if self.reserved != 0 {
            return invalid("bitmaps extension", self.reserved.into(), "the reserved field must be 0");
        }
        if self.count == 0 {
            return invalid("nb_bitmaps", 0, "the extension must have at least one bitmap");
        }
        if self.count > MAX_BITMAPS {
            return Err(FormatError::Limit {
                field: "nb_bitmaps",
                value: self.count.into(),
                limit: MAX_BITMAPS.into(),
            });
        }
        if self.directory_size > MAX_BITMAP_DIRECTORY_BYTES {
            return Err(FormatError::Limit {
                field: "bitmap_directory_size",
                value: self.directory_size,
                limit: MAX_BITMAP_DIRECTORY_BYTES,
            });
        }
        if !self.directory_offset.is_aligned(cluster_size) || self.directory_offset.0 > i64::MAX as u64 / 2 {
            return invalid(
                "bitmap_directory_offset",
                self.directory_offset.0,
                "not a multiple of the cluster size, or beyond the largest file offset",
            );
        }
        Ok(())
    }

    fn parse(data: &[u8]) -> FormatResult<Self> {
        if data.len() != Self::LENGTH {
            return Err(FormatError::invalid(
                "bitmaps extension",
                data.len() as u64,
                "the extension must have 24 bytes",
            ));
        }
        Ok(Self {
            count: be32(data, 0, "nb_bitmaps")?,
            reserved: be32(data, 4, "bitmaps extension")?,
            directory_size: be64(data, 8, "bitmap_directory_size")?,
            directory_offset: HostOffset(be64(data, 16, "bitmap_directory_offset")?),
        })
    }
}

fn put(out: &mut Vec<u8>, magic: u32, data: &[u8]) {
    out.extend_from_slice(&magic.to_be_bytes());
    // Extensions lie in one cluster, so a length always fits; a longer one is refused by the header's encoder.
    out.extend_from_slice(&u32::try_from(data.len()).unwrap_or(u32::MAX).to_be_bytes());
    out.extend_from_slice(data);
    out.resize(out.len() - data.len() + padded8(data.len()), 0);
}
