//! Byte offsets of the header's fields, and the numbers that appear in them, from the specification. A second table on
//! purpose: the format crate's is judged by it.

/// "QFI\xfb".
pub const MAGIC: u32 = 0x5146_49fb;

/// Offset of `version`.
pub const VERSION: u64 = 4;
/// Offset of `backing_file_offset`.
pub const BACKING_OFFSET: u64 = 8;
/// Offset of `backing_file_size`.
pub const BACKING_SIZE: u64 = 16;
/// Offset of `cluster_bits`.
pub const CLUSTER_BITS: u64 = 20;
/// Offset of `size`.
pub const SIZE: u64 = 24;
/// Offset of `crypt_method`.
pub const CRYPT_METHOD: u64 = 32;
/// Offset of `l1_size`.
pub const L1_SIZE: u64 = 36;
/// Offset of `l1_table_offset`.
pub const L1_OFFSET: u64 = 40;
/// Offset of `refcount_table_offset`.
pub const REFCOUNT_OFFSET: u64 = 48;
/// Offset of `refcount_table_clusters`.
pub const REFCOUNT_CLUSTERS: u64 = 56;
/// Offset of `nb_snapshots`.
pub const SNAPSHOTS: u64 = 60;
/// Offset of `snapshots_offset`.
pub const SNAPSHOTS_OFFSET: u64 = 64;
/// Offset of `incompatible_features`.
pub const INCOMPATIBLE: u64 = 72;
/// Offset of `compatible_features`.
pub const COMPATIBLE: u64 = 80;
/// Offset of `autoclear_features`.
pub const AUTOCLEAR: u64 = 88;
/// Offset of `refcount_order`.
pub const REFCOUNT_ORDER: u64 = 96;
/// Offset of `header_length`.
pub const HEADER_LENGTH: u64 = 100;
/// Offset of `compression_type` (one byte).
pub const COMPRESSION_TYPE: u64 = 104;

/// Incompatible: refcounts may be inconsistent.
pub const INCOMPAT_DIRTY: u64 = 1;
/// Incompatible: any structure may be corrupt.
pub const INCOMPAT_CORRUPT: u64 = 2;
/// Incompatible: an external data file is used.
pub const INCOMPAT_DATA_FILE: u64 = 4;
/// Incompatible: the compression type is not deflate.
pub const INCOMPAT_COMPRESSION: u64 = 8;
/// Incompatible: extended L2 entries.
pub const INCOMPAT_EXTENDED_L2: u64 = 16;
/// Autoclear: the bitmaps extension is consistent.
pub const AUTOCLEAR_BITMAPS: u64 = 1;
/// Autoclear: the external data file is a raw image.
pub const AUTOCLEAR_RAW: u64 = 2;

/// Extension: backing file format name.
pub const EXT_BACKING_FORMAT: u32 = 0xe279_2aca;
/// Extension: feature name table.
pub const EXT_FEATURE_NAMES: u32 = 0x6803_f857;
/// Extension: bitmaps.
pub const EXT_BITMAPS: u32 = 0x2385_2875;
/// Extension: full disk encryption header pointer.
pub const EXT_CRYPTO: u32 = 0x0537_be77;
/// Extension: external data file name.
pub const EXT_DATA_FILE: u32 = 0x4441_5441;
