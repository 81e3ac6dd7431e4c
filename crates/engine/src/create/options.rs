//! What a new image can be, and which combinations the format allows.

use std::sync::Arc;

use qcow2_core::convert::Compression;
use qcow2_core::raw::SECTOR;
use qcow2_core::space::Preallocation;
use qcow2_format::header::extension::Extension;
use qcow2_format::header::feature::{Autoclear, Compatible, Incompatible};
use qcow2_format::limits::{MAX_L1_BYTES, MAX_VIRTUAL_SIZE};
use qcow2_format::{CompressionType, CryptMethod, FormatError, Geometry, Header, HostOffset};
use qcow2_transform::{Codec, CompressOptions};

use crate::door::DataDoor;
use crate::invalid::invalid;
use crate::{Error, ErrorKind, Result};

/// QEMU writes a feature name table only where the first cluster is larger than this.
const SMALLEST_CLUSTER_WITHOUT_NAMES: u64 = 4096;
/// Bytes of an L1 table entry.
pub(super) const L1_ENTRY_SIZE: u64 = 8;

/// The backing file of a new image. It is named here and not opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Backing {
    /// Name as stored in the header, in the bytes of the system's paths.
    pub filename: Vec<u8>,
    /// Format as QEMU names it.
    pub format: Option<Vec<u8>>,
}

/// An external data file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DataFile {
    /// Name as stored in the header.
    pub filename: Vec<u8>,
    /// The data file can be read on its own as a raw image.
    pub raw: bool,
}

/// Every option of a new qcow2 image. The default is what most readers can read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CreateOptions {
    /// Virtual size in bytes, rounded up to a sector.
    pub size: u64,
    /// 2 or 3.
    pub version: u32,
    /// 512 bytes to 2 MiB, a power of two.
    pub cluster_size: u64,
    /// L2 entries with a subcluster bitmap.
    pub extended_l2: bool,
    /// 1 to 64, a power of two.
    pub refcount_bits: u32,
    /// Refcount updates may be postponed.
    pub lazy_refcounts: bool,
    /// Algorithm of compressed clusters.
    pub compression_type: CompressionType,
    /// What to allocate.
    pub preallocation: Preallocation,
    /// Backing file.
    pub backing: Option<Backing>,
    /// External data file.
    pub data_file: Option<DataFile>,
    /// The data file exists and keeps its bytes, which become the disk's: it is only made longer where it is too short.
    pub keep_data_file: bool,
    /// What stands between the guest's bytes and the file's: guest bytes are the file's without it.
    pub data_door: Option<Arc<dyn DataDoor>>,
}

impl Default for CreateOptions {
    fn default() -> Self {
        Self {
            size: 0,
            version: 3,
            cluster_size: 64 << 10,
            extended_l2: false,
            refcount_bits: 16,
            lazy_refcounts: false,
            compression_type: CompressionType::Zlib,
            preallocation: Preallocation::Off,
            backing: None,
            data_file: None,
            keep_data_file: false,
            data_door: None,
        }
    }
}

pub(super) fn refuse<T>(field: &'static str, message: impl Into<String>) -> Result<T> {
    Err(Error::new(ErrorKind::InvalidArgument, message).with_field(field))
}

/// log2 of a power of two.
fn exponent(field: &'static str, value: u64) -> Result<u32> {
    match value.is_power_of_two() {
        true => Ok(value.trailing_zeros()),
        false => refuse(field, format!("{value} is not a power of two")),
    }
}

impl CreateOptions {
    /// Checks every rule that does not need a file.
    ///
    /// # Errors
    /// `InvalidArgument` naming the option, `Limit` for a size that the geometry cannot address.
    pub fn validate(&self) -> Result<()> {
        self.header().map(drop)
    }

    /// Cluster size, refcount width and L2 entry form.
    ///
    /// # Errors
    /// As `validate`.
    pub fn geometry(&self) -> Result<Geometry> {
        let cluster_bits = exponent("cluster_size", self.cluster_size)?;
        let refcount_order = exponent("refcount_bits", self.refcount_bits.into())?;
        Geometry::new(cluster_bits, refcount_order, self.extended_l2).map_err(|e| {
            // The caller gave sizes in bytes and bits, not the header's exponents.
            let (field, value) = match e.field() {
                Some("refcount_order") => ("refcount_bits", self.refcount_bits.into()),
                _ => ("cluster_size", self.cluster_size),
            };
            let reason = match e {
                FormatError::Invalid { reason, .. } => reason,
                _ => "not possible",
            };
            Error::new(ErrorKind::InvalidArgument, format!("{field} {value}: {reason}")).with_field(field)
        })
    }

    /// What is allocated in the end: a raw data file is mapped in full, so that it reads the same with and
    /// without the metadata.
    pub fn effective_preallocation(&self) -> Preallocation {
        match (self.preallocation, &self.data_file) {
            (Preallocation::Off, Some(DataFile { raw: true, .. })) => Preallocation::Metadata,
            (mode, _) => mode,
        }
    }

    fn check_combinations(&self) -> Result<()> {
        if !(2..=3).contains(&self.version) {
            return refuse("version", format!("{} is not a qcow2 version: 2 and 3 are", self.version));
        }
        self.check_door()?;
        if self.keep_data_file {
            match self.effective_preallocation() {
                _ if self.data_file.is_none() => {
                    return refuse("keep_data_file", "there is no data file to keep");
                }
                Preallocation::Metadata => {}
                Preallocation::Off => {
                    return refuse(
                        "keep_data_file",
                        "what a data file holds is the disk's only where all of it is mapped: keep_data_file needs a raw data file or \
                         preallocated metadata",
                    );
                }
                Preallocation::Falloc | Preallocation::Full => {
                    return refuse(
                        "keep_data_file",
                        "preallocating more than metadata would write over the data file that is to be kept",
                    );
                }
            }
        }
        let needs_version_3 = [
            (self.extended_l2, "extended_l2"),
            (self.lazy_refcounts, "lazy_refcounts"),
            (self.refcount_bits != 16, "refcount_bits"),
            (self.data_file.is_some(), "data_file"),
            (self.compression_type != CompressionType::Zlib, "compression_type"),
        ];
        if let Some((_, option)) = needs_version_3.iter().find(|(used, _)| *used && self.version < 3) {
            return refuse(option, format!("{option} needs version 3 (compatibility level 1.1)"));
        }
        if self.backing.is_some() && self.preallocation != Preallocation::Off && !self.extended_l2 {
            return refuse(
                "preallocation",
                "a backing file would be hidden by preallocated clusters: extended_l2 allows both",
            );
        }
        match (&self.backing, &self.data_file) {
            (Some(_), Some(DataFile { raw: true, .. })) => {
                refuse("data_file_raw", "a raw data file cannot be read on its own beside a backing file")
            }
            (Some(Backing { filename, .. }), _) if filename.is_empty() => {
                refuse("backing_file", "the name is empty")
            }
            (_, Some(DataFile { filename, .. })) if filename.is_empty() => {
                refuse("data_file", "the name is empty")
            }
            _ => Ok(()),
        }
    }

    /// How its clusters are compressed.
    pub(crate) fn compress_options(&self, Compression { level, window }: Compression) -> CompressOptions {
        let codec = match self.compression_type {
            CompressionType::Zlib => Codec::Zlib,
            CompressionType::Zstd => Codec::Zstd,
        };
        CompressOptions { codec, level, window }
    }

    /// The encryption header that the image gets.
    pub(crate) fn crypto_header(&self) -> Option<&[u8]> {
        self.data_door.as_ref().and_then(|door| door.crypto_header())
    }

    fn crypt_method(&self) -> CryptMethod {
        match &self.data_door {
            Some(door) if door.by_guest().is_some() => CryptMethod::Aes,
            Some(door) if door.crypto_header().is_some() => CryptMethod::Luks,
            _ => CryptMethod::None,
        }
    }

    /// Bytes of a data file that are the guest's as they are cannot be behind a door.
    fn check_door(&self) -> Result<()> {
        if self.data_door.is_none() {
            return Ok(());
        }
        if self.data_file.as_ref().is_some_and(|data_file| data_file.raw) {
            return refuse(
                "data_file_raw",
                "an encrypted data file cannot be read on its own as a raw image",
            );
        }
        if self.keep_data_file {
            return refuse("keep_data_file", "an encrypted data file cannot keep what it holds unencrypted");
        }
        Ok(())
    }

    /// Whether what is mapped before anything is written to it has to be written as zeroes: those of a new file are none to the
    /// guest behind a door. Else a flag says that it reads zeroes.
    pub(crate) fn fills_behind_door(&self) -> bool {
        self.data_door.is_some()
            && match self.effective_preallocation() {
                Preallocation::Off => false,
                Preallocation::Full => true,
                Preallocation::Metadata | Preallocation::Falloc => self.version < 3,
            }
    }

    /// Whether a flag says that the guest reads zeroes where a host cluster is mapped and not written. Subclusters are unallocated
    /// there.
    pub(crate) fn reserves_behind_door(&self) -> bool {
        self.data_door.is_some() && !self.fills_behind_door() && !self.extended_l2
    }

    /// The header of the empty image; the places of its tables are filled in by the builder.
    pub(super) fn header(&self) -> Result<Header> {
        self.check_combinations()?;
        let geometry = self.geometry()?;
        let size = match self.size.checked_next_multiple_of(SECTOR) {
            Some(size) if size <= MAX_VIRTUAL_SIZE => size,
            _ => return Err(too_large(self.size, "the largest virtual size is 2^63 - 1 bytes")),
        };
        let l1_size = geometry.l1_entries_for(size);
        let l1_size = match u32::try_from(l1_size) {
            Ok(entries) if l1_size * L1_ENTRY_SIZE <= MAX_L1_BYTES => entries,
            _ => return Err(too_large(size, "its L1 table would exceed 32 MiB: larger clusters allow more")),
        };
        let header = Header {
            version: self.version,
            geometry,
            size,
            crypt_method: self.crypt_method(),
            l1_size,
            l1_table_offset: HostOffset(0),
            refcount_table_offset: HostOffset(0),
            refcount_table_clusters: 1,
            nb_snapshots: 0,
            snapshots_offset: HostOffset(0),
            incompatible: self.incompatible(),
            compatible: match self.lazy_refcounts {
                true => Compatible::LAZY_REFCOUNTS,
                false => Compatible::empty(),
            },
            autoclear: match self.data_file {
                Some(DataFile { raw: true, .. }) => Autoclear::DATA_FILE_RAW,
                _ => Autoclear::empty(),
            },
            compression_type: self.compression_type,
            header_length: 0,
            unknown_fields: Vec::new(),
            extensions: self.extensions(),
            backing_file: self.backing.as_ref().map(|b| b.filename.clone()),
        };
        // Names that do not fit are found before anything is written.
        header.encode().map_err(|e| invalid(e, ErrorKind::InvalidArgument))?;
        Ok(header)
    }

    fn incompatible(&self) -> Incompatible {
        let mut bits = Incompatible::empty();
        bits.set(Incompatible::DATA_FILE, self.data_file.is_some());
        bits.set(Incompatible::COMPRESSION_TYPE, self.compression_type != CompressionType::Zlib);
        bits.set(Incompatible::EXTENDED_L2, self.extended_l2);
        bits
    }

    /// In the order in which QEMU writes them.
    fn extensions(&self) -> Vec<Extension> {
        let mut extensions = Vec::new();
        if let Some(format) = self.backing.as_ref().and_then(|b| b.format.clone()) {
            extensions.push(Extension::BackingFormat(format));
        }
        if let Some(data_file) = &self.data_file {
            extensions.push(Extension::DataFile(data_file.filename.clone()));
        }
        if let Some(header) = self.crypto_header() {
            // The builder knows its place.
            let length = header.len() as u64;
            extensions.push(Extension::CryptoHeader { offset: HostOffset(0), length });
        }
        if self.version >= 3 && self.cluster_size > SMALLEST_CLUSTER_WITHOUT_NAMES {
            extensions.push(Extension::known_feature_names());
        }
        extensions
    }
}

fn too_large(size: u64, why: &str) -> Error {
    Error::new(ErrorKind::Limit, format!("the image is too large ({size} bytes): {why}")).with_field("size")
}
