//! The header's bytes as they lie on disk.

use zerocopy::byteorder::big_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// `QFI\xfb`.
pub const MAGIC: [u8; 4] = *b"QFI\xfb";
/// Header length of version 2.
pub const V2_LENGTH: usize = size_of::<RawHeaderV2>();
/// Smallest header length of version 3.
pub const V3_LENGTH: usize = V2_LENGTH + size_of::<RawHeaderV3>();
/// Offset of the `compression_type` byte.
pub const COMPRESSION_TYPE_OFFSET: usize = 104;
/// Header length that this library writes for version 3: with `compression_type` and its padding.
pub const V3_WRITTEN_LENGTH: usize = 112;

/// Bytes 0-71, both versions. Field names are the specification's.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
#[allow(missing_docs, reason = "the specification's names and meanings, section Header")]
pub struct RawHeaderV2 {
    pub magic: [u8; 4],
    pub version: U32,
    pub backing_file_offset: U64,
    pub backing_file_size: U32,
    pub cluster_bits: U32,
    pub size: U64,
    pub crypt_method: U32,
    pub l1_size: U32,
    pub l1_table_offset: U64,
    pub refcount_table_offset: U64,
    pub refcount_table_clusters: U32,
    pub nb_snapshots: U32,
    pub snapshots_offset: U64,
}

/// Bytes 72-103, version 3.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
#[allow(missing_docs, reason = "the specification's names and meanings, section Header")]
pub struct RawHeaderV3 {
    pub incompatible_features: U64,
    pub compatible_features: U64,
    pub autoclear_features: U64,
    pub refcount_order: U32,
    pub header_length: U32,
}

const _: () = assert!(V2_LENGTH == 72 && V3_LENGTH == 104);
