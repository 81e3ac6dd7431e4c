//! Writing a changed header so that a crash leaves the old one or the new one.

use qcow2_format::Header;
use qcow2_format::header::field::BACKING_FILE_OFFSET;

use crate::invalid::invalid;
use crate::{ErrorKind, Mem, MemMut, Result, Storage, StorageExt};

/// What a disk writes as a whole.
const SECTOR: usize = 512;

/// Writes `new` where `old` is, and makes it durable. What is behind it in the first cluster stays.
///
/// The fields of the header lie in the first sector, whose write is the moment of the change. What a new header has
/// behind that sector is written before, where that is possible: the old one must not reach so far, or have the same
/// bytes there. Otherwise (a long backing file name, or one that moves) all is one write, which the death of the
/// process does not tear either, but a power cut may.
///
/// # Errors
/// `Limit` for a header that does not fit into the first cluster; `Io`.
pub(crate) fn header(storage: &dyn Storage, old: &Header, new: &Header) -> Result<()> {
    let encode = |header: &Header| {
        header.encode().map_err(|e| storage.located(invalid(e, ErrorKind::InvalidArgument)))
    };
    let mut bytes = encode(new)?;
    let sector_end = bytes.len().next_multiple_of(SECTOR).min(new.geometry.cluster_len());
    let mut current = vec![0; sector_end];
    storage.read_padded_at(MemMut::from(&mut current[..]), 0)?;
    if current.get(..bytes.len()) == Some(&bytes[..]) {
        return Ok(());
    }
    // Whole sectors, with what is in the file behind the header.
    bytes.extend_from_slice(current.get(bytes.len()..).unwrap_or_default());
    let (head, tail) = bytes.split_at(SECTOR.min(bytes.len()));
    let same_tail = current.get(head.len()..) == Some(tail);
    let old_end = encode(old)?.len().max(used(&current, old));
    let write = |bytes: &[u8], at: usize| storage.write_all_at(Mem::from(bytes), at as u64);
    if !same_tail && old_end <= SECTOR {
        write(tail, head.len())?;
        storage.flush()?;
        write(head, 0)?;
    } else if same_tail {
        write(head, 0)?;
    } else {
        write(&bytes, 0)?;
    }
    storage.flush()
}

/// Where the backing file name in the first sector ends: a writer may leave gaps in front of it.
fn used(current: &[u8], old: &Header) -> usize {
    let offset = BACKING_FILE_OFFSET.read(current).unwrap_or(0);
    match &old.backing_file {
        Some(name) => usize::try_from(offset).unwrap_or(usize::MAX).saturating_add(name.len()),
        None => 0,
    }
}
