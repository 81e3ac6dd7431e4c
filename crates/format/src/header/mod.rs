//! The image header: parsed from the first cluster, validated, and written back with everything unknown preserved.

pub mod extension;
pub mod feature;
pub mod field;
pub mod raw;

use zerocopy::{FromBytes, IntoBytes};

use self::extension::Extension;
use self::feature::{Autoclear, Compatible, FeatureName, FeatureSet, Incompatible};
use self::raw::{
    COMPRESSION_TYPE_OFFSET, MAGIC, RawHeaderV2, RawHeaderV3, V2_LENGTH, V3_LENGTH, V3_WRITTEN_LENGTH,
};
use crate::bytes::slice;
use crate::limits::{
    MAX_BACKING_FILE_NAME, MAX_HOST_OFFSET, MAX_L1_BYTES, MAX_REFCOUNT_TABLE_BYTES, MAX_SNAPSHOTS,
    MAX_VIRTUAL_SIZE,
};
use crate::{FormatError, FormatResult, Geometry, HostOffset};

/// `crypt_method` of the header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum CryptMethod {
    /// Not encrypted.
    None,
    /// Legacy AES-CBC.
    Aes,
    /// LUKS.
    Luks,
}

impl CryptMethod {
    /// As the header's field has it.
    #[must_use]
    pub const fn encode(self) -> u32 {
        match self {
            Self::None => 0,
            Self::Aes => 1,
            Self::Luks => 2,
        }
    }
}

/// `compression_type` of the header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum CompressionType {
    /// RFC 1951 deflate, which QEMU calls zlib.
    Zlib,
    /// Zstandard.
    Zstd,
}

/// A validated header. Counts and offsets of tables are within the format's limits, but not yet known to lie
/// inside the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// Cluster size, refcount width and L2 entry form.
    pub geometry: Geometry,
    /// Virtual disk size in bytes.
    pub size: u64,
    /// Encryption of guest data.
    pub crypt_method: CryptMethod,
    /// Entries in the active L1 table.
    pub l1_size: u32,
    /// Start of the active L1 table.
    pub l1_table_offset: HostOffset,
    /// Start of the refcount table.
    pub refcount_table_offset: HostOffset,
    /// Clusters of the refcount table.
    pub refcount_table_clusters: u32,
    /// Internal snapshots.
    pub nb_snapshots: u32,
    /// Start of the snapshot table.
    pub snapshots_offset: HostOffset,
    /// Feature bits, all 0 in version 2.
    pub incompatible: Incompatible,
    /// Feature bits, all 0 in version 2.
    pub compatible: Compatible,
    /// Feature bits, all 0 in version 2.
    pub autoclear: Autoclear,
    /// Algorithm of compressed clusters.
    pub compression_type: CompressionType,
    /// Length of the header as read, in bytes; what lies behind the known fields is in `unknown_fields`.
    pub header_length: u32,
    /// Header bytes behind `compression_type`'s padding, kept on rewrite.
    pub unknown_fields: Vec<u8>,
    /// Header extensions in the image's order.
    pub extensions: Vec<Extension>,
    /// Backing file name, as bytes: a path of the system that wrote the image.
    pub backing_file: Option<Vec<u8>>,
}

/// What the first bytes say before the first cluster can be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Preamble {
    /// 2 or 3.
    pub version: u32,
    /// Bytes to read for [`Header::parse`]: the first cluster.
    pub cluster_size: u64,
}

/// Bytes that [`Header::preamble`] needs.
pub const PREAMBLE_LENGTH: usize = 24;

impl Header {
    /// Reads magic, version and cluster size.
    ///
    /// # Errors
    /// `NotQcow2`, `Truncated`, `UnsupportedVersion`, or `Invalid` for `cluster_bits` out of range.
    pub fn preamble(bytes: &[u8]) -> FormatResult<Preamble> {
        if bytes.get(..4) != Some(&MAGIC) {
            return Err(FormatError::NotQcow2);
        }
        let version = field::VERSION.read(bytes)?;
        if !(2..=3).contains(&version) {
            return Err(FormatError::UnsupportedVersion(version));
        }
        let cluster_bits = field::CLUSTER_BITS.read(bytes)?;
        let geometry = Geometry::new(cluster_bits, 4, false)?;
        Ok(Preamble { version, cluster_size: geometry.cluster_size() })
    }

    /// Parses the first cluster (or as much of it as the file has).
    ///
    /// # Errors
    /// As [`Header::preamble`]; `UnsupportedFeatures` by name; `Invalid` or `Limit` for fields that contradict the
    /// format; `Truncated` where the bytes end inside a structure.
    pub fn parse(cluster: &[u8]) -> FormatResult<Self> {
        let header = Self::parse_for_check(cluster)?;
        header.check_snapshot_table()?;
        Ok(header)
    }

    /// Whether the header says where the snapshot table is, and that it is no larger than it may be.
    ///
    /// # Errors
    /// `Invalid` or `Limit`, naming the field.
    pub fn check_snapshot_table(&self) -> FormatResult<()> {
        if self.nb_snapshots > MAX_SNAPSHOTS {
            return Err(FormatError::Limit {
                field: "nb_snapshots",
                value: self.nb_snapshots.into(),
                limit: MAX_SNAPSHOTS.into(),
            });
        }
        let smallest = u64::from(self.nb_snapshots) * crate::snapshot::FIXED_LENGTH as u64;
        self.check_table("snapshots_offset", self.snapshots_offset, smallest, u64::MAX)
    }

    /// As [`Header::parse`], but for the snapshot table, about which nothing is judged: it is part of what a check looks
    /// at, and the active disk can be read without it.
    ///
    /// # Errors
    /// As [`Header::parse`].
    pub fn parse_for_check(cluster: &[u8]) -> FormatResult<Self> {
        let preamble = Self::preamble(cluster)?;
        let v2 = RawHeaderV2::read_from_bytes(slice(cluster, 0, V2_LENGTH, "header")?)
            .map_err(|_| truncated(V2_LENGTH, cluster))?;
        let v3 = match preamble.version {
            2 => None,
            _ => Some(
                RawHeaderV3::read_from_bytes(slice(cluster, V2_LENGTH, V3_LENGTH - V2_LENGTH, "header")?)
                    .map_err(|_| truncated(V3_LENGTH, cluster))?,
            ),
        };
        let header_length = check_header_length(v3.as_ref(), preamble.cluster_size)?;
        let extensions_end = extensions_end(&v2, preamble.cluster_size)?;
        let incompatible = Incompatible::from_bits_retain(v3.map_or(0, |h| h.incompatible_features.get()));
        let parsed = extension::parse_all(cluster, header_length, extensions_end);
        if incompatible.unsupported() != 0 {
            // The name table helps the message; a damaged one must not hide that the feature is unknown.
            let bits = incompatible.unsupported();
            let names = feature::names_of(
                FeatureSet::Incompatible,
                bits,
                feature_table(parsed.as_deref().unwrap_or_default()),
            );
            return Err(FormatError::UnsupportedFeatures { bits, names });
        }
        let geometry = Geometry::new(
            v2.cluster_bits.get(),
            v3.map_or(4, |h| h.refcount_order.get()),
            incompatible.contains(Incompatible::EXTENDED_L2),
        )?;
        let known = V3_WRITTEN_LENGTH.min(header_length);
        let header = Self {
            version: preamble.version,
            geometry,
            size: v2.size.get(),
            crypt_method: match v2.crypt_method.get() {
                0 => CryptMethod::None,
                1 => CryptMethod::Aes,
                2 => CryptMethod::Luks,
                other => {
                    return Err(FormatError::invalid(
                        "crypt_method",
                        other.into(),
                        "unknown encryption method",
                    ));
                }
            },
            l1_size: v2.l1_size.get(),
            l1_table_offset: HostOffset(v2.l1_table_offset.get()),
            refcount_table_offset: HostOffset(v2.refcount_table_offset.get()),
            refcount_table_clusters: v2.refcount_table_clusters.get(),
            nb_snapshots: v2.nb_snapshots.get(),
            snapshots_offset: HostOffset(v2.snapshots_offset.get()),
            incompatible,
            compatible: Compatible::from_bits_retain(v3.map_or(0, |h| h.compatible_features.get())),
            autoclear: Autoclear::from_bits_retain(v3.map_or(0, |h| h.autoclear_features.get())),
            compression_type: compression_type(cluster, header_length, incompatible)?,
            header_length: header_length as u32,
            unknown_fields: slice(cluster, known, header_length - known, "header")?.to_vec(),
            extensions: parsed?,
            backing_file: backing_file(&v2, cluster, preamble.cluster_size)?,
        };
        header.check_tables()?;
        Ok(header)
    }

    fn check_tables(&self) -> FormatResult<()> {
        let g = &self.geometry;
        if self.size > MAX_VIRTUAL_SIZE {
            return Err(FormatError::Limit { field: "size", value: self.size, limit: MAX_VIRTUAL_SIZE });
        }
        let table = |field, offset, bytes, limit| self.check_table(field, offset, bytes, limit);
        let refcount_bytes = u64::from(self.refcount_table_clusters) * g.cluster_size();
        table("refcount_table_offset", self.refcount_table_offset, refcount_bytes, MAX_REFCOUNT_TABLE_BYTES)?;
        table("l1_table_offset", self.l1_table_offset, u64::from(self.l1_size) * 8, MAX_L1_BYTES)?;
        if self.l1_size > 0 && self.l1_table_offset.0 >= MAX_HOST_OFFSET {
            return Err(FormatError::invalid("l1_table_offset", self.l1_table_offset.0, "beyond 64 PiB"));
        }
        let needed = g.l1_entries_for(self.size);
        if i32::try_from(needed).is_err() {
            // No table could be long enough.
            let l1_size = self.l1_size.into();
            return Err(FormatError::invalid("l1_size", l1_size, "the virtual size is too big"));
        }
        if u64::from(self.l1_size) < needed {
            return Err(FormatError::invalid(
                "l1_size",
                self.l1_size.into(),
                "the L1 table is too small for the virtual size",
            ));
        }
        if self.autoclear.contains(Autoclear::DATA_FILE_RAW) && !self.has_data_file() {
            return Err(FormatError::invalid(
                "autoclear_features",
                self.autoclear.bits(),
                "raw external data needs an external data file",
            ));
        }
        match (self.crypt_method, self.crypto_header()) {
            (CryptMethod::Luks, None) => {
                Err(FormatError::invalid("crypt_method", 2, "LUKS without an encryption header pointer"))
            }
            (CryptMethod::None | CryptMethod::Aes, Some((offset, _))) => Err(FormatError::invalid(
                "full disk encryption header pointer",
                offset.0,
                "present although the encryption method has no header",
            )),
            _ => Ok(()),
        }
    }

    /// Whether a table of `bytes` bytes is within its limit, and can be where `offset` says.
    fn check_table(
        &self,
        field: &'static str,
        offset: HostOffset,
        bytes: u64,
        limit: u64,
    ) -> FormatResult<()> {
        if bytes > limit {
            return Err(FormatError::Limit { field, value: bytes, limit });
        }
        if bytes > 0 && !offset.is_aligned(self.geometry.cluster_size()) {
            return Err(FormatError::invalid(field, offset.0, "not a multiple of the cluster size"));
        }
        // Table offsets are used as signed file offsets.
        match offset.checked_add(bytes) {
            Some(end) if end.0 <= i64::MAX as u64 => Ok(()),
            _ => Err(FormatError::invalid(field, offset.0, "beyond the largest file offset")),
        }
    }

    /// Encodes header, extensions and backing file name: the start of the first cluster.
    ///
    /// # Errors
    /// `Limit` when they do not fit into one cluster, or a name is too long.
    pub fn encode(&self) -> FormatResult<Vec<u8>> {
        let mut out = vec![0u8; if self.version == 2 { V2_LENGTH } else { V3_WRITTEN_LENGTH }];
        if self.version > 2 {
            out.extend_from_slice(&self.unknown_fields);
        }
        let header_length = out.len();
        for extension in &self.extensions {
            extension.encode(&mut out);
        }
        Extension::encode_end(&mut out);
        let name_offset = out.len();
        let name = self.backing_file.as_deref().unwrap_or_default();
        let limit =
            |field, value: usize, limit: u64| FormatError::Limit { field, value: value as u64, limit };
        if name.len() > MAX_BACKING_FILE_NAME {
            return Err(limit("backing file name", name.len(), MAX_BACKING_FILE_NAME as u64));
        }
        out.extend_from_slice(name);
        if out.len() as u64 > self.geometry.cluster_size() {
            return Err(limit("header with extensions and names", out.len(), self.geometry.cluster_size()));
        }
        let v2 = RawHeaderV2 {
            magic: MAGIC,
            version: self.version.into(),
            backing_file_offset: self.backing_file.as_ref().map_or(0, |_| name_offset as u64).into(),
            backing_file_size: (name.len() as u32).into(),
            cluster_bits: self.geometry.cluster_bits().into(),
            size: self.size.into(),
            crypt_method: self.crypt_method.encode().into(),
            l1_size: self.l1_size.into(),
            l1_table_offset: self.l1_table_offset.0.into(),
            refcount_table_offset: self.refcount_table_offset.0.into(),
            refcount_table_clusters: self.refcount_table_clusters.into(),
            nb_snapshots: self.nb_snapshots.into(),
            snapshots_offset: self.snapshots_offset.0.into(),
        };
        put(&mut out, 0, v2.as_bytes());
        if self.version > 2 {
            let v3 = RawHeaderV3 {
                incompatible_features: self.incompatible.bits().into(),
                compatible_features: self.compatible.bits().into(),
                autoclear_features: self.autoclear.bits().into(),
                refcount_order: self.geometry.refcount_order().into(),
                header_length: (header_length as u32).into(),
            };
            put(&mut out, V2_LENGTH, v3.as_bytes());
            let compression = match self.compression_type {
                CompressionType::Zlib => 0,
                CompressionType::Zstd => 1,
            };
            field::COMPRESSION_TYPE.write(&mut out, compression);
        }
        Ok(out)
    }

    /// Whether guest clusters are in an external data file.
    pub fn has_data_file(&self) -> bool {
        self.incompatible.contains(Incompatible::DATA_FILE)
    }
    /// Whether the external data file can be read as a raw image.
    pub fn data_file_raw(&self) -> bool {
        self.autoclear.contains(Autoclear::DATA_FILE_RAW)
    }
    /// Name of the external data file, if the header stores one.
    pub fn data_file(&self) -> Option<&[u8]> {
        self.extensions.iter().find_map(|e| match e {
            Extension::DataFile(name) => Some(name.as_slice()),
            _ => None,
        })
    }
    /// Format of the backing file, if the header stores one. Of several the last one counts, as for QEMU.
    pub fn backing_format(&self) -> Option<&[u8]> {
        self.extensions.iter().rev().find_map(|e| match e {
            Extension::BackingFormat(name) => Some(name.as_slice()),
            _ => None,
        })
    }
    /// The bitmaps extension, whether or not it is consistent (autoclear bit 0).
    pub fn bitmaps(&self) -> Option<&extension::BitmapsExtension> {
        self.extensions.iter().find_map(|e| match e {
            Extension::Bitmaps(bitmaps) => Some(bitmaps),
            _ => None,
        })
    }
    /// Start and length of the encryption header.
    pub fn crypto_header(&self) -> Option<(HostOffset, u64)> {
        self.extensions.iter().find_map(|e| match e {
            Extension::CryptoHeader { offset, length } => Some((*offset, *length)),
            _ => None,
        })
    }
    /// The feature name table; empty if there is none.
    pub fn feature_names(&self) -> &[FeatureName] {
        feature_table(&self.extensions)
    }
}

/// Overwrites the bytes at `at`; the caller has made room.
fn put(out: &mut [u8], at: usize, bytes: &[u8]) {
    if let Some(target) = out.get_mut(at..at + bytes.len()) {
        target.copy_from_slice(bytes);
    }
}

fn feature_table(extensions: &[Extension]) -> &[FeatureName] {
    extensions
        .iter()
        .find_map(|e| match e {
            Extension::FeatureNames(names) => Some(names.as_slice()),
            _ => None,
        })
        .unwrap_or_default()
}

fn truncated(needed: usize, bytes: &[u8]) -> FormatError {
    FormatError::Truncated { field: "header", needed: needed as u64, available: bytes.len() as u64 }
}

fn check_header_length(v3: Option<&RawHeaderV3>, cluster_size: u64) -> FormatResult<usize> {
    let Some(v3) = v3 else { return Ok(V2_LENGTH) };
    let length = v3.header_length.get();
    let reason = if (length as usize) < V3_LENGTH {
        "the header is too short"
    } else if u64::from(length) > cluster_size {
        "the header exceeds the first cluster"
    } else if length % 8 != 0 {
        "not a multiple of 8"
    } else {
        return Ok(length as usize);
    };
    Err(FormatError::invalid("header_length", length.into(), reason))
}

fn extensions_end(v2: &RawHeaderV2, cluster_size: u64) -> FormatResult<usize> {
    match v2.backing_file_offset.get() {
        0 => Ok(cluster_size as usize),
        offset if offset > cluster_size => {
            Err(FormatError::invalid("backing_file_offset", offset, "outside the first cluster"))
        }
        offset => Ok(offset as usize),
    }
}

fn compression_type(
    cluster: &[u8],
    header_length: usize,
    incompatible: Incompatible,
) -> FormatResult<CompressionType> {
    let value =
        if header_length > COMPRESSION_TYPE_OFFSET { field::COMPRESSION_TYPE.read(cluster)? } else { 0 };
    let flagged = incompatible.contains(Incompatible::COMPRESSION_TYPE);
    match (value, flagged) {
        (0, false) => Ok(CompressionType::Zlib),
        (1, true) => Ok(CompressionType::Zstd),
        (0, true) => Err(FormatError::invalid(
            "compression_type",
            0,
            "the compression type bit is set although the type is the default",
        )),
        (other, false) => Err(FormatError::invalid(
            "compression_type",
            other.into(),
            "not the default although the compression type bit is not set",
        )),
        (other, true) => Err(FormatError::invalid("compression_type", other.into(), "unknown type")),
    }
}

fn backing_file(v2: &RawHeaderV2, cluster: &[u8], cluster_size: u64) -> FormatResult<Option<Vec<u8>>> {
    let offset = v2.backing_file_offset.get();
    if offset == 0 {
        return Ok(None);
    }
    let length = u64::from(v2.backing_file_size.get());
    if length > (MAX_BACKING_FILE_NAME as u64).min(cluster_size.saturating_sub(offset)) {
        return Err(FormatError::invalid(
            "backing_file_size",
            length,
            "longer than 1023 bytes or beyond the first cluster",
        ));
    }
    if length == 0 {
        return Ok(None);
    }
    slice(cluster, offset as usize, length as usize, "backing file name").map(|name| Some(name.to_vec()))
}
