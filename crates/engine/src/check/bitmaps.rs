//! Persistent bitmaps: directory, tables and data clusters.

use qcow2_format::bitmap::{BitmapCluster, BitmapDirectoryEntry, BitmapTableEntry};
use qcow2_format::header::feature::Autoclear;

use super::target::{Stop, Target};
use super::walk::Walk;
use crate::{Error, ErrorKind, MemMut, StorageExt};
use qcow2_core::check::{FindingCode, Repair};

/// Largest bitmap, in bytes of its clusters: QEMU's limit.
const MAX_BITMAP_BYTES: u64 = 512 << 20;

/// Bitmap table entries that are read at once.
const WINDOW: u64 = 1 << 13;

/// Counts what the bitmaps refer to. Bitmaps whose extension is not marked consistent do not exist. A directory that is
/// damaged fails the check: without it, its clusters would be taken for leaks. A repair of all gives the bitmaps up then,
/// which is true: nothing of them is counted.
pub(super) fn walk(walk: &mut Walk<'_, '_>) -> Result<bool, Stop> {
    let header = walk.target.header;
    if header.bitmaps().filter(|_| header.autoclear.contains(Autoclear::BITMAPS)).is_none() {
        return Ok(false);
    }
    if walk.target.repair == Some(Repair::All) {
        // Nothing is counted before all of it is known to be right.
        match visit(walk, &mut judge) {
            Ok(()) => {}
            Err(Broken::At(reason, offset)) => {
                walk.tally.fixed_corruption(FindingCode::Bitmap, offset, || {
                    format!("{reason}; the bitmaps are given up")
                });
                return Ok(true);
            }
            Err(Broken::Stop(stop)) => return Err(stop),
        }
    }
    let counted = visit(walk, &mut |walk, offset, length| Ok(walk.reference(offset, length)?));
    match counted {
        Ok(()) => Ok(false),
        Err(Broken::At(reason, offset)) => {
            walk.tally.corruption(FindingCode::Bitmap, offset, || reason.clone());
            let message = format!("{reason}: a repair of all gives the bitmaps up");
            Err(Stop::corrupt(message, offset))
        }
        Err(Broken::Stop(stop)) => Err(stop),
    }
}

/// Why bitmaps cannot be visited.
enum Broken {
    /// What is wrong, and where.
    At(String, u64),
    Stop(Stop),
}

impl From<Stop> for Broken {
    fn from(stop: Stop) -> Self {
        Self::Stop(stop)
    }
}

impl From<Error> for Broken {
    fn from(error: Error) -> Self {
        Self::Stop(error.into())
    }
}

/// What is done with each region, its offset and length, that bitmaps refer to.
type Visitor<'v> = &'v mut dyn FnMut(&mut Walk<'_, '_>, u64, u64) -> Result<(), Broken>;

/// Refuses a region that is not in the file.
fn judge(walk: &mut Walk<'_, '_>, offset: u64, length: u64) -> Result<(), Broken> {
    let cluster_size = walk.target.header.geometry.cluster_size();
    let outside = offset.saturating_add(length) >= walk.file_length.saturating_add(cluster_size);
    if length > 0 && (outside || offset < cluster_size) {
        let message = format!("{length} bytes of bitmaps at {offset:#x} lie outside the file");
        return Err(Broken::At(message, offset));
    }
    Ok(())
}

fn visit(walk: &mut Walk<'_, '_>, each: Visitor<'_>) -> Result<(), Broken> {
    let header = walk.target.header;
    let Some(bitmaps) = header.bitmaps() else { return Ok(()) };
    let directory = bitmaps.directory_offset.get();
    bitmaps.validate(header.geometry.cluster_size()).map_err(|e| Broken::At(e.to_string(), directory))?;
    each(walk, directory, bitmaps.directory_size)?;
    let entries = read_directory(walk.target, directory, bitmaps.directory_size, bitmaps.count)?;
    for entry in entries {
        walk.target.job.checkpoint()?;
        table(walk, &entry, each)?;
    }
    Ok(())
}

fn read_directory(
    target: &Target<'_>,
    offset: u64,
    size: u64,
    count: u32,
) -> Result<Vec<BitmapDirectoryEntry>, Broken> {
    let Target { storage, header, options, .. } = target;
    let broken = |reason: &str| Err(Broken::At(reason.to_owned(), offset));
    if size > options.limits.max_metadata_bytes || count > options.limits.max_bitmaps {
        let message = format!("a directory of {count} bitmaps in {size} bytes exceeds the limits");
        let error = Error::new(ErrorKind::Limit, message).with_field("bitmap_directory_size");
        return Err(Stop::Error(error).into());
    }
    let mut bytes = vec![0; usize::try_from(size).unwrap_or(usize::MAX)];
    storage.read_padded_at(MemMut::from(&mut bytes[..]), offset)?;
    let mut entries = Vec::new();
    let mut rest = bytes.as_slice();
    while !rest.is_empty() {
        let Ok((entry, length)) = BitmapDirectoryEntry::parse(rest) else {
            return broken("Broken bitmap directory");
        };
        if entries.len() >= count as usize {
            return broken("More bitmaps found than specified in header extension");
        }
        if !entry.extra_data.is_empty() {
            return broken("Bitmap extra data is not supported");
        }
        let bytes = u64::from(entry.table_size) * header.geometry.cluster_size();
        if entry.validate(header.size, &header.geometry).is_err() || bytes > MAX_BITMAP_BYTES {
            let name = String::from_utf8_lossy(&entry.name).into_owned();
            return broken(&format!("Bitmap '{name}' doesn't satisfy the constraints"));
        }
        entries.push(entry);
        rest = rest.get(length..).unwrap_or_default();
    }
    if entries.len() != count as usize {
        return broken("Less bitmaps found than specified in header extension");
    }
    Ok(entries)
}

fn table(walk: &mut Walk<'_, '_>, bitmap: &BitmapDirectoryEntry, each: Visitor<'_>) -> Result<(), Broken> {
    let target = walk.target;
    let geometry = &target.header.geometry;
    let table = bitmap.table_offset.get();
    let size = u64::from(bitmap.table_size);
    each(walk, table, size * 8)?;
    let mut buffer = vec![0; size.min(WINDOW) as usize * 8];
    for start in (0..size).step_by(WINDOW as usize) {
        let count = (size - start).min(WINDOW) as usize;
        let window = buffer.get_mut(..count * 8).unwrap_or_default();
        target.storage.read_padded_at(MemMut::from(&mut *window), table + start * 8)?;
        for entry in BitmapTableEntry::entries(window) {
            match entry.decode(geometry) {
                Ok(BitmapCluster::Data(offset)) => each(walk, offset.get(), geometry.cluster_size())?,
                Ok(_) => {}
                Err(error) => return Err(Broken::At(error.to_string(), table)),
            }
        }
    }
    Ok(())
}
