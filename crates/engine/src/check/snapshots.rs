//! The snapshot table, as far as a check needs it.

use qcow2_format::limits::{MAX_SNAPSHOT_EXTRA_DATA, MAX_SNAPSHOT_TABLE_BYTES};
use qcow2_format::snapshot::{FIXED_LENGTH, ParsedSnapshot, V3_EXTRA_DATA};
use qcow2_format::{FormatError, SnapshotRecord};

use super::report::{FindingCode, Severity, Tally};
use super::{Repair, Stop, Target};
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
    /// The entries in full, for a repair to write.
    pub(super) records: Vec<SnapshotRecord>,
    /// Corruptions of the table; a repair removes them with a new table.
    pub(super) corruptions: u64,
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
    let repair = target.repair == Some(Repair::All);
    let file_length = target.storage.size()?.next_multiple_of(super::SECTOR);
    let mut table = SnapshotTable::default();
    let mut incomplete = Vec::new();
    // What a repaired table takes: extra data beyond the limit is cut off.
    let mut kept = 0;
    for index in 0..header.nb_snapshots {
        target.job.checkpoint()?;
        let at = header.snapshots_offset.get().saturating_add(table.length);
        let Entry { record, length, cut } = read_entry(target, at)?;
        if repair && at.saturating_add(length) > file_length {
            // What reads as zeroes there is no entry: to write it anew would give up the snapshots for good.
            return Err(Stop::corrupt("the snapshot table lies outside the file", at));
        }
        if let Some(claimed) = cut {
            table.corruptions += 1;
            tally.announce(Severity::Note, false, FindingCode::Snapshot, at, || {
                format!(
                    "Discarding too much extra metadata in snapshot table entry {index} \
                     ({claimed} > {MAX_SNAPSHOT_EXTRA_DATA})"
                )
            });
        }
        kept += record.encoded_length() as u64;
        if kept > limit || table.length + length > i32::MAX as u64 {
            if !repair {
                return Err(Stop::corrupt(
                    "failed to read the snapshot table: Snapshot table is too big",
                    at,
                ));
            }
            let rest = header.nb_snapshots - index;
            table.corruptions += u64::from(rest);
            tally.announce(Severity::Note, false, FindingCode::Snapshot, at, || {
                format!("Discarding {rest} overhanging snapshots (snapshot table is too big)")
            });
            break;
        }
        table.length += length;
        if header.version >= 3 && (record.extra_data_size as usize) < V3_EXTRA_DATA {
            incomplete.push((index, at));
        }
        table.entries.push(Snapshot {
            id: String::from_utf8_lossy(&record.id).into_owned(),
            name: String::from_utf8_lossy(&record.name).into_owned(),
            l1_offset: record.l1_table_offset.get(),
            l1_size: record.l1_size,
        });
        if repair {
            table.records.push(record);
        }
    }
    table.corruptions += incomplete.len() as u64;
    for (index, at) in incomplete {
        tally.announce(Severity::Corruption, repair, FindingCode::Snapshot, at, || {
            format!("snapshot table entry {index} is incomplete")
        });
    }
    Ok(table)
}

/// An entry as it lies in the table.
struct Entry {
    record: SnapshotRecord,
    /// Bytes it takes, with padding.
    length: u64,
    /// The size of its extra data, where that was cut to the limit.
    cut: Option<u32>,
}

fn read_entry(target: &Target<'_>, at: u64) -> Result<Entry, Stop> {
    let mut buffer = vec![0; FIRST_READ];
    // Two rounds at most: the first read tells the length of the entry.
    loop {
        target.storage.read_padded_at(MemMut::from(&mut buffer[..]), at)?;
        match SnapshotRecord::parse(&buffer) {
            Ok(ParsedSnapshot::Record(record, length)) => {
                return Ok(Entry { record: *record, length: length as u64, cut: None });
            }
            Ok(ParsedSnapshot::Needs(length)) if length > buffer.len() => buffer.resize(length, 0),
            Ok(ParsedSnapshot::Needs(_)) => {
                return Err(Stop::corrupt("a snapshot table entry has no end", at));
            }
            Err(FormatError::Limit { value, .. }) if target.repair == Some(Repair::All) => {
                return cut_entry(target, at, &buffer, value);
            }
            Err(error @ FormatError::Limit { .. }) => {
                return Err(Stop::corrupt(format!("failed to read the snapshot table: {error}"), at));
            }
            Err(error) => return Err(Stop::corrupt(error.to_string(), at)),
        }
    }
}

/// Reads an entry whose `claimed` bytes of extra data are beyond the limit: as much of them as may be is kept.
fn cut_entry(target: &Target<'_>, at: u64, start: &[u8], claimed: u64) -> Result<Entry, Stop> {
    let broken = || Stop::corrupt("a snapshot table entry cannot be read", at);
    let fixed = start.first_chunk::<FIXED_LENGTH>().ok_or_else(broken)?;
    let [id_high, id_low, name_high, name_low] =
        *fixed.get(12..).and_then(|b| b.first_chunk::<4>()).ok_or_else(broken)?;
    let names = u64::from(u16::from_be_bytes([id_high, id_low]))
        + u64::from(u16::from_be_bytes([name_high, name_low]));
    let extra = MAX_SNAPSHOT_EXTRA_DATA as usize;
    let mut entry = vec![0; FIXED_LENGTH + extra + names as usize];
    let (kept, tail) = entry.split_at_mut(FIXED_LENGTH + extra);
    target.storage.read_padded_at(MemMut::from(&mut *kept), at)?;
    target.storage.read_padded_at(MemMut::from(tail), at + FIXED_LENGTH as u64 + claimed)?;
    if let Some(size) = kept.get_mut(36..40) {
        size.copy_from_slice(&MAX_SNAPSHOT_EXTRA_DATA.to_be_bytes());
    }
    match SnapshotRecord::parse(&entry) {
        Ok(ParsedSnapshot::Record(record, _)) => Ok(Entry {
            record: *record,
            length: (FIXED_LENGTH as u64 + claimed + names).next_multiple_of(8),
            cut: Some(u32::try_from(claimed).unwrap_or(u32::MAX)),
        }),
        _ => Err(broken()),
    }
}
