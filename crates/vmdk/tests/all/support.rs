//! Opening images with the files that they name.

use std::path::Path;
use std::sync::Arc;

use qcow2_core::storage::{Access, CacheMode, FileStorage, MemoryStorage};
use qcow2_core::{Chain, GuestSource, Layer, MemMut, Result, Storage};
use qcow2_testkit::Rng;
use qcow2_vmdk::{OpenOptions, Vmdk};

/// A file of the system.
pub(crate) fn file(path: &Path, access: Access) -> Arc<dyn Storage> {
    FileStorage::open_cached(path, access, CacheMode::Writeback).unwrap().into_storage()
}

/// Opens the image in `storage`, and its extents by `find`.
pub(crate) fn open_with(storage: Arc<dyn Storage>, find: &dyn Fn(&str) -> Arc<dyn Storage>) -> Result<Vmdk> {
    let mut vmdk = Vmdk::open(storage, &OpenOptions::default())?;
    for (index, extent) in vmdk.references().extents.iter().enumerate() {
        vmdk.attach_extent(index, find(std::str::from_utf8(&extent.filename).unwrap()))?;
    }
    Ok(vmdk)
}

/// Opens an image with its extents beside it.
pub(crate) fn open(path: &Path, access: Access) -> Result<Vmdk> {
    let folder = path.parent().unwrap().to_owned();
    open_with(file(path, access), &|name| file(&folder.join(name), access))
}

/// Opens an image of one file, given as bytes.
pub(crate) fn open_bytes(bytes: &[u8]) -> Result<Vmdk> {
    Vmdk::open(Arc::new(MemoryStorage::from_bytes(bytes)), &OpenOptions::default())
}

/// The bytes of a disk.
pub(crate) fn guest(source: &dyn GuestSource) -> Vec<u8> {
    let mut bytes = vec![1; source.virtual_size() as usize];
    source.read_at(MemMut::from(&mut bytes[..]), 0).unwrap();
    bytes
}

/// A chain of one image.
pub(crate) fn chain(vmdk: Vmdk) -> Chain {
    Chain::new(vec![Box::new(vmdk)]).unwrap()
}

/// A disk with text, noise and holes.
pub(crate) fn disk(seed: u64, size: usize) -> Vec<u8> {
    let mut rng = Rng::new(seed);
    let mut bytes = vec![0; size];
    let mut text = |at: usize, length: usize| {
        let at = at.min(size);
        let length = length.min(size - at);
        bytes[at..at + length].copy_from_slice(&rng.text(length));
    };
    text(0, 70_000);
    text(300_000, 8192);
    text(2_000_000, 100_000);
    text(size.saturating_sub(5000), 5000);
    if size > 500_000 {
        bytes[400_000..500_000].copy_from_slice(&rng.bytes(100_000));
    }
    bytes
}
