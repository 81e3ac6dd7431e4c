//! Guest clusters whose mapping a request is about to change. Requests that overlap wait, then plan again.
//!
//! A request registers one range at a time and never waits while it has one, so there is no cycle to wait in.

use std::collections::BTreeMap;
use std::ops::Range;

use parking_lot::{Condvar, Mutex};

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overlapping_ranges_exclude_each_other() {
        let registry = InFlight::default();
        let first = registry.try_register(4..8).unwrap();
        assert!(registry.try_register(7..9).is_none());
        assert!(registry.try_register(0..5).is_none());
        let second = registry.try_register(8..9).unwrap();
        let third = registry.try_register(0..4).unwrap();
        drop((first, second));
        assert!(registry.try_register(4..9).is_some());
        drop(third);
    }

    #[test]
    fn a_waiter_goes_on_when_the_range_is_released() {
        let registry = InFlight::default();
        let registration = registry.try_register(0..1).unwrap();
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| registry.wait(&(0..4)));
            drop(registration);
            waiter.join().unwrap();
        });
    }
}
