//! Changes of single header fields in place: everything else in the first cluster stays as it is.

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
/// Offset of `autoclear_features`.
const AUTOCLEAR: u64 = 88;

/// What one write of the header switches: fields that lie in one sector.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Places {
    pub(crate) size: u64,
    pub(crate) l1_entries: u32,
    pub(crate) l1_offset: u64,
    pub(crate) refcount_table_offset: u64,
    pub(crate) refcount_table_clusters: u32,
    pub(crate) snapshots: u32,
    pub(crate) snapshots_offset: u64,
}

impl Writer {
    /// Prepares the image for its first change: clears the autoclear bits that this library does not know, and loads the
    /// enabled bitmaps, which are in use from now on.
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
        let mut changed = self.bitmaps.load(image, false)?;
        if header.version >= 3 && header.autoclear != keep {
            self.write_autoclear(image, keep)?;
            changed = true;
        }
        if self.options.lazy_refcounts {
            // Before any refcount is late.
            self.write_incompatible(image, header.incompatible | Incompatible::DIRTY)?;
            changed = true;
        }
        if changed {
            image.storage().flush().map_err(|e| self.poison(e))?;
        }
        self.begun.get_or_init(|| ());
        Ok(())
    }

    /// Sets the autoclear bits. Durable with the next sync.
    pub(crate) fn write_autoclear(&self, image: &Qcow2, bits: Autoclear) -> Result<()> {
        self.write_field(image, AUTOCLEAR, &bits.bits().to_be_bytes())
    }

    /// Marks the image corrupt, as far as that is possible: a version 2 header has no such bit.
    pub(super) fn mark_corrupt(&self, image: &Qcow2) {
        let header = image.header();
        if header.version >= 3 {
            let dirty = if self.options.lazy_refcounts { Incompatible::DIRTY } else { Incompatible::empty() };
            // The image is refused either way; a failure here adds nothing to the error that led here.
            let _ = self.write_incompatible(image, header.incompatible | Incompatible::CORRUPT | dirty);
            let _ = image.storage().flush();
        }
    }

    /// Everything is in the file and durable: the image is no longer dirty.
    pub(super) fn mark_clean(&self, image: &Qcow2) -> Result<()> {
        if !self.options.lazy_refcounts {
            return Ok(());
        }
        image.storage().flush().map_err(|e| self.poison(e))?;
        self.write_incompatible(image, image.header().incompatible)?;
        image.storage().flush().map_err(|e| self.poison(e))
    }

    /// Marks the image as one whose refcounts may be wrong, durably: until [`Writer::unmark_dirty`], a crash leaves it to the
    /// next writer to repair it. False in version 2, which has no such mark.
    pub(crate) fn mark_dirty(&self, image: &Qcow2) -> Result<bool> {
        let header = image.header();
        if header.version < 3 {
            return Ok(false);
        }
        self.write_incompatible(image, header.incompatible | Incompatible::DIRTY)?;
        image.storage().flush().map_err(|e| self.poison(e))?;
        Ok(true)
    }

    /// All is durable and fits together again. Lazy refcounts keep the mark until the image is closed.
    pub(crate) fn unmark_dirty(&self, image: &Qcow2) -> Result<()> {
        if self.options.lazy_refcounts {
            return Ok(());
        }
        self.write_incompatible(image, image.header().incompatible)?;
        image.storage().flush().map_err(|e| self.poison(e))
    }

    fn write_incompatible(&self, image: &Qcow2, bits: Incompatible) -> Result<()> {
        self.write_field(image, INCOMPATIBLE, &bits.bits().to_be_bytes())
    }

    /// Sets the virtual size.
    pub(super) fn write_size(&self, image: &Qcow2, size: u64) -> Result<()> {
        self.write_field(image, SIZE, &size.to_be_bytes())
    }

    /// Sets size and place of the L1 table in one write.
    pub(crate) fn write_l1_place(&self, image: &Qcow2, entries: u32, offset: u64) -> Result<()> {
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

    /// Sets virtual size and L1 table in one write: they lie in one sector, with `crypt_method` between them.
    pub(crate) fn write_active(&self, image: &Qcow2, size: u64, entries: u32, offset: u64) -> Result<()> {
        let mut bytes = Vec::with_capacity(24);
        bytes.extend_from_slice(&size.to_be_bytes());
        bytes.extend_from_slice(&image.header().crypt_method.encode().to_be_bytes());
        bytes.extend_from_slice(&entries.to_be_bytes());
        bytes.extend_from_slice(&offset.to_be_bytes());
        self.write_field(image, SIZE, &bytes)
    }

    /// Sets virtual size, L1 table, refcount table and snapshot table in one write, inside the first sector.
    pub(crate) fn write_places(&self, image: &Qcow2, places: &Places) -> Result<()> {
        let mut bytes = Vec::with_capacity(48);
        bytes.extend_from_slice(&places.size.to_be_bytes());
        bytes.extend_from_slice(&image.header().crypt_method.encode().to_be_bytes());
        bytes.extend_from_slice(&places.l1_entries.to_be_bytes());
        bytes.extend_from_slice(&places.l1_offset.to_be_bytes());
        bytes.extend_from_slice(&places.refcount_table_offset.to_be_bytes());
        bytes.extend_from_slice(&places.refcount_table_clusters.to_be_bytes());
        bytes.extend_from_slice(&places.snapshots.to_be_bytes());
        bytes.extend_from_slice(&places.snapshots_offset.to_be_bytes());
        self.write_field(image, SIZE, &bytes)
    }

    fn write_field(&self, image: &Qcow2, offset: u64, bytes: &[u8]) -> Result<()> {
        image.storage().write_all_at(Mem::from(bytes), offset).map_err(|e| self.poison(e))
    }
}
