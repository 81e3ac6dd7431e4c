//! Changes of single header fields in place: everything else in the first cluster stays as it is.

use qcow2_format::bitmap::BitmapFlags;
use qcow2_format::header::feature::{Autoclear, Incompatible};

use super::writer::Writer;
use crate::image::Qcow2;
use crate::{Mem, Result, StorageExt};

/// Offset of `size`.
const SIZE: u64 = 24;
/// Offset of `l1_size`, followed by `l1_table_offset`.
const L1_SIZE: u64 = 36;
/// Offset of `refcount_table_offset`, followed by `refcount_table_clusters`.
pub(super) const REFCOUNT_TABLE_OFFSET: u64 = 48;
/// Offset of `nb_snapshots`, followed by `snapshots_offset`.
const NB_SNAPSHOTS: u64 = 60;
/// Offset of `incompatible_features`.
const INCOMPATIBLE: u64 = 72;
/// Offset of `flags` in a bitmap directory entry.
const BITMAP_FLAGS: u64 = 12;
/// Offset of `autoclear_features`.
const AUTOCLEAR: u64 = 88;

impl Writer {
    /// Prepares the image for its first change: clears the autoclear bits that this library does not know, and marks
    /// enabled bitmaps as in use, because they are not kept up to date.
    pub(crate) fn begin(&self, image: &Qcow2) -> Result<()> {
        self.check()?;
        if self.begun.get().is_some() {
            return Ok(());
        }
        let _one = self.flushing.lock();
        if self.begun.get().is_some() {
            return Ok(());
        }
        let header = image.header();
        let keep = header.autoclear & Autoclear::SUPPORTED;
        let mut changed = self.mark_bitmaps(image)?;
        if header.version >= 3 && header.autoclear != keep {
            self.write_field(image, AUTOCLEAR, &keep.bits().to_be_bytes())?;
            changed = true;
        }
        if changed {
            image.storage().flush().map_err(|e| self.poison(e))?;
        }
        self.begun.get_or_init(|| ());
        Ok(())
    }

    /// Sets the in-use flag of every enabled bitmap; true if there was one to mark.
    fn mark_bitmaps(&self, image: &Qcow2) -> Result<bool> {
        let mut changed = false;
        let Some(directory) = image.header().bitmaps() else { return Ok(false) };
        let mut at = directory.directory_offset.0;
        for bitmap in image.bitmaps()? {
            let flags = bitmap.entry.flags;
            if flags.contains(BitmapFlags::AUTO) && !flags.contains(BitmapFlags::IN_USE) {
                let flags = (flags | BitmapFlags::IN_USE).bits();
                self.write_field(image, at + BITMAP_FLAGS, &flags.to_be_bytes())?;
                changed = true;
            }
            at += bitmap.entry.encoded_length() as u64;
        }
        Ok(changed)
    }

    /// Marks the image corrupt, as far as that is possible: a version 2 header has no such bit.
    pub(super) fn mark_corrupt(&self, image: &Qcow2) {
        let header = image.header();
        if header.version >= 3 {
            let bits = (header.incompatible | Incompatible::CORRUPT).bits();
            // The image is refused either way; a failure here adds nothing to the error that led here.
            let _ = self.write_field(image, INCOMPATIBLE, &bits.to_be_bytes());
            let _ = image.storage().flush();
        }
    }

    /// Sets the virtual size.
    pub(super) fn write_size(&self, image: &Qcow2, size: u64) -> Result<()> {
        self.write_field(image, SIZE, &size.to_be_bytes())
    }

    /// Sets size and place of the L1 table in one write.
    pub(super) fn write_l1_place(&self, image: &Qcow2, entries: u32, offset: u64) -> Result<()> {
        let mut bytes = [0u8; 12];
        let (first, second) = bytes.split_at_mut(4);
        first.copy_from_slice(&entries.to_be_bytes());
        second.copy_from_slice(&offset.to_be_bytes());
        self.write_field(image, L1_SIZE, &bytes)
    }

    /// Sets number and place of the snapshots in one write.
    pub(crate) fn write_snapshots_place(&self, image: &Qcow2, count: u32, offset: u64) -> Result<()> {
        let mut bytes = [0u8; 12];
        let (first, second) = bytes.split_at_mut(4);
        first.copy_from_slice(&count.to_be_bytes());
        second.copy_from_slice(&offset.to_be_bytes());
        self.write_field(image, NB_SNAPSHOTS, &bytes)
    }

    /// Sets virtual size and L1 table in one write: they lie in one sector, with `crypt_method` (0) between them.
    pub(crate) fn write_active(&self, image: &Qcow2, size: u64, entries: u32, offset: u64) -> Result<()> {
        let mut bytes = Vec::with_capacity(24);
        bytes.extend_from_slice(&size.to_be_bytes());
        bytes.extend_from_slice(&0u32.to_be_bytes());
        bytes.extend_from_slice(&entries.to_be_bytes());
        bytes.extend_from_slice(&offset.to_be_bytes());
        self.write_field(image, SIZE, &bytes)
    }

    fn write_field(&self, image: &Qcow2, offset: u64, bytes: &[u8]) -> Result<()> {
        image.storage().write_all_at(Mem::from(bytes), offset).map_err(|e| self.poison(e))
    }
}
