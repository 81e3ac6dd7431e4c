//! Walks over the extents of disks: a disk can have one for every sector, and a walk never holds all of them.

use std::ops::{ControlFlow, Range};

use crate::{Extent, GuestSource, Job, Result};

/// How much of a walk is looked at at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Steps {
    /// Guest bytes of a step, to begin with and at least.
    pub smallest: u64,
    /// Guest bytes of a step, at most.
    pub largest: u64,
    /// The number of extents at which a step ends early.
    pub most: usize,
    /// A step with fewer extents makes the next one larger.
    pub few: usize,
    /// A step with as many extents makes the next one smaller.
    pub many: usize,
    /// How many times larger or smaller.
    pub factor: u64,
}

impl Steps {
    /// Steps of `bytes`, which end early with `most` extents.
    pub const fn of(bytes: u64, most: usize) -> Self {
        Self { smallest: bytes, largest: bytes, most, few: 0, many: usize::MAX, factor: 1 }
    }

    /// Steps between two sizes, which end early with `most` extents: larger over holes, smaller where extents are many.
    pub const fn growing(smallest: u64, largest: u64, most: usize) -> Self {
        Self { smallest, largest, most, few: 256, many: 4097, factor: 4 }
    }

    /// The next step after one of `bytes` with `extents`.
    fn after(&self, bytes: u64, extents: usize) -> u64 {
        let next = match extents {
            n if n < self.few => bytes.saturating_mul(self.factor),
            n if n >= self.many => bytes / self.factor,
            _ => bytes,
        };
        next.clamp(self.smallest, self.largest)
    }
}

/// A walk over a range of `N` disks at once, step by step, in guest order.
#[derive(Debug)]
pub struct Walk<const N: usize> {
    at: u64,
    end: u64,
    bytes: u64,
    steps: Steps,
    extents: [Vec<Extent>; N],
}

/// One step of a walk.
#[derive(Debug)]
pub struct Step<'a, const N: usize> {
    /// The guest bytes that it covers, never empty.
    pub range: Range<u64>,
    /// What each disk has there, in order and without gaps from the start of the range on. The last extents of a list can end behind
    /// the range, where another disk's list ended earlier; where a disk ends, so does its list.
    pub extents: [&'a mut Vec<Extent>; N],
}

impl<const N: usize> Walk<N> {
    /// A walk over `range` of the guest bytes.
    pub fn new(range: Range<u64>, steps: Steps) -> Self {
        let extents = std::array::from_fn(|_| Vec::new());
        Self { at: range.start, end: range.end, bytes: steps.smallest, steps, extents }
    }

    /// Whether all of the range was looked at.
    pub fn is_done(&self) -> bool {
        self.at >= self.end
    }

    /// The next step; `None` at the end of the range. `disks` are the same each time, `None` for one that has no bytes.
    ///
    /// # Errors
    /// `Aborted` through `job`, and what looking at the disks' metadata gives.
    pub fn next(&mut self, disks: [Option<&dyn GuestSource>; N], job: &Job) -> Result<Option<Step<'_, N>>> {
        let start = self.at;
        let mut end = start.saturating_add(self.bytes).min(self.end);
        if start >= end {
            return Ok(None);
        }
        job.checkpoint()?;
        for (disk, extents) in disks.into_iter().zip(&mut self.extents) {
            extents.clear();
            let Some(disk) = disk.filter(|disk| start < disk.virtual_size()) else { continue };
            let covered = disk.extents_up_to(start, end - start, self.steps.most, job, extents)?;
            // Behind its own end, where it may have shrunk to meanwhile, a disk has no extents to list.
            if covered < disk.virtual_size() {
                end = end.min(covered);
            }
        }
        let listed = self.extents.iter().map(Vec::len).max().unwrap_or(0);
        self.bytes = self.steps.after(self.bytes, listed);
        self.at = end;
        Ok(Some(Step { range: start..end, extents: self.extents.each_mut() }))
    }
}

/// Calls `visit` with the extents of `range`, in guest order, until it breaks off.
///
/// # Errors
/// As [`Walk::next`], and those of `visit`.
pub fn for_each_extent(
    source: &dyn GuestSource,
    range: Range<u64>,
    steps: Steps,
    job: &Job,
    mut visit: impl FnMut(&Extent) -> Result<ControlFlow<()>>,
) -> Result<()> {
    let mut walk = Walk::new(range, steps);
    while let Some(Step { extents: [extents], .. }) = walk.next([Some(source)], job)? {
        for extent in extents.iter() {
            if visit(extent)?.is_break() {
                return Ok(());
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::storage::MemoryStorage;
    use crate::{Chain, ErrorKind, Mem, Raw, StorageExt};

    const PAGE: u64 = 16 << 10;

    /// A raw disk of so many pages, of which those that `data` names are no holes.
    fn disk(pages: u64, data: impl Iterator<Item = u64>) -> Chain {
        let storage = MemoryStorage::new();
        storage.resize(pages * PAGE).unwrap();
        data.for_each(|page| storage.write_all_at(Mem::from(&[1; PAGE as usize][..]), page * PAGE).unwrap());
        Chain::new(vec![Box::new(Raw::new(Arc::new(storage)).unwrap())]).unwrap()
    }

    fn all(source: &dyn GuestSource) -> Vec<(u64, u64, bool)> {
        let mut extents = Vec::new();
        source.extents(0, u64::MAX, &Job::new(), &mut extents).unwrap();
        extents.iter().map(|e| (e.start, e.length, e.zero)).collect()
    }

    #[test]
    fn every_extent_is_visited_once_and_few_are_held() {
        let disk = disk(64, (0..64).filter(|page| page % 3 == 0));
        let whole = all(&disk);
        for steps in [Steps::of(u64::MAX, 5), Steps::of(PAGE * 7, 1000), Steps::of(u64::MAX, usize::MAX)] {
            let mut seen: Vec<(u64, u64, bool)> = Vec::new();
            for_each_extent(&disk, 0..disk.virtual_size(), steps, &Job::new(), |e| {
                match seen.last_mut() {
                    Some(last) if last.2 == e.zero => last.1 += e.length,
                    _ => seen.push((e.start, e.length, e.zero)),
                }
                Ok(ControlFlow::Continue(()))
            })
            .unwrap();
            assert_eq!(seen, whole, "{steps:?}");
        }
        let mut walk = Walk::new(0..disk.virtual_size(), Steps::of(PAGE * 7, 1000));
        while let Some(Step { range, extents: [extents] }) = walk.next([Some(&disk)], &Job::new()).unwrap() {
            assert!(extents.len() <= 7 && range.end - range.start <= PAGE * 7, "{range:?} {extents:?}");
        }
        assert!(walk.is_done());
    }

    #[test]
    fn a_visitor_ends_the_walk_and_so_does_a_cancelled_job() {
        let disk = disk(8, [1, 3].into_iter());
        let (job, mut visited) = (Job::new(), 0);
        let mut first = |result: fn() -> Result<ControlFlow<()>>| {
            let steps = Steps::of(u64::MAX, 100);
            for_each_extent(&disk, 0..disk.virtual_size(), steps, &job, |_| {
                visited += 1;
                result()
            })
        };
        first(|| Ok(ControlFlow::Break(()))).unwrap();
        assert_eq!(
            first(|| Err(crate::Error::new(ErrorKind::Limit, "enough"))).unwrap_err().kind(),
            ErrorKind::Limit
        );
        job.cancel();
        assert_eq!(first(|| Ok(ControlFlow::Continue(()))).unwrap_err().kind(), ErrorKind::Aborted);
        assert_eq!(visited, 2);
    }

    #[test]
    fn disks_in_step_have_lists_of_one_range() {
        let (a, b) = (disk(40, (0..40).filter(|page| page % 2 == 0)), disk(10, 3..7));
        let steps = Steps { smallest: PAGE, largest: 8 * PAGE, most: 4, few: 3, many: 4, factor: 2 };
        let mut walk = Walk::new(0..50 * PAGE, steps);
        let (mut at, mut lengths) = (0, Vec::new());
        while let Some(step) = walk.next([Some(&a), Some(&b), None], &Job::new()).unwrap() {
            let [of_a, of_b, none] = step.extents;
            assert_eq!(step.range.start, at);
            for (list, size) in [(&of_a, 40), (&of_b, 10)] {
                let end = list.last().map_or(step.range.start, |e| e.start + e.length);
                assert!(end >= step.range.end.min(size * PAGE), "{:?}", step.range);
            }
            assert!(none.is_empty());
            at = step.range.end;
            lengths.push(step.range.end - step.range.start);
        }
        assert_eq!(at, 50 * PAGE);
        assert_eq!(lengths.first(), Some(&PAGE));
        assert!(lengths.iter().any(|length| *length > 2 * PAGE), "{lengths:?}");
    }

    #[test]
    fn steps_grow_and_shrink() {
        let steps = Steps { smallest: 8, largest: 100, most: 9, few: 2, many: 5, factor: 4 };
        let after = |bytes| [1, 2, 4, 5].map(|extents| steps.after(bytes, extents));
        assert_eq!(after(8), [32, 8, 8, 8]);
        assert_eq!(after(40), [100, 40, 40, 10]);
        assert_eq!(Steps::of(7, 1).after(7, 0), 7);
    }
}
