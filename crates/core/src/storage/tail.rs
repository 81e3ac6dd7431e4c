//! The rest of a file, behind what it begins with.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use super::{ReadStorage, ReadTransfer, Run, Storage, WriteTransfer, read_each, write_each};
use crate::{Mem, MemMut, forward_storage};

/// The bytes of `host` from `start` on, as a file of their own. What lies in front of them cannot be reached through it.
#[derive(Debug)]
pub struct Tail {
    host: Arc<dyn Storage>,
    /// Bytes in front.
    start: u64,
}

impl Tail {
    /// The bytes of `host` from `start` on.
    pub fn new(host: Arc<dyn Storage>, start: u64) -> Self {
        Self { host, start }
    }

    /// Where an offset lies in the host.
    fn place(&self, offset: u64) -> io::Result<u64> {
        offset.checked_add(self.start).ok_or_else(|| io::ErrorKind::InvalidInput.into())
    }
}

#[deny(clippy::missing_trait_methods, reason = "in front of another storage: a new method must be passed on")]
impl ReadStorage for Tail {
    fn read_at(&self, buf: MemMut<'_>, offset: u64) -> io::Result<usize> {
        // Nothing lies behind the largest offset.
        self.place(offset).map_or(Ok(0), |place| self.host.read_at(buf, place))
    }
    fn len(&self) -> io::Result<u64> {
        Ok(self.host.len()?.saturating_sub(self.start))
    }
    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }
    fn read_batch(&self, batch: &mut [ReadTransfer<'_>]) {
        read_each(self, batch);
    }
    fn run_in(&self, range: Range<u64>) -> io::Result<Run> {
        let Ok(start) = self.place(range.start) else { return Ok(Run::new(u64::MAX, false)) };
        let run = self.host.run_in(start..range.end.saturating_add(self.start))?;
        Ok(Run { end: run.end.saturating_sub(self.start), ..run })
    }
    fn forget(&self, range: Range<u64>) {
        self.host.forget(range.start.saturating_add(self.start)..range.end.saturating_add(self.start));
    }
    forward_storage!(host: allocated_bytes identity traits io_limits path operation is_transient lock no_arriving no_fd);
}

#[deny(clippy::missing_trait_methods, reason = "in front of another storage: a new method must be passed on")]
impl Storage for Tail {
    fn write_at(&self, buf: Mem<'_>, offset: u64) -> io::Result<usize> {
        self.host.write_at(buf, self.place(offset)?)
    }
    fn write_vectored_at(&self, bufs: &[Mem<'_>], offset: u64) -> io::Result<usize> {
        self.host.write_vectored_at(bufs, self.place(offset)?)
    }
    fn write_batch(&self, batch: &mut [WriteTransfer<'_>]) {
        write_each(self, batch);
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.host.set_len(self.place(len)?)
    }
    fn write_zeroes(&self, offset: u64, length: u64, unmap: bool) -> io::Result<()> {
        self.host.write_zeroes(self.place(offset)?, length, unmap)
    }
    fn discard(&self, offset: u64, length: u64) -> io::Result<()> {
        self.host.discard(self.place(offset)?, length)
    }
    fn allocate(&self, offset: u64, length: u64) -> io::Result<()> {
        self.host.allocate(self.place(offset)?, length)
    }
    fn allocate_ahead(&self, offset: u64, length: u64) -> io::Result<()> {
        self.host.allocate_ahead(self.place(offset)?, length)
    }
    fn clone_range(
        &self,
        from: &dyn ReadStorage,
        from_offset: u64,
        offset: u64,
        length: u64,
    ) -> io::Result<()> {
        self.host.clone_range(from, from_offset, self.place(offset)?, length)
    }
    forward_storage!(host: sync_data begin_sync check_close);
}
