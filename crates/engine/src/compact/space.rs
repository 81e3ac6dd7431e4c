//! The space that files take, and what of it would be given back.

use crate::{Result, Storage, StorageExt};

/// Bytes of the range that take space in the file.
pub(super) fn allocated(storage: &dyn Storage, start: u64, length: u64) -> Result<u64> {
    let end = storage.size()?.min(start.saturating_add(length));
    let (mut at, mut sum) = (start, 0);
    while at < end {
        let run = storage.run(at..end)?;
        let stop = run.end.min(end).max(at + 1);
        sum += if run.data { stop - at } else { 0 };
        at = stop;
    }
    Ok(sum)
}

/// What a file system takes for its own tables of a file is below this, or below that part of the file's data.
const OWN_BYTES: u64 = 64 << 10;
const OWN_PART: u64 = 256;

/// Bytes that a file takes and that its file system calls holes, because nothing was written to them.
pub(super) fn preallocated(storage: &dyn Storage) -> Result<u64> {
    let data = allocated(storage, 0, storage.size()?)?;
    let more = storage.space_in_use()?.saturating_sub(data);
    Ok(if more > OWN_BYTES.max(data / OWN_PART) { more } else { 0 })
}

/// Space of a file that would be given back.
pub(super) struct Freed<'a> {
    storage: &'a dyn Storage,
    /// Bytes with data.
    data: u64,
    /// Bytes that the file system calls holes.
    holes: u64,
}

impl<'a> Freed<'a> {
    pub(super) fn of(storage: &'a dyn Storage) -> Self {
        Self { storage, data: 0, holes: 0 }
    }

    pub(super) fn add(&mut self, start: u64, length: u64) -> Result<()> {
        let length = length.min(self.storage.size()?.saturating_sub(start));
        let data = allocated(self.storage, start, length)?;
        self.data += data;
        self.holes += length - data;
        Ok(())
    }

    /// At least so much: which of the holes take space is not known, so that those which stay are taken to have as much of it as they can.
    pub(super) fn bytes(&self) -> Result<u64> {
        let length = self.storage.size()?;
        let stay = length - allocated(self.storage, 0, length)? - self.holes;
        Ok(self.data + preallocated(self.storage)?.saturating_sub(stay))
    }
}
