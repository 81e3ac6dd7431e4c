//! An open disk: a chain whose top may be open for writing.

use std::any::Any;
use std::ops::Range;
use std::sync::Arc;

use qcow2_core::disk::WriteLayer;
use qcow2_core::{Chain, Layer};

use super::clones::Clones;
use super::qcow2::Qcow2;
use crate::source::{Extent, GuestSource};
use crate::{Job, MemMut, Result};

impl Qcow2 {
    /// The qcow2 image, if the layer is one.
    pub(crate) fn of(layer: &dyn Layer) -> Option<&Self> {
        (layer as &dyn Any).downcast_ref()
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
        self.chain.top().and_then(Qcow2::of)
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

    /// Fills `buf` with the guest bytes at `offset`.
    ///
    /// # Errors
    /// As [`Chain::read_at`].
    pub fn read_at(&self, buf: MemMut<'_>, offset: u64) -> Result<()> {
        self.chain.read_at(buf, offset)
    }

    /// Fills `buf` with the guest bytes at `offset` if they are in memory, without waiting: see [`Chain::read_at_hand`].
    pub fn read_at_hand(&self, buf: MemMut<'_>, offset: u64) -> bool {
        self.chain.read_at_hand(buf, offset)
    }

    /// Copies what clones under way still need of `range`, which the caller is about to change. It holds the gate,
    /// shared or alone. Never fails: an error ends the clone.
    pub(crate) fn preserve(&self, range: &Range<u64>) {
        self.clones.preserve(self, range);
    }
}

impl GuestSource for Image {
    fn virtual_size(&self) -> u64 {
        self.virtual_size()
    }

    fn cluster_size(&self) -> u64 {
        self.chain.cluster_size()
    }

    fn is_sequential(&self) -> bool {
        self.chain.is_sequential()
    }

    fn is_arriving(&self) -> bool {
        self.chain.is_arriving()
    }

    fn settle(&self) -> Result<()> {
        self.chain.settle()
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
