//! A raw layer: the file is the disk.

use std::sync::Arc;

use crate::{Result, Storage, StorageExt};

/// Sector size: a raw disk's size is rounded up to it, as QEMU does.
pub(crate) const SECTOR: u64 = 512;

/// A raw disk image.
#[derive(Debug)]
pub struct Raw {
    storage: Arc<dyn Storage>,
    size: u64,
}

impl Raw {
    /// The disk in `storage`. Its size is the file's, rounded up to a sector of 512 bytes; the bytes behind the end
    /// of the file read as zeroes.
    ///
    /// # Errors
    /// `Io` when the length cannot be had.
    pub fn new(storage: Arc<dyn Storage>) -> Result<Self> {
        let size = storage.size()?;
        let size = size.checked_next_multiple_of(SECTOR).unwrap_or(size);
        Ok(Self { storage, size })
    }

    /// The file.
    pub fn storage(&self) -> &Arc<dyn Storage> {
        &self.storage
    }
    /// Size of the disk in bytes.
    pub fn virtual_size(&self) -> u64 {
        self.size
    }
}
