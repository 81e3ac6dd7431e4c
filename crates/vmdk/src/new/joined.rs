//! Several files seen as one.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use qcow2_core::storage::{ReadStorage, Run, Traits};
use qcow2_core::{Mem, MemMut, Storage};

/// Files one behind the other, each with the same number of bytes at most.
#[derive(Debug)]
pub(super) struct Joined {
    files: Vec<Arc<dyn Storage>>,
    /// Bytes for each.
    stride: u64,
}

impl Joined {
    pub(super) fn new(files: Vec<Arc<dyn Storage>>, stride: u64) -> Self {
        Self { files, stride }
    }

    /// The file with the byte at `offset`, where that is in it, and how many bytes from there on are.
    fn at(&self, offset: u64) -> io::Result<(&Arc<dyn Storage>, u64, u64)> {
        let file = usize::try_from(offset / self.stride).ok().and_then(|number| self.files.get(number));
        let inside = offset % self.stride;
        file.map(|file| (file, inside, self.stride - inside))
            .ok_or_else(|| io::ErrorKind::InvalidInput.into())
    }

    /// Runs `then` on the parts of a range: a file, the first byte in it, how many, and how many came before.
    fn parts(
        &self,
        offset: u64,
        length: u64,
        mut then: impl FnMut(&Arc<dyn Storage>, u64, u64, u64) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut done = 0;
        while done < length {
            let (file, inside, room) = self.at(offset + done)?;
            let part = room.min(length - done);
            then(file, inside, part, done)?;
            done += part;
        }
        Ok(())
    }
}

impl ReadStorage for Joined {
    fn read_at(&self, mut buf: MemMut<'_>, offset: u64) -> io::Result<usize> {
        let Ok((file, inside, room)) = self.at(offset) else { return Ok(0) };
        let part = buf.take_front(usize::try_from(room).unwrap_or(usize::MAX).min(buf.len()));
        file.read_at(part, inside)
    }

    fn len(&self) -> io::Result<u64> {
        let last = self.files.iter().enumerate().rev();
        for (number, file) in last {
            let length = file.len()?;
            if length > 0 {
                return Ok(number as u64 * self.stride + length);
            }
        }
        Ok(0)
    }

    fn run_in(&self, range: Range<u64>) -> io::Result<Run> {
        let (file, inside, room) = self.at(range.start)?;
        let end = inside + room.min(range.end - range.start);
        let run = file.run_in(inside..end)?;
        Ok(Run { end: range.start - inside + run.end.min(end), ..run })
    }

    fn allocated_bytes(&self) -> io::Result<u64> {
        self.files.iter().map(|file| file.allocated_bytes()).sum()
    }

    fn traits(&self) -> Traits {
        let first = self.files.first().map(|file| file.traits());
        first.unwrap_or(Traits { writable: true, ..Traits::default() })
    }
}

impl Storage for Joined {
    fn write_at(&self, buf: Mem<'_>, offset: u64) -> io::Result<usize> {
        let (file, inside, room) = self.at(offset)?;
        file.write_at(buf.split_at(usize::try_from(room).unwrap_or(usize::MAX).min(buf.len())).0, inside)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        for (number, file) in (0u64..).zip(&self.files) {
            file.set_len(len.saturating_sub(number * self.stride).min(self.stride))?;
        }
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        self.files.iter().try_for_each(|file| file.sync_data())
    }

    fn check_close(&self) -> io::Result<()> {
        self.files.iter().try_for_each(|file| file.check_close())
    }

    fn write_zeroes(&self, offset: u64, length: u64, unmap: bool) -> io::Result<()> {
        self.parts(offset, length, |file, at, part, _| file.write_zeroes(at, part, unmap))
    }

    fn discard(&self, offset: u64, length: u64) -> io::Result<()> {
        self.parts(offset, length, |file, at, part, _| file.discard(at, part))
    }

    fn allocate(&self, offset: u64, length: u64) -> io::Result<()> {
        self.parts(offset, length, |file, at, part, _| file.allocate(at, part))
    }

    fn allocate_ahead(&self, offset: u64, length: u64) -> io::Result<()> {
        self.parts(offset, length, |file, at, part, _| file.allocate_ahead(at, part))
    }

    fn clone_range(
        &self,
        from: &dyn ReadStorage,
        from_offset: u64,
        offset: u64,
        length: u64,
    ) -> io::Result<()> {
        self.parts(offset, length, |file, at, part, done| {
            file.clone_range(from, from_offset + done, at, part)
        })
    }
}
