//! New images.

use std::time::{SystemTime, UNIX_EPOCH};

use qcow2_core::space::{Preallocation, empty, reserve, write_zero_bytes};
use qcow2_core::{Error, ErrorKind, Job, Mem, Result, Storage, StorageExt};

use crate::structures::{BLOCK_SIZE, DiskType, FOOTER_LENGTH, Footer, Geometry, Header, MAX_SECTORS, SECTOR};

/// Seconds from 1970 to 2000, from which VHD counts.
const YEAR_2000: u64 = 946_684_800;

/// The kind of a new image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Subformat {
    /// Blocks have a place when they are written to.
    #[default]
    Dynamic,
    /// The file is the disk and a footer.
    Fixed,
}

/// A new image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewVpc {
    pub(crate) footer: Footer,
    /// Of a dynamic one.
    pub(crate) header: Option<Header>,
    preallocation: Preallocation,
}

impl NewVpc {
    /// An image with a disk of `size` bytes, whole sectors. Without `force_size` the disk is as large as the next geometry, as Virtual PC
    /// and QEMU have it; with it, exactly so, as Hyper-V and Azure do.
    ///
    /// # Errors
    /// `Limit` above 2040 GiB; `InvalidArgument` for a size that is not whole sectors, or a preallocation of a dynamic image; `Io` without
    /// random numbers.
    pub fn new(
        size: u64,
        subformat: Subformat,
        force_size: bool,
        preallocation: Preallocation,
    ) -> Result<Self> {
        let refuse =
            |kind, field: &'static str, message: String| Err(Error::new(kind, message).with_field(field));
        if !size.is_multiple_of(SECTOR) {
            let message = format!("the size of a disk is a multiple of {SECTOR} bytes, not {size}");
            return refuse(ErrorKind::InvalidArgument, "size", message);
        }
        if size > MAX_SECTORS * SECTOR {
            return refuse(ErrorKind::Limit, "size", format!("a VHD has at most 2040 GiB, not {size} bytes"));
        }
        if subformat == Subformat::Dynamic && preallocation != Preallocation::Off {
            let message = "a dynamic VHD has no preallocation: a fixed one has".to_owned();
            return refuse(ErrorKind::InvalidArgument, "preallocation", message);
        }
        let (geometry, creator) = match force_size {
            true => (Geometry::LARGEST, *b"qem2"),
            false => (Geometry::at_least(size / SECTOR), *b"qemu"),
        };
        let size = if geometry == Geometry::LARGEST { size } else { geometry.total() * SECTOR };
        let disk_type = match subformat {
            Subformat::Dynamic => DiskType::Dynamic,
            Subformat::Fixed => DiskType::Fixed,
        };
        let footer = Footer::new(disk_type, size, geometry, creator, uuid()?, seconds());
        let entries = u32::try_from(size.div_ceil(BLOCK_SIZE.into())).unwrap_or(u32::MAX);
        let header = (subformat == Subformat::Dynamic).then(|| Header::new(entries));
        Ok(Self { footer, header, preallocation })
    }

    /// Bytes of the disk.
    #[must_use]
    pub fn virtual_size(&self) -> u64 {
        self.footer.virtual_size()
    }

    /// Makes the image in `storage`, which loses what it held. It is none before its footer is written, which comes last.
    ///
    /// # Errors
    /// `InvalidArgument` for a device that is not exactly as long as a fixed disk with its footer; `Io`; `Aborted`.
    pub fn create(&self, storage: &dyn Storage, job: &Job) -> Result<()> {
        let is_device = storage.traits().block_device;
        let size = self.virtual_size();
        let length = match &self.header {
            Some(header) => header.layout(FOOTER_LENGTH as u64, size).data + FOOTER_LENGTH as u64,
            None => size + FOOTER_LENGTH as u64,
        };
        if is_device && storage.size()? != length {
            let message =
                format!("the footer is where the device ends: it would have to have {length} bytes");
            return Err(storage.located(Error::new(ErrorKind::InvalidArgument, message).with_field("size")));
        }
        empty(storage)?;
        if is_device {
            storage.write_all_at(Mem::from(&[0; FOOTER_LENGTH][..]), 0)?;
        }
        storage.resize(length)?;
        match &self.header {
            Some(header) => self.write_tables(storage, header, job)?,
            None => match self.preallocation {
                Preallocation::Off | Preallocation::Metadata => {}
                Preallocation::Falloc => reserve(storage, 0..size, job)?,
                Preallocation::Full => write_zero_bytes(storage, 0, size, job)?,
            },
        }
        storage.write_all_at(Mem::from(&self.footer.bytes()[..]), length - FOOTER_LENGTH as u64)?;
        match &self.header {
            Some(_) => storage.write_all_at(Mem::from(&self.footer.bytes()[..]), 0),
            None => Ok(()),
        }
    }

    /// The header and an empty BAT of whole sectors.
    fn write_tables(&self, storage: &dyn Storage, header: &Header, job: &Job) -> Result<()> {
        let layout = header.layout(FOOTER_LENGTH as u64, self.virtual_size());
        let (mut at, unused) = (layout.table, vec![0xff; 64 << 10]);
        while at < layout.data {
            job.checkpoint()?;
            let length = (layout.data - at).min(unused.len() as u64) as usize;
            storage.write_all_at(Mem::from(unused.get(..length).unwrap_or_default()), at)?;
            at += length as u64;
        }
        storage.write_all_at(Mem::from(&header.bytes()[..]), FOOTER_LENGTH as u64)
    }
}

fn uuid() -> Result<[u8; 16]> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).map_err(|e| {
        match e.raw_os_error().map(std::io::Error::from_raw_os_error) {
            Some(io) => Error::io(io, "getrandom"),
            None => Error::new(ErrorKind::Io, format!("the system gives no randomness: {e}")),
        }
    })?;
    // RFC 9562, version 4.
    let [_, _, _, _, _, _, version, _, variant, ..] = &mut bytes;
    *version = (*version & 0x0f) | 0x40;
    *variant = (*variant & 0x3f) | 0x80;
    Ok(bytes)
}

/// Seconds since 2000; 0 on a clock that is wrong.
fn seconds() -> u32 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    u32::try_from(now.saturating_sub(YEAR_2000)).unwrap_or(0)
}
