//! Changing single fields of the header in place.

use qcow2_format::header::field::{Patch, Steady};

use crate::invalid::invalid;
use crate::{ErrorKind, Mem, Result, Storage, StorageExt};

/// Offset and bytes of the write of a patch. No patch of this crate is refused.
pub(crate) fn encode_patch(patch: &Patch, steady: &Steady) -> Result<(u64, Vec<u8>)> {
    patch.encode(steady).map_err(|error| invalid(error, ErrorKind::Internal))
}

/// Writes a few fields of the header at once, inside its first sector: everything else stays as it is.
pub(crate) fn write_patch(storage: &dyn Storage, steady: &Steady, patch: &Patch) -> Result<()> {
    let (offset, bytes) = encode_patch(patch, steady)?;
    storage.write_all_at(Mem::from(bytes.as_slice()), offset)
}
