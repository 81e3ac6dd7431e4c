//! Large guest requests that can be cancelled: part by part, so that it is known what was done.

use std::ops::Range;

use crate::image::Image;
use crate::{Job, Mem, MemMut, Result};

/// Guest bytes of one part of a request that changes mappings: a multiple of every cluster size.
const MAPPED: u64 = 1 << 30;
/// Guest bytes of one part of a read or a write.
const MOVED: u64 = 64 << 20;
/// Guest bytes of one part that is compressed.
const PACKED: u64 = 2 << 20;

/// Runs `request` for the parts of `range` in order, cut where guest offsets are multiples of `part`. Of a request that ends
/// early, `job` has counted the bytes of the parts that are done; none behind them has changed, but for the part that failed.
fn in_parts(
    job: &Job,
    range: Range<u64>,
    part: u64,
    mut request: impl FnMut(Range<u64>) -> Result<()>,
) -> Result<()> {
    let mut at = range.start;
    loop {
        job.checkpoint()?;
        let end = (at - at % part).saturating_add(part).min(range.end);
        request(at..end)?;
        job.advance(end - at);
        at = end;
        if at >= range.end {
            return Ok(());
        }
    }
}

impl Image {
    /// As [`Image::read_at`], in parts between which it can be cancelled.
    ///
    /// # Errors
    /// As [`Image::read_at`], and `Aborted`.
    pub fn read_as(&self, job: &Job, mut buf: MemMut<'_>, offset: u64) -> Result<()> {
        let range = self.guest_range(offset, buf.len() as u64)?;
        in_parts(job, range, MOVED, |part| {
            self.read_at(buf.take_front((part.end - part.start) as usize), part.start)
        })
    }

    /// As [`Image::write_at`], or as [`Image::write_compressed_at`], in parts between which it can be cancelled: the bytes
    /// that `job` has counted are written then, and none behind them.
    ///
    /// # Errors
    /// As [`Image::write_at`], and `Aborted`.
    pub fn write_as(&self, job: &Job, buf: Mem<'_>, offset: u64, compressed: bool) -> Result<()> {
        let range = self.guest_range(offset, buf.len() as u64)?;
        let mut rest = buf;
        in_parts(job, range, if compressed { PACKED } else { MOVED }, |part| {
            let front;
            (front, rest) = rest.split_at((part.end - part.start) as usize);
            if compressed {
                self.write_compressed_at(front, part.start)
            } else {
                self.write_at(front, part.start)
            }
        })
    }

    /// As [`Image::write_zeroes`], in parts as [`Image::write_as`].
    ///
    /// # Errors
    /// As [`Image::write_zeroes`], and `Aborted`.
    pub fn write_zeroes_as(&self, job: &Job, offset: u64, length: u64, unmap: bool) -> Result<()> {
        let range = self.guest_range(offset, length)?;
        in_parts(job, range, MAPPED, |part| self.write_zeroes(part.start, part.end - part.start, unmap))
    }

    /// As [`Image::discard`], in parts as [`Image::write_as`].
    ///
    /// # Errors
    /// As [`Image::discard`], and `Aborted`.
    pub fn discard_as(&self, job: &Job, offset: u64, length: u64) -> Result<()> {
        let range = self.guest_range(offset, length)?;
        in_parts(job, range, MAPPED, |part| self.discard(part.start, part.end - part.start))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ErrorKind;

    #[test]
    fn what_is_done_is_counted_and_nothing_behind_it_begins() {
        let job = Job::new();
        let mut parts = Vec::new();
        let ended = in_parts(&job, 5..35, 10, |part| {
            parts.push(part.clone());
            if part.end == 20 {
                job.cancel();
            }
            Ok(())
        });
        assert_eq!(ended.unwrap_err().kind(), ErrorKind::Aborted);
        assert_eq!(parts, [5..10, 10..20]);
        assert_eq!(job.progress().0, 15);
    }
}
