//! The state of an image that is open for writing.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use parking_lot::{Mutex, MutexGuard, RwLock};
use qcow2_format::header::extension::BitmapsExtension;
use qcow2_format::header::feature::Incompatible;
use qcow2_format::{CryptMethod, Geometry, L1Entry, SnapshotRecord};
use qcow2_transform::Window;

use super::alloc::Allocator;
use super::inflight::InFlight;
use super::overlap::MetadataMap;
use super::refcounts::Refcounts;
use crate::bitmap::Tracker;
use crate::check::{self, CheckOptions, Repair};
use crate::image::{Qcow2, l1_damage};
use crate::{DetectZeroes, Discard, DiskOptions, Error, ErrorKind, Job, Result, StorageExt};

/// How to write to an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct WriteOptions {
    /// What a guest's discard does.
    pub discard: Discard,
    /// What a write of nothing but zeroes becomes.
    pub detect_zeroes: DetectZeroes,
    /// Flush after every request: cache modes `writethrough` and `directsync`.
    pub flush_each: bool,
    /// Mark the image dirty while it is open, and write refcounts late: QEMU's `lazy-refcounts`. One that is not closed
    /// cleanly is repaired when it is opened again.
    pub lazy_refcounts: bool,
    /// Level of compressed writes; the codec's default without one.
    pub compression_level: Option<u32>,
    /// Window of a zlib stream.
    pub compression_window: Window,
}

impl From<&WriteOptions> for DiskOptions {
    fn from(options: &WriteOptions) -> Self {
        let &WriteOptions { discard, detect_zeroes, flush_each, .. } = options;
        Self { discard, detect_zeroes, flush_each }
    }
}

/// Everything that writing needs beside the mapping. See the module's documentation for the order of the locks.
#[derive(Debug)]
pub(crate) struct Writer {
    /// Guest requests share it; maintenance has it alone.
    pub(crate) gate: RwLock<()>,
    /// One flush, or one change of the header, at a time.
    pub(super) flushing: Mutex<()>,
    /// One new L2 table at a time.
    pub(super) tables: Mutex<()>,
    pub(super) alloc: Mutex<Allocator>,
    pub(super) metadata: Mutex<MetadataMap>,
    pub(super) inflight: InFlight,
    pub(super) options: WriteOptions,
    pub(crate) bitmaps: Tracker,
    /// Where the active L1 table is: growing the disk moves it.
    l1_offset: AtomicU64,
    /// Set once the header is prepared for changes.
    pub(super) begun: OnceLock<()>,
    poisoned: OnceLock<Poison>,
}

#[derive(Debug, Clone)]
struct Poison {
    kind: ErrorKind,
    message: String,
}

impl Writer {
    /// Prepares `image` for writing. Changes nothing in the file.
    ///
    /// # Errors
    /// `ReadOnly`, `UnsupportedFeature` (encryption), `Corrupt` (the corrupt or the dirty bit, no refcount table),
    /// `InvalidArgument` (a snapshot is viewed; lazy refcounts in version 2).
    pub(crate) fn new(image: &Qcow2, options: WriteOptions) -> Result<Self> {
        let header = image.header();
        if !image.storage().traits().writable {
            return Err(image.error(ErrorKind::ReadOnly, "the file is open for reading only"));
        }
        if image.viewed_snapshot().is_some() {
            return Err(image.error(ErrorKind::InvalidArgument, "a snapshot's view cannot be written to"));
        }
        if header.crypt_method == CryptMethod::Aes || image.is_read_by_guest() {
            let message = "images with the legacy AES encryption are only read: convert it to one with LUKS";
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
        let metadata = MetadataMap::new(image, refcounts.block_offsets());
        let alloc = Allocator::new(image.storage(), refcounts, header.geometry)?;
        Ok(Self {
            gate: RwLock::new(()),
            flushing: Mutex::new(()),
            tables: Mutex::new(()),
            alloc: Mutex::new(alloc),
            metadata: Mutex::new(metadata),
            inflight: InFlight::default(),
            options,
            bitmaps: Tracker::default(),
            l1_offset: AtomicU64::new(header.l1_table_offset.0),
            begun: OnceLock::new(),
            poisoned: OnceLock::new(),
        })
    }

    /// Refuses when a metadata write failed before.
    ///
    /// # Errors
    /// The kind of the first failure, saying that the image must be reopened.
    pub(crate) fn check(&self) -> Result<()> {
        match self.poisoned.get() {
            None => Ok(()),
            Some(poison) => Err(Error::new(
                poison.kind,
                format!("the image refuses writes since an earlier error, reopen it: {}", poison.message),
            )),
        }
    }

    /// After a failed metadata write, memory and file differ in unknown ways: nothing more is written.
    pub(crate) fn poison(&self, error: Error) -> Error {
        self.poisoned.get_or_init(|| Poison { kind: error.kind(), message: error.to_string() });
        error
    }

    /// Host offset of the active L1 table.
    pub(crate) fn l1_offset(&self) -> u64 {
        self.l1_offset.load(Ordering::Acquire)
    }

    /// Records that the active L1 table moved; its header field is durable.
    pub(super) fn set_l1_offset(&self, offset: u64) {
        self.l1_offset.store(offset, Ordering::Release);
    }

    /// Runs a change of the allocation. Errors of the system poison the image, but for a full file system.
    pub(crate) fn with_alloc<T>(
        &self,
        change: impl FnOnce(&mut Allocator, &mut MetadataMap) -> Result<T>,
    ) -> Result<T> {
        change(&mut self.alloc.lock(), &mut self.metadata.lock()).map_err(|e| self.poison_unless_full(e))
    }

    /// The allocation, for changes whose failure harms nothing.
    pub(crate) fn alloc(&self) -> MutexGuard<'_, Allocator> {
        self.alloc.lock()
    }

    /// Runs a change of a fork, whose failure harms nothing.
    pub(crate) fn with_fork<T>(
        &self,
        change: impl FnOnce(&mut Allocator, &MetadataMap) -> Result<T>,
    ) -> Result<T> {
        change(&mut self.alloc.lock(), &self.metadata.lock())
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

    /// Poisons the image as closed.
    pub(crate) fn close(&self) {
        self.poisoned
            .get_or_init(|| Poison { kind: ErrorKind::Closed, message: "the image is closed".to_owned() });
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

impl Qcow2 {
    /// Makes the image writable. One that was not closed cleanly (its dirty bit is set) is repaired first, as QEMU does:
    /// the caller holds the file alone.
    ///
    /// # Errors
    /// See [`Writer::new`]; `Corrupt` for an image that stays dirty because not all of it could be repaired.
    pub fn enable_writing(&mut self, options: WriteOptions) -> Result<()> {
        self.refuse_damaged_snapshots()?;
        let marks = self.header().incompatible;
        if marks.contains(Incompatible::DIRTY)
            && !marks.contains(Incompatible::CORRUPT)
            && self.viewed_snapshot().is_none()
            && self.storage().traits().writable
        {
            self.repair_dirty()?;
        }
        self.writer = Some(Writer::new(self, options)?);
        Ok(())
    }

    /// Refuses to write where snapshots are not known, or would be given up by the repair of an image that was not closed
    /// cleanly: that is for the user to decide.
    fn refuse_damaged_snapshots(&self) -> Result<()> {
        let length = self.storage().size()?;
        let geometry = self.geometry();
        let records = self.snapshots();
        let lost = |s: &SnapshotRecord| l1_damage(s.l1_table_offset.get(), s.l1_size, geometry, length);
        let dirty = self.header().incompatible.contains(Incompatible::DIRTY);
        let reason = match self.snapshot_error() {
            Some(error) => error.message().to_owned(),
            None => match records.iter().filter(|_| dirty).find_map(lost) {
                Some(reason) => reason,
                None => return Ok(()),
            },
        };
        let message = format!(
            "the snapshot table is damaged ({reason}): the image can be opened for reading, and a repair of all \
             keeps the snapshots that are left"
        );
        Err(self.error(ErrorKind::Corrupt, message).with_field("snapshot table"))
    }

    fn repair_dirty(&mut self) -> Result<()> {
        let options = CheckOptions { limits: *self.limits(), max_findings: 0, ..CheckOptions::default() };
        let report = check::repair(&**self.storage(), Repair::All, &options, &Job::new())?;
        let left = report.corruptions + report.check_errors;
        if left > 0 {
            let message = format!(
                "the image was not closed cleanly, and {left} of its errors could not be repaired: check it"
            );
            let error = self.error(ErrorKind::Corrupt, message).with_field("incompatible_features");
            return Err(match report.failure {
                Some(failure) => error.with_source(failure),
                None => error,
            });
        }
        self.reload()
    }

    /// Whether the image is open for writing.
    pub fn is_writable(&self) -> bool {
        self.writer.is_some()
    }

    pub(crate) fn writer(&self) -> Result<&Writer> {
        self.writer
            .as_ref()
            .ok_or_else(|| self.error(ErrorKind::ReadOnly, "the image is open for reading only"))
    }

    /// Held while host offsets that were planned are in use. Take it before planning.
    pub(crate) fn pin(&self) -> Option<Arc<()>> {
        self.writer.as_ref().map(|_| Arc::clone(&self.mapping.read().epoch))
    }
}
