//! What the tests share.

use std::sync::Arc;

use qcow2_core::space::Preallocation;
use qcow2_core::{Layer, Result, Storage};
use qcow2_engine::Image;
pub(crate) use qcow2_testkit::disks::{bytes_of, memory, noisy as disk, read};
use qcow2_testkit::disks::{image_of, made};
use qcow2_vdi::structures::{FREE, Header, ImageType};
use qcow2_vdi::{NewVdi, OpenOptions};

pub(crate) fn open(storage: Arc<dyn Storage>) -> Result<Box<dyn Layer>> {
    Ok(Box::new(qcow2_vdi::open(storage, &OpenOptions::default())?))
}

/// A new image, as bytes.
pub(crate) fn new(size: u64, is_static: bool) -> Vec<u8> {
    made(&NewVdi::new(size, is_static, Preallocation::Off).unwrap())
}

/// An empty image with blocks of this many bytes, which QEMU does not read.
pub(crate) fn forged(blocks: u32, block_size: u32, block_extra: u32) -> Vec<u8> {
    let disk_size = u64::from(blocks) * u64::from(block_size);
    let header = Header {
        block_size,
        block_extra,
        blocks_in_image: blocks,
        disk_size,
        offset_data: 8192,
        ..Header::new(disk_size, ImageType::Dynamic, [[1; 16], [2; 16]]).unwrap()
    };
    let mut bytes = header.to_bytes().to_vec();
    for _ in 0..blocks {
        bytes.extend(FREE.to_le_bytes());
    }
    bytes.resize(8192, 0);
    bytes
}

pub(crate) fn image(storage: Arc<dyn Storage>, write: bool) -> Image {
    image_of(open(storage).unwrap(), write)
}
