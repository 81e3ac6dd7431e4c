//! An open disk: a chain whose top may be open for writing.

use std::any::Any;
use std::sync::Arc;

use qcow2_core::disk::{Disk, Durability, WriteLayer};
use qcow2_core::{Chain, Layer};

use super::qcow2::Qcow2;
use crate::clone::Clones;
use crate::source::{Extent, GuestSource};
use crate::write::WriteOptions;
use crate::{Error, ErrorKind, Job, Mem, MemMut, Result, StorageExt};

/// What this crate knows of a layer beyond what every format has: the one table of formats.
pub trait LayerExt {
    /// The qcow2 image, if the layer is one.
    fn as_qcow2(&self) -> Option<&Qcow2>;

    /// As [`LayerExt::as_qcow2`], to prepare it.
    fn as_qcow2_mut(&mut self) -> Option<&mut Qcow2>;

    /// Makes the layer writable: as the top of a chain.
    ///
    /// # Errors
    /// As [`Qcow2::enable_writing`]; `ReadOnly` for a raw file that is open for reading only; `UnsupportedFeature` for a
    /// format that is only read.
    fn enable_writing(&mut self, options: WriteOptions) -> Result<()>;
}

impl LayerExt for dyn Layer {
    fn as_qcow2(&self) -> Option<&Qcow2> {
        (self as &dyn Any).downcast_ref()
    }

    fn as_qcow2_mut(&mut self) -> Option<&mut Qcow2> {
        (self as &mut dyn Any).downcast_mut()
    }

    fn enable_writing(&mut self, options: WriteOptions) -> Result<()> {
        if let Some(qcow2) = self.as_qcow2_mut() {
            return qcow2.enable_writing(options);
        }
        if options.lazy_refcounts {
            let message = format!("a {} disk has no refcounts", self.format());
            let error = Error::new(ErrorKind::InvalidArgument, message).with_field("lazy_refcounts");
            return Err(self.storage().located(error));
        }
        self.make_writable((&options).into())
    }
}

/// An open disk: layers, top first. All methods can be called from many threads at once.
#[derive(Debug)]
pub struct Image {
    chain: Chain,
    /// Copies of the disk at a point in time that are being made.
    pub(crate) clones: Arc<Clones>,
}

impl Image {
    /// The disk that `layers` make, top first: see [`Chain::new`].
    ///
    /// # Errors
    /// As [`Chain::new`].
    pub fn new(layers: Vec<Box<dyn Layer>>) -> Result<Self> {
        Ok(Self { chain: Chain::new(layers)?, clones: Arc::default() })
    }

    /// The layers, top first; never empty.
    pub fn layers(&self) -> &[Box<dyn Layer>] {
        self.chain.layers()
    }

    /// The top layer where that is qcow2.
    pub fn top_qcow2(&self) -> Option<&Qcow2> {
        self.chain.top().and_then(LayerExt::as_qcow2)
    }

    /// The top layer where others than qcow2 take requests.
    pub(crate) fn top_writable(&self) -> Option<&dyn WriteLayer> {
        self.chain.top().and_then(Layer::as_writable).filter(|layer| layer.is_writable())
    }

    /// QEMU's name of the top layer's format.
    pub fn format(&self) -> &'static str {
        self.chain.top().map_or("raw", Layer::format)
    }

    /// Size of the disk in bytes: the top layer's.
    pub fn virtual_size(&self) -> u64 {
        self.chain.virtual_size()
    }

    fn made_durable(&self, durability: Durability) -> Result<()> {
        match durability {
            Durability::AtFlush => Ok(()),
            Durability::Now => self.flush(),
        }
    }

    /// Fills `buf` with the guest bytes at `offset`.
    ///
    /// # Errors
    /// As [`Chain::read_at`].
    pub fn read_at(&self, buf: MemMut<'_>, offset: u64) -> Result<()> {
        self.chain.read_at(buf, offset)
    }
}

impl Disk for Image {
    fn write_at(&self, buf: Mem<'_>, offset: u64, durability: Durability) -> Result<()> {
        self.write_at(buf, offset)?;
        self.made_durable(durability)
    }

    fn write_zeroes(&self, offset: u64, length: u64, unmap: bool, durability: Durability) -> Result<()> {
        self.write_zeroes(offset, length, unmap)?;
        self.made_durable(durability)
    }

    fn discard(&self, offset: u64, length: u64, durability: Durability) -> Result<()> {
        self.discard(offset, length)?;
        self.made_durable(durability)
    }

    fn flush(&self) -> Result<()> {
        self.flush()
    }

    fn grow(&self, size: u64) -> Result<()> {
        self.resize(size)
    }

    fn write_compressed_at(&self, buf: Mem<'_>, offset: u64) -> Result<()> {
        self.write_compressed_at(buf, offset)
    }
}

impl GuestSource for Image {
    fn virtual_size(&self) -> u64 {
        self.virtual_size()
    }

    fn cluster_size(&self) -> u64 {
        self.chain.cluster_size()
    }

    fn extents_up_to(
        &self,
        start: u64,
        length: u64,
        most: usize,
        job: &Job,
        out: &mut Vec<Extent>,
    ) -> Result<u64> {
        self.chain.extents_up_to(start, length, most, job, out)
    }

    fn read_at(&self, buf: MemMut<'_>, offset: u64) -> Result<()> {
        self.read_at(buf, offset)
    }
}
