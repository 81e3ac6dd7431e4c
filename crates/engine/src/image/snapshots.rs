//! Reading the snapshot table.

use qcow2_format::limits::MAX_SNAPSHOT_TABLE_BYTES;
use qcow2_format::snapshot::ParsedSnapshot;
use qcow2_format::{FormatError, Header, Limits, SnapshotRecord};

use crate::invalid::invalid;
use crate::{Error, ErrorKind, MemMut, Result, Storage, StorageExt};

/// Bytes read at a time: most tables fit into one piece.
const PIECE: u64 = 64 << 10;

/// Loads the whole table. Its size is known only by walking it, so it is read piece by piece: a header that claims
/// many snapshots costs no more memory than the file has bytes there.
pub(crate) fn load(storage: &dyn Storage, header: &Header, limits: &Limits) -> Result<Vec<SnapshotRecord>> {
    let limit = MAX_SNAPSHOT_TABLE_BYTES.min(limits.max_metadata_bytes);
    let mut records = Vec::new();
    let mut at = header.snapshots_offset.0;
    let mut window = Vec::new();
    let corrupt = |message: String, at: u64| {
        Error::new(ErrorKind::Corrupt, message).with_field("snapshot table").with_offset(at)
    };
    if header.nb_snapshots > limits.max_snapshots {
        let message =
            format!("nb_snapshots of {} exceeds the limit of {}", header.nb_snapshots, limits.max_snapshots);
        return Err(Error::new(ErrorKind::Limit, message).with_field("nb_snapshots"));
    }
    let mut consumed = 0usize;
    for index in 0..header.nb_snapshots {
        loop {
            let rest = window.get(consumed..).unwrap_or_default();
            let parsed = SnapshotRecord::parse(rest).map_err(|e| unreadable(index, e).with_offset(at))?;
            match parsed {
                ParsedSnapshot::Record(record, length) => {
                    consumed += length;
                    at += length as u64;
                    records.push(*record);
                    break;
                }
                ParsedSnapshot::Needs(needed) => {
                    let mut piece = vec![0u8; (needed as u64).max(PIECE) as usize];
                    let got = storage.read_up_to_at(MemMut::from(&mut piece[..]), at)?;
                    if got < needed {
                        let message = format!("the file ends inside snapshot table entry {index}");
                        return Err(corrupt(message, at));
                    }
                    piece.truncate(got);
                    window = piece;
                    consumed = 0;
                }
            }
        }
        let used = at - header.snapshots_offset.0;
        if used > limit {
            let message = format!("snapshot table of more than {limit} bytes exceeds the limit");
            return Err(Error::new(ErrorKind::Limit, message).with_field("snapshot table"));
        }
    }
    Ok(records)
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
