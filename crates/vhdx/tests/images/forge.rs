//! Small images, byte by byte: as little as there can be in front of the blocks, which have 1 MiB.

use std::sync::Arc;

use qcow2_core::check::{CheckLayer, CheckReport};
use qcow2_core::new_image::{Hosts, NewImage};
use qcow2_core::storage::MemoryStorage;
use qcow2_core::{Discard, Disk, DiskOptions, Job, Layer, MemMut, Result, Storage};
use qcow2_engine::Image;
use qcow2_testkit::Rng;
use qcow2_vhdx::structures::{
    BAT, FILE_IDENTIFIER, Geometry, Guid, HEADER_OFFSETS, Header, METADATA, METADATA_ITEMS, Metadata,
    Payload, REGION_TABLE_OFFSETS, Region, RegionTable, encode_metadata, encode_payload,
};
use qcow2_vhdx::{NewOptions, OpenOptions, Vhdx};

pub(crate) const MIB: u64 = 1 << 20;
/// Where the table is.
pub(crate) const TABLE: u64 = 2 * MIB;
/// Where the metadata are.
pub(crate) const ITEMS: u64 = 3 * MIB;
/// Where blocks begin.
pub(crate) const BLOCKS: u64 = 4 * MIB;
pub(crate) const DATA_WRITE_GUID: Guid = Guid([0xd2; 16]);

pub(crate) fn header(sequence_number: u64) -> Header {
    Header {
        sequence_number,
        file_write_guid: Guid([0xf1; 16]),
        data_write_guid: DATA_WRITE_GUID,
        log_guid: Guid::default(),
        log_length: 1 << 20,
        log_offset: MIB,
    }
}

pub(crate) fn regions() -> RegionTable {
    let region = |guid, offset| Region { guid, offset, length: 1 << 20, required: true };
    RegionTable { bat: region(BAT, TABLE), metadata: region(METADATA, ITEMS), others: Vec::new() }
}

pub(crate) fn metadata(size: u64, sector_size: u32) -> Metadata {
    Metadata {
        block_size: MIB,
        leave_blocks_allocated: false,
        virtual_size: size,
        virtual_size_at: 0,
        virtual_disk_id: Guid([9; 16]),
        logical_sector_size: sector_size,
        physical_sector_size: 4096,
        parent: None,
    }
}

pub(crate) fn put(file: &mut Vec<u8>, at: u64, bytes: &[u8]) {
    let end = at as usize + bytes.len();
    file.resize(file.len().max(end), 0);
    file[at as usize..end].copy_from_slice(bytes);
}

/// An image of these metadata, with its first blocks as they are given, their bytes one behind the other.
pub(crate) fn image(metadata: &Metadata, entries: &[Payload]) -> Vec<u8> {
    let mut file = vec![0; BLOCKS as usize];
    put(&mut file, 0, &FILE_IDENTIFIER);
    for (offset, number) in HEADER_OFFSETS.into_iter().zip(5..) {
        put(&mut file, offset, &header(number).encode());
    }
    for offset in REGION_TABLE_OFFSETS {
        put(&mut file, offset, &regions().encode());
    }
    let (table, items) = encode_metadata(metadata);
    put(&mut file, ITEMS, &table);
    put(&mut file, ITEMS + METADATA_ITEMS.0, &items);
    for (entry, at) in entries.iter().zip((TABLE..).step_by(8)) {
        put(&mut file, at, &encode_payload(*entry).to_le_bytes());
        if let Payload::Present(offset) | Payload::Partial(offset) = entry {
            put(&mut file, *offset, &Rng::new(*offset).bytes(MIB as usize));
        }
    }
    file
}

/// Makes an image one that has a parent: its metadata get a locator with these pairs.
pub(crate) fn with_parent(file: &mut Vec<u8>, pairs: &[(&str, &str)]) {
    let locator = Guid::new(0xa8d3_5f2d, 0xb30b, 0x454d, [0xab, 0xf7, 0xd3, 0xd8, 0x48, 0x34, 0xab, 0x0c]);
    let kind = Guid::new(0xb04a_efb7, 0xd19e, 0x4a81, [0xb7, 0x89, 0x25, 0xb8, 0xe9, 0x44, 0x59, 0x13]);
    let mut item = [&kind.0[..], &[0, 0], &(pairs.len() as u16).to_le_bytes()].concat();
    let (mut texts, first) = (Vec::new(), 20 + 12 * pairs.len());
    for (key, value) in pairs {
        let units = |text: &str| text.encode_utf16().flat_map(u16::to_le_bytes).collect::<Vec<u8>>();
        let (key, value) = (units(key), units(value));
        item.extend(((first + texts.len()) as u32).to_le_bytes());
        item.extend(((first + texts.len() + key.len()) as u32).to_le_bytes());
        item.extend((key.len() as u16).to_le_bytes());
        item.extend((value.len() as u16).to_le_bytes());
        texts.extend([key, value].concat());
    }
    item.extend(texts);
    let at = 128u64 << 10;
    put(file, ITEMS + at, &item);
    put(file, ITEMS + 10, &[6]);
    let entry = ITEMS + 32 + 5 * 32;
    put(file, entry, &locator.0);
    put(file, entry + 16, &(at as u32).to_le_bytes());
    put(file, entry + 20, &(item.len() as u32).to_le_bytes());
    put(file, entry + 24, &4u32.to_le_bytes());
    // HasParent.
    put(file, ITEMS + METADATA_ITEMS.0 + 4, &[2]);
}

/// The byte of the file where the entry of a chunk's sector bitmap is.
pub(crate) fn bitmap_entry(block: u64, sector_size: u64) -> u64 {
    let geometry = Geometry { block_size: MIB, sector_size, has_parent: true };
    TABLE + geometry.bitmap_entry_of(block) * 8
}

pub(crate) fn open_layer(storage: Arc<dyn Storage>) -> Result<Box<dyn Layer>> {
    Ok(Box::new(Vhdx::open(storage, &OpenOptions::default())?))
}

pub(crate) fn memory(file: &[u8]) -> Arc<dyn Storage> {
    Arc::new(MemoryStorage::from_bytes(file))
}

/// The disk, open for writing.
pub(crate) fn open_disk(storage: Arc<dyn Storage>) -> Result<Image> {
    let mut layer = open_layer(storage)?;
    layer.make_writable(DiskOptions { discard: Discard::Unmap, ..DiskOptions::default() })?;
    Image::new(vec![layer])
}

/// The disk, open for reading.
pub(crate) fn open_source(storage: Arc<dyn Storage>) -> Result<Image> {
    Image::new(vec![open_layer(storage)?])
}

/// All bytes of a disk.
pub(crate) fn bytes_of(disk: &dyn Disk) -> Vec<u8> {
    let mut bytes = vec![0; disk.virtual_size() as usize];
    disk.read_at(MemMut::from(&mut bytes[..]), 0).unwrap();
    bytes
}

/// Makes a new image.
pub(crate) fn create(new: &NewOptions, storage: Arc<dyn Storage>) -> Result<()> {
    new.plan()?.create(&Hosts::from(storage), &Job::new())
}

/// What a check finds.
pub(crate) fn check(storage: Arc<dyn Storage>) -> Result<CheckReport> {
    Vhdx::open(storage, &OpenOptions::default())?.check(1000, &Job::new())
}
