//! The bytes that one client holds.

use parking_lot::{Condvar, Mutex};

/// So many bytes at once, and no more: who wants some waits until they are free.
pub(super) struct Budget {
    most: usize,
    held: Mutex<usize>,
    freed: Condvar,
}

/// Bytes that are held.
pub(super) struct Held<'a> {
    budget: &'a Budget,
    bytes: usize,
}

impl Budget {
    pub(super) fn new(most: usize) -> Self {
        Self { most, held: Mutex::new(0), freed: Condvar::new() }
    }

    /// Waits until `bytes`, which are fewer than there are at all, are free.
    pub(super) fn take(&self, bytes: usize) -> Held<'_> {
        let bytes = bytes.min(self.most);
        let mut held = self.held.lock();
        while *held + bytes > self.most {
            self.freed.wait(&mut held);
        }
        *held += bytes;
        Held { budget: self, bytes }
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        *self.budget.held.lock() -= self.bytes;
        self.budget.freed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::thread;

    use super::*;

    #[test]
    fn who_wants_too_much_waits() {
        let budget = Budget::new(10);
        let (first, second) = (budget.take(6), budget.take(4));
        let freed = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                let _all = budget.take(99);
                assert!(freed.load(Ordering::SeqCst));
            });
            drop(first);
            freed.store(true, Ordering::SeqCst);
            drop(second);
        });
        assert_eq!(*budget.held.lock(), 0);
    }
}
