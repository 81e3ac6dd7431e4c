//! In a file of their own: the model check compiles the registry itself with other locks.

use super::inflight::InFlight;

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
