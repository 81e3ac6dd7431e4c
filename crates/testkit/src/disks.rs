//! Whole disks and the files that they are in, for tests of formats whose images are small.

use std::path::Path;
use std::sync::Arc;

use qcow2_core::new_image::{Hosts, NewImage};
use qcow2_core::storage::{Access, FileStorage, MemoryStorage};
use qcow2_core::{Chain, Discard, DiskOptions, Job, Layer, MemMut, Result, Storage};
use qcow2_engine::Image;

use crate::Rng;

/// A file in memory with these bytes.
pub fn memory(bytes: &[u8]) -> Arc<dyn Storage> {
    Arc::new(MemoryStorage::from_bytes(bytes))
}

/// A file of the system, open for writing.
pub fn file(path: &Path) -> Arc<dyn Storage> {
    Arc::new(FileStorage::open(path, Access::ReadWrite).unwrap())
}

/// The bytes of a file.
pub fn bytes_of(storage: &dyn Storage) -> Vec<u8> {
    let mut bytes = vec![0; storage.len().unwrap() as usize];
    storage.read_at(MemMut::from(&mut bytes[..]), 0).unwrap();
    bytes
}

/// A new image, as bytes.
pub fn made(image: &dyn NewImage) -> Vec<u8> {
    let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::new());
    image.create(&Hosts::from(Arc::clone(&storage)), &Job::new()).unwrap();
    bytes_of(&*storage)
}

/// An image of one layer, which takes requests and gives up what is discarded where `write` says so.
pub fn image_of(mut layer: Box<dyn Layer>, write: bool) -> Image {
    if write {
        layer.make_writable(DiskOptions { discard: Discard::Unmap, ..DiskOptions::default() }).unwrap();
    }
    Image::new(vec![layer]).unwrap()
}

/// The disk that layers make, top first.
///
/// # Errors
/// As [`Chain::new`] and reading.
pub fn read(layers: Vec<Box<dyn Layer>>) -> Result<Vec<u8>> {
    let chain = Chain::new(layers)?;
    let mut bytes = vec![0; chain.virtual_size() as usize];
    chain.read_at(MemMut::from(&mut bytes[..]), 0).map(|()| bytes)
}

/// A disk with noise and holes.
pub fn noisy(size: u64, seed: u64) -> Vec<u8> {
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
