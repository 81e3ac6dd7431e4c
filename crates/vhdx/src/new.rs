//! A new image: where its parts lie, and the order in which they are written.

use std::fmt;
use std::sync::Arc;

use qcow2_core::convert::{BlockSink, BlockTarget, Context, Sink};
use qcow2_core::disk::DiskOptions;
use qcow2_core::new_image::{Hosts, NewImage};
use qcow2_core::space::{Preallocation, empty, lengthen};
use qcow2_core::{Error, ErrorKind, Job, Layer, Mem, Result, Storage, StorageExt};

use crate::file::new_guid;
use crate::structures::{
    BAT, FILE_IDENTIFIER, Geometry, Guid, HEADER_OFFSETS, HEADER_SECTION, Header, MAX_VIRTUAL_SIZE, METADATA,
    METADATA_ITEMS, MIB, Metadata, ParentLocator, Payload, REGION_TABLE_OFFSETS, Region, RegionTable,
    encode_metadata, encode_payload,
};
use crate::{OpenOptions, Vhdx};

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

/// What a new image is to be. Sizes are bytes; what is 0 is chosen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewOptions {
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
    /// Bytes of a sector: 512 or 4096; the parent's where there is one.
    pub sector_size: u32,
    /// What the image does not have is read from it.
    pub parent: Option<Parent>,
}

/// The parent of a new image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parent {
    /// Its name: a relative one is relative to the image's folder.
    pub filename: Vec<u8>,
    /// How it is known again.
    pub id: ParentId,
}

/// What a child keeps of its parent: its `DataWriteGuid`, and the disk that both have. As text, with spaces between.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ParentId {
    /// Changes whenever the disk may have changed.
    pub data_write_guid: Guid,
    /// Bytes of the disk.
    pub size: u64,
    /// Bytes of a sector.
    pub sector_size: u32,
}

impl ParentId {
    /// The one of this text.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split(' ');
        Some(Self {
            data_write_guid: Guid(u128::from_str_radix(parts.next()?, 16).ok()?.to_be_bytes()),
            size: parts.next()?.parse().ok()?,
            sector_size: parts.next()?.parse().ok()?,
        })
    }
}

impl fmt::Display for ParentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x} {} {}", u128::from_be_bytes(self.data_write_guid.0), self.size, self.sector_size)
    }
}

impl Default for NewOptions {
    fn default() -> Self {
        Self {
            size: 0,
            subformat: Subformat::Dynamic,
            block_size: 0,
            log_size: 0,
            block_state_zero: true,
            sector_size: 512,
            parent: None,
        }
    }
}

/// A new image: where its parts lie.
#[derive(Debug, Clone)]
pub struct NewVhdx {
    options: NewOptions,
    geometry: Geometry,
    header: Header,
    regions: RegionTable,
    metadata: Metadata,
    /// Where blocks begin.
    data: u64,
}

fn refuse(kind: ErrorKind, field: &'static str, message: String) -> Error {
    Error::new(kind, message).with_field(field)
}

impl NewOptions {
    /// What QEMU takes for a disk of this size.
    fn chosen_block_size(&self) -> u64 {
        match self.size {
            // As Hyper-V has it: what is around a write is not copied, and little is lost.
            _ if self.parent.is_some() => 2 * MIB,
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
    pub fn plan(&self) -> Result<NewVhdx> {
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
        let sector_size = self.parent.as_ref().map_or(self.sector_size, |parent| parent.id.sector_size);
        if let Some(parent) = &self.parent {
            if self.subformat == Subformat::Fixed {
                return Err(refuse(invalid, "subformat", "a fixed VHDX has no parent".to_owned()));
            }
            if self.size != parent.id.size {
                let message =
                    format!("a differencing VHDX has the size of its parent, {} bytes", parent.id.size);
                return Err(refuse(invalid, "size", message));
            }
        }
        if ![512, 4096].contains(&sector_size) {
            let message = format!("a sector size of {sector_size} is neither 512 nor 4096");
            return Err(refuse(invalid, "sector_size", message));
        }
        if self.size > MAX_VIRTUAL_SIZE {
            return Err(refuse(
                ErrorKind::Limit,
                "size",
                format!("{} bytes are more than 64 TiB", self.size),
            ));
        }
        if !self.size.is_multiple_of(sector_size.into()) {
            let message = format!("{} is no multiple of {sector_size} bytes", self.size);
            return Err(refuse(invalid, "size", message));
        }
        let parent = self.parent.as_ref();
        let geometry = Geometry { block_size, sector_size: sector_size.into(), has_parent: parent.is_some() };
        let locator = parent
            .map(|parent| ParentLocator::new(&parent.filename, parent.id.data_write_guid))
            .transpose()?;
        let table = (geometry.entries(self.size) * 8).next_multiple_of(MIB).max(MIB);
        let bat =
            Region { guid: BAT, offset: HEADER_SECTION + log_size, length: table as u32, required: true };
        let items = Region { guid: METADATA, offset: bat.offset + table, length: MIB as u32, required: true };
        Ok(NewVhdx {
            options: self.clone(),
            geometry,
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
                logical_sector_size: sector_size,
                physical_sector_size: sector_size,
                parent: locator,
            },
        })
    }
}

impl NewVhdx {
    /// What a block is before anything is written to it.
    fn initial(&self, block: u64) -> Payload {
        match self.options.subformat {
            _ if self.geometry.has_parent => Payload::NotPresent,
            Subformat::Fixed => Payload::Present(self.data + block * self.geometry.block_size),
            Subformat::Dynamic if self.options.block_state_zero => Payload::Zero,
            Subformat::Dynamic => Payload::NotPresent,
        }
    }

    fn is_fixed(&self) -> bool {
        self.options.subformat == Subformat::Fixed
    }

    /// Bytes of all blocks.
    fn all_blocks(&self) -> u64 {
        self.geometry.blocks(self.options.size) * self.geometry.block_size
    }

    /// Makes an image that reads as zeroes; before it is complete the file is none.
    fn make(&self, host: &dyn Storage, durable: bool, job: &Job) -> Result<()> {
        self.begin(host)?;
        lengthen(host, self.length(0))?;
        self.write_table(host, job, &mut |block| self.initial(block))?;
        self.write_front(host, durable)
    }

    /// Makes `host` no image, and empty.
    fn begin(&self, host: &dyn Storage) -> Result<()> {
        if host.traits().block_device {
            let message = "vhdx images are made in files: they grow";
            return Err(host.located(Error::new(ErrorKind::InvalidArgument, message)));
        }
        empty(host)
    }

    /// Writes the table; `of` says where each block is, in their order.
    fn write_table(&self, host: &dyn Storage, job: &Job, of: &mut dyn FnMut(u64) -> Payload) -> Result<()> {
        let entries = self.geometry.entries(self.options.size);
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
    fn write_front(&self, host: &dyn Storage, durable: bool) -> Result<()> {
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

impl NewImage for NewVhdx {
    fn format(&self) -> &'static str {
        "vhdx"
    }

    fn size(&self) -> u64 {
        self.options.size
    }

    fn has_backing(&self) -> bool {
        self.geometry.has_parent
    }

    fn unit(&self) -> u64 {
        self.geometry.block_size
    }

    fn length(&self, data: u64) -> u64 {
        self.data + if self.is_fixed() { self.all_blocks() } else { data }
    }

    /// The space of a fixed image is not reserved: QEMU leaves it to the file system, too.
    fn preallocation(&self) -> Preallocation {
        Preallocation::Off
    }

    fn create(&self, hosts: &Hosts, job: &Job) -> Result<()> {
        self.make(&*hosts.own, true, job)
    }

    fn sink(self: Arc<Self>, hosts: Hosts, context: &Context<'_>, _: usize) -> Result<Box<dyn Sink>> {
        let host = hosts.own;
        self.begin(&*host)?;
        let blocks = Blocks {
            with_data: vec![0; (self.geometry.blocks(self.options.size) / 64 + 1) as usize],
            count: 0,
            host: Arc::clone(&host),
            new: self,
        };
        Ok(Box::new(BlockSink::new(context, host, Box::new(blocks))))
    }

    fn disk(&self, hosts: &Hosts, job: &Job) -> Result<Box<dyn Layer>> {
        self.make(&*hosts.own, false, job)?;
        let mut disk = Vhdx::open(Arc::clone(&hosts.own), &OpenOptions::default())?;
        disk.make_writable(DiskOptions::default())?;
        Ok(Box::new(disk))
    }
}

/// The blocks of a new image while a disk is copied into it: one behind the other, in guest order.
struct Blocks {
    new: Arc<NewVhdx>,
    host: Arc<dyn Storage>,
    /// A bit for each block that has data.
    with_data: Vec<u64>,
    /// How many have.
    count: u64,
}

impl Blocks {
    fn has_data(&self, block: u64) -> bool {
        self.with_data.get((block / 64) as usize).is_some_and(|word| word >> (block % 64) & 1 == 1)
    }
}

impl BlockTarget for Blocks {
    fn block_size(&self) -> u64 {
        self.new.geometry.block_size
    }

    fn place(&mut self, block: u64) -> Result<u64> {
        if let Some(word) = self.with_data.get_mut((block / 64) as usize) {
            *word |= 1 << (block % 64);
        }
        let number = if self.new.is_fixed() { block } else { self.count };
        self.count += 1;
        Ok(self.new.data + number * self.new.geometry.block_size)
    }

    fn finish(self: Box<Self>, durable: bool, job: &Job) -> Result<()> {
        let (new, host) = (&*self.new, &*self.host);
        lengthen(host, new.length(self.count * new.geometry.block_size))?;
        let mut next = new.data;
        new.write_table(host, job, &mut |block| {
            if new.is_fixed() || !self.has_data(block) {
                return new.initial(block);
            }
            let place = next;
            next += new.geometry.block_size;
            Payload::Present(place)
        })?;
        new.write_front(host, durable)
    }
}
