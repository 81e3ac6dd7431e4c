//! A disk as it is, with a few bytes behind it where the format has some.

use super::{FrontToBack, Planning, read_padded};
use crate::raw::SECTOR;
use crate::{Error, ErrorKind, GuestSource, Job, MemMut, Result};

/// Bytes that are read between two looks at the job.
const STEP: usize = 4 << 20;

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
        while offset < self.size && !buf.is_empty() {
            job.checkpoint()?;
            let part = buf.take_front((self.size - offset).min(STEP as u64) as usize);
            let length = part.len() as u64;
            read_padded(source, part, offset)?;
            offset += length;
        }
        let rest = self.tail.get(offset.saturating_sub(self.size) as usize..).unwrap_or_default();
        buf.copy_from(rest);
        Ok(())
    }
}
