//! A new image: where its parts lie, and the order in which they are written.

use qcow2_core::space::{empty, lengthen};
use qcow2_core::{Error, ErrorKind, Job, Mem, Result, Storage, StorageExt};

use crate::file::new_guid;
use crate::structures::{
    BAT, FILE_IDENTIFIER, Geometry, Guid, HEADER_OFFSETS, HEADER_SECTION, Header, MAX_VIRTUAL_SIZE, METADATA,
    METADATA_ITEMS, MIB, Metadata, Payload, REGION_TABLE_OFFSETS, Region, RegionTable, encode_metadata,
    encode_payload,
};

/// Entries that are written at once.
const TABLE_PART: u64 = 1 << 17;
/// The length of a log unless the caller says otherwise.
const DEFAULT_LOG: u64 = MIB;
/// Room behind the metadata that stays free, as QEMU leaves it.
const SPARE: u64 = 4 * MIB;
const CREATOR: &str = "qcow2";

/// How blocks are allocated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Subformat {
    /// When they are written to.
    #[default]
    Dynamic,
    /// From the start.
    Fixed,
}

/// A new image. Sizes are bytes; what is 0 is chosen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewVhdx {
    /// Size of the disk, a multiple of the sector size.
    pub size: u64,
    /// How blocks are allocated.
    pub subformat: Subformat,
    /// Bytes of a block: a power of two from 1 MiB to 256 MiB; 0 for what QEMU takes for a disk of this size.
    pub block_size: u64,
    /// Bytes of the log: a multiple of 1 MiB; 0 for 1 MiB.
    pub log_size: u64,
    /// Blocks of a dynamic disk are zero, and not just absent: what QEMU does unless it is told otherwise.
    pub block_state_zero: bool,
    /// Bytes of a sector: 512 or 4096.
    pub sector_size: u32,
}

impl Default for NewVhdx {
    fn default() -> Self {
        Self {
            size: 0,
            subformat: Subformat::Dynamic,
            block_size: 0,
            log_size: 0,
            block_state_zero: true,
            sector_size: 512,
        }
    }
}

/// Where the parts of a new image lie.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    pub(crate) geometry: Geometry,
    size: u64,
    header: Header,
    regions: RegionTable,
    metadata: Metadata,
    /// Where blocks begin.
    pub(crate) data: u64,
}

fn refuse(kind: ErrorKind, field: &'static str, message: String) -> Error {
    Error::new(kind, message).with_field(field)
}

impl NewVhdx {
    /// What QEMU takes for a disk of this size.
    fn chosen_block_size(&self) -> u64 {
        match self.size {
            size if size > 32 << 40 => 64 * MIB,
            size if size > 100 << 30 => 32 * MIB,
            size if size > 1 << 30 => 16 * MIB,
            _ => 8 * MIB,
        }
    }

    /// Lays the image out.
    ///
    /// # Errors
    /// `InvalidArgument`, `Limit` for a size that the format does not have.
    pub(crate) fn plan(&self) -> Result<Plan> {
        let invalid = ErrorKind::InvalidArgument;
        let block_size = if self.block_size == 0 { self.chosen_block_size() } else { self.block_size };
        if !block_size.is_power_of_two() || !(MIB..=256 * MIB).contains(&block_size) {
            let message = format!("a block size of {block_size} is no power of two from 1 MiB to 256 MiB");
            return Err(refuse(invalid, "block_size", message));
        }
        let log_size = if self.log_size == 0 { DEFAULT_LOG } else { self.log_size };
        let Some(log_length) =
            u32::try_from(log_size).ok().filter(|size| u64::from(*size).is_multiple_of(MIB))
        else {
            let message = format!("a log size of {log_size} is no multiple of 1 MiB below 4 GiB");
            return Err(refuse(invalid, "log_size", message));
        };
        if ![512, 4096].contains(&self.sector_size) {
            let message = format!("a sector size of {} is neither 512 nor 4096", self.sector_size);
            return Err(refuse(invalid, "sector_size", message));
        }
        if self.size > MAX_VIRTUAL_SIZE {
            return Err(refuse(
                ErrorKind::Limit,
                "size",
                format!("{} bytes are more than 64 TiB", self.size),
            ));
        }
        if !self.size.is_multiple_of(self.sector_size.into()) {
            let message = format!("{} is no multiple of {} bytes", self.size, self.sector_size);
            return Err(refuse(invalid, "size", message));
        }
        let geometry = Geometry { block_size, sector_size: self.sector_size.into(), has_parent: false };
        let table = (geometry.entries(self.size) * 8).next_multiple_of(MIB).max(MIB);
        let bat =
            Region { guid: BAT, offset: HEADER_SECTION + log_size, length: table as u32, required: true };
        let items = Region { guid: METADATA, offset: bat.offset + table, length: MIB as u32, required: true };
        Ok(Plan {
            geometry,
            size: self.size,
            header: Header {
                sequence_number: 1,
                file_write_guid: new_guid()?,
                data_write_guid: new_guid()?,
                log_guid: Guid::default(),
                log_length,
                log_offset: HEADER_SECTION,
            },
            data: items.offset + MIB + SPARE,
            regions: RegionTable { bat, metadata: items, others: Vec::new() },
            metadata: Metadata {
                block_size,
                leave_blocks_allocated: self.subformat == Subformat::Fixed,
                virtual_size: self.size,
                virtual_size_at: 0,
                virtual_disk_id: new_guid()?,
                logical_sector_size: self.sector_size,
                physical_sector_size: self.sector_size,
                parent: None,
            },
        })
    }

    /// What a block of the new image is before anything is written to it.
    pub(crate) fn initial(&self, plan: &Plan, block: u64) -> Payload {
        match self.subformat {
            Subformat::Fixed => Payload::Present(plan.data + block * plan.geometry.block_size),
            Subformat::Dynamic if self.block_state_zero => Payload::Zero,
            Subformat::Dynamic => Payload::NotPresent,
        }
    }

    /// Makes an image that reads as zeroes. Returns when it is durable; before that the file is none.
    ///
    /// # Errors
    /// `InvalidArgument`, `Limit`; `Io`; `Aborted`.
    pub fn create(&self, host: &dyn Storage, job: &Job) -> Result<()> {
        let plan = self.plan().map_err(|e| host.located(e))?;
        plan.begin(host)?;
        let length = match self.subformat {
            Subformat::Fixed => plan.data + plan.geometry.blocks(self.size) * plan.geometry.block_size,
            Subformat::Dynamic => plan.data,
        };
        lengthen(host, length)?;
        plan.write_table(host, job, &mut |block| self.initial(&plan, block))?;
        plan.publish(host, true)
    }
}

impl Plan {
    /// Makes `host` no image, and empty.
    pub(crate) fn begin(&self, host: &dyn Storage) -> Result<()> {
        if host.traits().block_device {
            let message = "vhdx images are made in files: they grow";
            return Err(host.located(Error::new(ErrorKind::InvalidArgument, message)));
        }
        empty(host)
    }

    /// Writes the table; `of` says where each block is, in their order.
    pub(crate) fn write_table(
        &self,
        host: &dyn Storage,
        job: &Job,
        of: &mut dyn FnMut(u64) -> Payload,
    ) -> Result<()> {
        let entries = self.geometry.entries(self.size);
        let mut index = 0;
        while index < entries {
            job.checkpoint()?;
            let part = index..(index + TABLE_PART).min(entries);
            let entry = |index| self.geometry.block_of(index).map_or(0, |block| encode_payload(of(block)));
            let bytes: Vec<u8> = part.clone().map(entry).flat_map(u64::to_le_bytes).collect();
            if bytes.iter().any(|byte| *byte != 0) {
                host.write_all_at(Mem::from(&bytes[..]), self.regions.bat.offset + index * 8)?;
            }
            index = part.end;
        }
        Ok(())
    }

    /// Writes everything but blocks and their table: what makes the file an image comes last. `durable`: in this order also on stable
    /// storage.
    pub(crate) fn publish(&self, host: &dyn Storage, durable: bool) -> Result<()> {
        let sync = || if durable { host.flush() } else { Ok(()) };
        let (table, items) = encode_metadata(&self.metadata);
        let place = self.regions.metadata.offset;
        host.write_all_at(Mem::from(&table[..]), place)?;
        host.write_all_at(Mem::from(&items[..]), place + METADATA_ITEMS.0)?;
        let regions = self.regions.encode();
        for offset in REGION_TABLE_OFFSETS {
            host.write_all_at(Mem::from(&regions[..]), offset)?;
        }
        for (offset, newer) in HEADER_OFFSETS.into_iter().zip(0..) {
            let header = Header { sequence_number: self.header.sequence_number + newer, ..self.header };
            host.write_all_at(Mem::from(&header.encode()[..]), offset)?;
        }
        lengthen(host, self.data)?;
        sync()?;
        let creator = CREATOR.encode_utf16().flat_map(u16::to_le_bytes);
        let identifier: Vec<u8> = FILE_IDENTIFIER.into_iter().chain(creator).collect();
        host.write_all_at(Mem::from(&identifier[..]), 0)?;
        sync()
    }
}
