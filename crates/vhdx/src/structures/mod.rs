//! Bytes to typed values, and back: no I/O. All numbers are little-endian; sections are those of [MS-VHDX].

mod bat;
mod fields;
mod header;
mod locator;
mod log;
mod metadata;
mod region;

pub(crate) use bat::anchor;
pub use bat::{Geometry, Payload, SECTORS_PER_CHUNK, bitmap_block, encode_bitmap, encode_payload, payload};
pub use fields::{Guid, seal};
pub use header::{
    FILE_IDENTIFIER, FILE_IDENTIFIER_LENGTH, HEADER_LENGTH, HEADER_OFFSETS, HEADER_SECTION, Header,
    check_identifier, current,
};
pub use locator::ParentLocator;
pub use log::{LOG_SECTOR, MOST_DESCRIPTORS, Patch, Sequence, active_sequence, encode_entry};
pub use metadata::{MAX_VIRTUAL_SIZE, METADATA_ITEMS, METADATA_TABLE_LENGTH, Metadata, encode_metadata};
pub use region::{BAT, METADATA, REGION_TABLE_LENGTH, REGION_TABLE_OFFSETS, Region, RegionTable};

pub(crate) use fields::put;

/// What places in the file are multiples of.
pub const MIB: u64 = 1 << 20;
