//! Guest clusters whose mapping a request is about to change; where the data file is a raw image by itself, also those that it
//! overwrites. Requests that overlap wait, then plan again.
//!
//! A request never waits while it has a range registered, so there is no cycle to wait in.

use std::collections::BTreeMap;
use std::ops::Range;

use super::sync::{Condvar, Mutex};

/// The registry: start of a range of guest clusters to its end.
#[derive(Debug, Default)]
pub(crate) struct InFlight {
    ranges: Mutex<BTreeMap<u64, u64>>,
    released: Condvar,
}

/// A registered range; dropping it releases it and wakes who waits.
#[derive(Debug)]
pub(crate) struct Registration<'a> {
    registry: &'a InFlight,
    start: u64,
}

impl InFlight {
    /// Registers guest clusters `range` (not empty) unless they overlap a registered range.
    pub(crate) fn try_register(&self, range: Range<u64>) -> Option<Registration<'_>> {
        let mut ranges = self.ranges.lock();
        if overlaps(&ranges, &range) {
            return None;
        }
        ranges.insert(range.start, range.end);
        Some(Registration { registry: self, start: range.start })
    }

    /// Waits until nothing registered overlaps `range`.
    pub(crate) fn wait(&self, range: &Range<u64>) {
        let mut ranges = self.ranges.lock();
        while overlaps(&ranges, range) {
            self.released.wait(&mut ranges);
        }
    }
}

fn overlaps(ranges: &BTreeMap<u64, u64>, range: &Range<u64>) -> bool {
    ranges.range(..range.end).next_back().is_some_and(|(_, end)| *end > range.start)
}

impl Drop for Registration<'_> {
    fn drop(&mut self) {
        self.registry.ranges.lock().remove(&self.start);
        self.registry.released.notify_all();
    }
}
