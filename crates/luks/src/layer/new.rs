//! A new file: the order in which it is written.

use std::fmt;
use std::sync::Arc;

use qcow2_core::space::{Preallocation, empty, size_raw, write_zero_bytes};
use qcow2_core::storage::{SectorCodec, Sectors, Tail};
use qcow2_core::{Error, ErrorKind, Job, Mem, Result, Storage, StorageExt};

use crate::Formatted;
use crate::cipher::SECTOR;

/// A header for a new file, and the cipher of what comes behind it. The file is no image before [`NewLuks::publish`].
#[derive(Clone)]
pub struct NewLuks {
    header: Arc<[u8]>,
    cipher: Arc<dyn SectorCodec>,
}

impl fmt::Debug for NewLuks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "NewLuks({:?}, {} bytes)", self.cipher, self.header.len())
    }
}

impl From<Formatted> for NewLuks {
    fn from(formatted: Formatted) -> Self {
        Self { header: formatted.bytes.into(), cipher: Arc::new(formatted.cipher) }
    }
}

impl NewLuks {
    /// Bytes in front of the data.
    pub fn header_length(&self) -> u64 {
        self.header.len() as u64
    }

    /// Makes `host`, which is to hold a disk of `size` bytes, no image: a file is emptied, a device keeps nothing where headers lie.
    ///
    /// # Errors
    /// `InvalidArgument` for a device that is too small, which is left alone; `Io`; `Aborted`.
    pub fn begin(&self, host: &dyn Storage, size: u64, job: &Job) -> Result<()> {
        if !host.traits().block_device {
            return empty(host);
        }
        let (room, header) = (host.size()?, self.header_length());
        if room.checked_sub(header).is_none_or(|room| room < size) {
            let message = format!(
                "the target holds {room} bytes, of which the header takes {header}; the disk has {size}"
            );
            return Err(host.located(Error::new(ErrorKind::InvalidArgument, message)));
        }
        write_zero_bytes(host, 0, header, job)?;
        host.flush()
    }

    /// The place of the data, as it is stored.
    pub fn place(&self, host: Arc<dyn Storage>) -> Arc<dyn Storage> {
        Arc::new(Tail::new(host, self.header_length()))
    }

    /// The data in clear: what is written to it is encrypted. It reads as noise where nothing was written.
    pub fn data(&self, host: Arc<dyn Storage>) -> Arc<dyn Storage> {
        Arc::new(Sectors::new(self.place(host), Arc::clone(&self.cipher)))
    }

    /// Makes a disk of `size` bytes on which nothing was written: it reads as noise. Returns when it is durable.
    ///
    /// # Errors
    /// `Io`; `Aborted`.
    pub fn create(
        &self,
        host: &Arc<dyn Storage>,
        size: u64,
        preallocation: Preallocation,
        job: &Job,
    ) -> Result<()> {
        self.begin(&**host, size, job)?;
        if !host.traits().block_device {
            size_raw(&*self.place(Arc::clone(host)), size, space_of(preallocation), job)?;
        }
        self.publish(&**host, true)
    }

    /// Writes the header behind all else: its first sector, which makes the file an image, last. `durable`: in this order also on
    /// stable storage.
    ///
    /// # Errors
    /// `Io`.
    pub fn publish(&self, host: &dyn Storage, durable: bool) -> Result<()> {
        let (first, rest) = self.header.split_at(self.header.len().min(SECTOR));
        host.write_all_at(Mem::from(rest), SECTOR as u64)?;
        let sync = || if durable { host.flush() } else { Ok(()) };
        sync()?;
        host.write_all_at(Mem::from(first), 0)?;
        sync()
    }
}

/// What is allocated of a file whose disk has no metadata.
pub fn space_of(preallocation: Preallocation) -> Preallocation {
    if preallocation == Preallocation::Metadata { Preallocation::Off } else { preallocation }
}
