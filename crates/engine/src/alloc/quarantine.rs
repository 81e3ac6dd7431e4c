//! Clusters between losing a reference and being used again.
//!
//! A cluster that lost a reference is in one batch per flush. The batch waits for two things: that the loss is durable
//! (the flush), and that no request which planned before it can still touch the cluster. Requests hold the mapping's
//! epoch while they use host offsets; every flush starts a new epoch, and batches leave in order, so a batch whose own
//! epoch and all earlier ones are held by nobody is out of every request's reach.

use std::collections::VecDeque;
use std::sync::Arc;

/// Host clusters that lost one reference each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Unlinked {
    /// First host cluster.
    pub(crate) cluster: u64,
    /// Number of clusters.
    pub(crate) count: u64,
    /// The guest gave the contents up: the space goes back to the file system.
    pub(crate) punch: bool,
}

impl Unlinked {
    /// Appends to `list`, joined with its last entry where that continues.
    pub(crate) fn push_to(self, list: &mut Vec<Self>) {
        if let Some(last) = list.last_mut()
            && last.punch == self.punch
            && last.cluster + last.count == self.cluster
        {
            last.count += self.count;
            return;
        }
        list.push(self);
    }
}

#[derive(Debug)]
struct Batch {
    epoch: Arc<()>,
    unlinked: Vec<Unlinked>,
}

/// Batches whose loss of references is durable, oldest first.
#[derive(Debug, Default)]
pub(super) struct Quarantine {
    batches: VecDeque<Batch>,
}

impl Quarantine {
    /// Adds what one flush made durable, with the epoch that ended when the flush began.
    pub(super) fn push(&mut self, epoch: Arc<()>, unlinked: Vec<Unlinked>) {
        self.batches.push_back(Batch { epoch, unlinked });
    }

    /// Whether no cluster waits.
    pub(super) fn is_empty(&self) -> bool {
        self.batches.iter().all(|batch| batch.unlinked.is_empty())
    }

    /// Whether every request is over that planned before the last flush.
    pub(super) fn is_past(&self) -> bool {
        self.batches.is_empty()
    }

    /// Takes the clusters that no request can reach any more.
    pub(super) fn take_reachless(&mut self) -> Vec<Unlinked> {
        let mut free = Vec::new();
        while let Some(batch) = self.batches.pop_front() {
            if Arc::strong_count(&batch.epoch) > 1 {
                self.batches.push_front(batch);
                break;
            }
            free.extend(batch.unlinked);
        }
        free
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_leave_in_order_and_only_unheld() {
        let mut quarantine = Quarantine::default();
        let (first, second) = (Arc::new(()), Arc::new(()));
        let held = Arc::clone(&first);
        let freed = |cluster| vec![Unlinked { cluster, count: 1, punch: false }];
        quarantine.push(first, freed(1));
        quarantine.push(second, freed(2));
        assert_eq!(
            quarantine.take_reachless(),
            [],
            "a request of the first epoch may have seen the second's"
        );
        drop(held);
        assert!(!quarantine.is_empty());
        assert_eq!(quarantine.take_reachless().len(), 2);
        let (third, fourth) = (Arc::new(()), Arc::new(()));
        let held = Arc::clone(&third);
        quarantine.push(third, Vec::new());
        assert!(quarantine.is_empty(), "no cluster waits");
        quarantine.push(fourth, freed(3));
        assert_eq!(quarantine.take_reachless(), [], "nor may what comes behind an empty batch overtake it");
        assert!(!quarantine.is_past());
        drop(held);
        assert_eq!(quarantine.take_reachless().len(), 1);
        assert!(quarantine.is_past());
    }

    #[test]
    fn neighbours_join() {
        let mut list = Vec::new();
        Unlinked { cluster: 5, count: 2, punch: true }.push_to(&mut list);
        Unlinked { cluster: 7, count: 1, punch: true }.push_to(&mut list);
        Unlinked { cluster: 8, count: 1, punch: false }.push_to(&mut list);
        assert_eq!(list.len(), 2);
        assert_eq!(list[0].count, 3);
    }
}
