//! Where a disk has data: what is zero needs no copy.

use std::collections::VecDeque;
use std::ops::Range;

use crate::walk::{Step, Steps, Walk};
use crate::{GuestSource, Job, Result};

/// How much is asked for at once.
const STEPS: Steps = Steps::of(64 << 30, 4096);

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
    walk: Walk<1>,
    data: VecDeque<Range<u64>>,
}

impl Scan {
    pub(super) fn new(range: Range<u64>, chunk: u64, most: u64) -> Self {
        let walk = Walk::new(range.clone(), STEPS);
        Self { at: range.start, end: range.end, chunk, most, walk, data: VecDeque::new() }
    }

    /// The next piece, `None` when the range is done.
    pub(super) fn next(&mut self, disk: &dyn GuestSource, job: &Job) -> Result<Option<Piece>> {
        if self.at >= self.end {
            return Ok(None);
        }
        let from = self.at;
        // A piece ends with a chunk, which can be behind what was asked.
        loop {
            while self.data.front().is_some_and(|run| run.end <= from) {
                self.data.pop_front();
            }
            if !self.data.is_empty() || self.walk.is_done() {
                break;
            }
            self.ask(disk, job)?;
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

    fn ask(&mut self, disk: &dyn GuestSource, job: &Job) -> Result<()> {
        let Some(Step { extents: [extents], .. }) = self.walk.next([Some(disk)], job)? else {
            return Ok(());
        };
        for extent in extents.iter().filter(|extent| !extent.zero) {
            let run = extent.start..extent.start + extent.length;
            match self.data.back_mut() {
                Some(last) if run.start < last.end.saturating_add(self.chunk) => last.end = run.end,
                _ => self.data.push_back(run),
            }
        }
        Ok(())
    }
}
