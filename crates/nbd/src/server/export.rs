//! What is served.

use std::ops::Range;
use std::sync::Arc;

use qcow2_core::{Disk, Result};

use crate::protocol::export_flags as flag;

/// What is best for clients: a page. Any size is taken.
const PREFERRED: u32 = 4096;

/// Ranges that were written to, as they are when it is asked.
pub trait DirtyRanges: Send + Sync {
    /// Calls `visit` with the dirty ranges of the disk from `start` on, in order, until it says that it has enough.
    ///
    /// # Errors
    /// Where the bitmap cannot be read.
    fn dirty(&self, start: u64, visit: &mut dyn FnMut(Range<u64>) -> bool) -> Result<()>;
}

/// A bitmap that is told of as `qemu:dirty-bitmap:NAME`.
pub struct Bitmap {
    /// Its name.
    pub name: Vec<u8>,
    /// Its ranges.
    pub ranges: Arc<dyn DirtyRanges>,
}

/// A disk under a name.
pub struct Export {
    /// The name; empty for the one that is meant where none is given.
    pub name: Vec<u8>,
    /// What it is, for a person; empty for nothing.
    pub description: Vec<u8>,
    /// The disk.
    pub disk: Arc<dyn Disk>,
    /// First byte of the disk that is the export's: what lies before is neither read nor written.
    pub offset: u64,
    /// Writes are refused.
    pub read_only: bool,
    /// Whole clusters become zeroes without being written.
    pub fast_zeroes: bool,
    /// Tell of `qemu:allocation-depth`.
    pub allocation_depth: bool,
    /// Bitmaps that are told of.
    pub bitmaps: Vec<Bitmap>,
}

impl Export {
    /// Bytes that it has now.
    pub(super) fn size(&self) -> u64 {
        self.disk.virtual_size().saturating_sub(self.offset)
    }

    pub(super) fn preferred_size(&self) -> u32 {
        PREFERRED
    }

    /// What it says of itself. `several`: there can be more than one client.
    pub(super) fn flags(&self, structured: bool, several: bool) -> u16 {
        let mut flags = flag::HAS_FLAGS | flag::SEND_FLUSH | flag::SEND_FUA | flag::SEND_CACHE;
        flags |= if self.read_only { flag::READ_ONLY } else { flag::SEND_TRIM | flag::SEND_WRITE_ZEROES };
        if self.fast_zeroes && !self.read_only {
            flags |= flag::SEND_FAST_ZERO;
        }
        if structured {
            flags |= flag::SEND_DF;
        }
        if several {
            flags |= flag::CAN_MULTI_CONN;
        }
        flags
    }
}
