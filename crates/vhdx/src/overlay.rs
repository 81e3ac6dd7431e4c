//! A file with its log brought in, in memory: the file itself is not changed.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::ops::{Deref, Range};

use qcow2_core::storage::{ReadStorage, Run};
use qcow2_core::{Mem, MemMut, Storage, forward_storage};

use crate::structures::Patch;

/// What lies over the file from an offset on: up to its end, and the bytes, or zeroes.
type Piece = (u64, Option<Box<[u8]>>);

/// A storage that reads as the file will when its log was replayed. Nothing can be written to it.
#[derive(Debug)]
pub(crate) struct Replayed<S> {
    inner: S,
    pieces: BTreeMap<u64, Piece>,
    /// The file has at least so many bytes.
    length: u64,
}

impl<S> Replayed<S> {
    /// `inner` with `patches`, in this order; their places and lengths are multiples of 4 KiB.
    pub(crate) fn new(inner: S, patches: Vec<Patch>, length: u64) -> Self {
        let mut replayed = Self { inner, pieces: BTreeMap::new(), length };
        for patch in patches {
            match patch {
                Patch::Data(offset, bytes) => {
                    replayed.insert(offset, offset + bytes.len() as u64, Some(bytes))
                }
                Patch::Zero(offset, length) => replayed.insert(offset, offset + length, None),
            }
        }
        replayed
    }

    fn insert(&mut self, start: u64, end: u64, bytes: Option<Box<[u8]>>) {
        if start == end {
            return;
        }
        let before = self.pieces.range(..start).next_back().filter(|(_, (before, _))| *before > start);
        // Sectors are never cut: only zeroes reach over the ends of what is new.
        let cut = before.map(|(at, (end, _))| (*at, *end));
        if let Some((at, old_end)) = cut {
            self.pieces.insert(at, (start, None));
            if old_end > end {
                self.pieces.insert(end, (old_end, None));
            }
        }
        let covered: Vec<u64> = self.pieces.range(start..end).map(|(at, _)| *at).collect();
        for at in covered {
            if let Some((old_end, None)) = self.pieces.remove(&at)
                && old_end > end
            {
                self.pieces.insert(end, (old_end, None));
            }
        }
        self.length = self.length.max(end);
        self.pieces.insert(start, (end, bytes));
    }

    /// The piece at `offset`, or where the next one begins.
    fn at(&self, offset: u64) -> Result<(u64, &Piece), u64> {
        match self.pieces.range(..=offset).next_back().filter(|(_, (end, _))| *end > offset) {
            Some((start, piece)) => Ok((*start, piece)),
            None => Err(self.pieces.range(offset..).next().map_or(u64::MAX, |(start, _)| *start)),
        }
    }

    fn refused<T>() -> io::Result<T> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }
}

#[deny(clippy::missing_trait_methods, reason = "in front of another storage: a new method must be passed on")]
impl<S> ReadStorage for Replayed<S>
where
    S: Deref<Target: Storage> + fmt::Debug + Send + Sync,
{
    fn read_at(&self, buf: MemMut<'_>, offset: u64) -> io::Result<usize> {
        let room = |end: u64| usize::try_from(end.saturating_sub(offset)).unwrap_or(usize::MAX);
        match self.at(offset) {
            Ok((start, (end, bytes))) => {
                let mut part = buf.split_at(room(*end)).0;
                let length = part.len();
                match bytes {
                    Some(bytes) => {
                        part.copy_from(bytes.get((offset - start) as usize..).unwrap_or_default());
                    }
                    None => part.fill_zero(),
                }
                Ok(length)
            }
            Err(next) => {
                let mut part = buf.split_at(room(next.min(self.len()?))).0;
                let read = if part.is_empty() { 0 } else { self.inner.read_at(part.reborrow(), offset)? };
                if read == 0 {
                    part.fill_zero();
                    return Ok(part.len());
                }
                Ok(read)
            }
        }
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.inner.len()?.max(self.length))
    }

    fn run_in(&self, range: Range<u64>) -> io::Result<Run> {
        match self.at(range.start) {
            Ok((_, (end, bytes))) => Ok(Run::new(*end, bytes.is_some())),
            Err(next) => {
                let run = self.inner.run_in(range.start..range.end.min(next))?;
                Ok(Run { end: run.end.min(next), ..run })
            }
        }
    }

    forward_storage!(inner: is_empty allocated_bytes identity traits io_limits path operation is_transient lock forget arriving no_fd read_each);
}

#[deny(clippy::missing_trait_methods, reason = "in front of another storage: a new method must be passed on")]
impl<S> Storage for Replayed<S>
where
    S: Deref<Target: Storage> + fmt::Debug + Send + Sync,
{
    fn write_at(&self, _: Mem<'_>, _: u64) -> io::Result<usize> {
        Self::refused()
    }
    fn write_vectored_at(&self, _: &[Mem<'_>], _: u64) -> io::Result<usize> {
        Self::refused()
    }
    fn set_len(&self, _: u64) -> io::Result<()> {
        Self::refused()
    }
    fn write_zeroes(&self, _: u64, _: u64, _: bool) -> io::Result<()> {
        Self::refused()
    }
    fn discard(&self, _: u64, _: u64) -> io::Result<()> {
        Self::refused()
    }
    fn allocate(&self, _: u64, _: u64) -> io::Result<()> {
        Self::refused()
    }
    forward_storage!(inner: sync_data begin_sync check_close never_ahead never_clone write_each);
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use qcow2_core::StorageExt;
    use qcow2_core::storage::MemoryStorage;

    use super::*;

    #[test]
    fn patches_lie_over_the_file_in_their_order() {
        const S: u64 = 4096;
        let mut model: Vec<u8> = (0..10 * S).map(|at| (at / S) as u8 + 1).collect();
        let inner: Arc<dyn Storage> = Arc::new(MemoryStorage::from_bytes(&model));
        let data = |at: u64, byte| Patch::Data(at * S, vec![byte; S as usize].into());
        let zero = |at: u64, count: u64| Patch::Zero(at * S, count * S);
        let patches = vec![
            data(2, 70),
            zero(1, 6),
            data(3, 71),
            data(3, 72),
            zero(4, 1),
            zero(5, 9),
            data(12, 73),
            zero(0, 0),
            zero(12, 1),
        ];
        model.resize(16 * S as usize, 0);
        for patch in &patches {
            match patch {
                Patch::Data(at, bytes) => model[*at as usize..][..bytes.len()].copy_from_slice(bytes),
                Patch::Zero(at, length) => model[*at as usize..][..*length as usize].fill(0),
            }
        }
        let replayed = Replayed::new(inner, patches, 16 * S);
        assert_eq!(replayed.len().unwrap(), 16 * S);
        for (start, end) in [(0, 16 * S), (100, 9 * S + 7), (3 * S + 5, 3 * S + 9), (13 * S, 16 * S)] {
            let mut found = vec![9; (end - start) as usize];
            replayed.read_exact_at(MemMut::from(&mut found[..]), start).unwrap();
            assert!(found == model[start as usize..end as usize], "{start}..{end}");
        }
        assert_eq!(replayed.read_at(MemMut::from(&mut [0; 9][..]), 16 * S).unwrap(), 0);
        assert_eq!(replayed.run_in(3 * S..4 * S).unwrap(), Run::new(4 * S, true));
        assert_eq!(replayed.run_in(S..4 * S).unwrap(), Run::new(3 * S, false));
        replayed.write_at(Mem::from(&[1][..]), 0).unwrap_err();
    }
}
