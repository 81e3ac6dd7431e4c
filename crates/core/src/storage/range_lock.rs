//! Which ranges of a file or a disk are being written, so that a read-modify-write or an allocation has its blocks for itself.

use parking_lot::{Condvar, Mutex};

/// Ranges held at this moment. Served in order of arrival where they conflict, so nobody starves; a holder
/// never waits for another range, so nobody deadlocks.
#[derive(Debug, Default)]
pub struct RangeLock {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    next: u64,
    /// As many as requests are in flight: few enough to walk.
    holders: Vec<Holder>,
    waiting: usize,
}

#[derive(Debug)]
struct Holder {
    ticket: u64,
    start: u64,
    end: u64,
    exclusive: bool,
}

impl State {
    fn must_wait(&self, ticket: u64, start: u64, end: u64, exclusive: bool) -> bool {
        self.holders
            .iter()
            .any(|h| h.ticket < ticket && h.start < end && start < h.end && (h.exclusive || exclusive))
    }
}

/// A range that is held until this is dropped.
#[derive(Debug)]
pub struct HeldRange<'a> {
    lock: &'a RangeLock,
    ticket: u64,
}

impl RangeLock {
    /// Waits until nobody who came before holds a part of `start..end`; two that are not exclusive get along.
    pub fn hold(&self, start: u64, end: u64, exclusive: bool) -> HeldRange<'_> {
        let mut state = self.state.lock();
        let ticket = state.next;
        state.next += 1;
        state.holders.push(Holder { ticket, start, end, exclusive });
        while state.must_wait(ticket, start, end, exclusive) {
            state.waiting += 1;
            self.changed.wait(&mut state);
            state.waiting -= 1;
        }
        HeldRange { lock: self, ticket }
    }
}

impl Drop for HeldRange<'_> {
    fn drop(&mut self) {
        let mut state = self.lock.state.lock();
        if let Some(at) = state.holders.iter().position(|h| h.ticket == self.ticket) {
            state.holders.swap_remove(at);
        }
        if state.waiting > 0 {
            self.lock.changed.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    use super::*;

    /// Whether a second holder gets its range while the first holds.
    fn together(first: (u64, u64, bool), second: (u64, u64, bool)) -> bool {
        let lock = RangeLock::default();
        let (sender, receiver) = std::sync::mpsc::channel();
        std::thread::scope(|scope| {
            let held = lock.hold(first.0, first.1, first.2);
            scope.spawn(|| {
                let _held = lock.hold(second.0, second.1, second.2);
                sender.send(()).unwrap();
            });
            let together = receiver.recv_timeout(Duration::from_millis(100)).is_ok();
            drop(held);
            together || {
                receiver.recv_timeout(Duration::from_secs(10)).unwrap();
                false
            }
        })
    }

    #[test]
    fn only_overlap_with_an_exclusive_one_waits() {
        assert!(together((0, 10, true), (10, 20, true)));
        assert!(together((0, 10, false), (5, 20, false)));
        assert!(!together((0, 10, true), (9, 20, false)));
        assert!(!together((0, 10, false), (9, 20, true)));
        assert!(together((5, 5, true), (5, 6, true)));
    }

    #[test]
    fn many_exclusive_holders_of_overlapping_ranges_never_meet() {
        let lock = RangeLock::default();
        let blocks: Vec<AtomicUsize> = (0..8).map(|_| AtomicUsize::new(0)).collect();
        std::thread::scope(|scope| {
            for thread in 0..4u64 {
                let (lock, blocks) = (&lock, &blocks);
                scope.spawn(move || {
                    for i in 0..2000 {
                        let start = (i * 7 + thread * 3) % 6;
                        let _held = lock.hold(start, start + 2, true);
                        for block in &blocks[start as usize..start as usize + 2] {
                            assert_eq!(block.fetch_add(1, Ordering::SeqCst), 0);
                        }
                        for block in &blocks[start as usize..start as usize + 2] {
                            block.fetch_sub(1, Ordering::SeqCst);
                        }
                    }
                });
            }
        });
    }
}
