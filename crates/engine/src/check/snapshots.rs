//! The snapshot table, as far as a check needs it.

use qcow2_format::limits::{
    MAX_SNAPSHOT_EXTRA_DATA, MAX_SNAPSHOT_TABLE_BYTES, MAX_SNAPSHOTS, MAX_VIRTUAL_SIZE,
};
use qcow2_format::snapshot::{
    FIXED_LENGTH, ParsedSnapshot, V3_EXTRA_DATA, names_length, set_extra_data_size,
};
use qcow2_format::{FormatError, SnapshotRecord};

use super::target::{SECTOR, Stop, Target};
use crate::image::l1_damage;
use crate::{Error, ErrorKind, MemMut, StorageExt};
use qcow2_core::check::{FindingCode, Repair, Severity, Tally};

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
    /// Corruptions of entries that stay: a repair removes them with a new table.
    pub(super) damaged: u64,
    /// Entries behind those that an image may have: a repair gives them up with a lower count in the header.
    pub(super) overhanging: u64,
}

impl SnapshotTable {
    /// Corruptions of the table.
    pub(super) fn corruptions(&self) -> u64 {
        self.damaged + self.overhanging
    }

    /// Gives up the last `count` entries of the table, the first of them at `at`.
    fn give_up(&mut self, tally: &mut Tally, at: u64, count: u32, reason: &str) {
        self.overhanging += u64::from(count);
        tally.announce(Severity::Note, false, FindingCode::Snapshot, at, || {
            format!("Discarding {count} overhanging snapshots{reason}")
        });
    }

    fn push(&mut self, entry: Entry, keep: bool) {
        let Entry { mut record, .. } = entry;
        record.id.truncate(record.id_text().len());
        record.name.truncate(record.name_text().len());
        self.entries.push(Snapshot {
            id: String::from_utf8_lossy(&record.id).into_owned(),
            name: String::from_utf8_lossy(&record.name).into_owned(),
            l1_offset: record.l1_table_offset.get(),
            l1_size: record.l1_size,
        });
        if keep {
            self.records.push(record);
        }
    }
}

/// Reads the table. One that cannot be read fails the check: without it, the references of snapshots would be taken for
/// leaks.
pub(super) fn read(target: &Target<'_>, tally: &mut Tally) -> Result<SnapshotTable, Stop> {
    let repair = target.repair == Some(Repair::All);
    let mut table = SnapshotTable::default();
    let count = entries_to_read(target, repair, &mut table, tally)?;
    let length = target.storage.size()?;
    let file_length = length.next_multiple_of(SECTOR);
    let mut incomplete = Vec::new();
    // What a repaired table takes: extra data beyond the limit is cut off.
    let mut kept = 0;
    for index in 0..count {
        target.job.checkpoint()?;
        let at = target.header.snapshots_offset.get().saturating_add(table.length);
        if repair && at.saturating_add(FIXED_LENGTH as u64) > file_length {
            // Nothing says any more where these snapshots are.
            table.give_up(tally, at, count - index, " (they lie behind the end of the file)");
            break;
        }
        let entry = read_entry(target, index, at)?;
        if let Some(claimed) = entry.cut {
            table.damaged += 1;
            tally.announce(Severity::Note, false, FindingCode::Snapshot, at, || {
                format!("Discarding too much extra metadata in {}", too_much(index, claimed))
            });
        }
        kept += entry.length - entry.cut.map_or(0, |claimed| claimed - u64::from(MAX_SNAPSHOT_EXTRA_DATA));
        if kept > MAX_SNAPSHOT_TABLE_BYTES || table.length + entry.length > i32::MAX as u64 {
            if !repair {
                let message = format!(
                    "failed to read the snapshot table: Snapshot table is too big: a repair of all gives its last {} up",
                    count - index
                );
                return Err(Stop::corrupt(message, at));
            }
            table.give_up(tally, at, count - index, " (snapshot table is too big)");
            break;
        }
        if kept > target.options.limits.max_metadata_bytes {
            let message = format!("a snapshot table of {kept} bytes or more exceeds the limit");
            return Err(Stop::Error(Error::new(ErrorKind::Limit, message).with_field("snapshot table")));
        }
        let complete = at.saturating_add(entry.unpadded) <= length;
        let old = target.header.version >= 3 && (entry.record.extra_data_size as usize) < V3_EXTRA_DATA;
        // What lies behind the file is taken for zeroes, as in QEMU, which however does not tell of it.
        if old || (!complete && entry.cut.is_none()) {
            incomplete.push((index, at));
        }
        table.length += entry.length;
        if !repair {
            table.push(entry, false);
        } else if let Some(entry) = with_l1_table(target, entry, file_length, &mut table, tally) {
            table.push(entry, true);
        }
    }
    table.damaged += incomplete.len() as u64;
    for (index, at) in incomplete {
        tally.announce(Severity::Corruption, repair, FindingCode::Snapshot, at, || {
            format!("snapshot table entry {index} is incomplete")
        });
    }
    Ok(table)
}

/// The entries to read: those that the header claims, as far as an image may have so many.
fn entries_to_read(
    target: &Target<'_>,
    repair: bool,
    table: &mut SnapshotTable,
    tally: &mut Tally,
) -> Result<u32, Stop> {
    let claimed = target.header.nb_snapshots;
    let limit = target.options.limits.max_snapshots;
    let count = claimed.min(MAX_SNAPSHOTS);
    let at = target.header.snapshots_offset.get();
    let size = target.header.geometry.cluster_size();
    let nowhere = !at.is_multiple_of(size) || at > i64::MAX as u64 - MAX_SNAPSHOT_TABLE_BYTES;
    if nowhere && !repair {
        // Also where there are no entries: QEMU does not open an image that says so.
        let message = "snapshot table offset invalid: a repair of all gives its snapshots up";
        return Err(Stop::corrupt(message, at));
    }
    // What is read as a table over the header shows in the references.
    if nowhere || (repair && claimed > 0 && at < size) {
        table.damaged += u64::from(claimed.max(1));
        tally.announce(Severity::Corruption, true, FindingCode::Snapshot, at, || {
            format!("offset {at:#x} of a snapshot table of {claimed} entries")
        });
        return Ok(0);
    }
    if count > limit {
        let message = format!("{claimed} snapshots exceed the limit of {limit}");
        return Err(Stop::Error(Error::new(ErrorKind::Limit, message).with_field("nb_snapshots")));
    }
    if claimed > count {
        if !repair {
            let message = format!(
                "snapshot table too large: {claimed} snapshots exceed the limit of {MAX_SNAPSHOTS}; a repair of all \
                 gives the last {} up",
                claimed - count
            );
            return Err(Stop::corrupt(message, at));
        }
        table.give_up(tally, at, claimed - count, "");
    }
    Ok(count)
}

/// The entry as a repair keeps it: `None` where nothing says where the snapshot's L1 table is. A size that is wrong by
/// itself becomes the one that the disk needs, if such a table is in the file.
fn with_l1_table(
    target: &Target<'_>,
    mut entry: Entry,
    file_length: u64,
    table: &mut SnapshotTable,
    tally: &mut Tally,
) -> Option<Entry> {
    let header = target.header;
    let geometry = &header.geometry;
    let record = &mut entry.record;
    let at = record.l1_table_offset.get();
    let Some(wrong) = l1_damage(at, record.l1_size, geometry, file_length) else { return Some(entry) };
    let disk = record.disk_size.unwrap_or(header.size).min(MAX_VIRTUAL_SIZE);
    let disk =
        geometry.l1_entries_for(disk) + geometry.l1_entries_for(record.vm_state_size.min(MAX_VIRTUAL_SIZE));
    let mended = u32::try_from(disk).ok().filter(|size| {
        *size > 0 && *size < record.l1_size && l1_damage(at, *size, geometry, file_length).is_none()
    });
    let (id, name) = (String::from_utf8_lossy(record.id_text()), String::from_utf8_lossy(record.name_text()));
    let what = match mended {
        Some(size) => format!("snapshot {id} ({name}) {wrong}; it gets {size} entries"),
        None => format!("snapshot {id} ({name}) {wrong}; the snapshot is given up"),
    };
    table.damaged += 1;
    tally.announce(Severity::Corruption, true, FindingCode::Snapshot, at, || what);
    record.l1_size = mended?;
    Some(entry)
}

/// Names an entry with too much extra data.
fn too_much(index: u32, claimed: u64) -> String {
    format!("snapshot table entry {index} ({claimed} > {MAX_SNAPSHOT_EXTRA_DATA})")
}

/// An entry as it lies in the table.
struct Entry {
    record: SnapshotRecord,
    /// Bytes it takes, with padding.
    length: u64,
    /// Bytes it takes, without.
    unpadded: u64,
    /// The size of its extra data, where that was cut to the limit.
    cut: Option<u64>,
}

fn read_entry(target: &Target<'_>, index: u32, at: u64) -> Result<Entry, Stop> {
    let mut buffer = vec![0; FIRST_READ];
    // Two rounds at most: the first read tells the length of the entry.
    loop {
        target.storage.read_padded_at(MemMut::from(&mut buffer[..]), at)?;
        match SnapshotRecord::parse(&buffer) {
            Ok(ParsedSnapshot::Record(record, length)) => {
                let names = record.id.len() + record.name.len();
                let unpadded = FIXED_LENGTH as u64 + u64::from(record.extra_data_size) + names as u64;
                return Ok(Entry { record: *record, length: length as u64, unpadded, cut: None });
            }
            Ok(ParsedSnapshot::Needs(length)) if length > buffer.len() => buffer.resize(length, 0),
            Ok(ParsedSnapshot::Needs(_)) => {
                return Err(Stop::corrupt("a snapshot table entry has no end", at));
            }
            Err(FormatError::Limit { value, .. }) if target.repair == Some(Repair::All) => {
                return cut_entry(target, at, &buffer, value);
            }
            Err(FormatError::Limit { value, .. }) => {
                let entry = too_much(index, value);
                let message = format!(
                    "failed to read the snapshot table: Too much extra metadata in {entry}: a repair of all discards it"
                );
                return Err(Stop::corrupt(message, at));
            }
            Err(error) => return Err(Stop::corrupt(error.to_string(), at)),
        }
    }
}

/// Reads an entry whose `claimed` bytes of extra data are beyond the limit: as much of them as may be is kept.
fn cut_entry(target: &Target<'_>, at: u64, start: &[u8], claimed: u64) -> Result<Entry, Stop> {
    let broken = || Stop::corrupt("a snapshot table entry cannot be read", at);
    let names = names_length(start).map_err(|_| broken())?;
    let extra = MAX_SNAPSHOT_EXTRA_DATA as usize;
    let mut entry = vec![0; FIXED_LENGTH + extra + names];
    let (kept, tail) = entry.split_at_mut(FIXED_LENGTH + extra);
    target.storage.read_padded_at(MemMut::from(&mut *kept), at)?;
    target.storage.read_padded_at(MemMut::from(tail), at + FIXED_LENGTH as u64 + claimed)?;
    set_extra_data_size(&mut entry, MAX_SNAPSHOT_EXTRA_DATA);
    let unpadded = FIXED_LENGTH as u64 + claimed + names as u64;
    match SnapshotRecord::parse(&entry) {
        Ok(ParsedSnapshot::Record(record, _)) => {
            Ok(Entry { record: *record, length: unpadded.next_multiple_of(8), unpadded, cut: Some(claimed) })
        }
        _ => Err(broken()),
    }
}
