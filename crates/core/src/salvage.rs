//! Reading what can be read of a damaged disk.

use parking_lot::Mutex;

use crate::source::{Extent, ExtentKind, GuestSource};
use crate::{Error, ErrorKind, Job, MemMut, Result};

/// What is given up at a time, in bytes.
const SECTOR: u64 = 512;
/// Most ranges that are remembered one by one.
const MOST_RANGES: usize = 4096;

/// A range of the disk that could not be read.
#[derive(Debug)]
pub struct Unreadable {
    /// First guest byte.
    pub start: u64,
    /// Bytes.
    pub length: u64,
    /// Why, of the first part that failed.
    pub error: Error,
}

/// A disk on which nothing is unreadable: sectors that cannot be read are zeroes, and are remembered.
pub struct Salvage<'a> {
    source: &'a dyn GuestSource,
    lost: Mutex<Vec<Unreadable>>,
}

impl<'a> Salvage<'a> {
    /// All of `source` that can be read.
    pub fn new(source: &'a dyn GuestSource) -> Self {
        Self { source, lost: Mutex::default() }
    }

    /// What could not be read so far, in guest order; the first of very many.
    pub fn into_lost(self) -> Vec<Unreadable> {
        let mut lost = self.lost.into_inner();
        lost.sort_by_key(|range| range.start);
        lost
    }

    fn lose(&self, start: u64, length: u64, error: Error) {
        let mut lost = self.lost.lock();
        if let Some(last) = lost.iter_mut().rev().find(|range| range.start + range.length == start) {
            last.length += length;
        } else if lost.len() < MOST_RANGES {
            lost.push(Unreadable { start, length, error });
        }
    }
}

impl GuestSource for Salvage<'_> {
    fn virtual_size(&self) -> u64 {
        self.source.virtual_size()
    }

    fn cluster_size(&self) -> u64 {
        self.source.cluster_size()
    }

    fn is_sequential(&self) -> bool {
        self.source.is_sequential()
    }

    fn is_arriving(&self) -> bool {
        self.source.is_arriving()
    }

    fn settle(&self) -> Result<()> {
        self.source.settle()
    }

    fn extents_up_to(
        &self,
        start: u64,
        length: u64,
        most: usize,
        job: &Job,
        out: &mut Vec<Extent>,
    ) -> Result<u64> {
        let first = out.len();
        let end = start.saturating_add(length).min(self.virtual_size());
        let covered = match self.source.extents_up_to(start, length, most, job, out) {
            Ok(covered) => covered,
            Err(error) if error.kind() == ErrorKind::Aborted => return Err(error),
            // What was found before the damage is good; behind it, reading will tell.
            Err(_) => match out.get(first..).and_then(<[Extent]>::last) {
                Some(last) => last.start + last.length,
                None => {
                    let cluster = self.cluster_size();
                    let next = (start - start % cluster).saturating_add(cluster).min(end);
                    let kind = ExtentKind::Data;
                    out.push(Extent { start, length: next - start, kind, depth: 0, zero: false, host: None });
                    next
                }
            },
        };
        // All is read through here, never from the files.
        out.iter_mut().skip(first).for_each(|extent| extent.host = None);
        Ok(covered)
    }

    fn read_at(&self, mut buf: MemMut<'_>, offset: u64) -> Result<()> {
        if self.source.read_at(buf.reborrow(), offset).is_ok() {
            return Ok(());
        }
        let mut at = offset;
        while !buf.is_empty() {
            let length = (SECTOR - at % SECTOR).min(buf.len() as u64);
            let mut part = buf.take_front(length as usize);
            if let Err(error) = self.source.read_at(part.reborrow(), at) {
                part.fill_zero();
                self.lose(at, length, error);
            }
            at += length;
        }
        Ok(())
    }
}

impl std::fmt::Debug for Salvage<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Salvage").field("lost", &self.lost).finish_non_exhaustive()
    }
}
