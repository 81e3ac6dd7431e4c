//! Where new places are.

use super::layer::Shared;
use super::layout::{Entry, Layout, Scheme};
use crate::{Error, ErrorKind, Result, StorageExt};

/// Most places inside the file that are given out again. Others wait until the image is opened anew.
const MOST_FREE: usize = 1 << 16;

/// Places that can be given out.
#[derive(Debug)]
pub(super) struct Places {
    /// Those inside the file that nothing refers to, the first one last.
    pub(super) free: Vec<u64>,
    /// Behind the last place that something refers to.
    pub(super) end: u64,
    /// What lies in front of here may hold anything.
    pub(super) stale: u64,
}

impl Places {
    /// Reads the whole table, of which the first `entries` count.
    ///
    /// # Errors
    /// `Corrupt` for places that are none, or that overlap: nothing can be written safely then. `Io`.
    pub(super) fn survey<S: Scheme>(shared: &Shared<S>, entries: u32) -> Result<Self> {
        let layout = shared.layout();
        let mut used = Vec::new();
        shared.walk(|index, entry| {
            if index < entries
                && let Entry::At(place) = entry
                && let Some(entry) = layout.entry_of(place)
            {
                shared.judged(index, entry)?;
                used.push(entry);
            }
            Ok(())
        })?;
        used.sort_unstable();
        let device = shared.storage.traits().block_device;
        let stale = if device { u64::MAX } else { shared.storage.size()? };
        let mut places = Self { free: Vec::new(), end: clear_of(layout, layout.data), stale };
        let mut last = 0;
        for entry in used {
            let Entry::At(place) = layout.entry(entry) else { continue };
            if place < last {
                let message = format!(
                    "two blocks share bytes at {place:#x}: nothing can be written before check has repaired that"
                );
                let error = Error::new(ErrorKind::Corrupt, message).with_field(shared.scheme.entry_name());
                return Err(shared.storage.located(error.with_offset(place)));
            }
            while places.end + layout.stride() <= place && places.free.len() < MOST_FREE {
                places.free.push(places.end);
                places.end = clear_of(layout, places.end + layout.stride());
            }
            last = place + layout.stride();
            places.end = places.end.max(layout.next_place(last));
        }
        let behind = layout.metadata.iter().map(|part| part.end).max().unwrap_or(0);
        places.end = places.end.max(layout.next_place(behind));
        places.free.reverse();
        Ok(places)
    }
}

/// The first place at or behind `at` that touches none of the format's own structures.
fn clear_of(layout: &Layout, at: u64) -> u64 {
    let mut place = layout.next_place(at);
    while let Some(part) =
        layout.metadata.iter().find(|part| part.start < place + layout.stride() && place < part.end)
    {
        place = layout.next_place(part.end);
    }
    place
}
