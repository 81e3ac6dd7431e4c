//! Dirty bitmaps in memory: what follows the writes of an image that is open for writing.

mod bits;

use std::ops::Range;
use std::sync::Arc;

use parking_lot::RwLock;

use crate::Result;
pub use bits::Bits;

/// One bitmap in memory. Its entry in the file is marked in use.
#[derive(Debug, Clone)]
pub(crate) struct Tracked {
    pub(crate) name: Vec<u8>,
    pub(crate) bits: Arc<Bits>,
    /// Guest changes are recorded.
    pub(crate) enabled: bool,
}

/// The bitmaps in memory.
#[derive(Debug, Default)]
pub(crate) struct Tracker {
    list: RwLock<Vec<Tracked>>,
}

impl Tracker {
    /// Records a guest change.
    pub(crate) fn mark(&self, range: &Range<u64>) {
        for tracked in self.list.read().iter().filter(|t| t.enabled) {
            tracked.bits.mark(range);
        }
    }

    /// Whether a bitmap of this name is in memory.
    pub(crate) fn tracks(&self, name: &[u8]) -> bool {
        self.list.read().iter().any(|t| t.name == name)
    }

    pub(crate) fn find(&self, name: &[u8]) -> Option<Tracked> {
        self.list.read().iter().find(|t| t.name == name).cloned()
    }

    pub(crate) fn all(&self) -> Vec<Tracked> {
        self.list.read().clone()
    }

    pub(crate) fn remove(&self, name: &[u8]) {
        self.list.write().retain(|t| t.name != name);
    }

    /// Adds a bitmap, or replaces the one of its name.
    pub(crate) fn put(&self, tracked: Tracked) {
        let mut list = self.list.write();
        list.retain(|t| t.name != tracked.name);
        list.push(tracked);
    }

    pub(crate) fn clear(&self) {
        self.list.write().clear();
    }

    /// Refuses a size of the disk for which a bitmap would take too much memory.
    ///
    /// # Errors
    /// `Limit`.
    pub(crate) fn check_size(&self, size: u64, max_memory: u64) -> Result<()> {
        let list = self.list.read();
        list.iter().try_for_each(|t| Bits::words_for(size, t.bits.granularity_bits(), max_memory).map(drop))
    }

    /// Gives every bitmap the disk's new size.
    pub(crate) fn resize(&self, size: u64, max_memory: u64) -> Result<()> {
        self.replace(self.resized(size, max_memory)?);
        Ok(())
    }

    /// Every bitmap as it is on a disk of another size: for [`Tracker::replace`], which cannot fail.
    pub(crate) fn resized(&self, size: u64, max_memory: u64) -> Result<Vec<Tracked>> {
        let mut resized = self.all();
        for tracked in &mut resized {
            tracked.bits = Arc::new(tracked.bits.resized(size, max_memory)?);
        }
        Ok(resized)
    }

    /// Replaces all bitmaps.
    pub(crate) fn replace(&self, list: Vec<Tracked>) {
        *self.list.write() = list;
    }
}
