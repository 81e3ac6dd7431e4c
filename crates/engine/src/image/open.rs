//! Opening one qcow2 layer: header, active or snapshot L1 table, snapshot table. Opens nothing that the image names.

use std::sync::Arc;

use qcow2_format::header::PREAMBLE_LENGTH;
use qcow2_format::{FormatResult, Geometry, Header, HostOffset, L1Entry, Limits, words};

use super::inflated::InflatedCache;
use super::options::OpenOptions;
use super::qcow2::{Qcow2, View};
use super::slices::SliceCache;
use super::snapshots::{self, LoadedSnapshots};
use crate::invalid::invalid;
use crate::{Error, ErrorKind, MemMut, Result, Storage, StorageExt, check_limit};

/// Reads and parses the header of the qcow2 image in `storage`; reads only the first cluster.
///
/// # Errors
/// `InvalidHeader`, `UnsupportedFeature`, `Limit` or `Io`, with the file's path.
pub fn read_header(storage: &dyn Storage) -> Result<Header> {
    header_by(storage, Header::parse)
}

/// As [`read_header`], for a check: see [`Header::parse_for_check`].
///
/// # Errors
/// As [`read_header`].
pub fn read_header_for_check(storage: &dyn Storage) -> Result<Header> {
    header_by(storage, Header::parse_for_check)
}

fn header_by(storage: &dyn Storage, parse: impl Fn(&[u8]) -> FormatResult<Header>) -> Result<Header> {
    let fail = |e| storage.located(invalid(e, ErrorKind::InvalidHeader));
    let mut start = [0u8; PREAMBLE_LENGTH];
    let got = storage.read_up_to_at(MemMut::from(&mut start[..]), 0)?;
    let preamble = Header::preamble(start.get(..got).unwrap_or_default()).map_err(fail)?;
    // At most 2 MiB: the preamble is validated.
    let mut cluster = vec![0u8; preamble.cluster_size as usize];
    let got = storage.read_up_to_at(MemMut::from(&mut cluster[..]), 0)?;
    parse(cluster.get(..got).unwrap_or_default()).map_err(fail)
}

impl Qcow2 {
    /// Opens the image in `storage`.
    ///
    /// # Errors
    /// As [`read_header`]; `Corrupt` for tables outside the file; `Limit`; `NoSnapshot`; `InvalidArgument` for a door to a raw
    /// data file. A damaged snapshot table is one only where a snapshot behind the damage is wanted: see
    /// [`Qcow2::snapshot_error`].
    pub fn open(storage: Arc<dyn Storage>, options: &OpenOptions) -> Result<Self> {
        let header = read_header_for_check(&*storage)?;
        Self::open_with(storage, header, options)
    }

    /// As `open`, with a header that was read before.
    pub(crate) fn open_with(
        storage: Arc<dyn Storage>,
        header: Header,
        options: &OpenOptions,
    ) -> Result<Self> {
        let fail = |e: Error| storage.located(e);
        check_limits(&header, &options.limits).map_err(fail)?;
        if options.data_door.is_some() && header.data_file_raw() {
            let message =
                "the external data file is a raw image on its own: its bytes are the guest's as they are";
            return Err(fail(Error::new(ErrorKind::InvalidArgument, message).with_field("data_file_raw")));
        }
        let file_size = storage.size()?;
        let place = |field, start, entries| {
            check_l1_placement(field, start, entries, &header.geometry, file_size).map_err(fail)
        };
        if !options.salvage {
            place("l1_table_offset", header.l1_table_offset, header.l1_size)?;
        }
        let LoadedSnapshots { records: snapshots, damage } =
            snapshots::load(&*storage, &header, &options.limits).map_err(fail)?;
        let mut snapshot_error = damage.map(fail);
        let view = match &options.snapshot {
            None => View {
                size: header.size,
                l1: if options.salvage {
                    salvage_l1(&*storage, &header)?
                } else {
                    read_l1(&*storage, header.l1_table_offset, header.l1_size)?
                },
                snapshot: None,
            },
            Some(wanted) => {
                // One that is not among those in front of the damage may be behind it.
                let index = match (snapshots::find(&snapshots, wanted), snapshot_error) {
                    (Err(_), Some(damage)) => return Err(damage),
                    (found, damage) => {
                        snapshot_error = damage;
                        found.map_err(fail)?
                    }
                };
                let record = snapshots.get(index).ok_or_else(Error::aborted)?;
                record
                    .check_l1(&header.geometry, header.size)
                    .map_err(|e| fail(invalid(e, ErrorKind::Corrupt)))?;
                place("snapshot L1 table offset", record.l1_table_offset, record.l1_size)?;
                View {
                    size: record.disk_size.unwrap_or(header.size),
                    l1: read_l1(&*storage, record.l1_table_offset, record.l1_size)?,
                    snapshot: Some(index),
                }
            }
        };
        let slices = SliceCache::new(&header.geometry, view.size, options.l2_cache_bytes);
        let inflated = InflatedCache::new(&header.geometry, options.inflated_cache_bytes);
        Ok(Self::assemble(storage, header, view, snapshots, snapshot_error, slices, inflated, options))
    }
}

impl Qcow2 {
    /// The active disk of the same image anew, for reading, as it was opened.
    ///
    /// # Errors
    /// As [`Qcow2::open`].
    pub fn reopen(&self) -> Result<Self> {
        let mut fresh = Self::open(Arc::clone(self.storage()), self.open_options())?;
        if let Some(data) = self.data_file() {
            fresh.set_data_file(Arc::clone(data));
        }
        Ok(fresh)
    }

    /// Reads header and tables again, after they were changed in the file. Caches keep their memory; the image is not open
    /// for writing any more.
    pub(crate) fn reload(&mut self) -> Result<()> {
        let mut fresh = self.reopen()?;
        std::mem::swap(&mut fresh.slices, &mut self.slices);
        std::mem::swap(&mut fresh.inflated, &mut self.inflated);
        fresh.slices.clear();
        *self = fresh;
        Ok(())
    }
}

fn check_limits(header: &Header, limits: &Limits) -> Result<()> {
    check_limit("size", header.size, limits.max_virtual_size)?;
    check_limit("l1_size", u64::from(header.l1_size) * 8, limits.max_metadata_bytes)?;
    check_limit(
        "refcount_table_clusters",
        u64::from(header.refcount_table_clusters) * header.geometry.cluster_size(),
        limits.max_metadata_bytes,
    )
}

/// An L1 table must lie behind the header and inside the file: checked before its size is allocated.
fn check_l1_placement(
    field: &'static str,
    start: HostOffset,
    entries: u32,
    geometry: &Geometry,
    file_size: u64,
) -> Result<()> {
    let bytes = u64::from(entries) * 8;
    if bytes == 0 {
        return Ok(());
    }
    let end = start.checked_add(bytes).map_or(u64::MAX, HostOffset::get);
    let reason = if start.0 < geometry.cluster_size() {
        "overlaps the header"
    } else if end > file_size {
        "lies outside the file"
    } else {
        return Ok(());
    };
    let message = format!("the table at {start} with {bytes} bytes {reason} ({file_size} bytes)");
    Err(Error::new(ErrorKind::Corrupt, message).with_field(field).with_offset(start.0))
}

/// What is in the file of the active L1 table.
fn salvage_l1(storage: &dyn Storage, header: &Header) -> Result<Vec<u64>> {
    let mut bytes = vec![0u8; header.l1_size as usize * 8];
    let got = storage.read_up_to_at(MemMut::from(&mut bytes[..]), header.l1_table_offset.0)?;
    let mut l1 = words::decode(&bytes);
    // The low bits of an entry are 0 in any case: one of which only those are missing is whole.
    let whole = (got + (header.geometry.cluster_bits() / 8) as usize) / 8;
    l1.iter_mut().skip(whole).for_each(|entry| *entry = L1Entry::NOWHERE.0);
    Ok(l1)
}

/// Reads an L1 table of at most 32 MiB (the header's and the snapshot's checks guarantee that).
fn read_l1(storage: &dyn Storage, offset: HostOffset, entries: u32) -> Result<Vec<u64>> {
    let mut bytes = vec![0u8; entries as usize * 8];
    storage.read_exact_at(MemMut::from(&mut bytes[..]), offset.0).map_err(|e| e.with_field("L1 table"))?;
    Ok(words::decode(&bytes))
}
