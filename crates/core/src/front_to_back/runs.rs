//! Numbers in ascending order, as runs: which units of a disk are stored, and which place each has among them.

use std::ops::ControlFlow;

use crate::walk::{Steps, for_each_extent};
use crate::{Error, ErrorKind, GuestSource, Job, Result};

/// How much of a disk is listed at once: more over holes.
const STEPS: Steps = Steps::growing(1 << 30, 1 << 40, 16 << 10);

/// A set of numbers. The rank of a number is how many smaller ones there are.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Runs {
    runs: Vec<Run>,
    total: u64,
}

/// Its length is the difference of the next one's rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Run {
    first: u64,
    rank: u64,
}

/// Numbers one behind the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    /// The first of them.
    pub first: u64,
    /// How many, never 0.
    pub count: u64,
    /// Rank of the first.
    pub rank: u64,
}

impl Runs {
    /// The units of `unit` bytes in which `source` has anything that is not known to read as zeroes. Nothing but its map is read.
    ///
    /// # Errors
    /// `Limit` when they take more than `max_memory` bytes here; `Aborted`; what reading the disk's metadata gives.
    pub fn of_data(source: &dyn GuestSource, unit: u64, max_memory: u64, job: &Job) -> Result<Self> {
        let (mut runs, unit) = (Self::default(), unit.max(1));
        for_each_extent(source, 0..source.virtual_size(), STEPS, job, |extent| {
            if !extent.zero && extent.length > 0 {
                let first = extent.start / unit;
                runs.make_room(max_memory)?;
                runs.add(first, (extent.start + extent.length).div_ceil(unit) - first);
            }
            Ok(ControlFlow::Continue(()))
        })?;
        runs.runs.shrink_to_fit();
        Ok(runs)
    }

    /// Adds `count` numbers from `first` on. Those up to the last one that it has are left out.
    pub fn add(&mut self, first: u64, count: u64) {
        let (end, behind) = (first.saturating_add(count), self.end());
        let first = first.max(behind);
        if first >= end {
            return;
        }
        if first > behind || self.runs.is_empty() {
            self.runs.push(Run { first, rank: self.total });
        }
        self.total += end - first;
    }

    /// The number behind the last one.
    pub fn end(&self) -> u64 {
        self.runs.last().map_or(0, |run| run.first + (self.total - run.rank))
    }

    /// How many numbers there are.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// Bytes that it takes.
    pub fn memory(&self) -> u64 {
        (self.runs.capacity() * size_of::<Run>()) as u64
    }

    /// Makes room for another run, in `most` bytes in all.
    ///
    /// # Errors
    /// `Limit` where there is none.
    pub(super) fn make_room(&mut self, most: u64) -> Result<()> {
        let (runs, allowed) = (self.runs.len(), most / size_of::<Run>() as u64);
        if runs < self.runs.capacity() {
            return Ok(());
        }
        if runs as u64 >= allowed {
            let message = format!(
                "the disk is in too many pieces to plan it in {most} bytes: a larger max_memory, or larger clusters, help"
            );
            return Err(Error::new(ErrorKind::Limit, message).with_field("max_memory"));
        }
        let wanted = (2 * runs as u64).max(64).min(allowed);
        self.runs.reserve_exact(wanted as usize - runs);
        Ok(())
    }

    fn part(&self, index: usize) -> Option<Part> {
        let &Run { first, rank } = self.runs.get(index)?;
        let end = self.runs.get(index + 1).map_or(self.total, |next| next.rank);
        Some(Part { first, count: end - rank, rank })
    }

    /// The number of that rank, and those that follow it without a gap.
    pub fn at(&self, rank: u64) -> Option<Part> {
        if rank >= self.total {
            return None;
        }
        let index = self.runs.partition_point(|run| run.rank <= rank).checked_sub(1)?;
        let part = self.part(index)?;
        let skip = rank - part.rank;
        Some(Part { first: part.first + skip, count: part.count - skip, rank })
    }

    /// What lies in `first..end`, in order.
    pub fn within(&self, first: u64, end: u64) -> impl Iterator<Item = Part> + '_ {
        let start = self.runs.partition_point(|run| run.first <= first).saturating_sub(1);
        let parts = (start..).map_while(|index| self.part(index));
        parts.take_while(move |part| part.first < end).filter_map(move |part| {
            let (from, to) = (part.first.max(first), (part.first + part.count).min(end));
            (from < to).then(|| Part { first: from, count: to - from, rank: part.rank + (from - part.first) })
        })
    }

    /// All of them, in order.
    pub fn iter(&self) -> impl Iterator<Item = Part> + '_ {
        self.within(0, u64::MAX)
    }

    /// What these numbers are as parts of groups of `size`: the groups that have any.
    #[must_use]
    pub fn groups(&self, size: u64) -> Self {
        let mut groups = Self::default();
        for part in self.iter() {
            let first = part.first / size;
            groups.add(first, (part.first + part.count).div_ceil(size) - first);
        }
        groups
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Some hundred numbers in runs and gaps of any length, and the same as a list.
    fn some(seed: u64) -> (Runs, Vec<u64>) {
        let (mut runs, mut list, mut state) = (Runs::default(), Vec::new(), seed);
        let mut next = |below: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 33) % below
        };
        for _ in 0..40 {
            let behind = list.last().map_or(0, |last| last + 1);
            // Sometimes a part that is there already, sometimes nothing at all.
            let first = (behind + next(6)).saturating_sub(3);
            let count = next(9);
            runs.add(first, count);
            list.extend((first..first + count).filter(|number| *number >= behind));
        }
        (runs, list)
    }

    #[test]
    fn a_set_is_what_a_list_of_its_numbers_is() {
        for seed in 0..200 {
            let (runs, list) = some(seed);
            assert_eq!(runs.total(), list.len() as u64, "{seed}");
            let all: Vec<u64> = runs.iter().flat_map(|part| part.first..part.first + part.count).collect();
            assert_eq!(all, list, "{seed}");
            for (rank, number) in list.iter().enumerate() {
                let part = runs.at(rank as u64).unwrap();
                assert_eq!((part.first, part.rank), (*number, rank as u64));
                let run = list[rank..].iter().zip(*number..).take_while(|(a, b)| **a == *b).count();
                assert_eq!(part.count, run as u64, "{seed}");
            }
            assert_eq!(runs.at(runs.total()), None);
            for (first, end) in [(0, 5), (3, 3), (7, 40), (20, 21), (0, u64::MAX)] {
                let within: Vec<(u64, u64)> = runs
                    .within(first, end)
                    .flat_map(|part| (0..part.count).map(move |i| (part.first + i, part.rank + i)))
                    .collect();
                let wanted: Vec<(u64, u64)> = (0..list.len())
                    .map(|rank| (list[rank], rank as u64))
                    .filter(|(number, _)| (first..end).contains(number))
                    .collect();
                assert_eq!(within, wanted, "{seed} {first}..{end}");
            }
            let mut groups: Vec<u64> = list.iter().map(|number| number / 7).collect();
            groups.dedup();
            let found: Vec<u64> = runs.groups(7).iter().flat_map(|p| p.first..p.first + p.count).collect();
            assert_eq!(found, groups, "{seed}");
        }
    }

    #[test]
    fn neighbours_are_one_run_however_long() {
        let mut runs = Runs::default();
        for first in 0..1000 {
            runs.add(first << 40, 1 << 40);
        }
        assert_eq!((runs.total(), runs.runs.len()), (1000 << 40, 1));
        assert_eq!(runs.at(5 << 40), Some(Part { first: 5 << 40, count: 995 << 40, rank: 5 << 40 }));
    }
}
