//! A set of cluster indices as disjoint ranges.

use std::collections::BTreeMap;

/// Disjoint, non-adjacent ranges: start to length.
#[derive(Debug, Default)]
pub(super) struct Ranges {
    ranges: BTreeMap<u64, u64>,
    total: u64,
    /// No aligned run of `take_aligned` begins before this.
    aligned_from: u64,
}

impl Ranges {
    /// Number of clusters.
    pub(super) fn total(&self) -> u64 {
        self.total
    }

    /// Adds `count` clusters from `start` on; none of them may be in the set.
    pub(super) fn insert(&mut self, mut start: u64, mut count: u64) {
        if count == 0 {
            return;
        }
        self.total += count;
        self.aligned_from = self.aligned_from.min(start);
        if let Some((&before, &length)) = self.ranges.range(..start).next_back()
            && before + length == start
        {
            self.ranges.remove(&before);
            start = before;
            count += length;
            self.aligned_from = self.aligned_from.min(start);
        }
        if let Some(length) = self.ranges.remove(&(start + count)) {
            count += length;
        }
        self.ranges.insert(start, count);
    }

    /// Removes up to `count` contiguous clusters: from `at` if that cluster is free, else from the first range that is
    /// long enough, else the longest start there is.
    pub(super) fn take(&mut self, count: u64, at: u64) -> Option<(u64, u64)> {
        let follows = self.ranges.range(..=at).next_back().filter(|(start, length)| *start + *length > at);
        let (start, length) = match follows {
            Some((&start, &length)) => (start, length),
            None => {
                let fits = self.ranges.iter().find(|(_, length)| **length >= count);
                let (&start, &length) = fits.or_else(|| self.ranges.iter().max_by_key(|r| *r.1))?;
                return Some(self.cut(start, length, start, count));
            }
        };
        Some(self.cut(start, length, at, count))
    }

    /// Removes up to `count` contiguous clusters from `at` on, if `at` is in the set.
    pub(super) fn take_at(&mut self, count: u64, at: u64) -> Option<(u64, u64)> {
        let (&start, &length) = self.ranges.range(..=at).next_back()?;
        (start + length > at).then(|| self.cut(start, length, at, count))
    }

    /// Removes up to `count` contiguous clusters from place `within` of an aligned run of `chunk` clusters on, all of
    /// which are in the set. `chunk` is the same in every call.
    pub(super) fn take_aligned(&mut self, count: u64, chunk: u64, within: u64) -> Option<(u64, u64)> {
        let mut runs = self.aligned_runs(chunk).peekable();
        let first = runs.peek().copied();
        let fits = runs.find(|(start, length, aligned)| aligned + within + count <= start + length);
        drop(runs);
        self.aligned_from = first.map_or(u64::MAX, |(.., aligned)| aligned);
        let (start, length, aligned) = fits.or(first)?;
        Some(self.cut(start, length, aligned + within, count))
    }

    /// Whether [`Ranges::take_aligned`] finds anything.
    pub(super) fn has_aligned(&mut self, chunk: u64) -> bool {
        let found = self.aligned_runs(chunk).next().map(|(.., aligned)| aligned);
        self.aligned_from = found.unwrap_or(u64::MAX);
        found.is_some()
    }

    /// The ranges that hold an aligned run of `chunk` clusters: start, length, and where the first such run begins.
    fn aligned_runs(&self, chunk: u64) -> impl Iterator<Item = (u64, u64, u64)> + '_ {
        let from = self.aligned_from;
        let before = self.ranges.range(..from).next_back().map(|(start, _)| *start);
        let ranges = self.ranges.range(before.unwrap_or(from)..).filter(move |_| from != u64::MAX);
        ranges.filter_map(move |(&start, &length)| {
            let aligned = start.max(from).next_multiple_of(chunk);
            (aligned + chunk <= start + length).then_some((start, length, aligned))
        })
    }

    /// Start of the first range that has `count` clusters.
    pub(super) fn first_run(&self, count: u64) -> Option<u64> {
        self.ranges.iter().find(|(_, length)| **length >= count).map(|(start, _)| *start)
    }

    /// Takes clusters from `from` on out of the range `start, length`.
    fn cut(&mut self, start: u64, length: u64, from: u64, count: u64) -> (u64, u64) {
        let taken = count.min(start + length - from);
        self.ranges.remove(&start);
        if from > start {
            self.ranges.insert(start, from - start);
        }
        let behind = start + length - (from + taken);
        if behind > 0 {
            self.ranges.insert(from + taken, behind);
        }
        self.total -= taken;
        (from, taken)
    }

    /// Empties the set.
    pub(super) fn drain(&mut self) -> impl Iterator<Item = (u64, u64)> + use<> {
        self.total = 0;
        self.aligned_from = 0;
        std::mem::take(&mut self.ranges).into_iter()
    }

    /// Takes the last range.
    pub(super) fn pop_last(&mut self) -> Option<(u64, u64)> {
        let (start, length) = self.ranges.pop_last()?;
        self.total -= length;
        Some((start, length))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn aligned_runs_are_found_where_there_are_any(
            ops in proptest::collection::vec((0u8..3, 0u64..96, 1u64..20, 0u64..4), 0..60)
        ) {
            const CHUNK: u64 = 4;
            let mut ranges = Ranges::default();
            let mut model = BTreeSet::new();
            for (op, start, count, within) in ops {
                let taken = match op {
                    0 => {
                        if (start..start + count).all(|c| !model.contains(&c)) {
                            ranges.insert(start, count);
                            model.extend(start..start + count);
                        }
                        None
                    }
                    1 => {
                        let taken = ranges.take_at(count, start);
                        prop_assert_eq!(taken.is_some(), model.contains(&start));
                        prop_assert!(taken.is_none_or(|t| t.0 == start));
                        taken
                    }
                    _ => {
                        let whole = |c: u64| (c..c + CHUNK).all(|c| model.contains(&c));
                        let any = (0..40).any(|n| whole(n * CHUNK));
                        prop_assert_eq!(ranges.has_aligned(CHUNK), any);
                        let taken = ranges.take_aligned(count, CHUNK, within);
                        prop_assert_eq!(taken.is_some(), any);
                        prop_assert!(taken.is_none_or(|t| t.0 % CHUNK == within && whole(t.0 - within)));
                        taken
                    }
                };
                if let Some((from, n)) = taken {
                    prop_assert!(n >= 1 && n <= count);
                    for c in from..from + n {
                        prop_assert!(model.remove(&c));
                    }
                }
                prop_assert_eq!(ranges.total(), model.len() as u64);
            }
        }

        #[test]
        fn behaves_like_a_set(ops in proptest::collection::vec((any::<bool>(), 0u64..64, 1u64..8), 0..60)) {
            let mut ranges = Ranges::default();
            let mut model = BTreeSet::new();
            for (insert, start, count) in ops {
                if insert {
                    if (start..start + count).all(|c| !model.contains(&c)) {
                        ranges.insert(start, count);
                        model.extend(start..start + count);
                    }
                } else {
                    let taken = ranges.take(count, start);
                    prop_assert_eq!(taken.is_some(), !model.is_empty());
                    if let Some((from, n)) = taken {
                        prop_assert!(n >= 1 && n <= count);
                        prop_assert!(!model.contains(&start) || from == start);
                        for c in from..from + n {
                            prop_assert!(model.remove(&c));
                        }
                    }
                }
                prop_assert_eq!(ranges.total(), model.len() as u64);
            }
            let left: Vec<u64> = ranges.drain().flat_map(|(s, n)| s..s + n).collect();
            prop_assert_eq!(left, model.into_iter().collect::<Vec<_>>());
        }
    }
}
