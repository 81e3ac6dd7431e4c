//! Reference counters, one per cluster of the file: sparse, and as wide as their values need.

use std::collections::BTreeSet;

use crate::{Error, ErrorKind, Result};

/// Counters in a page. The allocator asks the system for each that is behind all others: smaller ones are asked for more often, larger ones
/// are mapped one by one.
pub(super) const PAGE: usize = 1 << 16;

/// Memory that one cluster with too many references takes.
const OVERFLOWED_BYTES: usize = 16;

/// Counts the references to every cluster. A page is allocated with its first reference, and widened when a counter
/// outgrows it: an image without many snapshots costs one byte per cluster.
pub(super) struct ReferenceCounts {
    pages: Vec<Page>,
    /// For each page, from where on all of its counters are 0.
    fresh: Vec<usize>,
    clusters: u64,
    /// Where a counter stops: the largest refcount of the image.
    max: u64,
    /// Clusters with more references than that.
    overflowed: BTreeSet<u64>,
    memory: u64,
    memory_limit: u64,
}

/// The counters of [`PAGE`] clusters.
#[derive(Default)]
pub(super) enum Page {
    /// All 0.
    #[default]
    Empty,
    Byte(Box<[u8]>),
    Word(Box<[u16]>),
    Wide(Box<[u64]>),
}

impl ReferenceCounts {
    /// Counters for `clusters` clusters, all 0, that stop at `max` and take no more than `memory_limit` bytes.
    pub(super) fn new(clusters: u64, max: u64, memory_limit: u64) -> Self {
        Self {
            pages: Vec::new(),
            fresh: Vec::new(),
            clusters,
            max,
            overflowed: BTreeSet::new(),
            memory: 0,
            memory_limit,
        }
    }

    /// Clusters that have a counter: those of the file, and the one behind it where something refers to it.
    pub(super) fn clusters(&self) -> u64 {
        self.clusters
    }

    /// Page `index`, which holds the counters from `index * PAGE` on; `None` behind the last one in use.
    pub(super) fn page(&self, index: usize) -> Option<&Page> {
        self.pages.get(index)
    }

    /// The count of one cluster.
    pub(super) fn get(&self, cluster: u64) -> u64 {
        let (page, index) = place(cluster);
        match self.pages.get(page) {
            None | Some(Page::Empty) => 0,
            Some(Page::Byte(c)) => c.get(index).copied().map_or(0, u64::from),
            Some(Page::Word(c)) => c.get(index).copied().map_or(0, u64::from),
            Some(Page::Wide(c)) => c.get(index).copied().unwrap_or(0),
        }
    }

    /// The references to one cluster; `None` where there are more than can be counted.
    pub(super) fn exact(&self, cluster: u64) -> Option<u64> {
        (!self.overflowed.contains(&cluster)).then(|| self.get(cluster))
    }

    /// Whether each of the clusters `first..end` is referred to exactly once, where that can be told fast.
    pub(super) fn all_one(&self, first: u64, end: u64) -> bool {
        let mut cluster = first;
        while cluster < end {
            let (page, index) = place(cluster);
            let count = (PAGE - index).min(usize::try_from(end - cluster).unwrap_or(PAGE));
            let Some(Page::Byte(counts)) = self.pages.get(page) else { return false };
            let counts = counts.get(index..index + count).unwrap_or_default();
            if counts.iter().fold(0, |other, count| other | (count ^ 1)) != 0 {
                return false;
            }
            cluster += count as u64;
        }
        true
    }

    /// Adds one reference to each of `length` clusters. `overflow` is told of those that cannot be counted any more.
    pub(super) fn add(&mut self, first: u64, length: u64, overflow: &mut dyn FnMut(u64)) -> Result<()> {
        let end = first.saturating_add(length);
        self.clusters = self.clusters.max(end);
        let mut cluster = first;
        while cluster < end {
            let (page, index) = place(cluster);
            let count = (PAGE - index).min(usize::try_from(end - cluster).unwrap_or(PAGE));
            self.prepare(page)?;
            // What is looked at before it is written to is given by the system twice.
            let counted = self.begin(page, index, count) || self.add_fast(page, index, count);
            if !counted {
                for i in 0..count {
                    if !self.add_one(page, index + i)? {
                        if self.overflowed.insert(cluster + i as u64) {
                            self.charge(OVERFLOWED_BYTES)?;
                        }
                        overflow(cluster + i as u64);
                    }
                }
            }
            cluster += count as u64;
        }
        Ok(())
    }

    /// Makes sure that page `page` has counters.
    fn prepare(&mut self, page: usize) -> Result<()> {
        if page >= self.pages.len() {
            self.charge((page + 1 - self.pages.len()) * (size_of::<Page>() + size_of::<usize>()))?;
            self.pages.resize_with(page + 1, Page::default);
            self.fresh.resize(page + 1, 0);
        }
        if matches!(self.pages.get(page), Some(Page::Empty)) {
            self.charge(PAGE)?;
            self.set(page, Page::Byte(vec![0; PAGE].into_boxed_slice()));
        }
        Ok(())
    }

    /// Counts the first reference to a run behind all that were counted in a page: any refcount can be one.
    fn begin(&mut self, page: usize, index: usize, count: usize) -> bool {
        let Some(fresh) = self.fresh.get_mut(page) else { return false };
        let is_fresh = index >= *fresh;
        *fresh = (*fresh).max(index + count);
        let Some(Page::Byte(counts)) = self.pages.get_mut(page).filter(|_| is_fresh) else { return false };
        counts.get_mut(index..index + count).is_some_and(|run| {
            run.fill(1);
            true
        })
    }

    /// Adds one to a run inside one page, if none of the counters is at its limit.
    fn add_fast(&mut self, page: usize, index: usize, count: usize) -> bool {
        fn add<T: Copy + Ord + std::ops::AddAssign>(run: Option<&mut [T]>, limit: T, one: T) -> bool {
            let Some(run) = run else { return false };
            // Looked at as a whole, so that the loop runs in vector registers.
            if run.iter().fold(false, |any, c| any | (*c >= limit)) {
                return false;
            }
            run.iter_mut().for_each(|c| *c += one);
            true
        }
        let range = index..index + count;
        match self.pages.get_mut(page) {
            Some(Page::Byte(c)) => add(c.get_mut(range), u8::try_from(self.max).unwrap_or(u8::MAX), 1),
            Some(Page::Word(c)) => add(c.get_mut(range), u16::try_from(self.max).unwrap_or(u16::MAX), 1),
            Some(Page::Wide(c)) => add(c.get_mut(range), self.max, 1),
            _ => false,
        }
    }

    /// Takes one reference to a cluster away.
    pub(super) fn remove_one(&mut self, cluster: u64) {
        if self.overflowed.contains(&cluster) {
            // What is left is not known: at least as many as can be counted.
            return;
        }
        let (page, index) = place(cluster);
        match self.pages.get_mut(page) {
            Some(Page::Byte(c)) => c.get_mut(index).into_iter().for_each(|c| *c = c.saturating_sub(1)),
            Some(Page::Word(c)) => c.get_mut(index).into_iter().for_each(|c| *c = c.saturating_sub(1)),
            Some(Page::Wide(c)) => c.get_mut(index).into_iter().for_each(|c| *c = c.saturating_sub(1)),
            None | Some(Page::Empty) => {}
        }
    }

    /// Adds one to a counter, widening its page if need be; false when it is at the image's limit.
    fn add_one(&mut self, page: usize, index: usize) -> Result<bool> {
        if self.add_fast(page, index, 1) {
            return Ok(true);
        }
        let start = page as u64 * PAGE as u64;
        if self.get(start + index as u64) >= self.max {
            return Ok(false);
        }
        let wider = match self.pages.get(page) {
            Some(Page::Byte(c)) => Page::Word(c.iter().map(|&c| c.into()).collect()),
            Some(Page::Word(c)) => Page::Wide(c.iter().map(|&c| c.into()).collect()),
            // Nothing is wider, and an empty page was prepared.
            _ => return Ok(false),
        };
        self.charge(PAGE * if matches!(wider, Page::Word(_)) { 1 } else { 6 })?;
        self.set(page, wider);
        Ok(self.add_fast(page, index, 1))
    }

    fn set(&mut self, page: usize, value: Page) {
        if let Some(slot) = self.pages.get_mut(page) {
            *slot = value;
        }
    }

    fn charge(&mut self, bytes: usize) -> Result<()> {
        self.memory += bytes as u64;
        if self.memory > self.memory_limit {
            let limit = self.memory_limit;
            let message = format!("the reference counters of the check exceed the limit of {limit} bytes");
            return Err(Error::new(ErrorKind::Limit, message));
        }
        Ok(())
    }
}

fn place(cluster: u64) -> (usize, usize) {
    let page = usize::try_from(cluster / PAGE as u64).unwrap_or(usize::MAX);
    (page, (cluster % PAGE as u64) as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn add(counts: &mut ReferenceCounts, first: u64, length: u64) -> Vec<u64> {
        let mut over = Vec::new();
        counts.add(first, length, &mut |c| over.push(c)).unwrap();
        over
    }

    #[test]
    fn counts_across_pages_and_widths() {
        let mut counts = ReferenceCounts::new(0, u64::MAX, 1 << 30);
        let first = PAGE as u64 - 3;
        for _ in 0..300 {
            assert!(add(&mut counts, first, 7).is_empty());
        }
        for _ in 0..66_000 {
            assert!(add(&mut counts, first + 2, 1).is_empty());
        }
        assert_eq!([0, 1, 2, 6, 7].map(|i| counts.get(first + i)), [300, 300, 66_300, 300, 0]);
        assert_eq!(counts.get(first - 1), 0);
        assert_eq!(counts.clusters(), first + 7);
    }

    #[test]
    fn stops_at_the_refcount_width() {
        for (bits, max) in [(1, 1), (2, 3), (8, 255), (16, 65535)] {
            let mut counts = ReferenceCounts::new(0, max, 1 << 30);
            for _ in 0..max {
                assert!(add(&mut counts, 5, 2).is_empty(), "{bits}");
            }
            assert!(add(&mut counts, 6, 2) == [6], "{bits}");
            assert_eq!([5, 6, 7].map(|c| counts.get(c)), [max, max, 1]);
        }
    }

    #[test]
    fn counts_in_any_order() {
        let mut counts = ReferenceCounts::new(0, 65535, 1 << 30);
        let mut expected = vec![0; 3 * PAGE];
        for i in 0..400u64 {
            let (first, length) = (i * 7919 % (3 * PAGE as u64 - 5000), 1 + i * 104_729 % 5000);
            assert!(add(&mut counts, first, length).is_empty());
            expected[first as usize..][..length as usize].iter_mut().for_each(|n| *n += 1);
        }
        for (cluster, expected) in (0u64..).zip(expected) {
            assert_eq!(counts.get(cluster), expected, "{cluster}");
        }
    }

    #[test]
    fn memory_is_limited() {
        let mut counts = ReferenceCounts::new(0, 65535, 3 * PAGE as u64);
        let error = (0..9).find_map(|i| counts.add(i * PAGE as u64, 1, &mut |_| {}).err()).unwrap();
        assert_eq!(error.kind(), ErrorKind::Limit);
    }
}
