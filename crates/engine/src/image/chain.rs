//! The chain of layers, and reading through it.

use std::sync::Arc;

use super::mapping::{Segment, SegmentKind};
use super::qcow2::Qcow2;
use super::raw::Raw;
use crate::clone::Clones;
use crate::source::{Extent, GuestSource};
use crate::write::WriteOptions;
use crate::{Error, ErrorKind, Job, MemMut, Result, Storage, StorageExt};

/// One file of a chain.
#[derive(Debug)]
pub enum Layer {
    /// A qcow2 image.
    Qcow2(Box<Qcow2>),
    /// A raw image: always the bottom of a chain.
    Raw(Raw),
}

impl Layer {
    /// Size of the layer's disk in bytes.
    pub fn virtual_size(&self) -> u64 {
        match self {
            Self::Qcow2(q) => q.virtual_size(),
            Self::Raw(r) => r.virtual_size(),
        }
    }
    /// The layer's file.
    pub fn storage(&self) -> &Arc<dyn Storage> {
        match self {
            Self::Qcow2(q) => q.storage(),
            Self::Raw(r) => r.storage(),
        }
    }
    /// Makes the layer writable: as the top of a chain.
    ///
    /// # Errors
    /// As [`Qcow2::enable_writing`]; `ReadOnly` for a raw file that is open for reading only.
    pub fn enable_writing(&mut self, options: WriteOptions) -> Result<()> {
        match self {
            Self::Qcow2(qcow2) => qcow2.enable_writing(options),
            Self::Raw(raw) if options.lazy_refcounts => {
                let error = Error::new(ErrorKind::InvalidArgument, "a raw disk has no refcounts");
                Err(super::open::on_file(&**raw.storage(), error.with_field("lazy_refcounts")))
            }
            Self::Raw(raw) if raw.storage().traits().writable => {
                raw.set_write_options(&options);
                Ok(())
            }
            Self::Raw(raw) => {
                let error = Error::new(ErrorKind::ReadOnly, "the file is open for reading only");
                Err(super::open::on_file(&**raw.storage(), error))
            }
        }
    }
    /// The qcow2 image, unless the layer is raw.
    pub fn as_qcow2(&self) -> Option<&Qcow2> {
        match self {
            Self::Qcow2(q) => Some(q),
            Self::Raw(_) => None,
        }
    }
}

/// An open disk: layers, top first. All methods can be called from many threads at once.
#[derive(Debug)]
pub struct Image {
    layers: Vec<Layer>,
    /// Copies of the disk at a point in time that are being made.
    pub(crate) clones: Arc<Clones>,
}

impl Image {
    /// The disk that `layers` make, top first. What a layer does not have is read from the next one; what none has, and
    /// what lies behind the end of a shorter one, reads as zeroes.
    ///
    /// # Errors
    /// `InvalidArgument` without layers or with a raw layer that is not the last; `Chain` when one file appears twice.
    pub fn new(layers: Vec<Layer>) -> Result<Self> {
        let Some((_, above)) = layers.split_last() else {
            return Err(Error::new(ErrorKind::InvalidArgument, "a chain needs at least one layer"));
        };
        if above.iter().any(|l| matches!(l, Layer::Raw(_))) {
            return Err(Error::new(ErrorKind::InvalidArgument, "a raw layer cannot have a backing file"));
        }
        for (index, layer) in above.iter().enumerate() {
            let Some(identity) = layer.storage().traits().identity else { continue };
            let rest = layers.iter().skip(index + 1);
            if let Some(again) = rest.into_iter().find(|l| l.storage().traits().identity == Some(identity)) {
                let error = Error::new(ErrorKind::Chain, "the backing chain contains this file twice");
                return Err(super::open::on_file(&**again.storage(), error));
            }
        }
        Ok(Self { layers, clones: Arc::default() })
    }

    /// The layers, top first; never empty.
    pub fn layers(&self) -> &[Layer] {
        &self.layers
    }

    /// The top layer where that is qcow2.
    pub fn top_qcow2(&self) -> Option<&Qcow2> {
        self.layers.first().and_then(Layer::as_qcow2)
    }

    /// Size of the disk in bytes: the top layer's.
    pub fn virtual_size(&self) -> u64 {
        self.layers.first().map_or(0, Layer::virtual_size)
    }

    /// Fills `buf` with the guest bytes at `offset`.
    ///
    /// # Errors
    /// `InvalidArgument` beyond the end of the disk; `Corrupt`, `Io`, `UnsupportedFeature` (encryption) and
    /// `ReferenceDenied` (data file not opened) from the layers. The buffer's contents are unspecified then.
    pub fn read_at(&self, buf: MemMut<'_>, offset: u64) -> Result<()> {
        // Keeps planned clusters from being reused while they are read. Only the top layer changes.
        let _pin = self.top_qcow2().and_then(Qcow2::pin);
        let size = self.virtual_size();
        if offset.checked_add(buf.len() as u64).is_none_or(|end| end > size) {
            let message = format!("{} bytes at {offset} reach beyond the disk of {size} bytes", buf.len());
            return Err(Error::new(ErrorKind::InvalidArgument, message));
        }
        let mut segments = Vec::new();
        let mut pending = vec![(0usize, offset, buf)];
        while let Some((depth, offset, mut buf)) = pending.pop() {
            let Some(layer) = self.layers.get(depth) else {
                buf.fill_zero();
                continue;
            };
            // What lies behind the end of a shorter layer is in no deeper one either.
            let inside = layer.virtual_size().saturating_sub(offset).min(buf.len() as u64) as usize;
            let mut here = buf.take_front(inside);
            buf.fill_zero();
            match layer {
                Layer::Raw(raw) => raw.storage().read_padded_at(here, offset)?,
                Layer::Qcow2(qcow2) => {
                    segments.clear();
                    qcow2.plan_read(offset..offset + inside as u64, &mut segments)?;
                    for segment in &segments {
                        let part = here.take_front(segment.length as usize);
                        if let Some(mut part) = qcow2.read_segment(segment, part)? {
                            // A layer that shrank meanwhile does not show what is below it either.
                            let end = qcow2.virtual_size().max(segment.start);
                            let inside = (end - segment.start).min(segment.length) as usize;
                            pending.push((depth + 1, segment.start, part.take_front(inside)));
                            part.fill_zero();
                        }
                    }
                }
            }
        }
        Ok(())
    }
}

impl Qcow2 {
    /// Fills `buf` from one segment of a plan; hands it back when the segment is not in this layer.
    fn read_segment<'a>(&self, segment: &Segment, mut buf: MemMut<'a>) -> Result<Option<MemMut<'a>>> {
        match segment.kind {
            SegmentKind::Unallocated { .. } => return Ok(Some(buf)),
            SegmentKind::Zero { .. } => buf.fill_zero(),
            SegmentKind::Data { host } => {
                self.require_plain()?;
                self.data_storage()?.read_padded_at(buf, host)?;
            }
            SegmentKind::Compressed(descriptor) => {
                self.require_plain()?;
                let inflate = self.inflate(descriptor);
                let whole = segment.length == self.geometry().cluster_size();
                match buf.exclusive() {
                    Some(cluster) if whole => inflate.run(cluster)?,
                    _ => {
                        let cluster = self.inflated.get(&inflate)?;
                        let from = self.geometry().in_cluster(segment.start) as usize;
                        buf.copy_from(cluster.get(from..).unwrap_or_default());
                    }
                }
            }
        }
        Ok(None)
    }
}

impl GuestSource for Image {
    fn virtual_size(&self) -> u64 {
        self.virtual_size()
    }

    fn cluster_size(&self) -> u64 {
        let sizes = self.layers.iter().filter_map(Layer::as_qcow2).map(|q| q.geometry().cluster_size());
        sizes.max().unwrap_or(64 << 10)
    }

    fn extents_up_to(
        &self,
        start: u64,
        length: u64,
        most: usize,
        job: &Job,
        out: &mut Vec<Extent>,
    ) -> Result<u64> {
        super::extents::collect(&self.layers, start, length, most, job, out)
    }

    fn read_at(&self, buf: MemMut<'_>, offset: u64) -> Result<()> {
        self.read_at(buf, offset)
    }
}
