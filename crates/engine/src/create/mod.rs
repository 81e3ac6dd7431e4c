//! New images.
//!
//! Layout: header in cluster 0, refcount table from cluster 1, the first refcount block behind it, then the L1
//! table; L2 tables and data follow in guest order. With the usual geometry that puts the refcount block in
//! cluster 2 and the L1 table in cluster 3.

mod builder;
mod front_to_back;
mod hosts;
mod options;
mod target;

use std::sync::Arc;

pub use front_to_back::Streamed;
pub use options::{Backing, CreateOptions, DataFile};
use qcow2_core::raw::SECTOR;
pub use qcow2_core::space::Preallocation;
pub(crate) use qcow2_core::space::{empty, lengthen, size_raw, write_zero_bytes, zero_out};
use qcow2_format::limits::MAX_VIRTUAL_SIZE;
use qcow2_format::{Header, HostOffset, SubclusterBitmap};
pub use target::NewTarget;

pub(crate) use builder::{ImageBuilder, NewCluster, publish};

use crate::door::GuestData;
use crate::{Error, ErrorKind, Job, Result, Storage, StorageExt};

/// Guest clusters that are placed in one step.
const STEP: u64 = 8192;

/// Creates an image in `storage`, and empties or extends `data_file`, its external data file. What they held
/// is lost, but for a data file that is to be kept. Returns when the image is durable; before that, `storage` holds no image.
///
/// # Errors
/// `InvalidArgument` or `Limit` for options that contradict each other or the format (nothing is written
/// then), `Aborted`, `Io`.
pub fn create(
    storage: Arc<dyn Storage>,
    data_file: Option<Arc<dyn Storage>>,
    options: &CreateOptions,
    job: &Job,
) -> Result<()> {
    let builder = build(storage, data_file, options, job)?;
    builder.finish(options.effective_preallocation(), true).map(drop)
}

/// As [`create`], for an image that is filled before anybody may take it for one: `storage` holds no image until
/// [`publish`]. Returns its header, which cannot be read from there.
pub(crate) fn create_withheld(
    storage: Arc<dyn Storage>,
    data_file: Option<Arc<dyn Storage>>,
    options: &CreateOptions,
    job: &Job,
) -> Result<Header> {
    build(storage, data_file, options, job)?.withhold(options.effective_preallocation())
}

/// All of a new image but what its builder writes at the end.
fn build(
    storage: Arc<dyn Storage>,
    data_file: Option<Arc<dyn Storage>>,
    options: &CreateOptions,
    job: &Job,
) -> Result<ImageBuilder> {
    options.validate()?;
    check_data_file(options, data_file.is_some())?;
    let mut builder = ImageBuilder::new(storage.clone(), options, false)?;
    let size = builder.size();
    job.set_total(size);
    if options.effective_preallocation() != Preallocation::Off {
        let fill = Preallocator::new(options, &storage);
        fill.place(&mut builder, 0, size, job)?;
    }
    if let Some(data_file) = &data_file {
        match options.keep_data_file {
            true => lengthen(data_file.as_ref(), size)?,
            false => size_data_file(data_file, size, options, job)?,
        }
        data_file.flush()?;
    }
    Ok(builder)
}

/// Makes a raw disk of `size` bytes, rounded up to a sector, in `storage`. What it held is lost. Returns when it is durable.
///
/// # Errors
/// `InvalidArgument` for a preallocation of metadata, which a raw disk does not have; `Limit`, `Aborted`, `Io`.
pub fn create_raw(storage: &dyn Storage, size: u64, preallocation: Preallocation, job: &Job) -> Result<()> {
    if preallocation == Preallocation::Metadata {
        let message = "a raw image has no metadata to preallocate: falloc and full are possible";
        return Err(Error::new(ErrorKind::InvalidArgument, message).with_field("preallocation"));
    }
    let size = whole_sectors(size)?;
    job.set_total(size);
    size_raw(storage, size, preallocation, job)?;
    storage.flush()
}

/// The size of a disk that lies in its file as it is.
fn whole_sectors(size: u64) -> Result<u64> {
    let whole = size.checked_next_multiple_of(SECTOR).filter(|&size| size <= MAX_VIRTUAL_SIZE);
    whole.ok_or_else(|| {
        let message = format!("the largest virtual size is {MAX_VIRTUAL_SIZE} bytes");
        Error::new(ErrorKind::Limit, message)
    })
}

/// The storage of an external data file must be given exactly where the options name one.
pub(crate) fn check_data_file(options: &CreateOptions, given: bool) -> Result<()> {
    if options.data_file.is_some() == given {
        return Ok(());
    }
    let message = if given { "a data file was opened but is not named" } else { "the data file is not open" };
    Err(Error::new(ErrorKind::InvalidArgument, message).with_field("data_file"))
}

/// Gives an external data file its size and space; what it held is lost. What the image maps of it reads as zeroes.
pub(crate) fn size_data_file(
    data_file: &Arc<dyn Storage>,
    size: u64,
    options: &CreateOptions,
    job: &Job,
) -> Result<()> {
    let preallocation = options.effective_preallocation();
    if !options.fills_behind_door() {
        return size_raw(&**data_file, size, preallocation, job);
    }
    let space = if preallocation == Preallocation::Full { Preallocation::Off } else { preallocation };
    size_raw(&**data_file, size, space, job)?;
    // In an external data file, host offsets are guest offsets.
    write_zero_bytes(&**GuestData::behind(options.data_door.as_ref(), data_file).at(0, 0), 0, size, job)
}

/// Maps guest clusters to host clusters that hold nothing yet.
pub(crate) struct Preallocator {
    /// State of the 32 subclusters, with extended L2 entries.
    bitmap: SubclusterBitmap,
    /// Through which the clusters are zeroed by writing; `None` where they read as zeroes already.
    zeroed: Option<GuestData>,
    /// What a cluster is that holds nothing.
    empty: NewCluster,
}

impl Preallocator {
    pub(crate) fn new(options: &CreateOptions, storage: &Arc<dyn Storage>) -> Self {
        let data_file = options.data_file.as_ref();
        // Readers of a raw data file's image must see what readers of the raw file see.
        let raw = data_file.is_some_and(|d| d.raw);
        // What a data file keeps is seen, unless there is a backing file to be seen through it.
        let seen = raw || (options.keep_data_file && options.backing.is_none());
        let full = options.effective_preallocation() == Preallocation::Full;
        let stale = storage.traits().block_device;
        let zeroed = data_file.is_none() && (full || stale || options.fills_behind_door());
        let bitmap = if seen { SubclusterBitmap::ALL_DATA } else { SubclusterBitmap::default() };
        let reserved = options.reserves_behind_door();
        Self {
            bitmap,
            empty: if reserved { NewCluster::Reserved } else { NewCluster::Data(bitmap) },
            zeroed: zeroed.then(|| GuestData::behind(options.data_door.as_ref(), storage)),
        }
    }

    /// State of the subclusters of a cluster that holds nothing.
    pub(crate) fn bitmap(&self) -> SubclusterBitmap {
        self.bitmap
    }

    /// Whether a flag says that clusters which hold nothing read as zeroes.
    pub(crate) fn reserves(&self) -> bool {
        self.empty == NewCluster::Reserved
    }

    /// Whether clusters that hold nothing are written with zeroes.
    pub(crate) fn zeroes(&self) -> bool {
        self.zeroed.is_some()
    }

    /// Places `start..end`; both are cluster boundaries, or the end of the disk.
    pub(crate) fn place(&self, builder: &mut ImageBuilder, start: u64, end: u64, job: &Job) -> Result<()> {
        let g = builder.geometry();
        let step = STEP;
        let clusters = vec![self.empty; step as usize];
        let mut places = Vec::new();
        let mut at = start;
        while at < end {
            job.checkpoint()?;
            let count = g.clusters_for(end - at).min(step);
            builder.place(at, clusters.get(..count as usize).unwrap_or_default(), &mut places)?;
            if let Some(data) = &self.zeroed {
                for Run { guest, host, length } in contiguous_runs(at, &places, g.cluster_size()) {
                    write_zero_bytes(&**data.at(guest, host), host, length, job)?;
                }
            }
            at += count << g.cluster_bits();
        }
        Ok(())
    }
}

/// Bytes that lie together for the guest and in the file.
struct Run {
    guest: u64,
    host: u64,
    length: u64,
}

/// The clusters from `guest` on that have places, neighbours together.
fn contiguous_runs(guest: u64, places: &[Option<HostOffset>], cluster_size: u64) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    let clusters = (guest..).step_by(cluster_size as usize).zip(places);
    for (guest, host) in clusters.filter_map(|(guest, place)| Some((guest, place.as_ref()?.get()))) {
        match runs.last_mut() {
            Some(run) if run.guest + run.length == guest && run.host + run.length == host => {
                run.length += cluster_size;
            }
            _ => runs.push(Run { guest, host, length: cluster_size }),
        }
    }
    runs
}
