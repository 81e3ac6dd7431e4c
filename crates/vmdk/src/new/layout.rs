//! Where the structures of a new sparse extent are: as QEMU lays them out.

use qcow2_core::{Mem, Result, Storage, StorageExt};

use crate::fields::SECTOR;
use crate::geometry::Geometry;
use crate::sparse::Header;

/// Sectors of a grain table.
const TABLE: u64 = 4;

/// The structures of a new sparse extent: behind its descriptor the copy of the grain directory with its tables, then the directory
/// with its own, then grains.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SparseLayout {
    /// The header.
    pub(crate) header: Header,
    /// How the extent is cut.
    pub(crate) geometry: Geometry,
    /// Sectors of a directory.
    directory: u64,
}

impl SparseLayout {
    /// Bytes that there are for a descriptor.
    pub(crate) const DESCRIPTOR_BYTES: u64 = 20 * SECTOR;

    /// That of an extent of so many sectors.
    ///
    /// # Errors
    /// `Limit` for one that is too large.
    pub(crate) fn new(sectors: u64, zero_grains: bool) -> Result<Self> {
        let header = Header::new(sectors, false, zero_grains);
        let tables = header.geometry()?.tables();
        let directory = (tables * 4).div_ceil(SECTOR);
        let redundant = header.descriptor_offset + header.descriptor_size;
        let first = redundant + directory + tables * TABLE;
        let end = first + directory + tables * TABLE;
        let header =
            Header { redundant, directory: first, overhead: end.next_multiple_of(header.grain), ..header };
        Ok(Self { header, geometry: header.geometry()?, directory })
    }

    /// The sector of a table in the copy, and in the tables.
    pub(crate) fn tables(&self, index: u64) -> [u64; 2] {
        [self.header.redundant, self.header.directory].map(|start| start + self.directory + index * TABLE)
    }

    /// Gives an empty file the length of all structures, and writes both directories.
    ///
    /// # Errors
    /// `Io`.
    pub(crate) fn write_tables(&self, file: &dyn Storage) -> Result<()> {
        file.resize(self.header.overhead * SECTOR)?;
        for start in [self.header.redundant, self.header.directory] {
            let first = start + self.directory;
            let entries = (0..self.geometry.tables()).map(|index| (first + index * TABLE) as u32);
            let bytes: Vec<u8> = entries.flat_map(u32::to_le_bytes).collect();
            file.write_all_at(Mem::from(&bytes[..]), start * SECTOR)?;
        }
        Ok(())
    }
}
