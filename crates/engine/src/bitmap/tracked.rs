//! Storing the bitmaps that were kept current while the image was open for writing.

use std::sync::Arc;

use qcow2_format::bitmap::{BitmapDirectoryEntry, BitmapFlags};

use crate::maintenance::Session;
use crate::tracker::Tracked;
use crate::{Image, Result};

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
