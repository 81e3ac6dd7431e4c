//! The header of a COWD extent: the sparse extents of old ESX servers, and `vmfsSparse`, which snapshots on VMFS are.

use qcow2_core::{ErrorKind, Result};

use crate::fields::{Fields, invalid};
use crate::geometry::{Encoding, Geometry};

/// The first four bytes.
pub const MAGIC: [u8; 4] = *b"COWD";
/// Bytes of the header that are read.
pub const HEADER_BYTES: usize = 44;
/// Entries of each grain table.
const TABLE_ENTRIES: u64 = 4096;

/// How the extent whose header is at the start of `bytes` is cut.
///
/// # Errors
/// `InvalidHeader` with the field at fault; `UnsupportedFeature` for another version; `Limit`.
pub fn parse(bytes: &[u8]) -> Result<Geometry> {
    let mut fields = Fields(bytes);
    if fields.bytes(4, "magicNumber")? != MAGIC {
        return Err(invalid(ErrorKind::InvalidHeader, "magicNumber", "of the extent", "not a COWD extent"));
    }
    let version = fields.u32("version")?;
    if version != 1 {
        return Err(invalid(ErrorKind::UnsupportedFeature, "version", version, "not 1"));
    }
    fields.u32("flags")?;
    let capacity = u64::from(fields.u32("numSectors")?);
    let grain = u64::from(fields.u32("grainSize")?);
    let directory = u64::from(fields.u32("gdOffset")?);
    let entries = u64::from(fields.u32("numGDEntries")?);
    let geometry = Geometry {
        capacity,
        grain,
        table_entries: TABLE_ENTRIES,
        directory,
        redundant: None,
        overhead: 0,
        encoding: Encoding::Sectors { zero_grains: false },
        compressed: false,
        markers: false,
    };
    let geometry = geometry.checked()?;
    if entries < geometry.tables() {
        let reason = "too few for the sectors of the extent";
        return Err(invalid(ErrorKind::InvalidHeader, "numGDEntries", entries, reason));
    }
    Ok(geometry)
}
