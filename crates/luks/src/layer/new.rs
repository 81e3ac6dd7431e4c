//! A new file: the order in which it is written. It is no image before its header's first sector is there, which comes last.

use std::fmt;
use std::sync::Arc;

use qcow2_core::convert::{Context, ConvertOptions, RawSink, Rules, Sink, Worker};
use qcow2_core::disk::DiskOptions;
use qcow2_core::new_image::{Hosts, NewImage};
use qcow2_core::raw::SECTOR as RAW_SECTOR;
use qcow2_core::space::{Preallocation, empty, size_raw, write_zero_bytes};
use qcow2_core::storage::{SectorCodec, Sectors, Tail};
use qcow2_core::{Error, ErrorKind, Job, Layer, Mem, Raw, Result, Storage, StorageExt};

use crate::Formatted;
use crate::cipher::SECTOR;

/// A header for a new file, and the cipher of what comes behind it.
#[derive(Clone)]
pub struct NewLuks {
    header: Arc<[u8]>,
    cipher: Arc<dyn SectorCodec>,
    size: u64,
    preallocation: Preallocation,
}

impl fmt::Debug for NewLuks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "NewLuks({:?}, {} bytes, header of {})", self.cipher, self.size, self.header.len())
    }
}

impl NewLuks {
    /// With a disk of `size` bytes, rounded up to a sector.
    ///
    /// # Errors
    /// `Limit`.
    pub fn new(formatted: Formatted, size: u64, preallocation: Preallocation) -> Result<Self> {
        let header: Arc<[u8]> = formatted.bytes.into();
        let most = i64::MAX as u64 - header.len() as u64;
        let size =
            size.checked_next_multiple_of(RAW_SECTOR).filter(|&size| size <= most).ok_or_else(|| {
                Error::new(ErrorKind::Limit, format!("the largest virtual size is {most} bytes"))
            })?;
        Ok(Self { header, cipher: Arc::new(formatted.cipher), size, preallocation })
    }

    fn header_length(&self) -> u64 {
        self.header.len() as u64
    }

    /// Makes `host` no image: a file is emptied, a device keeps nothing where headers lie.
    fn begin(&self, host: &dyn Storage, job: &Job) -> Result<()> {
        if !host.traits().block_device {
            return empty(host);
        }
        let (room, header) = (host.size()?, self.header_length());
        if room.checked_sub(header).is_none_or(|room| room < self.size) {
            let message = format!(
                "the target holds {room} bytes, of which the header takes {header}; the disk has {}",
                self.size
            );
            return Err(host.located(Error::new(ErrorKind::InvalidArgument, message)));
        }
        write_zero_bytes(host, 0, header, job)?;
        host.flush()
    }

    /// The place of the data, as it is stored.
    fn place(&self, host: &Arc<dyn Storage>) -> Arc<dyn Storage> {
        Arc::new(Tail::new(Arc::clone(host), self.header_length()))
    }

    /// The data in clear: what is written to it is encrypted. It reads as noise where nothing was written.
    fn data(&self, host: &Arc<dyn Storage>) -> Arc<dyn Storage> {
        Arc::new(Sectors::new(self.place(host), Arc::clone(&self.cipher)))
    }

    /// Space that is taken of a file whose disk has no metadata.
    fn space(&self) -> Preallocation {
        match self.preallocation {
            Preallocation::Metadata => Preallocation::Off,
            other => other,
        }
    }

    /// Writes the header behind all else: its first sector, which makes the file an image, last. `durable`: in this order also on
    /// stable storage.
    fn write_header(&self, host: &dyn Storage, durable: bool) -> Result<()> {
        let (first, rest) = self.header.split_at(self.header.len().min(SECTOR));
        host.write_all_at(Mem::from(rest), SECTOR as u64)?;
        let sync = || if durable { host.flush() } else { Ok(()) };
        sync()?;
        host.write_all_at(Mem::from(first), 0)?;
        sync()
    }
}

impl NewImage for NewLuks {
    fn format(&self) -> &'static str {
        "luks"
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn unit(&self) -> u64 {
        1
    }

    fn length(&self, data: u64) -> u64 {
        data.saturating_add(self.header_length())
    }

    fn preallocation(&self) -> Preallocation {
        self.space()
    }

    /// Zeroes are written as all else.
    fn is_sparse(&self) -> bool {
        false
    }

    /// Nothing is written where the data goes: it reads as noise.
    fn create(&self, hosts: &Hosts, job: &Job) -> Result<()> {
        let host = &hosts.own;
        self.begin(&**host, job)?;
        if !host.traits().block_device {
            size_raw(&*self.place(host), self.size, self.space(), job)?;
        }
        self.write_header(&**host, true)
    }

    fn sink(self: Arc<Self>, hosts: Hosts, context: &Context<'_>, _: usize) -> Result<Box<dyn Sink>> {
        let host = hosts.own;
        self.begin(&*host, context.job)?;
        let data = RawSink::new(context, self.data(&host), self.space(), false)?.over_noise();
        Ok(Box::new(LuksSink { data, luks: self, host }))
    }

    /// Zeroes are written to all of it first: without them, it reads as noise.
    fn disk(&self, hosts: &Hosts, job: &Job) -> Result<Box<dyn Layer>> {
        let host = &hosts.own;
        self.begin(&**host, job)?;
        let data = self.data(host);
        if self.preallocation == Preallocation::Falloc && !host.traits().block_device {
            data.reserve(0, self.size)?;
        }
        write_zero_bytes(&*data, 0, self.size, job)?;
        let mut raw = Raw::new(data)?;
        raw.make_writable(DiskOptions::default())?;
        Ok(Box::new(raw))
    }

    fn publish(&self, hosts: &Hosts) -> Result<()> {
        self.write_header(&*hosts.own, true)
    }
}

/// A raw disk behind a cipher, and its header when all is there.
struct LuksSink {
    data: RawSink,
    luks: Arc<NewLuks>,
    host: Arc<dyn Storage>,
}

impl Sink for LuksSink {
    fn rules(&self) -> Rules {
        self.data.rules()
    }

    fn worker(&self) -> Result<Worker<'_>> {
        self.data.worker()
    }

    fn finish(self: Box<Self>, options: &ConvertOptions, job: &Job) -> Result<()> {
        let Self { data, luks, host } = *self;
        Box::new(data).finish(options, job)?;
        luks.write_header(&*host, options.durable)
    }
}
