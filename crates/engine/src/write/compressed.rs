//! Compressed writes: whole clusters, packed one behind the other.

use std::ops::Range;

use qcow2_format::{CompressedDescriptor, CompressionType, HostOffset, L2Mapping};
use qcow2_transform::{Codec, CompressOptions, Compressor};

use super::active::Active;
use super::cluster::Step;
use super::link::Change;
use super::request::{Payload, Top};
use crate::alloc::Unlinked;
use crate::alloc::Wish;
use crate::image::{Image, Qcow2};
use crate::writer::Writer;
use crate::{Error, ErrorKind, Mem, Result, StorageExt};

impl Image {
    /// Writes `buf` to the guest bytes at `offset`, compressed. A cluster that does not shrink is stored as it is.
    ///
    /// # Errors
    /// As [`Image::write_at`]; `InvalidArgument` unless the range is whole clusters (the last one may end with the
    /// disk); `UnsupportedFeature` for a raw disk, for an external data file and behind a door.
    pub fn write_compressed_at(&self, buf: Mem<'_>, offset: u64) -> Result<()> {
        let range = self.guest_range(offset, buf.len() as u64)?;
        // Before the request begins, which marks bitmaps: what is refused changes nothing.
        let active = self.check_compressed(&range)?;
        let mut context = Packer::new(&active)?;
        self.guest_request(&range.clone(), |_| {
            let size = active.image.geometry().cluster_size();
            let (mut rest, mut at) = (buf, range.start);
            while at < range.end {
                let part;
                (part, rest) = rest.split_at(size as usize);
                context.cluster.fill(0);
                part.copy_to(&mut context.cluster);
                active.write_packed(&mut context, at, part)?;
                at += part.len() as u64;
            }
            active.limit_dirty()
        })
    }

    fn check_compressed(&self, range: &Range<u64>) -> Result<Active<'_>> {
        let Top::Qcow2(active) = self.top()? else {
            let message = "a raw disk cannot hold compressed clusters";
            return Err(Error::new(ErrorKind::UnsupportedFeature, message));
        };
        let image = active.image;
        if image.header().has_data_file() {
            let message = "an image with an external data file cannot hold compressed clusters";
            return Err(image.error(ErrorKind::UnsupportedFeature, message));
        }
        if !image.host_is_guest() {
            let message =
                "an image whose data is encrypted cannot hold compressed clusters: write it uncompressed";
            return Err(image.error(ErrorKind::UnsupportedFeature, message));
        }
        let size = image.geometry().cluster_size();
        if !range.start.is_multiple_of(size)
            || (!range.end.is_multiple_of(size) && range.end != self.virtual_size())
        {
            let message =
                format!("a compressed write at {} must cover whole clusters of {size} bytes", range.start);
            return Err(image.error(ErrorKind::InvalidArgument, message));
        }
        Ok(active)
    }
}

impl<'a> Active<'a> {
    fn write_packed(&self, context: &mut Packer, guest: u64, part: Mem<'_>) -> Result<()> {
        let Self { image, writer, .. } = *self;
        let packed = context.compressor.compress(&context.cluster, &mut context.packed);
        let packed = packed.map_err(|e| Error::new(ErrorKind::Internal, e.to_string()).with_source(e))?;
        let Some(bytes) = packed.and_then(|length| context.packed.get(..length)) else {
            let end = guest + part.len() as u64;
            return self.write_range(Payload::Bytes(part), guest..end);
        };
        let run = loop {
            match writer.plan_change(image, guest..guest + 1)? {
                Step::Change(run) => break run,
                Step::Busy(clusters) => writer.inflight.wait(&clusters),
                Step::NeedsTable => writer.prepare_table(image, guest)?,
                Step::InPlace { .. } | Step::Missing(_) => {
                    return Err(image.error(ErrorKind::Internal, "a change of mappings planned I/O"));
                }
            }
        };
        let g = *image.geometry();
        let offset = writer.allocate_bytes(image, bytes.len() as u64)?;
        let descriptor = CompressedDescriptor::for_data(HostOffset(offset), bytes.len() as u64, &g)
            .map_err(|e| image.error(ErrorKind::Limit, e.to_string()).with_source(e))?;
        writer.check_overlap(image, offset, bytes.len() as u64)?;
        image.storage().write_all_at(Mem::from(bytes), offset).inspect_err(|_| {
            let unlinked = Unlinked { cluster: g.cluster_index(offset), count: 1, punch: false };
            image.changing().unlink(unlinked);
        })?;
        image.forget_inflated(&descriptor);
        let change = Change { guest: run.guest, clusters: 1, barrier: true, punch: false };
        writer.link(image, change, |_, _| Some(L2Mapping::Compressed(descriptor)))
    }
}

/// Compression context and buffers of one request.
struct Packer {
    compressor: Compressor,
    cluster: Vec<u8>,
    packed: Vec<u8>,
}

impl Packer {
    fn new(&Active { image, writer, .. }: &Active<'_>) -> Result<Self> {
        let codec = match image.header().compression_type {
            CompressionType::Zlib => Codec::Zlib,
            CompressionType::Zstd => Codec::Zstd,
        };
        let options = writer.options;
        let options =
            CompressOptions { codec, level: options.compression_level, window: options.compression_window };
        let compressor = Compressor::new(&options)
            .map_err(|e| Error::new(ErrorKind::InvalidArgument, e.to_string()).with_source(e))?;
        let size = image.geometry().cluster_len();
        Ok(Self { compressor, cluster: vec![0; size], packed: vec![0; size] })
    }
}

impl Writer {
    /// Takes `length` bytes (less than a cluster) for compressed data, behind the last ones where they fit.
    fn allocate_bytes(&self, image: &Qcow2, length: u64) -> Result<u64> {
        let size = image.geometry().cluster_size();
        let limit = image.geometry().compressed_offset_limit();
        let mut alloc = self.alloc.lock();
        let taken = (|| {
            if let Some((cluster, used)) = alloc.packing
                && size - used >= length
                && alloc.can_share(cluster)?
            {
                alloc.share(cluster)?;
                alloc.packing = Some((cluster, used + length)).filter(|p| p.1 < size);
                return Ok(cluster * size + used);
            }
            let allocation = alloc.allocate(1, true, Wish::default(), &mut self.metadata.lock())?;
            alloc.packing = Some((allocation.cluster, length)).filter(|p| p.1 < size);
            Ok(allocation.cluster * size)
        })();
        let offset = taken.map_err(|e| self.poison_unless_full(e))?;
        if offset + length > limit {
            let message = format!("host offset {offset:#x} is beyond what a compressed descriptor can hold");
            return Err(image.error(ErrorKind::Limit, message));
        }
        Ok(offset)
    }
}
