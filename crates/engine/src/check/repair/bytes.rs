//! Writing bytes to their place.

use crate::{Mem, Result, Storage, StorageExt};

pub(super) fn write(storage: &dyn Storage, bytes: &[u8], offset: u64) -> Result<()> {
    storage.write_all_at(Mem::from(bytes), offset)
}
