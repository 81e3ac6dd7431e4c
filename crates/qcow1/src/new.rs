//! New images: laid out front to back as QEMU does, with the header last.

mod sink;

use std::sync::Arc;

use qcow2_core::convert::{Context, Sink};
use qcow2_core::new_image::{Hosts, NewImage};
use qcow2_core::space::{Preallocation, empty};
use qcow2_core::{Error, ErrorKind, Job, Layer, Mem, Result, Storage, StorageExt};

use self::sink::ClusterSink;
use crate::format::{CryptMethod, HEADER_LENGTH, Header, MAX_BACKING_FILE_NAME};

/// Bytes of a sector. Disks are whole sectors.
const SECTOR: u64 = 512;

/// A new image, before anything of it is written. Behind the header are the backing file's name and the L1 table; then each L2 table
/// lies in front of its clusters.
#[derive(Debug, Clone)]
pub struct NewQcow1 {
    header: Header,
    backing_file: Vec<u8>,
}

impl NewQcow1 {
    /// An image of `size` bytes, rounded up to whole sectors, with QEMU's clusters: 4 KiB, and with a backing file, by its name as it is
    /// stored, 512 bytes.
    ///
    /// # Errors
    /// `InvalidArgument` for a disk without bytes and for a name that is empty or longer than 1023 bytes; `Limit` for a disk that is
    /// too large.
    pub fn new(size: u64, backing_file: Option<Vec<u8>>) -> Result<Self> {
        let refuse =
            |field, message: &str| Err(Error::new(ErrorKind::InvalidArgument, message).with_field(field));
        let name = backing_file.as_deref().unwrap_or_default();
        let Some(backing_file_size) =
            u32::try_from(name.len()).ok().filter(|length| *length <= MAX_BACKING_FILE_NAME)
        else {
            return refuse("backing_file", "the backing file's name is longer than 1023 bytes");
        };
        if backing_file.is_some() && name.is_empty() {
            return refuse("backing_file", "the backing file has no name");
        }
        if size == 0 {
            return refuse("size", "Image size is too small, cannot be zero length");
        }
        let named = backing_file.is_some();
        let header = Header {
            backing_file_offset: if named { HEADER_LENGTH as u64 } else { 0 },
            backing_file_size,
            mtime: 0,
            size: size.checked_next_multiple_of(SECTOR).unwrap_or(u64::MAX),
            cluster_bits: if named { 9 } else { 12 },
            l2_bits: if named { 12 } else { 9 },
            crypt_method: CryptMethod::None,
            l1_table_offset: (HEADER_LENGTH as u64 + u64::from(backing_file_size)).next_multiple_of(8),
        };
        header.check()?;
        Ok(Self { header, backing_file: backing_file.unwrap_or_default() })
    }

    /// Behind the L1 table, which takes whole sectors.
    fn data(&self) -> u64 {
        self.header.l1_table_offset + (self.header.l1_entries() * 8).next_multiple_of(SECTOR)
    }

    /// Makes the file no image, with an L1 table of zeroes.
    fn begin(&self, host: &dyn Storage) -> Result<()> {
        if host.traits().block_device {
            let message =
                "a qcow image is made in a file, not on a device: its clusters are added at the file's end";
            return Err(host.located(Error::new(ErrorKind::InvalidArgument, message)));
        }
        empty(host)?;
        host.resize(self.data())
    }

    /// Makes a file whose tables are there an image; `durable`: in this order also on stable storage.
    fn complete(&self, host: &dyn Storage, durable: bool) -> Result<()> {
        let sync = || if durable { host.flush() } else { Ok(()) };
        host.write_all_at(Mem::from(&self.backing_file[..]), HEADER_LENGTH as u64)?;
        sync()?;
        host.write_all_at(Mem::from(&self.header.encode()[..]), 0)?;
        sync()
    }
}

impl NewImage for NewQcow1 {
    fn format(&self) -> &'static str {
        "qcow"
    }

    fn size(&self) -> u64 {
        self.header.size
    }

    fn compresses(&self) -> bool {
        true
    }

    fn has_backing(&self) -> bool {
        !self.backing_file.is_empty()
    }

    fn unit(&self) -> u64 {
        self.header.cluster_size()
    }

    fn length(&self, data: u64) -> u64 {
        let tables = self.header.l1_entries().min(data.div_ceil(self.header.cluster_size()));
        let table = self.header.l2_entries() * 8;
        self.data().saturating_add(data).saturating_add(tables.saturating_mul(table))
    }

    fn preallocation(&self) -> Preallocation {
        Preallocation::Off
    }

    fn create(&self, hosts: &Hosts, _: &Job) -> Result<()> {
        self.begin(&*hosts.own)?;
        self.complete(&*hosts.own, true)
    }

    fn sink(self: Arc<Self>, hosts: Hosts, context: &Context<'_>, _: usize) -> Result<Box<dyn Sink>> {
        self.begin(&*hosts.own)?;
        Ok(Box::new(ClusterSink::new(self, hosts.own, context)))
    }

    fn disk(&self, _: &Hosts, _: &Job) -> Result<Box<dyn Layer>> {
        let message = "a qcow image is written once, front to back: convert to it, or choose another format";
        Err(Error::new(ErrorKind::UnsupportedFeature, message).with_field("format"))
    }
}
