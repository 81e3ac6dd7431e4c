//! Which files this process itself holds locks on, so that an opener that is in its own way is told so, not to look for
//! another process.

use std::collections::BTreeMap;
use std::fs::File;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;

use super::lock::Claim;
use super::platform::{self, FileId};

static HOLDERS: Mutex<BTreeMap<(FileId, u64), Claim>> = Mutex::new(BTreeMap::new());
static NEXT: AtomicU64 = AtomicU64::new(0);

/// One claim that is held, until it is dropped.
#[derive(Debug)]
pub(super) struct Holder((FileId, u64));

impl Holder {
    /// Notes a claim; nothing for no claim, and for a file without an identity.
    pub(super) fn new(file: &File, claim: Claim) -> Option<Self> {
        if claim == Claim::NONE {
            return None;
        }
        let key = (identity(file)?, NEXT.fetch_add(1, Ordering::Relaxed));
        HOLDERS.lock().insert(key, claim);
        Some(Self(key))
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        HOLDERS.lock().remove(&self.0);
    }
}

/// A claim of this process that keeps `wanted` from the file; `own` is who asks, in as far as it holds something already.
pub(super) fn in_the_way(file: &File, wanted: Claim, own: Option<&Holder>) -> Option<Claim> {
    let identity = identity(file)?;
    let holders = HOLDERS.lock();
    let mut others = holders.range((identity, 0)..=(identity, u64::MAX));
    others
        .find(|(key, claim)| own.is_none_or(|own| own.0 != **key) && claim.conflicts_with(wanted))
        .map(|(_, claim)| *claim)
}

fn identity(file: &File) -> Option<FileId> {
    platform::identity(file, &file.metadata().ok()?)
}
