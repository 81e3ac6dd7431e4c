//! Compares two disks: `qemu-img compare`.
//!
//! The caller's thread walks the extents of both and hands out what has to be read; workers, of which it is one, read and
//! compare. What is found lowest wins, so the result does not depend on their number.

use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;
use qcow2_transform::is_zero;

use crate::walk::{Step, Steps, Walk};
use crate::workers::{Tasks, share};
use crate::{Error, Extent, ExtentKind, GuestSource, Job, MemMut, Result};

/// Bytes that a worker reads of each disk at once.
const CHUNK: u64 = 256 << 10;
/// How much is listed at once.
const STEPS: Steps = Steps {
    smallest: 16 << 20,
    largest: 64 << 30,
    most: MOST_EXTENTS,
    few: GOOD_EXTENTS,
    many: GOOD_EXTENTS,
    factor: 2,
};
/// ... and in a strict comparison, where a range that leads to the end of the disk is not the same as one that does
/// not, as far as QEMU looks: an L2 table of the default geometry.
const STRICT_STEPS: Steps = Steps::of(512 << 20, MOST_EXTENTS);
/// The number of extents at which a step ends early.
const MOST_EXTENTS: usize = 16 * GOOD_EXTENTS;
/// The number of extents at which a step is neither small nor large.
const GOOD_EXTENTS: usize = 1024;

/// How to compare.
#[derive(Debug, Clone, Copy)]
pub struct CompareOptions {
    /// The sizes and the allocation must agree, too.
    pub strict: bool,
    /// Threads that read, the caller's among them; fewer where the system has no more.
    pub workers: usize,
}

impl Default for CompareOptions {
    fn default() -> Self {
        Self { strict: false, workers: 2 }
    }
}

/// The first way in which two disks differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Difference {
    /// Sizes (strict comparison only).
    Size,
    /// Allocation at this guest offset (strict comparison only).
    Allocation(u64),
    /// The byte at this guest offset. Behind the end of the smaller disk, a byte that is not zero.
    Content(u64),
}

/// Result of a comparison.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Comparison {
    /// The first difference; `None` for identical disks.
    pub difference: Option<Difference>,
    /// The sizes differ. Without `strict` that alone is no difference, if the rest of the larger disk reads as zeroes.
    pub sizes_differ: bool,
}

/// Compares the disks `a` and `b`. Ranges that both know to be zero are not read.
///
/// # Errors
/// `Aborted` through `job`, and what reading gives, if it comes before the first difference.
pub fn compare(
    a: &dyn GuestSource,
    b: &dyn GuestSource,
    options: &CompareOptions,
    job: &Job,
) -> Result<Comparison> {
    let (size_a, size_b) = (a.virtual_size(), b.virtual_size());
    let sizes_differ = size_a != size_b;
    job.set_total(size_a.max(size_b));
    if options.strict && sizes_differ {
        return Ok(Comparison { difference: Some(Difference::Size), sizes_differ });
    }
    let disks = [a, b];
    let found = Found::default();
    let scanned = share(
        options.workers,
        job,
        |tasks| scan(disks, options.strict, tasks, &found, job),
        |buffers, task: Task| {
            work(disks, buffers, &task, &found, job);
            Ok(())
        },
    );
    // What was left out may lie before what was found.
    job.checkpoint()?;
    // All that was handed out lies before the place where the scan ended.
    let difference = match found.lowest.into_inner() {
        Some((_, outcome)) => Some(outcome?),
        None => scanned?,
    };
    Ok(Comparison { difference, sizes_differ })
}

/// The lowest offset at which a worker found something, and what.
#[derive(Default)]
struct Found {
    lowest: Mutex<Option<(u64, Result<Difference>)>>,
    /// Bitwise negation of that offset, so that nothing found is 0 and the rest is a maximum.
    inverse: AtomicU64,
}

impl Found {
    fn add(&self, offset: u64, outcome: Result<Difference>) {
        let mut lowest = self.lowest.lock();
        if lowest.as_ref().is_none_or(|(at, _)| offset < *at) {
            *lowest = Some((offset, outcome));
            self.inverse.fetch_max(!offset, Ordering::Release);
        }
    }

    /// Nothing from here on matters.
    fn end(&self) -> u64 {
        !self.inverse.load(Ordering::Acquire)
    }
}

/// A range to read of the disks for which it is not known to be zero.
struct Task {
    start: u64,
    length: u64,
    read: [bool; 2],
}

/// Walks the extents of both disks in step, and hands out tasks in guest order.
fn scan(
    disks: [&dyn GuestSource; 2],
    strict: bool,
    tasks: &Tasks<'_, Task>,
    found: &Found,
    job: &Job,
) -> Result<Option<Difference>> {
    let total = disks.iter().map(|d| d.virtual_size()).max().unwrap_or(0);
    let mut walk = Walk::new(0..total, if strict { STRICT_STEPS } else { STEPS });
    let mut at = 0;
    while at < found.end() {
        let Some(Step { range, extents }) = walk.next(disks.map(Some), job)? else { break };
        let end = range.end;
        let mut cursors = extents.map(|extents| Cursor { extents, first: 0 });
        while at < end {
            let [a, b] = cursors.each_mut().map(|cursor| cursor.at(at, end, total));
            let length = a.length.min(b.length);
            if strict && a.class != b.class {
                return Ok(Some(Difference::Allocation(at)));
            }
            if a.zero && b.zero {
                job.advance(length);
            } else if !hand_out(at, length, [!a.zero, !b.zero], tasks, found)? {
                return Ok(None);
            }
            at += length;
        }
    }
    Ok(None)
}

/// Hands out a range in chunks; false when the rest does not matter any more.
fn hand_out(
    start: u64,
    length: u64,
    read: [bool; 2],
    tasks: &Tasks<'_, Task>,
    found: &Found,
) -> Result<bool> {
    let end = start + length;
    for at in (start..end).step_by(CHUNK as usize) {
        if at >= found.end() {
            return Ok(false);
        }
        tasks.hand_out(Task { start: at, length: CHUNK.min(end - at), read })?;
    }
    Ok(true)
}

/// What a disk has at one place.
struct Place {
    length: u64,
    zero: bool,
    class: Class,
}

/// What a strict comparison compares: how a range is stored, not where.
#[derive(PartialEq, Eq)]
struct Class {
    kind: Option<ExtentKind>,
    zero: bool,
    has_host: bool,
    to_the_end: bool,
}

/// Place in a list of extents.
struct Cursor<'a> {
    extents: &'a [Extent],
    first: usize,
}

impl Cursor<'_> {
    /// What is at `at`, at most up to `end`. Behind the end of a disk, up to `total`, there are zeroes.
    fn at(&mut self, at: u64, end: u64, total: u64) -> Place {
        let rest = self.extents.get(self.first..).unwrap_or_default();
        self.first += rest.iter().take_while(|e| e.start + e.length <= at).count();
        let Some(e) = self.extents.get(self.first) else {
            let class = Class { kind: None, zero: true, has_host: false, to_the_end: true };
            return Place { length: end - at, zero: true, class };
        };
        let extent_end = e.start + e.length;
        Place {
            length: extent_end.min(end) - at,
            zero: e.zero,
            class: Class {
                kind: Some(e.kind),
                zero: e.zero,
                has_host: e.host.is_some(),
                to_the_end: extent_end >= total,
            },
        }
    }
}

fn work(disks: [&dyn GuestSource; 2], buffers: &mut [Vec<u8>; 2], task: &Task, found: &Found, job: &Job) {
    // Tasks behind a difference are drained.
    if task.start >= found.end() {
        return;
    }
    match job.checkpoint().and_then(|()| first_difference(disks, task, buffers)) {
        Ok(None) => job.advance(task.length),
        Ok(Some(offset)) => found.add(offset, Ok(Difference::Content(offset))),
        Err(error) => found.add(task.start, Err(error)),
    }
}

/// The guest offset of the first byte of the task at which the disks differ.
fn first_difference(
    disks: [&dyn GuestSource; 2],
    task: &Task,
    buffers: &mut [Vec<u8>; 2],
) -> Result<Option<u64>, Error> {
    let length = task.length as usize;
    for ((disk, buffer), read) in disks.iter().zip(buffers.iter_mut()).zip(task.read) {
        buffer.resize(CHUNK as usize, 0);
        if read {
            let buffer = buffer.get_mut(..length).unwrap_or_default();
            disk.read_at(MemMut::from(buffer), task.start)?;
        }
    }
    let [a, b] = buffers.each_ref().map(|buffer| buffer.get(..length).unwrap_or_default());
    let differs = match task.read {
        [true, true] if a != b => a.iter().zip(b).position(|(a, b)| a != b),
        [true, true] => None,
        [true, false] if !is_zero(a) => a.iter().position(|byte| *byte != 0),
        [false, true] if !is_zero(b) => b.iter().position(|byte| *byte != 0),
        _ => None,
    };
    Ok(differs.map(|index| task.start + index as u64))
}
