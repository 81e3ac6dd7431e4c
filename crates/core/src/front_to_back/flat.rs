//! A disk as it is, with a few bytes behind it where the format has some.

use std::ops::ControlFlow;

use super::{FrontToBack, Planning, read_padded};
use crate::raw::SECTOR;
use crate::walk::{Steps, for_each_extent};
use crate::{Error, ErrorKind, GuestSource, Job, MemMut, Result};

/// How much of the map is looked at at once.
const STEPS: Steps = Steps::of(4 << 20, 1024);

/// A file that is the disk.
#[derive(Debug, Clone)]
pub struct Flat {
    /// Bytes of the disk, which reads as zeroes behind the end of the source.
    size: u64,
    tail: Vec<u8>,
}

impl Flat {
    /// A raw file: whole sectors.
    ///
    /// # Errors
    /// `Limit` for one of more than 2^63 - 1 bytes.
    pub fn raw(planning: &Planning<'_>) -> Result<Self> {
        let size = planning.source.virtual_size();
        let whole = size.checked_next_multiple_of(SECTOR).filter(|size| i64::try_from(*size).is_ok());
        let too_large = || Error::new(ErrorKind::Limit, format!("a disk of {size} bytes is too large"));
        Ok(Self::new(whole.ok_or_else(too_large)?, Vec::new()))
    }

    /// A disk of `size` bytes, and `tail` behind it.
    #[must_use]
    pub fn new(size: u64, tail: Vec<u8>) -> Self {
        Self { size, tail }
    }
}

impl FrontToBack for Flat {
    fn length(&self) -> u64 {
        self.size + self.tail.len() as u64
    }

    fn fill(&self, source: &dyn GuestSource, mut offset: u64, mut buf: MemMut<'_>, job: &Job) -> Result<()> {
        let of_disk = self.size.saturating_sub(offset).min(buf.len() as u64);
        let mut disk = buf.take_front(of_disk as usize);
        for_each_extent(source, offset..offset + of_disk, STEPS, job, |extent| {
            job.checkpoint()?;
            // A hole is not read: the system would have to make pages of it first.
            let end = extent.start + extent.length;
            let mut part = disk.take_front(end.saturating_sub(offset).min(disk.len() as u64) as usize);
            let length = part.len() as u64;
            match extent.zero {
                true => part.fill_zero(),
                false => read_padded(source, part, offset)?,
            }
            offset += length;
            Ok(ControlFlow::Continue(()))
        })?;
        // What lies behind the end of the source.
        offset += disk.len() as u64;
        disk.fill_zero();
        let rest = self.tail.get(offset.saturating_sub(self.size) as usize..).unwrap_or_default();
        buf.copy_from(rest);
        Ok(())
    }
}
