//! New images.

use qcow2_core::blocks::{Blueprint, NewBlocks};
use qcow2_core::{Mem, Result, Storage, StorageExt};

use crate::layer::ParallelsScheme;
use crate::structures::{Header, SECTOR};

/// The blueprint of a new image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewParallels {
    header: Header,
}

impl NewParallels {
    /// An image with a disk of `size` bytes and clusters of `cluster_size`, both whole sectors.
    ///
    /// # Errors
    /// As [`Header::new`].
    pub fn new(size: u64, cluster_size: u64) -> Result<NewBlocks<Self>> {
        Ok(NewBlocks::new(Self { header: Header::new(size, cluster_size)? }))
    }
}

impl Blueprint for NewParallels {
    type Scheme = ParallelsScheme;

    fn scheme(&self) -> ParallelsScheme {
        ParallelsScheme::new(self.header.clone(), u64::MAX >> 1)
    }

    fn head(&self) -> u64 {
        SECTOR
    }

    fn publish(&self, storage: &dyn Storage, _: u64, durable: bool) -> Result<()> {
        let sync = || if durable { storage.flush() } else { Ok(()) };
        sync()?;
        storage.write_all_at(Mem::from(&self.header.to_bytes()[..]), 0)?;
        sync()
    }
}
