//! Limits on what an image may claim. The constants are QEMU's, so that the same images open here and there.

/// Smallest `cluster_bits`: 512-byte clusters.
pub const MIN_CLUSTER_BITS: u32 = 9;
/// Largest `cluster_bits`: 2 MiB clusters.
pub const MAX_CLUSTER_BITS: u32 = 21;
/// Smallest `cluster_bits` with extended L2 entries: 512-byte subclusters.
pub const MIN_EXTENDED_L2_CLUSTER_BITS: u32 = 14;
/// Largest `refcount_order`: 64-bit refcounts.
pub const MAX_REFCOUNT_ORDER: u32 = 6;
/// Longest backing file name in bytes.
pub const MAX_BACKING_FILE_NAME: usize = 1023;
/// Longest backing format name in bytes.
pub const MAX_BACKING_FORMAT_NAME: usize = 15;
/// Largest L1 table in bytes.
pub const MAX_L1_BYTES: u64 = 32 << 20;
/// Largest refcount table in bytes.
pub const MAX_REFCOUNT_TABLE_BYTES: u64 = 8 << 20;
/// Most snapshots in one image.
pub const MAX_SNAPSHOTS: u32 = 65536;
/// Largest snapshot table in bytes.
pub const MAX_SNAPSHOT_TABLE_BYTES: u64 = 1024 * MAX_SNAPSHOTS as u64;
/// Most extra data in one snapshot table entry, in bytes.
pub const MAX_SNAPSHOT_EXTRA_DATA: u32 = 1024;
/// Most bitmaps in one image.
pub const MAX_BITMAPS: u32 = 65535;
/// Largest bitmap directory in bytes.
pub const MAX_BITMAP_DIRECTORY_BYTES: u64 = 1024 * MAX_BITMAPS as u64;
/// Longest bitmap name in bytes.
pub const MAX_BITMAP_NAME: usize = 1023;
/// Most entries in one bitmap's table.
pub const MAX_BITMAP_TABLE_ENTRIES: u32 = 0x0800_0000;
/// Bitmap granularity as a power of two: 512 bytes to 2 GiB.
pub const BITMAP_GRANULARITY_BITS: std::ops::RangeInclusive<u8> = 9..=31;
/// Exclusive upper end of host offsets that an L1 or L2 entry can hold: 64 PiB.
pub const MAX_HOST_OFFSET: u64 = 1 << 56;
/// Largest virtual size: offsets are signed 64-bit numbers to the operating system.
pub const MAX_VIRTUAL_SIZE: u64 = i64::MAX as u64;

/// Limits that a caller can tighten for images from strangers, checked before anything is allocated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Largest virtual size in bytes.
    pub max_virtual_size: u64,
    /// Most bytes of metadata that is loaded as a whole (L1 and refcount tables, snapshot table, bitmap directory).
    pub max_metadata_bytes: u64,
    /// Most internal snapshots.
    pub max_snapshots: u32,
    /// Most persistent bitmaps.
    pub max_bitmaps: u32,
    /// Most layers in a backing chain.
    pub max_chain_depth: u32,
    /// Most bytes that one operation may hold in memory for bookkeeping (a check's counters, say).
    pub max_memory: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_virtual_size: MAX_VIRTUAL_SIZE,
            max_metadata_bytes: 128 << 20,
            max_snapshots: MAX_SNAPSHOTS,
            max_bitmaps: MAX_BITMAPS,
            max_chain_depth: 200,
            max_memory: 1 << 30,
        }
    }
}
