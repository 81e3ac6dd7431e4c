//! The door to guest data: what stands between the guest's bytes and those of the file.
//!
//! An image has two kinds of bytes in its file: its own structures, which are what they are, and the guest's. The guest's go
//! through one storage in both directions (`Qcow2::data_storage`), which is the file itself unless the image was opened with a
//! door: then it is what the door makes of the file. Behind a door the two meanings of "zero" part: that the host's
//! bytes are zero (a hole, a new cluster), and that the guest reads zeroes.

use std::fmt;
use std::ptr;
use std::sync::Arc;

use qcow2_core::raw::SECTOR;

use crate::Storage;
use crate::storage::{SectorCodec, Sectors};

/// How guest bytes are stored where they are not stored as they are: a cipher, say.
///
/// Unallocated clusters and those with a zero flag have no bytes, so reading them goes past the door; so do compressed
/// clusters, which nobody writes behind a door.
pub trait DataDoor: fmt::Debug + Send + Sync {
    /// The storage through which guest bytes at offsets of `host` are read and written. Its lengths, space and syncs are those
    /// of `host`; its bytes at an offset depend on those of `host` there and on the offset, a sector of 512 bytes at a time. It has
    /// no holes, and `write_zeroes` makes it read as zeroes, whatever it takes. A request need not be whole sectors.
    fn open(&self, host: Arc<dyn Storage>) -> Arc<dyn Storage>;

    /// The encryption header that a new image gets with this door, as it is stored; `None` for a door without one.
    fn crypto_header(&self) -> Option<&[u8]> {
        None
    }

    /// A codec that counts sectors of the guest's disk instead of those of the file, of images that are only read; then `open`
    /// gives what is stored.
    fn by_guest(&self) -> Option<&Arc<dyn SectorCodec>> {
        None
    }
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

/// What a codec by guest sectors makes of `data`, whose bytes at `host` are the guest's at `guest`: both begin a sector, or lie as far
/// in one.
pub(crate) fn by_guest_sector(
    data: &Arc<dyn Storage>,
    codec: &Arc<dyn SectorCodec>,
    guest: u64,
    host: u64,
) -> Arc<dyn Storage> {
    let shift = (guest / SECTOR).wrapping_sub(host / SECTOR);
    Arc::new(Sectors::new(Arc::clone(data), Arc::new(Shifted { codec: Arc::clone(codec), shift })))
}

/// A codec whose sectors have other numbers.
#[derive(Debug)]
struct Shifted {
    codec: Arc<dyn SectorCodec>,
    shift: u64,
}

impl SectorCodec for Shifted {
    fn sector_size(&self) -> usize {
        self.codec.sector_size()
    }
    fn encode(&self, sector: u64, data: &mut [u8]) {
        self.codec.encode(sector.wrapping_add(self.shift), data);
    }
    fn decode(&self, sector: u64, data: &mut [u8]) {
        self.codec.decode(sector.wrapping_add(self.shift), data);
    }
}
