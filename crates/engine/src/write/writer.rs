//! Making the state of an image that is open for writing, and what it has to know of the image's structures.

use qcow2_format::header::extension::BitmapsExtension;
use qcow2_format::header::feature::Incompatible;
use qcow2_format::{Geometry, L1Entry, SnapshotRecord};

use crate::alloc::{Allocator, MetadataMap, Refcounts};
use crate::image::Qcow2;
use crate::writer::{WriteOptions, Writer};
use crate::{ErrorKind, Result};

impl Writer {
    /// Prepares `image` for writing. Changes nothing in the file.
    ///
    /// # Errors
    /// `ReadOnly`, `UnsupportedFeature` (weak encryption), `Corrupt` (the corrupt or the dirty bit, no refcount table),
    /// `InvalidArgument` (a snapshot is viewed; lazy refcounts in version 2).
    pub(crate) fn new(image: &Qcow2, options: WriteOptions) -> Result<Self> {
        let header = image.header();
        if !image.storage().traits().writable {
            return Err(image.error(ErrorKind::ReadOnly, "the file is open for reading only"));
        }
        if image.viewed_snapshot().is_some() {
            return Err(image.error(ErrorKind::InvalidArgument, "a snapshot's view cannot be written to"));
        }
        if image.is_weak() && !image.open_options().allow_weak {
            let message = "the legacy AES encryption is weak, and written only where that is allowed (allowWeak): convert the \
                           image to one with LUKS";
            return Err(image.error(ErrorKind::UnsupportedFeature, message).with_field("crypt_method"));
        }
        for (bit, reason) in [
            (Incompatible::CORRUPT, "the image is marked corrupt: repair it before writing"),
            (
                Incompatible::DIRTY,
                "the image was not closed cleanly and its refcounts may be wrong: repair it first",
            ),
        ] {
            if header.incompatible.contains(bit) {
                return Err(image.error(ErrorKind::Corrupt, reason).with_field("incompatible_features"));
            }
        }
        if options.lazy_refcounts && header.version < 3 {
            let error = image.error(ErrorKind::InvalidArgument, "lazy refcounts need an image of version 3");
            return Err(error.with_field("lazy_refcounts"));
        }
        if header.refcount_table_clusters == 0 {
            let error = image.error(ErrorKind::Corrupt, "the image has no refcount table");
            return Err(error.with_field("refcount_table_clusters"));
        }
        let refcounts = Refcounts::load(image.storage(), header)?;
        let metadata = MetadataMap::of(image, refcounts.block_offsets());
        let alloc = Allocator::new(image.storage(), refcounts, header.geometry)?;
        let alloc = alloc.with_first_fit(options.first_fit);
        Ok(Self::of(alloc, metadata, options, header.l1_table_offset.0))
    }

    /// Records a new snapshot table for the overlap check.
    pub(crate) fn note_snapshots(&self, image: &Qcow2, records: &[SnapshotRecord], offset: u64, bytes: u64) {
        self.metadata.lock().set_snapshots(image.geometry(), records, offset, bytes);
    }

    /// Records the place of the bitmap directory for the overlap check.
    pub(crate) fn note_bitmaps(&self, image: &Qcow2, directory: Option<&BitmapsExtension>) {
        self.metadata.lock().set_bitmaps(image.geometry(), directory);
    }

    /// Forgets the L2 tables of an L1 table that was the active one, or a snapshot's: those that a compaction moved are
    /// known, too. `note_active` follows.
    pub(crate) fn forget_l2_tables(&self, image: &Qcow2, former: &[u64]) {
        let g = image.geometry();
        let mut metadata = self.metadata.lock();
        for entry in former.iter().map(|&e| L1Entry(e).offset_bits()).filter(|&o| o != 0) {
            metadata.remove(g.cluster_index(entry));
        }
    }

    /// Records that another L1 table is the active one.
    pub(crate) fn note_active(&self, image: &Qcow2, l1: &[u64], offset: u64) {
        let g = image.geometry();
        let mut metadata = self.metadata.lock();
        metadata.set_l1(g, offset, l1.len() as u64);
        for entry in l1.iter().map(|&e| L1Entry(e).offset_bits()).filter(|&o| o != 0) {
            metadata.add(g.cluster_index(entry));
        }
        self.set_l1_offset(offset);
    }

    /// Refuses a write of guest data over metadata, and marks the image corrupt: its refcounts cannot be trusted.
    pub(super) fn check_overlap(&self, image: &Qcow2, host: u64, length: u64) -> Result<()> {
        if image.header().has_data_file() || length == 0 {
            return Ok(());
        }
        let g: &Geometry = image.geometry();
        let end = g.cluster_index(host + (length - 1)) + 1;
        let Some(name) = self.metadata.lock().hit(g.cluster_index(host), end) else { return Ok(()) };
        self.mark_corrupt(image);
        let message =
            format!("a write of guest data would overwrite the {name}: the image is marked corrupt");
        Err(self.poison(image.error(ErrorKind::Corrupt, message).with_offset(host)))
    }
}
