//! How large a new image would be: `qemu-img measure`.
//!
//! The numbers are QEMU's to the byte, because callers reserve space by them. They are an upper bound: metadata is
//! counted as if every cluster were allocated.

use std::sync::Arc;

use qcow2_core::NewImage;
use qcow2_format::Geometry;
use qcow2_format::bitmap::FIXED_LENGTH;
use qcow2_format::limits::MAX_L1_BYTES;

use crate::convert::data_bytes;
use crate::create::{CreateOptions, Preallocation};
use crate::image::Image;
use crate::walk::{Step, Steps, Walk};
use crate::{Error, ErrorKind, GuestSource, Job, Result};

/// Bytes of an entry of the L1, refcount and bitmap tables.
const TABLE_ENTRY: u64 = 8;
/// Sizes of raw images are counted in sectors.
const SECTOR: u64 = 512;
/// How much is listed at once: more over holes.
const STEPS: Steps = Steps::growing(1 << 30, 1 << 40, 16 << 10);

/// What would be created.
#[derive(Debug, Clone)]
pub enum MeasureTarget {
    /// A raw image.
    Raw,
    /// The disk as it is, behind a header of so many bytes.
    Behind(u64),
    /// A qcow2 image.
    Qcow2(Qcow2Target),
    /// An image of another format, for a disk of the size that is measured.
    Format(Arc<dyn NewImage>),
}

/// The properties of a new qcow2 image that decide its size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Qcow2Target {
    /// Version: 2 or 3.
    pub version: u32,
    /// Cluster size, refcount width and L2 entry form.
    pub geometry: Geometry,
    /// It has a backing file, so that what the source shares with it cannot be known: everything counts.
    pub has_backing_file: bool,
    /// Its data clusters are preallocated (`falloc` or `full`; not `metadata`, which always counts).
    pub preallocated: bool,
    /// Bytes of its encryption header; 0 without one.
    pub crypto_header: u64,
}

impl Qcow2Target {
    /// What decides the size of an image with these options.
    ///
    /// # Errors
    /// `InvalidArgument` for an impossible geometry.
    pub fn from_options(options: &CreateOptions) -> Result<Self> {
        Ok(Self {
            version: options.version,
            geometry: options.geometry()?,
            has_backing_file: options.backing.is_some(),
            preallocated: matches!(options.preallocation, Preallocation::Falloc | Preallocation::Full),
            crypto_header: 0,
        })
    }
}

/// Sizes of the new image file, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Measurement {
    /// For the data of the source.
    pub required: u64,
    /// For a disk on which every cluster is written.
    pub fully_allocated: u64,
    /// For the persistent bitmaps of the source, on top; `None` where source or target cannot have any.
    pub bitmaps: Option<u64>,
}

/// Measures an empty disk of `size` bytes.
///
/// # Errors
/// `Limit` for a disk that is too large for the geometry.
pub fn measure_size(size: u64, target: &MeasureTarget) -> Result<Measurement> {
    let qcow2 = match target {
        MeasureTarget::Qcow2(qcow2) => qcow2,
        MeasureTarget::Format(target) => return Ok(of_format(&**target, 0)),
        MeasureTarget::Raw => return plain(size, 0),
        MeasureTarget::Behind(header) => return plain(size, *header),
    };
    if qcow2.geometry.l1_entries_for(size) > MAX_L1_BYTES / TABLE_ENTRY {
        return Err(too_large(size));
    }
    measured(size, 0, qcow2)
}

/// Measures the disk `image`, as seen through its whole chain.
///
/// # Errors
/// `Aborted` through `job`; `Limit` for a disk beyond 64 bits; what reading the image's metadata gives.
pub fn measure(image: &Image, target: &MeasureTarget, job: &Job) -> Result<Measurement> {
    let size = image.virtual_size();
    job.set_total(size);
    let qcow2 = match target {
        MeasureTarget::Qcow2(qcow2) => qcow2,
        MeasureTarget::Format(target) => {
            let data = data_bytes(image, target.unit(), job)?;
            job.advance(size);
            return Ok(of_format(&**target, data));
        }
        MeasureTarget::Raw | MeasureTarget::Behind(_) => {
            job.advance(size);
            return measure_size(size, target);
        }
    };
    let data = if qcow2.has_backing_file {
        job.advance(size);
        u64::MAX
    } else {
        data_clusters(image, &qcow2.geometry, job)?
    };
    let mut measurement = measured(size, data, qcow2)?;
    let source = image.top_qcow2();
    if let Some(source) = source.filter(|s| s.header().version >= 3 && qcow2.version >= 3) {
        let bitmaps = source.bitmaps()?;
        let sizes = bitmaps.iter().map(|b| (b.entry.granularity_bits, b.entry.name.len() as u64));
        measurement.bitmaps = Some(bitmap_bytes(size, sizes, &qcow2.geometry));
    }
    Ok(measurement)
}

/// Of an image that says itself what it takes.
fn of_format(target: &dyn NewImage, data: u64) -> Measurement {
    let full = matches!(target.preallocation(), Preallocation::Falloc | Preallocation::Full);
    let fully_allocated = target.length(target.size().next_multiple_of(target.unit()));
    let required = if full || !target.is_sparse() { fully_allocated } else { target.length(data) };
    Measurement { required, fully_allocated, bitmaps: None }
}

/// Of a target whose disk lies in its file as it is. Behind a header it has the size that is asked for, to the byte.
fn plain(size: u64, header: u64) -> Result<Measurement> {
    let bytes = match header {
        0 => size.checked_next_multiple_of(SECTOR),
        _ => size.checked_add(header),
    };
    let bytes = bytes.ok_or_else(|| too_large(size))?;
    Ok(Measurement { required: bytes, fully_allocated: bytes, bitmaps: None })
}

/// Clusters of the target that hold data of `source`: not known to read as zeroes.
fn data_clusters(source: &dyn GuestSource, geometry: &Geometry, job: &Job) -> Result<u64> {
    let mut clusters = 0;
    // First cluster that is not counted yet: a cluster in which two extents of data meet counts once.
    let mut next = 0;
    let mut walk = Walk::new(0..source.virtual_size(), STEPS);
    while let Some(Step { range, extents: [extents] }) = walk.next([Some(source)], job)? {
        for extent in extents.iter().filter(|extent| !extent.zero) {
            let first = geometry.cluster_index(extent.start).max(next);
            next = next.max(geometry.clusters_for(extent.start + extent.length));
            clusters += next.saturating_sub(first);
        }
        job.advance(range.end - range.start);
    }
    Ok(clusters)
}

/// The measurement of a disk of `size` bytes with `data` data clusters, or all of them.
fn measured(size: u64, data: u64, target: &Qcow2Target) -> Result<Measurement> {
    let geometry = &target.geometry;
    let all = geometry.clusters_for(size);
    let data = if target.preallocated { all } else { data.min(all) };
    let l2_tables = all.div_ceil(geometry.l2_entries());
    let l1_clusters = (l2_tables * TABLE_ENTRY).div_ceil(geometry.cluster_size());
    let counted = 1 + l1_clusters + l2_tables + all;
    let metadata = counted - all + refcount_clusters(counted, geometry);
    // What QEMU counts: the header, and no refcounts for it.
    let header = geometry.clusters_for(target.crypto_header);
    let bytes = |clusters: u64| {
        (clusters + header).checked_mul(geometry.cluster_size()).ok_or_else(|| too_large(size))
    };
    Ok(Measurement {
        required: bytes(metadata + data)?,
        fully_allocated: bytes(metadata + all)?,
        bitmaps: None,
    })
}

/// Clusters of refcount table and blocks for `counted` other clusters. They count themselves, so this is the fixed point
/// of an iteration.
fn refcount_clusters(counted: u64, geometry: &Geometry) -> u64 {
    let mut own = 0;
    loop {
        let blocks = (counted + own).div_ceil(geometry.refcount_block_entries());
        let table = (blocks * TABLE_ENTRY).div_ceil(geometry.cluster_size());
        if blocks + table == own {
            return own;
        }
        own = blocks + table;
    }
}

/// Bytes for bitmaps, given by granularity bits and length of the name: data clusters, all allocated, tables, and the
/// directory.
fn bitmap_bytes(size: u64, bitmaps: impl Iterator<Item = (u8, u64)>, geometry: &Geometry) -> u64 {
    let mut clusters = 0;
    let mut directory = 0;
    for (granularity_bits, name_length) in bitmaps {
        let data = geometry.clusters_for(size.div_ceil(1 << granularity_bits.min(63)).div_ceil(8));
        clusters += data + geometry.clusters_for(data * TABLE_ENTRY);
        directory += (FIXED_LENGTH as u64 + name_length).next_multiple_of(8);
    }
    (clusters + geometry.clusters_for(directory)) << geometry.cluster_bits()
}

fn too_large(size: u64) -> Error {
    let message = format!("a disk of {size} bytes is too large (try using a larger cluster size)");
    Error::new(ErrorKind::Limit, message).with_field("size")
}
