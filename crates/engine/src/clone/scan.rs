//! Where a disk has data: what is zero needs no copy.

use std::collections::VecDeque;
use std::ops::Range;

use crate::image::Image;
use crate::{GuestSource, Job, Result};

/// Guest bytes whose extents are asked for at once.
const WINDOW: u64 = 64 << 30;
/// Extents at which a window ends early.
const MOST_EXTENTS: usize = 4096;

/// The next part of a scan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Piece {
    /// From here to the data, everything is zero.
    pub(super) from: u64,
    /// Whole chunks with data in them; empty at the end of the range.
    pub(super) data: Range<u64>,
}

/// Walks a range of whole chunks (the last one may be cut off by the end of the disk).
#[derive(Debug)]
pub(super) struct Scan {
    at: u64,
    end: u64,
    chunk: u64,
    /// Most bytes of a piece's data: whole chunks.
    most: u64,
    asked: u64,
    data: VecDeque<Range<u64>>,
}

impl Scan {
    pub(super) fn new(range: Range<u64>, chunk: u64, most: u64) -> Self {
        Self { at: range.start, end: range.end, chunk, most, asked: range.start, data: VecDeque::new() }
    }

    /// The next piece, `None` when the range is done.
    pub(super) fn next(&mut self, image: &Image, job: &Job) -> Result<Option<Piece>> {
        if self.at >= self.end {
            return Ok(None);
        }
        let from = self.at;
        // A piece ends with a chunk, which can be behind what was asked.
        loop {
            while self.data.front().is_some_and(|run| run.end <= from) {
                self.data.pop_front();
            }
            if !self.data.is_empty() || self.asked >= self.end {
                break;
            }
            self.ask(image, job)?;
        }
        let data = match self.data.front() {
            Some(run) => {
                let start = (run.start - run.start % self.chunk).max(from);
                let end = run.end.next_multiple_of(self.chunk).min(start.saturating_add(self.most));
                start..end.min(self.end)
            }
            None => self.end..self.end,
        };
        self.at = data.end;
        Ok(Some(Piece { from, data }))
    }

    fn ask(&mut self, image: &Image, job: &Job) -> Result<()> {
        let mut extents = Vec::new();
        let length = WINDOW.min(self.end - self.asked);
        let until = image.extents_up_to(self.asked, length, MOST_EXTENTS, job, &mut extents)?;
        for extent in extents.iter().filter(|extent| !extent.zero) {
            let run = extent.start..extent.start + extent.length;
            match self.data.back_mut() {
                Some(last) if run.start < last.end.saturating_add(self.chunk) => last.end = run.end,
                _ => self.data.push_back(run),
            }
        }
        // Nothing of what a shrunk disk lost is left to copy.
        self.asked = if until > self.asked { until } else { self.end };
        Ok(())
    }
}
