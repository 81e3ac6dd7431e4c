//! A file that begins with a LUKS header, or has one in another file, as the layer of a chain: guest data lies encrypted behind the
//! header, as far as the file or the header's segment reaches.
//!
//! All of the disk is data: what a hole of the file decrypts to is noise, not zeroes. The header is written where key slots change, and
//! nowhere else.

mod inspect;
mod keys;
mod new;

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;
use qcow2_core::disk::{DiskOptions, WriteLayer};
use qcow2_core::layer::{Layer, Place, Segment, SegmentKind};
use qcow2_core::space::{Preallocation, reserve, write_zero_bytes};
use qcow2_core::storage::{Sectors, Tail};
use qcow2_core::{Error, ErrorKind, Job, Mem, MemMut, Result, Storage, StorageExt, check_limit};

use crate::cipher::SECTOR;
use crate::luks1::HEADER_BYTES;
use crate::{Limits, Luks1Header, Luks2Header, Unlocked, luks1, luks2, version};

pub use inspect::{Inspection, inspect, inspect_bytes};
pub use new::NewLuks;

/// How to open a disk.
#[derive(Debug, Clone)]
pub struct OpenOptions {
    /// Largest virtual size in bytes.
    pub max_virtual_size: u64,
    /// The file with the header, where that is not the file with the data.
    pub header: Option<Arc<dyn Storage>>,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self { max_virtual_size: i64::MAX as u64, header: None }
    }
}

/// A header of either version.
#[derive(Debug)]
pub enum Header {
    /// Version 1.
    Luks1(Box<Luks1Header>),
    /// Version 2.
    Luks2(Luks2Header),
}

impl Header {
    /// The header at the start of what `read` reads.
    ///
    /// # Errors
    /// `InvalidHeader` for what is none; `UnsupportedFeature` for what cannot be read, by name; `Corrupt`; and what `read` says.
    pub fn read(read: &crate::Read<'_>) -> Result<Self> {
        let mut start = [0; 8];
        read(0, &mut start)?;
        match version(&start) {
            Some(1) => {
                let mut bytes = [0; HEADER_BYTES];
                read(0, &mut bytes)?;
                Ok(Self::Luks1(Box::new(Luks1Header::parse(&bytes)?)))
            }
            Some(2) => Luks2Header::read(read).map(Self::Luks2),
            Some(version) => {
                let message = format!("LUKS version {version} is not supported: 1 and 2 are");
                Err(Error::new(ErrorKind::UnsupportedFeature, message).with_field("version"))
            }
            // The first copy of version 2 can be damaged, and the second whole.
            None => Luks2Header::read(read).map(Self::Luks2).map_err(|e| match e.kind() {
                ErrorKind::Io => e,
                _ => Error::new(ErrorKind::InvalidHeader, "not a LUKS header").with_field("magic"),
            }),
        }
    }

    /// Where the data begins, in bytes; 0 where it lies elsewhere.
    pub fn payload_offset(&self) -> u64 {
        match self {
            Self::Luks1(header) => header.payload_offset,
            Self::Luks2(header) => header.payload_offset,
        }
    }

    /// Bytes of the data; nothing where it ends with the file.
    pub fn payload_size(&self) -> Option<u64> {
        match self {
            Self::Luks1(_) => None,
            Self::Luks2(header) => header.payload_size,
        }
    }

    /// Bytes that are encrypted as one.
    pub fn sector_size(&self) -> u64 {
        match self {
            Self::Luks1(_) => SECTOR as u64,
            Self::Luks2(header) => header.sector_size as u64,
        }
    }

    /// Bytes of the disk in a file of `length` bytes.
    ///
    /// # Errors
    /// `Corrupt` for a file that ends in front of the data, or inside a segment that says its size.
    pub fn virtual_size(&self, length: u64) -> Result<u64> {
        let (start, sector) = (self.payload_offset(), self.sector_size());
        let cut = |what: String| Err(Error::new(ErrorKind::Corrupt, what).with_field("payload-offset"));
        let Some(rest) = length.checked_sub(start) else {
            return cut(format!("the file ends at {length}, in front of the data, which begins at {start}"));
        };
        match (self, self.payload_size()) {
            // As QEMU counts: in whole sectors, of which the last one may be there in part.
            (Self::Luks1(_), _) => Ok(rest.checked_next_multiple_of(sector).unwrap_or(rest)),
            (Self::Luks2(_), None) => Ok(rest - rest % sector.max(1)),
            (Self::Luks2(_), Some(size)) if size <= rest => Ok(size),
            (Self::Luks2(_), Some(size)) => {
                cut(format!("the file ends at {length}, inside the data: {size} bytes from {start} on"))
            }
        }
    }

    /// Tries a secret on each key slot.
    fn unlock(&self, secret: &[u8], read: &crate::Read<'_>, job: &Job) -> Result<Unlocked> {
        let limits = Limits::default();
        match self {
            Self::Luks1(header) => luks1::unlock(header, secret, read, job, &limits),
            Self::Luks2(header) => luks2::unlock(header, secret, read, job, &limits),
        }
    }
}

/// A disk behind a LUKS header. Without its secret everything but guest data can be had.
#[derive(Debug)]
pub struct Luks {
    /// The file with the data.
    storage: Arc<dyn Storage>,
    header: Arc<Header>,
    size: AtomicU64,
    /// The data in clear, once it was unlocked. Offsets are the guest's.
    data: Option<Arc<dyn Storage>>,
    options: OpenOptions,
    disk_options: DiskOptions,
    is_writable: bool,
    /// Held while key slots are written.
    changing_keys: Mutex<()>,
}

impl Luks {
    /// Opens the disk whose data is in `storage`.
    ///
    /// # Errors
    /// As [`Header::read`] and [`Header::virtual_size`]; `Limit`.
    pub fn open(storage: Arc<dyn Storage>, options: &OpenOptions) -> Result<Self> {
        let holder = options.header.as_ref().unwrap_or(&storage);
        let header = Header::read(&reader(&**holder)).map_err(|e| holder.located(e))?;
        Self::with_header(storage, Arc::new(header), options)
    }

    fn with_header(storage: Arc<dyn Storage>, header: Arc<Header>, options: &OpenOptions) -> Result<Self> {
        let size = header.virtual_size(storage.size()?).map_err(|e| storage.located(e))?;
        check_limit("size", size, options.max_virtual_size).map_err(|e| storage.located(e))?;
        Ok(Self {
            storage,
            header,
            size: AtomicU64::new(size),
            data: None,
            options: options.clone(),
            disk_options: DiskOptions::default(),
            is_writable: false,
            changing_keys: Mutex::new(()),
        })
    }

    /// Whether the header lies in a file of its own.
    pub fn is_detached(&self) -> bool {
        self.header.payload_offset() == 0 || self.options.header.is_some()
    }

    fn error(&self, kind: ErrorKind, message: impl Into<String>, field: &'static str) -> Error {
        self.storage.located(Error::new(kind, message.into()).with_field(field))
    }

    /// Guest data in clear.
    fn data(&self) -> Result<&Arc<dyn Storage>> {
        self.data.as_ref().ok_or_else(|| {
            let message = "the guest data is encrypted (LUKS): give the image's secret";
            self.error(ErrorKind::BadSecret, message, "secret")
        })
    }

    /// Refuses a size that the file or its header cannot have.
    fn judge_size(&self, size: u64) -> Result<u64> {
        let refuse = |kind, message: String| Err(self.error(kind, message, "size"));
        if let Some(fixed) = self.header.payload_size() {
            let message = format!(
                "the header says that the data has {fixed} bytes, and is not changed here: cryptsetup changes it"
            );
            return refuse(ErrorKind::UnsupportedFeature, message);
        }
        let sector = self.header.sector_size();
        if !size.is_multiple_of(sector) {
            return refuse(ErrorKind::InvalidArgument, format!("{size} is no multiple of {sector} bytes"));
        }
        let length = self.header.payload_offset().checked_add(size).filter(|end| *end <= i64::MAX as u64);
        let Some(length) = length else {
            return refuse(ErrorKind::Limit, format!("a disk of {size} bytes is too large for a file"));
        };
        let has = self.storage.size()?;
        if self.storage.traits().block_device && length != has {
            let message = format!(
                "a device cannot be resized to the {length} bytes that this disk takes, it has {has}: change the device itself"
            );
            return refuse(ErrorKind::InvalidArgument, message);
        }
        Ok(length)
    }
}

/// Reads a header and its key material from a file.
fn reader(storage: &dyn Storage) -> impl Fn(u64, &mut [u8]) -> Result<()> {
    |offset, bytes: &mut [u8]| storage.read_exact_at(MemMut::from(bytes), offset)
}

impl Layer for Luks {
    fn format(&self) -> &'static str {
        "luks"
    }

    fn virtual_size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    fn unit(&self) -> Option<u64> {
        None
    }

    fn takes_backing(&self) -> bool {
        false
    }

    fn storage(&self) -> &Arc<dyn Storage> {
        &self.storage
    }

    fn files(&self) -> Vec<&Arc<dyn Storage>> {
        std::iter::once(&self.storage).chain(&self.options.header).collect()
    }

    fn file(&self, _: u32) -> Option<&Arc<dyn Storage>> {
        None
    }

    fn plan(&self, range: Range<u64>, segments: &mut Vec<Segment>) -> Result<()> {
        if !range.is_empty() {
            let place = Place { file: 0, host: self.header.payload_offset() + range.start };
            let length = range.end - range.start;
            segments.push(Segment { start: range.start, length, kind: SegmentKind::Data(place) });
        }
        Ok(())
    }

    fn read_segment(&self, segment: &Segment, buf: MemMut<'_>) -> Result<()> {
        self.data()?.read_padded_at(buf, segment.start)
    }

    fn encryption(&self) -> Option<&'static str> {
        Some("luks")
    }

    fn unlock(&mut self, secret: &[u8], job: &Job) -> Result<()> {
        let start = self.header.payload_offset();
        if start == 0 && self.options.header.is_none() {
            let message = "the header is detached from its data: open the file with the data, and name this one as its header";
            return Err(self.error(ErrorKind::InvalidArgument, message, "payload-offset"));
        }
        let holder = self.holder();
        let opened = self.header.unlock(secret, &reader(&**holder), job).map_err(|e| holder.located(e))?;
        let host = Arc::new(Tail::new(Arc::clone(&self.storage), start));
        self.data = Some(Arc::new(Sectors::new(host, Arc::new(opened.cipher))));
        Ok(())
    }

    fn as_writable(&self) -> Option<&dyn WriteLayer> {
        Some(self)
    }

    fn make_writable(&mut self, options: DiskOptions) -> Result<()> {
        if !self.storage.traits().writable {
            let error = Error::new(ErrorKind::ReadOnly, "the file is open for reading only");
            return Err(self.storage.located(error));
        }
        self.data()?;
        self.disk_options = options;
        self.is_writable = true;
        Ok(())
    }

    fn reopen(&self) -> Result<Box<dyn Layer>> {
        let mut again =
            Self::with_header(Arc::clone(&self.storage), Arc::clone(&self.header), &self.options)?;
        again.data.clone_from(&self.data);
        Ok(Box::new(again))
    }
}

impl WriteLayer for Luks {
    fn is_writable(&self) -> bool {
        self.is_writable
    }

    fn disk_options(&self) -> DiskOptions {
        self.disk_options
    }

    fn write_at(&self, buf: Mem<'_>, offset: u64) -> Result<()> {
        self.data()?.write_all_at(buf, offset)
    }

    /// Zeroes are written as everything else is: their space cannot be given up.
    fn write_zeroes(&self, offset: u64, length: u64, unmap: bool) -> Result<()> {
        self.data()?.zero(offset, length, unmap)
    }

    /// Does nothing: space that was given up would tell what of the disk is not in use.
    fn discard(&self, _: u64, _: u64) -> Result<()> {
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        self.storage.flush()
    }

    fn resize(&self, size: u64, preallocation: Preallocation, job: &Job) -> Result<()> {
        if preallocation == Preallocation::Metadata {
            let message = "a luks image has no metadata to preallocate: falloc and full are possible";
            return Err(self.error(ErrorKind::InvalidArgument, message, "preallocation"));
        }
        let length = self.judge_size(size)?;
        let (old, data) = (self.virtual_size(), self.data()?);
        let former = self.storage.size()?;
        if size > old {
            // A new part reads as zeroes, which have to be written.
            let grown = match preallocation {
                Preallocation::Falloc => reserve(&**data, old..size, job),
                _ => Ok(()),
            };
            if let Err(error) = grown.and_then(|()| write_zero_bytes(&**data, old, size - old, job)) {
                // The length of the file is the size of the disk, and that stays.
                self.storage.resize(former)?;
                return Err(error);
            }
        } else {
            self.storage.resize(length)?;
        }
        self.size.store(size, Ordering::Release);
        Ok(())
    }
}
