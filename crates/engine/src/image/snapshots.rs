//! Reading the snapshot table.

use qcow2_format::limits::{MAX_L1_BYTES, MAX_SNAPSHOT_TABLE_BYTES};
use qcow2_format::snapshot::ParsedSnapshot;
use qcow2_format::{FormatError, Geometry, Header, Limits, SnapshotRecord};

use crate::invalid::invalid;
use crate::{Error, ErrorKind, MemMut, Result, Storage, StorageExt};

/// Bytes read at a time: most tables fit into one piece.
const PIECE: u64 = 64 << 10;

/// The entries of a snapshot table, as far as they can be read.
#[derive(Debug, Default)]
pub(crate) struct LoadedSnapshots {
    /// In the table's order: all of them, or those in front of the damage.
    pub(crate) records: Vec<SnapshotRecord>,
    /// Why there are no more. The active disk does not depend on it.
    pub(crate) damage: Option<Error>,
}

impl LoadedSnapshots {
    /// The whole table.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(crate) fn whole(self) -> Result<Vec<SnapshotRecord>> {
        self.damage.map_or(Ok(self.records), Err)
    }
}

/// Loads the table as far as it can be read. Its size is known only by walking it, so it is read piece by piece: a
/// header that claims many snapshots costs no more memory than the file has bytes there.
///
/// # Errors
/// `Io`, and `Limit` for the limits of the caller: what the format does not allow is damage of the table.
pub(crate) fn load(storage: &dyn Storage, header: &Header, limits: &Limits) -> Result<LoadedSnapshots> {
    let mut loaded = LoadedSnapshots::default();
    if let Err(error) = header.check_snapshot_table() {
        loaded.damage = Some(invalid(error, ErrorKind::InvalidHeader));
        return Ok(loaded);
    }
    if header.nb_snapshots > limits.max_snapshots {
        let message =
            format!("nb_snapshots of {} exceeds the limit of {}", header.nb_snapshots, limits.max_snapshots);
        return Err(Error::new(ErrorKind::Limit, message).with_field("nb_snapshots"));
    }
    let start = header.snapshots_offset.0;
    let mut table = Table { storage, at: start, window: Vec::new(), consumed: 0 };
    for index in 0..header.nb_snapshots {
        match table.next(index)? {
            Ok(record) => loaded.records.push(record),
            Err(damage) => {
                loaded.damage = Some(damage);
                return Ok(loaded);
            }
        }
        let used = table.at - start;
        let too_large = |limit: u64| {
            let message = format!("snapshot table of more than {limit} bytes exceeds the limit");
            Error::new(ErrorKind::Limit, message).with_field("snapshot table")
        };
        if used > limits.max_metadata_bytes {
            return Err(too_large(limits.max_metadata_bytes));
        }
        if used > MAX_SNAPSHOT_TABLE_BYTES {
            loaded.damage = Some(too_large(MAX_SNAPSHOT_TABLE_BYTES));
            return Ok(loaded);
        }
    }
    Ok(loaded)
}

/// A table while it is read.
struct Table<'a> {
    storage: &'a dyn Storage,
    /// Host offset of the next entry.
    at: u64,
    /// Bytes that were read.
    window: Vec<u8>,
    /// Of those, how many are in front of the next entry.
    consumed: usize,
}

impl Table<'_> {
    /// The next entry, or what is wrong with it.
    fn next(&mut self, index: u32) -> Result<Result<SnapshotRecord>> {
        loop {
            let rest = self.window.get(self.consumed..).unwrap_or_default();
            match SnapshotRecord::parse(rest) {
                Err(error) => return Ok(Err(unreadable(index, error).with_offset(self.at))),
                Ok(ParsedSnapshot::Record(record, length)) => {
                    self.consumed += length;
                    self.at += length as u64;
                    return Ok(Ok(*record));
                }
                Ok(ParsedSnapshot::Needs(needed)) => {
                    let mut piece = vec![0u8; (needed as u64).max(PIECE) as usize];
                    let got = self.storage.read_up_to_at(MemMut::from(&mut piece[..]), self.at)?;
                    if got < needed {
                        let message = format!("the file ends inside snapshot table entry {index}");
                        let error = Error::new(ErrorKind::Corrupt, message).with_field("snapshot table");
                        return Ok(Err(error.with_offset(self.at)));
                    }
                    piece.truncate(got);
                    self.window = piece;
                    self.consumed = 0;
                }
            }
        }
    }
}

/// What is wrong with the L1 table that a snapshot table entry names, so that nothing of the snapshot can be read:
/// `None` where it can be. A last cluster of the file that is cut short still counts as a whole one.
pub(crate) fn l1_damage(offset: u64, entries: u32, geometry: &Geometry, file_length: u64) -> Option<String> {
    let bytes = u64::from(entries) * 8;
    if geometry.in_cluster(offset) != 0 {
        return Some(format!("l1_offset={offset:#x}: L1 table is not cluster aligned"));
    }
    if bytes > MAX_L1_BYTES {
        return Some(format!("l1_size={entries:#x}: L1 table is too large"));
    }
    if bytes > 0 && offset < geometry.cluster_size() {
        return Some(format!("l1_offset={offset:#x}: L1 table overlaps the header"));
    }
    if offset > i64::MAX as u64 - MAX_L1_BYTES {
        return Some(format!("l1_offset={offset:#x}: L1 table lies behind the largest file offset"));
    }
    let end = offset.saturating_add(bytes);
    let outside = bytes > 0 && end >= file_length.saturating_add(geometry.cluster_size());
    outside.then(|| format!("l1_offset={offset:#x}: L1 table lies outside the file"))
}

/// Why entry `index` cannot be read.
fn unreadable(index: u32, error: FormatError) -> Error {
    let error = invalid(error, ErrorKind::Corrupt);
    let message = format!("snapshot table entry {index}: {}", error.message());
    Error::new(error.kind(), message).with_source(error)
}

/// Index of the snapshot with this id, else with this name.
pub(crate) fn find(snapshots: &[SnapshotRecord], wanted: &[u8]) -> Result<usize> {
    snapshots
        .iter()
        .position(|s| s.id_text() == wanted)
        .or_else(|| snapshots.iter().position(|s| s.name_text() == wanted))
        .ok_or_else(|| {
            let message = format!("no snapshot has the id or name '{}'", String::from_utf8_lossy(wanted));
            Error::new(ErrorKind::NoSnapshot, message)
        })
}
