//! The registry of requests in flight under every schedule of a few threads: the same source file, compiled with loom's
//! locks.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::single_range_in_vec_init,
    unreachable_pub,
    reason = "tests"
)]

/// The locks that the registry uses, with the interface of `parking_lot`.
mod sync {
    #[derive(Debug, Default)]
    pub struct Mutex<T>(loom::sync::Mutex<T>);

    #[derive(Debug, Default)]
    pub struct Condvar(loom::sync::Condvar);

    /// Loom's condition variable takes a guard by value, `parking_lot`'s by reference.
    pub struct Guard<'a, T>(Option<loom::sync::MutexGuard<'a, T>>);

    impl<T> Mutex<T> {
        pub fn lock(&self) -> Guard<'_, T> {
            Guard(Some(self.0.lock().expect("not poisoned")))
        }
    }

    impl Condvar {
        pub fn wait<T>(&self, guard: &mut Guard<'_, T>) {
            let inner = guard.0.take().expect("held");
            guard.0 = Some(self.0.wait(inner).expect("not poisoned"));
        }
        pub fn notify_all(&self) {
            self.0.notify_all();
        }
    }

    impl<T> std::ops::Deref for Guard<'_, T> {
        type Target = T;
        fn deref(&self) -> &T {
            self.0.as_ref().expect("held")
        }
    }
    impl<T> std::ops::DerefMut for Guard<'_, T> {
        fn deref_mut(&mut self) -> &mut T {
            self.0.as_mut().expect("held")
        }
    }
}

#[path = "../src/writer/inflight.rs"]
mod inflight;

use std::ops::Range;

use loom::sync::Arc;
use loom::sync::atomic::{AtomicU32, Ordering::SeqCst};
use loom::thread;

use inflight::{InFlight, Registration};

/// What a request does: register, or wait and try again.
fn register(registry: &InFlight, range: Range<u64>) -> Registration<'_> {
    loop {
        match registry.try_register(range.clone()) {
            Some(registration) => return registration,
            None => registry.wait(&range),
        }
    }
}

/// How many requests are in each guest cluster: a change that finds another one there fails the model.
struct Disk {
    registry: InFlight,
    users: [AtomicU32; 4],
    changes: AtomicU32,
}

impl Disk {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            registry: InFlight::default(),
            users: [0; 4].map(AtomicU32::new),
            changes: AtomicU32::new(0),
        })
    }

    fn change(&self, range: Range<u64>) {
        let _registration = register(&self.registry, range.clone());
        for cluster in range {
            self.touch(cluster);
        }
    }

    fn touch(&self, cluster: u64) {
        let users = &self.users[cluster as usize];
        assert_eq!(users.fetch_add(1, SeqCst), 0, "not alone in the cluster");
        self.changes.fetch_add(1, SeqCst);
        users.fetch_sub(1, SeqCst);
    }
}

fn run(requests: &'static [&'static [Range<u64>]], changes: u32) {
    // Two preemptions find what more would: every schedule of three threads takes hours.
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(2);
    model.check(move || {
        let disk = Disk::new();
        let threads: Vec<_> = requests
            .iter()
            .map(|ranges| {
                let disk = disk.clone();
                thread::spawn(move || ranges.iter().for_each(|range| disk.change(range.clone())))
            })
            .collect();
        threads.into_iter().for_each(|t| t.join().unwrap());
        assert_eq!(disk.changes.load(SeqCst), changes);
    });
}

#[test]
fn two_overlapping_requests_exclude_each_other_and_both_finish() {
    run(&[&[0..3, 1..2], &[2..4, 0..1]], 7);
}

#[test]
fn three_requests_finish_under_every_schedule() {
    run(&[&[0..2], &[1..3], &[2..4]], 6);
}

/// A waiter for a range that two others hold parts of goes on when both are gone, and not before.
#[test]
fn a_waiter_for_two_ranges_sees_both_leave() {
    run(&[&[0..1], &[1..2], &[0..2]], 4);
}

/// Without the registry the model fails: it looks at what it should look at.
#[test]
fn the_model_notices_requests_that_do_not_exclude_each_other() {
    let careless = || {
        let disk = Disk::new();
        let other = disk.clone();
        let thread = thread::spawn(move || other.change(0..1));
        disk.touch(0);
        thread.join().unwrap();
    };
    assert!(std::panic::catch_unwind(|| loom::model(careless)).is_err());
}
