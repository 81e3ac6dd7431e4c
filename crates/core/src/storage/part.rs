//! A part of a file: what is stored inside of another file, read in place.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use super::{Arriving, ReadStorage, ReadTransfer, Run, Storage, Traits, read_each};
use crate::{MemMut, Result, forward_storage};

/// `length` bytes of `host` from `start` on, as a file of their own that is only read. What lies around them cannot be reached through it.
#[derive(Debug)]
pub struct Part {
    host: Arc<dyn Storage>,
    start: u64,
    length: u64,
}

impl Part {
    /// The part that begins at `start`. It ends with the host where that is shorter.
    pub fn new(host: Arc<dyn Storage>, start: u64, length: u64) -> Self {
        // What lies behind the largest offset is nowhere.
        Self { host, start, length: length.min(u64::MAX - start) }
    }

    /// Bytes from `offset` to the end.
    fn rest(&self, offset: u64) -> u64 {
        self.length.saturating_sub(offset)
    }
}

#[deny(clippy::missing_trait_methods, reason = "in front of another storage: a new method must be passed on")]
impl ReadStorage for Part {
    fn read_at(&self, mut buf: MemMut<'_>, offset: u64) -> io::Result<usize> {
        let inside = usize::try_from(self.rest(offset)).unwrap_or(usize::MAX).min(buf.len());
        if inside == 0 {
            return Ok(0);
        }
        self.host.read_at(buf.take_front(inside), self.start + offset)
    }
    fn len(&self) -> io::Result<u64> {
        // Of what is still coming nobody waits for the end of what lies behind.
        if self.host.arriving().is_some() {
            return Ok(self.length);
        }
        Ok(self.host.len()?.saturating_sub(self.start).min(self.length))
    }
    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }
    fn read_batch(&self, batch: &mut [ReadTransfer<'_>]) {
        read_each(self, batch);
    }
    fn run_in(&self, range: Range<u64>) -> io::Result<Run> {
        let inside = |offset: u64| self.start + offset.min(self.length);
        let places = inside(range.start)..inside(range.end);
        if places.is_empty() {
            return Ok(Run::new(u64::MAX, false));
        }
        let run = self.host.run_in(places)?;
        Ok(Run { end: run.end.saturating_sub(self.start), ..run })
    }
    /// Its length: a file system counts whole files.
    fn allocated_bytes(&self) -> io::Result<u64> {
        self.len()
    }
    fn forget(&self, range: Range<u64>) {
        let inside = |offset: u64| self.start + offset.min(self.length);
        self.host.forget(inside(range.start)..inside(range.end));
    }
    fn traits(&self) -> Traits {
        Traits { writable: false, block_device: false, ..self.host.traits() }
    }
    fn arriving(&self) -> Option<&dyn Arriving> {
        self.host.arriving().map(|_| self as &dyn Arriving)
    }
    forward_storage!(host: identity io_limits path operation is_transient lock no_fd);
}

impl Arriving for Part {
    fn taken(&self, offset: u64, length: u64) -> Result<()> {
        let (start, length) = (self.start + offset.min(self.length), length.min(self.rest(offset)));
        self.host.arriving().map_or(Ok(()), |host| host.taken(start, length))
    }
    fn settle(&self) -> io::Result<()> {
        self.host.arriving().map_or(Ok(()), Arriving::settle)
    }
}
