//! The headers of a seSparse extent: snapshots on VMFS 6. VMware documents them nowhere; what is taken is what QEMU takes, and a
//! field of another value is refused.

use qcow2_core::{ErrorKind, Result, check_limit};

use crate::fields::{Fields, SECTOR, invalid};
use crate::geometry::{Encoding, Geometry};

/// The first eight bytes.
pub const MAGIC: [u8; 8] = 0xcafe_babe_u64.to_le_bytes();
/// The first eight bytes of the header that changes.
pub const VOLATILE_MAGIC: u64 = 0xcafe_cafe;
/// Bytes of each header.
pub const HEADER_BYTES: usize = 512;
const VERSION: u64 = 0x2_0000_0001;
/// Sectors of a grain.
const GRAIN: u64 = 8;
/// Sectors of a grain table.
const TABLE: u64 = 64;
/// Bytes of an entry.
const ENTRY: u64 = 8;

/// The header that never changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// How the extent is cut.
    pub geometry: Geometry,
    /// Sector of the header that changes.
    pub volatile: u64,
}

/// Reads the header at the start of `bytes`.
///
/// # Errors
/// `InvalidHeader` with the field at fault; `UnsupportedFeature` for a value that nobody knows; `Limit`.
pub fn parse(bytes: &[u8]) -> Result<Header> {
    let mut fields = Fields(bytes.get(..HEADER_BYTES).unwrap_or(bytes));
    if fields.bytes(8, "magic")? != MAGIC {
        return Err(invalid(ErrorKind::InvalidHeader, "magic", "of the extent", "not a seSparse extent"));
    }
    known(&mut fields, "version", VERSION)?;
    let capacity = fields.u64("capacity")?;
    known(&mut fields, "grainSize", GRAIN)?;
    known(&mut fields, "grainTableSize", TABLE)?;
    known(&mut fields, "flags", 0)?;
    for _ in 0..4 {
        known(&mut fields, "reserved", 0)?;
    }
    let volatile = fields.u64("volatileHeaderOffset")?;
    fields.bytes(5 * 8, "journalOffset")?;
    let directory = fields.u64("grainDirectoryOffset")?;
    let directory_sectors = fields.u64("grainDirectorySize")?;
    let tables = fields.u64("grainTablesOffset")?;
    fields.bytes(5 * 8, "grainTablesSize")?;
    let grains = fields.u64("grainOffset")?;
    for (field, sector) in
        [("volatileHeaderOffset", volatile), ("grainTablesOffset", tables), ("grainOffset", grains)]
    {
        check_limit(field, sector, i64::MAX as u64 / SECTOR)?;
    }
    let geometry = Geometry {
        capacity,
        grain: GRAIN,
        table_entries: TABLE * SECTOR / ENTRY,
        directory,
        redundant: None,
        overhead: 0,
        encoding: Encoding::SeSparse { tables, grains },
        compressed: false,
        markers: false,
    };
    let geometry = geometry.checked()?;
    if directory_sectors.saturating_mul(SECTOR / ENTRY) < geometry.tables() {
        let reason = "too small for the sectors of the extent";
        return Err(invalid(ErrorKind::InvalidHeader, "grainDirectorySize", directory_sectors, reason));
    }
    Ok(Header { geometry, volatile })
}

fn known(fields: &mut Fields<'_>, field: &'static str, value: u64) -> Result<()> {
    let found = fields.u64(field)?;
    if found == value {
        return Ok(());
    }
    Err(invalid(
        ErrorKind::UnsupportedFeature,
        field,
        format_args!("{found:#x}"),
        "a value that is not known",
    ))
}

/// Judges the header that changes, at the start of `bytes`.
///
/// # Errors
/// `InvalidHeader`; `UnsupportedFeature` for a journal that waits to be replayed.
pub fn judge_volatile(bytes: &[u8]) -> Result<()> {
    let mut fields = Fields(bytes);
    let magic = fields.u64("volatile header magic")?;
    if magic != VOLATILE_MAGIC {
        let value = format_args!("{magic:#x}");
        return Err(invalid(
            ErrorKind::InvalidHeader,
            "volatile header magic",
            value,
            "not that of a seSparse extent",
        ));
    }
    fields.u64("freeGTNumber")?;
    fields.u64("nextTxnSeqNumber")?;
    match fields.u64("replayJournal")? {
        0 => Ok(()),
        other => {
            let reason = "the journal has to be replayed, which only its host does";
            Err(invalid(ErrorKind::UnsupportedFeature, "replayJournal", other, reason))
        }
    }
}
