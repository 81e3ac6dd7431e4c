//! Bitmaps that are kept current while the image is open for writing.

use std::ops::Range;
use std::sync::Arc;

use parking_lot::RwLock;
use qcow2_format::bitmap::{BitmapDirectoryEntry, BitmapFlags};

use super::bits::Bits;
use super::stored;
use crate::image::Qcow2;
use crate::maintenance::Session;
use crate::{Image, Mem, Result, StorageExt};

/// One bitmap in memory. Its entry in the file is marked in use.
#[derive(Debug, Clone)]
pub(crate) struct Tracked {
    pub(super) name: Vec<u8>,
    pub(super) bits: Arc<Bits>,
    /// Guest changes are recorded.
    pub(super) enabled: bool,
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

    pub(super) fn find(&self, name: &[u8]) -> Option<Tracked> {
        self.list.read().iter().find(|t| t.name == name).cloned()
    }

    pub(super) fn all(&self) -> Vec<Tracked> {
        self.list.read().clone()
    }

    pub(super) fn remove(&self, name: &[u8]) {
        self.list.write().retain(|t| t.name != name);
    }

    /// Adds a bitmap, or replaces the one of its name.
    pub(super) fn put(&self, tracked: Tracked) {
        let mut list = self.list.write();
        list.retain(|t| t.name != tracked.name);
        list.push(tracked);
    }

    pub(super) fn clear(&self) {
        self.list.write().clear();
    }

    /// Loads the bitmaps that must follow guest changes (`all`: every consistent one) and marks them in use in the
    /// file. True if something was written, which a sync must follow before the first guest change.
    pub(crate) fn load(&self, image: &Qcow2, all: bool) -> Result<bool> {
        let Some(directory) = image.bitmap_directory() else { return Ok(false) };
        let mut at = directory.directory_offset.0;
        let mut changed = false;
        for record in image.bitmaps()? {
            let flags = record.entry.flags;
            let enabled = flags.contains(BitmapFlags::AUTO);
            let known = self.tracks(&record.entry.name);
            if !known && !flags.contains(BitmapFlags::IN_USE) && (enabled || all) {
                let bits = Arc::new(stored::load(image, &record.entry)?);
                let (field, bytes) = BitmapDirectoryEntry::flags_patch(flags | BitmapFlags::IN_USE);
                image.storage().write_all_at(Mem::from(&bytes[..]), at + field)?;
                changed = true;
                self.put(Tracked { name: record.entry.name.clone(), bits, enabled });
            }
            at += record.entry.encoded_length() as u64;
        }
        Ok(changed)
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

impl Image {
    /// Stores the bitmaps in memory, so that the file's are current again: the last change before closing.
    pub(crate) fn store_bitmaps(&self, session: &Session<'_>) -> Result<()> {
        let tracked = session.writer.bitmaps.all();
        if tracked.is_empty() {
            return Ok(());
        }
        if tracked.iter().any(|one| one.bits.is_changed()) {
            self.store_changed(session, &tracked)?;
        } else {
            session.unmark(&tracked)?;
        }
        session.writer.bitmaps.clear();
        Ok(())
    }

    /// After a close that failed: bitmaps that are in the file as they are in memory stay good there, and nothing changes
    /// the image any more. The others stay marked in use. What is reserved is given back.
    pub(crate) fn rescue_bitmaps(&self) {
        let Ok(session) = Session::begin(self) else { return };
        let mut same = session.writer.bitmaps.all();
        same.retain(|one| !one.bits.is_changed());
        let unmarked = !same.is_empty() && session.unmark(&same).is_ok();
        // The error that led here is the one to report. An image that takes no more writes stays as it is.
        let _given_back = session.barrier().and_then(|()| session.writer.give_back(session.image));
        if unmarked {
            session.writer.close();
        }
    }

    fn store_changed(&self, session: &Session<'_>, tracked: &[Tracked]) -> Result<()> {
        session.replace_bitmaps(|mut entries| {
            for one in tracked {
                if let Some(entry) = entries.iter_mut().find(|e| e.entry.name == one.name) {
                    entry.entry.flags.remove(BitmapFlags::IN_USE);
                    // What did not change keeps its place.
                    entry.bits = one.bits.is_changed().then(|| Arc::clone(&one.bits));
                }
            }
            Ok(entries)
        })
    }
}

impl Session<'_> {
    /// Takes the marks back from bitmaps that are in the file as they are in memory.
    fn unmark(&self, tracked: &[Tracked]) -> Result<()> {
        let Some(directory) = self.image.bitmap_directory() else { return Ok(()) };
        let mut at = directory.directory_offset.0;
        // What the marks vouch for is durable first.
        self.barrier()?;
        for record in self.image.bitmaps()? {
            if tracked.iter().any(|one| one.name == record.entry.name) {
                let flags = record.entry.flags - BitmapFlags::IN_USE;
                let (field, bytes) = BitmapDirectoryEntry::flags_patch(flags);
                self.write(at + field, &bytes)?;
            }
            at += record.entry.encoded_length() as u64;
        }
        self.barrier()
    }
}
