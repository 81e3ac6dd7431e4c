//! How an extent with grain tables is cut, whatever its header: in grains, tables of their places, and a directory of the tables.

use qcow2_core::{ErrorKind, Result, check_limit};

use crate::fields::{SECTOR, invalid};

/// Largest grain in sectors: 1 GiB, as QEMU has it.
const MAX_GRAIN: u64 = 0x20_0000;
/// Largest grain in sectors that is compressed: it is held in memory.
const MAX_COMPRESSED_GRAIN: u64 = 0x1_0000;
/// Most entries of a directory, QEMU's limit.
const MAX_TABLES: u64 = 32 << 20;

/// How entries are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Encoding {
    /// Sectors of 32 bits: of hosted sparse extents and of COWD.
    Sectors {
        /// An entry of 1 is a grain of zeroes.
        zero_grains: bool,
    },
    /// The 64-bit entries of a seSparse extent, whose numbers count from these sectors.
    SeSparse {
        /// First sector of the grain tables.
        tables: u64,
        /// First sector of the grains.
        grains: u64,
    },
}

/// Where a grain is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Grain {
    /// Not in this image.
    Unallocated,
    /// All zeroes.
    Zero,
    /// From this byte of the file on.
    Data(u64),
}

/// A grain of zeroes, where the header allows it.
pub const ZERO_GRAIN: u64 = 1;

/// The cut of an extent. Lengths and places are sectors unless said otherwise.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// Sectors of the extent.
    pub capacity: u64,
    /// Sectors of a grain, a power of two.
    pub grain: u64,
    /// Entries of a grain table.
    pub table_entries: u64,
    /// Where the directory is.
    pub directory: u64,
    /// Where the copy of the directory is, if there is one.
    pub redundant: Option<u64>,
    /// Sectors of metadata in front of the first grain, where the header says so.
    pub overhead: u64,
    /// How entries are written.
    pub encoding: Encoding,
    /// Grains are zlib streams.
    pub compressed: bool,
    /// A marker stands in front of each of them.
    pub markers: bool,
}

impl Geometry {
    /// Holds it against the limits.
    ///
    /// # Errors
    /// `InvalidHeader` or `Limit` with the field at fault.
    pub(crate) fn checked(self) -> Result<Self> {
        let kind = ErrorKind::InvalidHeader;
        if !self.grain.is_power_of_two() {
            return Err(invalid(kind, "grainSize", self.grain, "not a power of two"));
        }
        let largest = if self.compressed { MAX_COMPRESSED_GRAIN } else { MAX_GRAIN };
        check_limit("grainSize", self.grain, largest)?;
        if self.table_entries == 0 {
            return Err(invalid(kind, "numGTEsPerGT", 0, "a grain table has entries"));
        }
        check_limit("capacity", self.capacity, i64::MAX as u64 / SECTOR)?;
        check_limit("grain directory entries", self.tables(), MAX_TABLES)?;
        for (field, sector) in [
            ("gdOffset", self.directory),
            ("rgdOffset", self.redundant.unwrap_or(0)),
            ("overHead", self.overhead),
        ] {
            check_limit(field, sector, i64::MAX as u64 / SECTOR)?;
        }
        Ok(self)
    }

    /// Bytes of the extent.
    pub fn size(&self) -> u64 {
        self.capacity * SECTOR
    }

    /// Bytes of a grain.
    pub fn grain_bytes(&self) -> u64 {
        self.grain * SECTOR
    }

    /// Bytes that one table maps.
    pub fn coverage(&self) -> u64 {
        self.grain_bytes().saturating_mul(self.table_entries)
    }

    /// Entries of the directory.
    pub fn tables(&self) -> u64 {
        self.size().div_ceil(self.coverage())
    }

    /// Bytes of an entry.
    pub fn entry_bytes(&self) -> u64 {
        match self.encoding {
            Encoding::Sectors { .. } => 4,
            Encoding::SeSparse { .. } => 8,
        }
    }

    /// Bytes of the directory.
    pub fn directory_bytes(&self) -> u64 {
        self.tables() * self.entry_bytes()
    }

    /// Bytes of a table.
    pub fn table_bytes(&self) -> u64 {
        self.table_entries * self.entry_bytes()
    }

    /// Bytes of table `index` that map something.
    pub fn used_table_bytes(&self, index: u64) -> u64 {
        let rest = self.size().saturating_sub(index.saturating_mul(self.coverage()));
        rest.div_ceil(self.grain_bytes()).min(self.table_entries) * self.entry_bytes()
    }

    /// The first byte of the table that an entry of the directory names; `None` where there is none.
    ///
    /// # Errors
    /// `Corrupt` for an entry that names none and is not empty.
    pub fn table(&self, entry: u64) -> Result<Option<u64>> {
        match self.encoding {
            _ if entry == 0 => Ok(None),
            Encoding::Sectors { .. } => Ok(Some(entry * SECTOR)),
            // The upper half says that the table is there, the lower one is its number.
            Encoding::SeSparse { tables, .. } if entry >> 32 == 0x1000_0000 => {
                let number = entry & u64::from(u32::MAX);
                let place =
                    number.checked_mul(self.table_bytes()).and_then(|at| at.checked_add(tables * SECTOR));
                place
                    .map(Some)
                    .ok_or_else(|| damaged("grain directory entry", entry, "beyond the end of any file"))
            }
            Encoding::SeSparse { .. } => Err(damaged("grain directory entry", entry, "of no known kind")),
        }
    }

    /// What an entry of a grain table says.
    ///
    /// # Errors
    /// `Corrupt` for an entry of no known kind.
    pub fn grain(&self, entry: u64) -> Result<Grain> {
        match self.encoding {
            _ if entry == 0 => Ok(Grain::Unallocated),
            Encoding::Sectors { zero_grains: true } if entry == ZERO_GRAIN => Ok(Grain::Zero),
            Encoding::Sectors { .. } => Ok(Grain::Data(entry * SECTOR)),
            Encoding::SeSparse { grains, .. } => match entry >> 60 {
                // Unmapped by the guest, and zeroed.
                1 | 2 => Ok(Grain::Zero),
                3 => {
                    // The lowest 12 bits of the grain's number stand in front of the others.
                    let number = (entry >> 48 & 0xfff) | (entry & 0xffff_ffff_ffff) << 12;
                    let sector = number.checked_mul(self.grain).and_then(|at| at.checked_add(grains));
                    let place = sector.and_then(|sector| sector.checked_mul(SECTOR));
                    place
                        .map(Grain::Data)
                        .ok_or_else(|| damaged("grain table entry", entry, "beyond the end of any file"))
                }
                _ => Err(damaged("grain table entry", entry, "of no known kind")),
            },
        }
    }

    /// The words of a table or directory.
    pub(crate) fn decode(&self, bytes: &[u8]) -> Vec<u64> {
        match self.encoding {
            Encoding::Sectors { .. } => {
                bytes.as_chunks::<4>().0.iter().map(|word| u64::from(u32::from_le_bytes(*word))).collect()
            }
            Encoding::SeSparse { .. } => {
                bytes.as_chunks::<8>().0.iter().map(|word| u64::from_le_bytes(*word)).collect()
            }
        }
    }
}

fn damaged(field: &'static str, entry: u64, reason: &str) -> qcow2_core::Error {
    invalid(ErrorKind::Corrupt, field, format_args!("{entry:#x}"), reason)
}
