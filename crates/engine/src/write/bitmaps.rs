//! Bitmaps that are kept current while the image is open for writing.

use std::sync::Arc;

use qcow2_format::bitmap::{BitmapDirectoryEntry, BitmapFlags};

use crate::image::Qcow2;
use crate::tracker::Tracked;
use crate::writer::Writer;
use crate::{Mem, Result, StorageExt};

impl Writer {
    /// Loads the bitmaps that must follow guest changes (`all`: every consistent one) and marks them in use in the
    /// file. True if something was written, which a sync must follow before the first guest change.
    pub(crate) fn load_bitmaps(&self, image: &Qcow2, all: bool) -> Result<bool> {
        let Some(directory) = image.bitmap_directory() else { return Ok(false) };
        let mut at = directory.directory_offset.0;
        let mut changed = false;
        for record in image.bitmaps()? {
            let flags = record.entry.flags;
            let enabled = flags.contains(BitmapFlags::AUTO);
            let known = self.bitmaps.tracks(&record.entry.name);
            if !known && !flags.contains(BitmapFlags::IN_USE) && (enabled || all) {
                let bits = Arc::new(image.stored_bits(&record.entry)?);
                let (field, bytes) = BitmapDirectoryEntry::flags_patch(flags | BitmapFlags::IN_USE);
                image.storage().write_all_at(Mem::from(&bytes[..]), at + field)?;
                changed = true;
                self.bitmaps.put(Tracked { name: record.entry.name.clone(), bits, enabled });
            }
            at += record.entry.encoded_length() as u64;
        }
        Ok(changed)
    }
}
