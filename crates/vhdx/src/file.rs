//! The structures at the front of a file, read from it; and the log, brought in on disk or in memory.

use std::ops::Range;

use qcow2_core::{Error, ErrorKind, Mem, MemMut, Result, Storage, StorageExt, random};

use crate::OpenOptions;
use crate::overlay::Replayed;
use crate::structures::{
    FILE_IDENTIFIER, Geometry, Guid, HEADER_LENGTH, HEADER_OFFSETS, Header, Metadata, Patch,
    REGION_TABLE_LENGTH, REGION_TABLE_OFFSETS, RegionTable, Sequence, active_sequence, check_identifier,
    current,
};

/// The header that counts, and the log that it names.
#[derive(Debug)]
pub(crate) struct Front {
    pub(crate) header: Header,
    /// Which of the two it is.
    pub(crate) slot: usize,
    /// What has to be brought in before anything else is read.
    pub(crate) log: Option<Log>,
}

/// A log with a sequence in it.
#[derive(Debug)]
pub(crate) struct Log {
    pub(crate) sequence: Sequence,
    bytes: Vec<u8>,
    guid: Guid,
}

impl Log {
    /// What it brings, in this order.
    fn patches(&self) -> Result<Vec<Patch>> {
        self.sequence.patches(&self.bytes, self.guid)
    }

    /// `storage` with the log brought in, in memory.
    pub(crate) fn over<S>(&self, storage: S) -> Result<Replayed<S>> {
        Ok(Replayed::new(storage, self.patches()?, self.sequence.last_file_offset))
    }
}

/// Everything but the blocks.
#[derive(Debug)]
pub(crate) struct Tables {
    pub(crate) regions: RegionTable,
    pub(crate) metadata: Metadata,
    pub(crate) geometry: Geometry,
    /// What of the file cannot be a block: in the order of its places.
    pub(crate) reserved: Vec<Range<u64>>,
}

/// `length` bytes at `offset`, fewer where the file ends before.
pub(crate) fn read_up_to(storage: &dyn Storage, offset: u64, length: usize) -> Result<Vec<u8>> {
    let mut bytes = vec![0; length];
    let got = storage.read_up_to_at(MemMut::from(&mut bytes[..]), offset)?;
    bytes.truncate(got);
    Ok(bytes)
}

/// One of the headers.
pub(crate) fn read_header(storage: &dyn Storage, slot: usize) -> Result<Header> {
    let offset = HEADER_OFFSETS.get(slot).copied().unwrap_or_default();
    let bytes = read_up_to(storage, offset, HEADER_LENGTH)?;
    Header::parse(&bytes).map_err(|e| e.with_offset(offset))
}

/// One of the region tables.
pub(crate) fn read_regions(storage: &dyn Storage, slot: usize) -> Result<RegionTable> {
    let offset = REGION_TABLE_OFFSETS.get(slot).copied().unwrap_or_default();
    let bytes = read_up_to(storage, offset, REGION_TABLE_LENGTH)?;
    RegionTable::parse(&bytes).map_err(|e| e.with_offset(offset))
}

/// An error of reading is no damage that the other copy could make good for.
fn unless_io<T>(result: Result<T>) -> Result<Result<T>> {
    match result {
        Err(error) if error.kind() == ErrorKind::Io => Err(error),
        result => Ok(result),
    }
}

impl Front {
    /// Reads the file's identifier, its headers and the log.
    ///
    /// # Errors
    /// `InvalidHeader`, `UnsupportedFeature`, `Corrupt`; `Limit` for a log that is too long; `Io`.
    pub(crate) fn read(storage: &dyn Storage, options: &OpenOptions) -> Result<Self> {
        check_identifier(&read_up_to(storage, 0, FILE_IDENTIFIER.len())?)?;
        let (header, slot) =
            current(unless_io(read_header(storage, 0))?, unless_io(read_header(storage, 1))?)?;
        let log = read_log(storage, &header, options)?;
        Ok(Self { header, slot, log })
    }
}

fn read_log(storage: &dyn Storage, header: &Header, options: &OpenOptions) -> Result<Option<Log>> {
    let (length, guid) = (u64::from(header.log_length), header.log_guid);
    if guid.is_zero() || length == 0 {
        return Ok(None);
    }
    let error = |kind, message: String| Err(Error::new(kind, message).with_field("LogLength"));
    if length > options.max_metadata_bytes {
        let message = format!("a log of {length} bytes exceeds the limit of {}", options.max_metadata_bytes);
        return error(ErrorKind::Limit, message);
    }
    let size = storage.size()?;
    if header.log_offset + length > size {
        let message = format!("the log of {length} bytes at {:#x} lies outside the file", header.log_offset);
        return error(ErrorKind::Corrupt, message).map_err(|e| e.with_offset(header.log_offset));
    }
    let mut bytes = vec![0; length as usize];
    storage.read_exact_at(MemMut::from(&mut bytes[..]), header.log_offset)?;
    let found = active_sequence(&bytes, guid).map_err(|e| e.offset_from(header.log_offset))?;
    let Some(sequence) = found else { return Ok(None) };
    if sequence.flushed_file_offset > size {
        let flushed = sequence.flushed_file_offset;
        let message =
            format!("the file was cut off: it has {size} bytes, and had {flushed} when its log was written");
        return Err(Error::new(ErrorKind::Corrupt, message).with_field("FlushedFileOffset"));
    }
    Ok(Some(Log { sequence, bytes, guid }))
}

impl Tables {
    /// Reads everything behind the headers; `storage` has the log brought in, and `size` bytes, where that is known.
    ///
    /// # Errors
    /// `InvalidHeader`, `UnsupportedFeature`, `Corrupt`, `Limit`; `Io`.
    pub(crate) fn read(
        storage: &dyn Storage,
        header: &Header,
        file_size: Option<u64>,
        options: &OpenOptions,
    ) -> Result<Self> {
        let regions = match unless_io(read_regions(storage, 0))? {
            Ok(regions) => regions,
            // Only a table that is no whole one has a copy to replace it.
            Err(first) if first.kind() == ErrorKind::InvalidHeader => {
                unless_io(read_regions(storage, 1))?.map_err(|_| first)?
            }
            Err(first) => return Err(first),
        };
        let reserved = regions.reserved(header)?;
        let place = regions.metadata.offset;
        let read = |offset: u64, length: usize| {
            let mut bytes = vec![0; length];
            storage.read_exact_at(MemMut::from(&mut bytes[..]), place + offset)?;
            Ok(bytes)
        };
        let metadata = Metadata::read(regions.metadata.length, &read).map_err(|e| e.with_offset(place))?;
        let size = metadata.virtual_size;
        if size > options.max_virtual_size {
            let message = format!("size of {size} exceeds the limit of {}", options.max_virtual_size);
            return Err(Error::new(ErrorKind::Limit, message).with_field("VirtualDiskSize"));
        }
        let geometry = Geometry {
            block_size: metadata.block_size,
            sector_size: metadata.logical_sector_size.into(),
            has_parent: metadata.parent.is_some(),
        };
        let tables = Self { regions, metadata, geometry, reserved };
        tables.check_bat(file_size)?;
        Ok(tables)
    }

    /// Refuses a table that has too few entries, or lies outside the file.
    fn check_bat(&self, file_size: Option<u64>) -> Result<()> {
        let (bat, bytes) = (self.regions.bat, self.geometry.entries(self.metadata.virtual_size) * 8);
        let refuse = |message: String| {
            Err(Error::new(ErrorKind::Corrupt, message).with_field("BAT").with_offset(bat.offset))
        };
        if bytes > bat.length.into() {
            return refuse(format!(
                "the block allocation table has {} bytes, the disk needs {bytes}",
                bat.length
            ));
        }
        if let Some(file_size) = file_size.filter(|size| bat.offset + bytes > *size) {
            return refuse(format!(
                "the block allocation table with {bytes} bytes lies outside the file ({file_size} bytes)"
            ));
        }
        Ok(())
    }
}

/// Brings the log in on disk ([MS-VHDX] 2.3.3). The log stays valid until the header says otherwise: doing it twice does no harm.
pub(crate) fn replay_on_disk(storage: &dyn Storage, log: &Log) -> Result<()> {
    let length = log.sequence.last_file_offset;
    if storage.size()? < length && !storage.traits().block_device {
        storage.resize(length)?;
    }
    for patch in log.patches()? {
        match patch {
            Patch::Data(offset, bytes) => storage.write_all_at(Mem::from(&*bytes), offset)?,
            Patch::Zero(offset, length) => storage.zero(offset, length, false)?,
        }
    }
    storage.flush()
}

/// Makes `header` the current one, in both copies, the older one first (2.2.2.1): at any moment one of them is whole. Gives it as it is
/// stored then.
pub(crate) fn write_headers(storage: &dyn Storage, header: &Header, slot: usize) -> Result<Header> {
    let mut header = *header;
    for slot in [1 - slot.min(1), slot] {
        header.sequence_number = header.sequence_number.checked_add(1).ok_or_else(|| {
            Error::new(ErrorKind::Limit, "the headers cannot be changed any more")
                .with_field("SequenceNumber")
        })?;
        let offset = HEADER_OFFSETS.get(slot).copied().unwrap_or_default();
        storage.write_all_at(Mem::from(&header.encode()[..]), offset)?;
        storage.flush()?;
    }
    Ok(header)
}

/// A new GUID: version 4, random.
///
/// # Errors
/// `Io` where the system has no random numbers.
pub(crate) fn new_guid() -> Result<Guid> {
    random::guid().map(Guid)
}
