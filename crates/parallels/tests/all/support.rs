//! What the tests share.

use std::path::Path;
use std::sync::Arc;

use qcow2_core::disk::DiskOptions;
use qcow2_core::new_image::{Hosts, NewImage};
use qcow2_core::storage::{Access, FileStorage, MemoryStorage};
use qcow2_core::{Chain, Discard, Job, Layer, MemMut, Result, Storage};
use qcow2_engine::Image;
use qcow2_parallels::structures::Header;
use qcow2_parallels::{NewParallels, OpenOptions};
use qcow2_testkit::Rng;

pub(crate) fn open(storage: Arc<dyn Storage>) -> Result<Box<dyn Layer>> {
    Ok(Box::new(qcow2_parallels::open(storage, &OpenOptions::default())?))
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
pub(crate) fn new(size: u64, cluster_size: u64) -> Vec<u8> {
    let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::new());
    let image = NewParallels::new(size, cluster_size).unwrap();
    image.create(&Hosts::from(Arc::clone(&storage)), &Job::new()).unwrap();
    bytes_of(&*storage)
}

/// An empty image whose BAT counts sectors, and says nothing of where the data begins.
pub(crate) fn forged(clusters: u32, tracks: u32) -> Vec<u8> {
    let header = Header {
        counts_clusters: false,
        tracks,
        bat_entries: clusters,
        nb_sectors: u64::from(clusters) * u64::from(tracks),
        in_use: 0,
        data_off: 0,
        ext_off: 0,
    };
    let mut bytes = header.to_bytes().to_vec();
    bytes.resize((header.bat_end() as usize).next_multiple_of(512), 0);
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
