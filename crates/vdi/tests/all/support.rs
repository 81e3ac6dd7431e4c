//! What the tests share.

use std::sync::Arc;

use qcow2_core::disk::DiskOptions;
use qcow2_core::new_image::{Hosts, NewImage};
use qcow2_core::space::Preallocation;
use qcow2_core::storage::MemoryStorage;
use qcow2_core::{Chain, Discard, Job, Layer, MemMut, Result, Storage};
use qcow2_engine::Image;
use qcow2_testkit::Rng;
use qcow2_vdi::structures::{FREE, Header, ImageType};
use qcow2_vdi::{NewVdi, OpenOptions};

pub(crate) fn open(storage: Arc<dyn Storage>) -> Result<Box<dyn Layer>> {
    Ok(Box::new(qcow2_vdi::open(storage, &OpenOptions::default())?))
}

pub(crate) fn memory(bytes: &[u8]) -> Arc<dyn Storage> {
    Arc::new(MemoryStorage::from_bytes(bytes))
}

/// The bytes of a file.
pub(crate) fn bytes_of(storage: &dyn Storage) -> Vec<u8> {
    let mut bytes = vec![0; storage.len().unwrap() as usize];
    storage.read_at(MemMut::from(&mut bytes[..]), 0).unwrap();
    bytes
}

/// A new image, as bytes.
pub(crate) fn new(size: u64, is_static: bool) -> Vec<u8> {
    let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::new());
    let image = NewVdi::new(size, is_static, Preallocation::Off).unwrap();
    image.create(&Hosts::from(Arc::clone(&storage)), &Job::new()).unwrap();
    bytes_of(&*storage)
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
    let mut layer = open(storage).unwrap();
    if write {
        layer.make_writable(DiskOptions { discard: Discard::Unmap, ..DiskOptions::default() }).unwrap();
    }
    Image::new(vec![layer]).unwrap()
}

pub(crate) fn read(layers: Vec<Box<dyn Layer>>) -> Result<Vec<u8>> {
    let chain = Chain::new(layers)?;
    let mut bytes = vec![0; chain.virtual_size() as usize];
    chain.read_at(MemMut::from(&mut bytes[..]), 0).map(|()| bytes)
}

/// A disk with noise and holes.
pub(crate) fn disk(size: u64, seed: u64) -> Vec<u8> {
    let mut rng = Rng::new(seed);
    let mut bytes = vec![0; size as usize];
    let noise = rng.bytes(90_000);
    let mut at = 0;
    while at < bytes.len() {
        let length = (rng.below(400_000) as usize + 1).min(bytes.len() - at);
        if rng.below(3) > 0 {
            let length = length.min(noise.len());
            bytes[at..at + length].copy_from_slice(&noise[..length]);
        }
        at += length + rng.below(1_500_000) as usize;
    }
    bytes
}
