//! What the tests share.

use std::path::Path;
use std::sync::Arc;

use qcow2_core::disk::DiskOptions;
use qcow2_core::new_image::Hosts;
use qcow2_core::space::Preallocation;
use qcow2_core::storage::{Access, FileStorage, MemoryStorage};
use qcow2_core::{Chain, Discard, Job, Layer, MemMut, Result, Storage};
use qcow2_engine::Image;
use qcow2_testkit::Rng;
use qcow2_vpc::structures::{DiskType, Footer, Geometry, Header};
use qcow2_vpc::{OpenOptions, Subformat, new_vpc};

pub(crate) fn open(storage: Arc<dyn Storage>) -> Result<Box<dyn Layer>> {
    qcow2_vpc::open(storage, &OpenOptions::default())
}

pub(crate) fn memory(bytes: &[u8]) -> Arc<dyn Storage> {
    Arc::new(MemoryStorage::from_bytes(bytes))
}

pub(crate) fn file(path: &Path) -> Arc<dyn Storage> {
    Arc::new(FileStorage::open(path, Access::ReadWrite).unwrap())
}

/// The bytes of a file.
pub(crate) fn bytes_of(storage: &dyn Storage) -> Vec<u8> {
    let mut bytes = vec![0; storage.len().unwrap() as usize];
    storage.read_at(MemMut::from(&mut bytes[..]), 0).unwrap();
    bytes
}

/// A new image, as bytes.
pub(crate) fn new(size: u64, subformat: Subformat, force_size: bool) -> Vec<u8> {
    let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::new());
    let image = new_vpc(size, subformat, force_size, Preallocation::Off).unwrap();
    image.create(&Hosts::from(Arc::clone(&storage)), &Job::new()).unwrap();
    bytes_of(&*storage)
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
