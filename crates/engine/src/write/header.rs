//! Changes of single header fields in place: everything else in the first cluster stays as it is.

use qcow2_format::HostOffset;
use qcow2_format::header::feature::{Autoclear, Incompatible};
use qcow2_format::header::field::{self, Patch};

use crate::image::Qcow2;
use crate::patch::write_patch;
use crate::writer::Writer;
use crate::{Error, ErrorKind, Result, StorageExt};

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
        let mut changed = self.load_bitmaps(image, false)?;
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
        self.write_fields(image, Patch::new().set(field::AUTOCLEAR_FEATURES, bits))
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

    /// After an error: where it is that structures contradict each other, and nothing more is written for that, the file says so, too.
    /// Whoever opens it next would trust the same refcounts.
    pub(super) fn note_corruption(&self, image: &Qcow2, error: Error) -> Error {
        if error.kind() == ErrorKind::Corrupt && self.is_poisoned_by(ErrorKind::Corrupt) {
            self.mark_corrupt(image);
        }
        error
    }

    /// Everything is in the file and durable: the image is no longer dirty.
    pub(crate) fn mark_clean(&self, image: &Qcow2) -> Result<()> {
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
        self.write_fields(image, Patch::new().set(field::INCOMPATIBLE_FEATURES, bits))
    }

    /// Sets the virtual size.
    pub(crate) fn write_size(&self, image: &Qcow2, size: u64) -> Result<()> {
        self.write_fields(image, Patch::new().set(field::SIZE, size))
    }

    /// Sets size and place of the L1 table in one write.
    pub(crate) fn write_l1_place(&self, image: &Qcow2, entries: u32, offset: u64) -> Result<()> {
        let patch = Patch::new().set(field::L1_SIZE, entries);
        self.write_fields(image, patch.set(field::L1_TABLE_OFFSET, HostOffset(offset)))
    }

    /// Sets number and place of the snapshots in one write.
    pub(crate) fn write_snapshots_place(&self, image: &Qcow2, count: u32, offset: u64) -> Result<()> {
        let patch = Patch::new().set(field::NB_SNAPSHOTS, count);
        self.write_fields(image, patch.set(field::SNAPSHOTS_OFFSET, HostOffset(offset)))
    }

    /// Sets virtual size and L1 table in one write.
    pub(crate) fn write_active(&self, image: &Qcow2, size: u64, entries: u32, offset: u64) -> Result<()> {
        let patch = Patch::new().set(field::SIZE, size).set(field::L1_SIZE, entries);
        self.write_fields(image, patch.set(field::L1_TABLE_OFFSET, HostOffset(offset)))
    }

    /// Sets virtual size, L1 table, refcount table and snapshot table in one write.
    pub(crate) fn write_places(&self, image: &Qcow2, places: &Places) -> Result<()> {
        let patch = Patch::new()
            .set(field::SIZE, places.size)
            .set(field::L1_SIZE, places.l1_entries)
            .set(field::L1_TABLE_OFFSET, HostOffset(places.l1_offset))
            .set(field::REFCOUNT_TABLE_OFFSET, HostOffset(places.refcount_table_offset))
            .set(field::REFCOUNT_TABLE_CLUSTERS, places.refcount_table_clusters)
            .set(field::NB_SNAPSHOTS, places.snapshots)
            .set(field::SNAPSHOTS_OFFSET, HostOffset(places.snapshots_offset));
        self.write_fields(image, patch)
    }

    fn write_fields(&self, image: &Qcow2, patch: Patch) -> Result<()> {
        write_patch(&**image.storage(), &image.header().steady(), &patch).map_err(|e| self.poison(e))
    }
}
