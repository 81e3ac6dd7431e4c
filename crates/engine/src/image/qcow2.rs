//! One open qcow2 layer and what its header says.

use std::borrow::Cow;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use parking_lot::RwLock;

pub use qcow2_core::layer::{BackingReference, DataFileReference, ExtentReference, References};
use qcow2_format::header::extension::BitmapsExtension;
use qcow2_format::header::feature::Autoclear;
use qcow2_format::{CryptMethod, Geometry, Header, Limits, SnapshotRecord};

use super::inflated::{Inflate, InflatedCache};
use super::mapping::Mapping;
use super::options::OpenOptions;
use super::slices::SliceCache;
use crate::door::{DataDoor, GuestData};
use crate::writer::Writer;
use crate::{Error, ErrorKind, Result, Storage, StorageExt};

/// One qcow2 image file, without its backing file.
#[derive(Debug)]
pub struct Qcow2 {
    storage: Arc<dyn Storage>,
    data_file: Option<Arc<dyn Storage>>,
    /// Where guest bytes are read and written; `None` while the external data file is not open.
    data: Option<GuestData>,
    header: Header,
    size: AtomicU64,
    viewed: Option<usize>,
    snapshots: RwLock<Arc<[SnapshotRecord]>>,
    generation: AtomicU64,
    bitmap_directory: RwLock<Option<BitmapsExtension>>,
    snapshot_error: Option<Error>,
    options: OpenOptions,
    pub(super) mapping: RwLock<Mapping>,
    pub(super) slices: SliceCache,
    pub(super) inflated: InflatedCache,
    /// Present when the image is open for writing.
    pub(super) writer: Option<Writer>,
    pub(super) metadata_preallocated: OnceLock<bool>,
}

/// The disk that is read: the active one or an internal snapshot's.
#[derive(Debug)]
pub(super) struct View {
    pub(super) size: u64,
    pub(super) l1: Vec<u64>,
    pub(super) snapshot: Option<usize>,
}

impl Qcow2 {
    #[allow(clippy::too_many_arguments, reason = "the fields of the struct, from one caller")]
    pub(super) fn assemble(
        storage: Arc<dyn Storage>,
        header: Header,
        view: View,
        snapshots: Vec<SnapshotRecord>,
        snapshot_error: Option<Error>,
        slices: SliceCache,
        inflated: InflatedCache,
        options: &OpenOptions,
    ) -> Self {
        let consistent = header.autoclear.contains(Autoclear::BITMAPS);
        let directory = header.bitmaps().filter(|_| consistent).copied();
        let readable = header.crypt_method == CryptMethod::None || options.data_door.is_some();
        let data = (readable && !header.has_data_file())
            .then(|| GuestData::behind(options.data_door.as_ref(), &storage));
        Self {
            storage,
            data_file: None,
            data,
            header,
            bitmap_directory: RwLock::new(directory),
            size: AtomicU64::new(view.size),
            viewed: view.snapshot,
            snapshots: RwLock::new(snapshots.into()),
            generation: AtomicU64::new(0),
            snapshot_error,
            options: OpenOptions { snapshot: None, ..options.clone() },
            mapping: RwLock::new(Mapping::new(view.l1)),
            slices,
            inflated,
            writer: None,
            metadata_preallocated: OnceLock::new(),
        }
    }

    /// Files that the image names.
    pub fn references(&self) -> References {
        References {
            backing: self.header.backing_file.as_ref().map(|filename| BackingReference {
                filename: filename.clone(),
                format: self.header.backing_format().map(<[u8]>::to_vec),
            }),
            data_file: self.header.has_data_file().then(|| DataFileReference {
                filename: self.header.data_file().map(<[u8]>::to_vec),
                raw: self.header.data_file_raw(),
            }),
            extents: Vec::new(),
        }
    }

    /// Attaches the external data file. Without it, reading stored data fails with `ReferenceDenied`.
    pub fn set_data_file(&mut self, storage: Arc<dyn Storage>) {
        if self.header.has_data_file() && !self.is_locked() {
            self.data = Some(GuestData::behind(self.options.data_door.as_ref(), &storage));
        }
        self.data_file = Some(storage);
    }

    /// The image file.
    pub fn storage(&self) -> &Arc<dyn Storage> {
        &self.storage
    }
    /// The external data file, where it is attached.
    pub fn data_file(&self) -> Option<&Arc<dyn Storage>> {
        self.data_file.as_ref()
    }
    /// The header as it was read.
    pub fn header(&self) -> &Header {
        &self.header
    }
    /// Cluster size, refcount width and L2 entry form.
    pub fn geometry(&self) -> &Geometry {
        &self.header.geometry
    }
    /// Size in bytes of the disk that is read.
    pub fn virtual_size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    /// Publishes a new size: what lies beyond the old one is mapped.
    pub(crate) fn set_virtual_size(&self, size: u64) {
        self.size.store(size, Ordering::Release);
    }
    /// The internal snapshots, in the table's order.
    pub fn snapshots(&self) -> Arc<[SnapshotRecord]> {
        Arc::clone(&self.snapshots.read())
    }
    /// Counts the changes of the snapshots while the image is open: a plan is good for one generation.
    pub fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }
    /// Where the bitmap directory is, if the image has consistent bitmaps.
    pub(crate) fn bitmap_directory(&self) -> Option<BitmapsExtension> {
        *self.bitmap_directory.read()
    }
    pub(crate) fn set_bitmap_directory(&self, directory: Option<BitmapsExtension>) {
        *self.bitmap_directory.write() = directory;
    }
    pub(crate) fn next_generation(&self) {
        self.generation.fetch_add(1, Ordering::AcqRel);
    }
    pub(crate) fn set_snapshots(&self, records: Arc<[SnapshotRecord]>) {
        *self.snapshots.write() = records;
        self.next_generation();
    }
    /// Why the snapshot table could not be read to its end: [`Qcow2::snapshots`] are those in front of the damage. The
    /// active disk can be read all the same, but not written to.
    pub fn snapshot_error(&self) -> Option<&Error> {
        self.snapshot_error.as_ref()
    }
    /// The snapshot that is viewed, if any.
    pub fn viewed_snapshot(&self) -> Option<SnapshotRecord> {
        self.snapshots.read().get(self.viewed?).cloned()
    }
    /// The limits the image was opened with.
    pub fn limits(&self) -> &Limits {
        &self.options.limits
    }
    /// How the active disk of the image is opened again: as it was opened.
    pub fn open_options(&self) -> &OpenOptions {
        &self.options
    }
    /// A copy of the L1 table of the disk that is read.
    pub fn l1(&self) -> Vec<u64> {
        self.mapping.read().l1.clone()
    }

    /// Through which guest bytes are read and written, in both directions and without exception.
    ///
    /// # Errors
    /// `ReferenceDenied` for an external data file that is not open; `BadSecret` for an encrypted image without its secret.
    pub(crate) fn guest_data(&self) -> Result<&GuestData> {
        self.data.as_ref().ok_or_else(|| if self.is_locked() { self.locked() } else { self.data_not_open() })
    }

    /// Whether guest data is encrypted, and no secret was given.
    pub(crate) fn is_locked(&self) -> bool {
        self.header.crypt_method != CryptMethod::None && self.options.data_door.is_none()
    }

    fn locked(&self) -> Error {
        let name = if self.header.crypt_method == CryptMethod::Luks { "LUKS" } else { "AES" };
        let message = format!("the guest data is encrypted ({name}): give the image's secret");
        self.error(ErrorKind::BadSecret, message).with_field("secret")
    }

    /// The file in which guest bytes are stored, for what is about the file: its length, its space, its holes.
    pub(crate) fn data_host(&self) -> Result<&Arc<dyn Storage>> {
        if !self.header.has_data_file() {
            return Ok(&self.storage);
        }
        self.data_file.as_ref().ok_or_else(|| self.data_not_open())
    }

    /// Whether guest bytes are stored as they are: only then what is zero in the file is zero for the guest, and a hole is.
    pub(crate) fn host_is_guest(&self) -> bool {
        self.options.data_door.is_none() && self.header.crypt_method == CryptMethod::None
    }

    fn data_not_open(&self) -> Error {
        let name = self.header.data_file().map(String::from_utf8_lossy);
        let message = format!(
            "the guest data is in the external data file '{}', which was not opened",
            name.unwrap_or_default()
        );
        self.error(ErrorKind::ReferenceDenied, message)
    }

    /// Refuses to hand out ciphertext: there is a door to what is encrypted, or it is not read.
    pub(crate) fn require_plain(&self) -> Result<()> {
        if self.is_locked() { Err(self.locked()) } else { Ok(()) }
    }

    /// Puts a door in front of the guest data, of which nothing was read or written yet; it stays when the image is opened again.
    pub(crate) fn set_door(&mut self, door: Arc<dyn DataDoor>) {
        let host = self.data_host().ok().cloned();
        self.data = host.map(|host| GuestData::behind(Some(&door), &host));
        self.options.data_door = Some(door);
    }

    /// Lets guest data be written although its encryption is weak, see [`OpenOptions::allow_weak`].
    pub fn allow_weak(&mut self) {
        self.options.allow_weak = true;
    }

    /// Whether guest data is encrypted in a way that is weak: legacy AES, whose secret was given.
    pub(crate) fn is_weak(&self) -> bool {
        self.options.data_door.as_ref().is_some_and(|door| door.by_guest().is_some())
    }

    /// Through which the guest bytes at `guest`, and behind it, are read and written that are stored from `host` on.
    ///
    /// # Errors
    /// As [`Qcow2::guest_data`].
    pub(crate) fn data_at(&self, guest: u64, host: u64) -> Result<Cow<'_, Arc<dyn Storage>>> {
        Ok(self.guest_data()?.at(guest, host))
    }

    pub(super) fn inflate(&self, descriptor: qcow2_format::CompressedDescriptor) -> Inflate<'_> {
        Inflate {
            storage: &*self.storage,
            descriptor,
            compression: self.header.compression_type,
            cluster_size: self.geometry().cluster_len(),
        }
    }

    /// Whether `data` inflates to a whole cluster.
    pub(crate) fn inflates(&self, data: &[u8], cluster: &mut [u8]) -> bool {
        super::inflated::inflates(self.header.compression_type, data, cluster)
    }

    /// An error in this image's file.
    pub(crate) fn error(&self, kind: ErrorKind, message: impl Into<String>) -> Error {
        self.storage.located(Error::new(kind, message))
    }
}
