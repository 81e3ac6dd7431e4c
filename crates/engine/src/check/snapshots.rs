//! The snapshot table, as far as a check needs it.

use qcow2_format::limits::MAX_SNAPSHOT_TABLE_BYTES;
use qcow2_format::snapshot::{ParsedSnapshot, V3_EXTRA_DATA};
use qcow2_format::{FormatError, SnapshotRecord};

use super::report::{FindingCode, Tally};
use super::{Stop, Target};
use crate::{Error, ErrorKind, MemMut, StorageExt};

/// Bytes that are read for an entry at first: most are far smaller.
const FIRST_READ: usize = 512;

/// What is needed of one snapshot.
pub(super) struct Snapshot {
    pub(super) id: String,
    pub(super) name: String,
    pub(super) l1_offset: u64,
    pub(super) l1_size: u32,
}

/// The snapshot table.
#[derive(Default)]
pub(super) struct SnapshotTable {
    pub(super) entries: Vec<Snapshot>,
    /// Bytes of the table.
    pub(super) length: u64,
}

/// Reads the table. One that cannot be read fails the check: without it, the references of snapshots would be taken for
/// leaks.
pub(super) fn read(target: &Target<'_>, tally: &mut Tally) -> Result<SnapshotTable, Stop> {
    let header = target.header;
    let limits = &target.options.limits;
    if header.nb_snapshots > limits.max_snapshots {
        let message =
            format!("{} snapshots exceed the limit of {}", header.nb_snapshots, limits.max_snapshots);
        return Err(Stop::Error(Error::new(ErrorKind::Limit, message).with_field("nb_snapshots")));
    }
    let limit = MAX_SNAPSHOT_TABLE_BYTES.min(limits.max_metadata_bytes);
    let mut table = SnapshotTable::default();
    let mut buffer = Vec::new();
    for index in 0..header.nb_snapshots {
        target.job.checkpoint()?;
        let at = header.snapshots_offset.get().saturating_add(table.length);
        let (record, length) = read_entry(target, at, &mut buffer)?;
        table.length += length as u64;
        if table.length > limit {
            return Err(Stop::corrupt("failed to read the snapshot table: Snapshot table is too big", at));
        }
        if header.version >= 3 && (record.extra_data_size as usize) < V3_EXTRA_DATA {
            tally.corruption(FindingCode::Snapshot, at, || {
                format!("snapshot table entry {index} is incomplete")
            });
        }
        table.entries.push(Snapshot {
            id: String::from_utf8_lossy(&record.id).into_owned(),
            name: String::from_utf8_lossy(&record.name).into_owned(),
            l1_offset: record.l1_table_offset.get(),
            l1_size: record.l1_size,
        });
    }
    Ok(table)
}

fn read_entry(target: &Target<'_>, at: u64, buffer: &mut Vec<u8>) -> Result<(SnapshotRecord, usize), Stop> {
    let mut needed = FIRST_READ;
    // Two rounds at most: the first read tells the length of the entry.
    loop {
        buffer.resize(needed, 0);
        target.storage.read_padded_at(MemMut::from(&mut buffer[..]), at)?;
        match SnapshotRecord::parse(buffer) {
            Ok(ParsedSnapshot::Record(record, length)) => return Ok((*record, length)),
            Ok(ParsedSnapshot::Needs(length)) if length > needed => needed = length,
            Ok(ParsedSnapshot::Needs(_)) => {
                return Err(Stop::corrupt("a snapshot table entry has no end", at));
            }
            Err(error @ FormatError::Limit { .. }) => {
                return Err(Stop::corrupt(format!("failed to read the snapshot table: {error}"), at));
            }
            Err(error) => return Err(Stop::corrupt(error.to_string(), at)),
        }
    }
}
