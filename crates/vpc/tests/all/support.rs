//! What the tests share.

use std::sync::Arc;

use qcow2_core::{Layer, Result, Storage};
use qcow2_engine::Image;
pub(crate) use qcow2_testkit::disks::{bytes_of, file, memory, noisy as disk, read};
use qcow2_testkit::disks::{image_of, made};
use qcow2_vpc::structures::{DiskType, Footer, Geometry, Header};
use qcow2_vpc::{NewOptions, OpenOptions, Subformat, new_vpc};

pub(crate) fn open(storage: Arc<dyn Storage>) -> Result<Box<dyn Layer>> {
    qcow2_vpc::open(storage, &OpenOptions::default())
}

/// A new image, as bytes.
pub(crate) fn new(size: u64, subformat: Subformat, force_size: bool) -> Vec<u8> {
    made(&*new_vpc(options(size, subformat, force_size)).unwrap())
}

pub(crate) fn options(size: u64, subformat: Subformat, force_size: bool) -> NewOptions {
    NewOptions { size, subformat, force_size, ..NewOptions::default() }
}

/// A header with another block size.
fn header(entries: u32, block_size: u32) -> Header {
    let mut bytes = *Header::new(entries).bytes();
    bytes[32..36].copy_from_slice(&block_size.to_be_bytes());
    let others = bytes.iter().enumerate().filter(|(at, _)| !(36..40).contains(at));
    let sum = !others.map(|(_, byte)| u32::from(*byte)).sum::<u32>();
    bytes[36..40].copy_from_slice(&sum.to_be_bytes());
    Header::parse(&bytes).unwrap()
}

/// An empty dynamic disk of blocks with this many bytes.
pub(crate) fn forged(blocks: u32, block_size: u32, disk_type: DiskType) -> Vec<u8> {
    let size = u64::from(blocks) * u64::from(block_size);
    let footer = Footer::new(disk_type, size, Geometry::LARGEST, *b"qem2", [1; 16], 0);
    let mut bytes = footer.bytes().to_vec();
    bytes.extend(header(blocks, block_size).bytes());
    // An entry too many, and room for more.
    bytes.resize(1536 + 1024, 0xff);
    bytes.extend(footer.bytes());
    bytes
}

pub(crate) fn image(storage: Arc<dyn Storage>, write: bool) -> Image {
    image_of(open(storage).unwrap(), write)
}
