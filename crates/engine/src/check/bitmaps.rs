//! Persistent bitmaps: directory, tables and data clusters.

use qcow2_format::bitmap::{BitmapCluster, BitmapDirectoryEntry, BitmapTableEntry};
use qcow2_format::header::feature::Autoclear;

use super::report::FindingCode;
use super::walk::Walk;
use super::{Stop, Target};
use crate::{Error, ErrorKind, MemMut, StorageExt};

/// Largest bitmap, in bytes of its clusters: QEMU's limit.
const MAX_BITMAP_BYTES: u64 = 512 << 20;

/// Bitmap table entries that are read at once.
const WINDOW: u64 = 1 << 13;

/// Counts what the bitmaps refer to. Bitmaps whose extension is not marked consistent do not exist. A directory that is
/// damaged fails the check: without it, its clusters would be taken for leaks.
pub(super) fn walk(walk: &mut Walk<'_, '_>) -> Result<(), Stop> {
    let header = walk.target.header;
    let Some(bitmaps) = header.bitmaps().filter(|_| header.autoclear.contains(Autoclear::BITMAPS)) else {
        return Ok(());
    };
    let directory = bitmaps.directory_offset.get();
    bitmaps.validate(header.geometry.cluster_size()).map_err(|e| broken(walk, e.to_string(), directory))?;
    walk.reference(directory, bitmaps.directory_size)?;
    let entries = read_directory(walk, directory, bitmaps.directory_size, bitmaps.count)?;
    for entry in entries {
        walk.target.job.checkpoint()?;
        table(walk, &entry)?;
    }
    Ok(())
}

/// A corruption after which the check cannot go on.
fn broken(walk: &mut Walk<'_, '_>, reason: String, offset: u64) -> Stop {
    walk.tally.corruption(FindingCode::Bitmap, offset, || reason.clone());
    Stop::corrupt(reason, offset)
}

fn read_directory(
    walk: &mut Walk<'_, '_>,
    offset: u64,
    size: u64,
    count: u32,
) -> Result<Vec<BitmapDirectoryEntry>, Stop> {
    let Target { storage, header, options, .. } = walk.target;
    if size > options.limits.max_metadata_bytes || count > options.limits.max_bitmaps {
        let message = format!("a directory of {count} bitmaps in {size} bytes exceeds the limits");
        return Err(Stop::Error(Error::new(ErrorKind::Limit, message).with_field("bitmap_directory_size")));
    }
    let mut bytes = vec![0; usize::try_from(size).unwrap_or(usize::MAX)];
    storage.read_padded_at(MemMut::from(&mut bytes[..]), offset)?;
    let mut entries = Vec::new();
    let mut rest = bytes.as_slice();
    while !rest.is_empty() {
        let Ok((entry, length)) = BitmapDirectoryEntry::parse(rest) else {
            return Err(broken(walk, "Broken bitmap directory".into(), offset));
        };
        if entries.len() >= count as usize {
            let reason = "More bitmaps found than specified in header extension";
            return Err(broken(walk, reason.into(), offset));
        }
        if !entry.extra_data.is_empty() {
            return Err(broken(walk, "Bitmap extra data is not supported".into(), offset));
        }
        let bytes = u64::from(entry.table_size) * header.geometry.cluster_size();
        if entry.validate(header.size, &header.geometry).is_err() || bytes > MAX_BITMAP_BYTES {
            let name = String::from_utf8_lossy(&entry.name).into_owned();
            return Err(broken(walk, format!("Bitmap '{name}' doesn't satisfy the constraints"), offset));
        }
        entries.push(entry);
        rest = rest.get(length..).unwrap_or_default();
    }
    if entries.len() != count as usize {
        let reason = "Less bitmaps found than specified in header extension";
        return Err(broken(walk, reason.into(), offset));
    }
    Ok(entries)
}

fn table(walk: &mut Walk<'_, '_>, bitmap: &BitmapDirectoryEntry) -> Result<(), Stop> {
    let target = walk.target;
    let geometry = &target.header.geometry;
    let table = bitmap.table_offset.get();
    let size = u64::from(bitmap.table_size);
    walk.reference(table, size * 8)?;
    let mut buffer = vec![0; size.min(WINDOW) as usize * 8];
    for start in (0..size).step_by(WINDOW as usize) {
        let count = (size - start).min(WINDOW) as usize;
        let window = buffer.get_mut(..count * 8).unwrap_or_default();
        target.storage.read_padded_at(MemMut::from(&mut *window), table + start * 8)?;
        for entry in window.as_chunks::<8>().0 {
            match BitmapTableEntry(u64::from_be_bytes(*entry)).decode(geometry) {
                Ok(BitmapCluster::Data(offset)) => walk.reference(offset.get(), geometry.cluster_size())?,
                Ok(_) => {}
                Err(error) => return Err(broken(walk, error.to_string(), table)),
            }
        }
    }
    Ok(())
}
