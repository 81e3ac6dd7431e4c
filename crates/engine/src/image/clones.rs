//! Copies of a disk at a point in time that are being made: who changes the disk copies first what they need.

use std::fmt::Debug;
use std::ops::Range;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::RwLock;

use crate::{Error, ErrorKind, GuestSource};

/// A copy that is being made.
pub(crate) trait LiveCopy: Debug + Send + Sync {
    /// Copies what is not copied of `range`, which is about to change on `disk`. An error ends the copy.
    fn preserve(&self, disk: &dyn GuestSource, range: &Range<u64>);

    /// Ends the copy; the first reason is the one to report.
    fn fail(&self, error: Error);
}

/// The clones of one image that are under way.
#[derive(Debug, Default)]
pub(crate) struct Clones {
    /// Whether there are any: requests look here first.
    any: AtomicBool,
    /// Changed only while no request is in flight, but to end a clone.
    list: RwLock<Vec<Arc<dyn LiveCopy>>>,
    /// The gate of a disk of another format, which has no writer's: requests share it, a point in time has it alone.
    pub(crate) layer_gate: RwLock<()>,
}

impl Clones {
    pub(crate) fn add(&self, copying: Arc<dyn LiveCopy>) {
        self.list.write().push(copying);
        self.any.store(true, Ordering::Release);
    }

    pub(crate) fn remove(&self, copying: &dyn LiveCopy) {
        let mut list = self.list.write();
        list.retain(|other| !ptr::addr_eq(&raw const **other, copying));
        self.any.store(!list.is_empty(), Ordering::Release);
    }

    /// Ends all clones: the image is closing.
    pub(crate) fn end(&self) {
        for copying in self.list.read().iter() {
            copying.fail(Error::new(ErrorKind::Closed, "the image was closed before its clone was complete"));
        }
    }

    /// See [`super::Image::preserve`].
    pub(super) fn preserve(&self, disk: &dyn GuestSource, range: &Range<u64>) {
        if !self.any.load(Ordering::Acquire) {
            return;
        }
        let clones = self.list.read().clone();
        for copying in clones {
            copying.preserve(disk, range);
        }
    }
}
