//! The door to guest data: what stands between the guest's bytes and those of the file.
//!
//! An image has two kinds of bytes in its file: its own structures, which are what they are, and the guest's. The guest's go
//! through one storage in both directions (`Qcow2::data_storage`), which is the file itself unless the image was opened with a
//! door: then it is what the door makes of the file. Behind a door the two meanings of "zero" part: that the host's
//! bytes are zero (a hole, a new cluster), and that the guest reads zeroes.

use std::fmt;
use std::ptr;
use std::sync::Arc;

use crate::Storage;

/// How guest bytes are stored where they are not stored as they are: a cipher, say.
///
/// Unallocated clusters and those with a zero flag have no bytes, so reading them goes past the door; so do compressed
/// clusters, which nobody writes behind a door.
pub trait DataDoor: fmt::Debug + Send + Sync {
    /// The storage through which guest bytes at offsets of `host` are read and written. Its lengths, space and syncs are those
    /// of `host`; its bytes at an offset depend on those of `host` there and on the offset, a sector of 512 bytes at a time. It has
    /// no holes, and `write_zeroes` makes it read as zeroes, whatever it takes. A request need not be whole sectors.
    fn open(&self, host: Arc<dyn Storage>) -> Arc<dyn Storage>;
}

/// The same door, not one that does the same.
impl PartialEq for dyn DataDoor {
    fn eq(&self, other: &Self) -> bool {
        ptr::addr_eq(self, other)
    }
}

impl Eq for dyn DataDoor {}

/// Where the guest bytes of `host` are read and written: `host` itself, without a door.
pub(crate) fn behind(door: Option<&Arc<dyn DataDoor>>, host: &Arc<dyn Storage>) -> Arc<dyn Storage> {
    match door {
        Some(door) => door.open(Arc::clone(host)),
        None => Arc::clone(host),
    }
}
