//! The door to guest data: what stands between the guest's bytes and those of the file.
//!
//! An image has two kinds of bytes in its file: its own structures, which are what they are, and the guest's. The guest's go
//! through `GuestData` in both directions, which is the file itself unless the image was opened with a door: then it is what the
//! door makes of the file. Behind a door the two meanings of "zero" part: that the host's
//! bytes are zero (a hole, a new cluster), and that the guest reads zeroes.

use std::borrow::Cow;
use std::fmt;
use std::ptr;
use std::sync::Arc;

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

    /// A codec that counts sectors of the guest's disk instead of those of the file: then it is used, and `open` is not. Images say
    /// `crypt_method` 1.
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

/// Where the guest bytes of a file are read and written.
#[derive(Debug, Clone)]
pub(crate) enum GuestData {
    /// At their host offsets: in the file itself, or in what a door makes of it.
    ByHost(Arc<dyn Storage>),
    /// At their host offsets as well, but what is stored depends on their guest offsets.
    ByGuest(Arc<Sectors>),
}

impl GuestData {
    /// Those of `host` behind `door`, or in `host` itself without one.
    pub(crate) fn behind(door: Option<&Arc<dyn DataDoor>>, host: &Arc<dyn Storage>) -> Self {
        let host = Arc::clone(host);
        match door.map(|door| (door, door.by_guest())) {
            None => Self::ByHost(host),
            Some((door, None)) => Self::ByHost(door.open(host)),
            Some((_, Some(codec))) => Self::ByGuest(Arc::new(Sectors::new(host, Arc::clone(codec)))),
        }
    }

    /// Through which bytes are read and written at `host`, and behind it, that are the guest's at `guest`, and behind it.
    pub(crate) fn at(&self, guest: u64, host: u64) -> Cow<'_, Arc<dyn Storage>> {
        match self {
            Self::ByHost(data) => Cow::Borrowed(data),
            Self::ByGuest(sectors) => {
                let counted: Arc<dyn Storage> = Arc::new(sectors.counted(guest, host));
                Cow::Owned(counted)
            }
        }
    }

    /// Through which bytes come to another place of the file: to the guest, they stay where they are.
    pub(crate) fn moving(&self) -> &Arc<dyn Storage> {
        match self {
            Self::ByHost(data) => data,
            Self::ByGuest(sectors) => sectors.host(),
        }
    }
}
