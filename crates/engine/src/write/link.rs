//! Publishing: the one place where L2 entries change.

use qcow2_format::{Geometry, GuestOffset, L2Mapping};

use super::table::{SlicePlace, exclusive_slice};
use crate::alloc::Unlinked;
use crate::image::{Loaded, Missing, Qcow2};
use crate::writer::Writer;
use crate::{ErrorKind, Result};

/// Entries to change, in one slice.
#[derive(Debug, Clone, Copy)]
pub(super) struct Change {
    /// Guest offset of the first cluster.
    pub(super) guest: u64,
    /// Number of clusters.
    pub(super) clusters: u64,
    /// The new entries must not be durable before what was written for them.
    pub(super) barrier: bool,
    /// The guest gave up the clusters that lose their reference.
    pub(super) punch: bool,
}

impl Writer {
    /// Replaces each old mapping by what `replace` (number of the cluster, old mapping) returns; `None` leaves it. Host
    /// clusters that lose their reference go to the quarantine with the next flush. The clusters are registered by
    /// the caller, and their table is exclusive.
    pub(super) fn link(
        &self,
        image: &Qcow2,
        change: Change,
        replace: impl Fn(u64, &L2Mapping) -> Option<L2Mapping>,
    ) -> Result<()> {
        let mut loaded = Loaded::default();
        while let Some(missing) = self.link_in_memory(image, change, &replace, &loaded)? {
            loaded = image.load_slice(missing)?;
        }
        Ok(())
    }

    fn link_in_memory(
        &self,
        image: &Qcow2,
        change: Change,
        replace: &impl Fn(u64, &L2Mapping) -> Option<L2Mapping>,
        loaded: &Loaded,
    ) -> Result<Option<Missing>> {
        let g = *image.geometry();
        let mut mapping = image.changing();
        let guest = GuestOffset(change.guest);
        let place = exclusive_slice(image, mapping.l1(), guest)?;
        let Some(SlicePlace { offset, index }) = place else {
            return Err(image.error(ErrorKind::Internal, "the L2 table of a registered run is not exclusive"));
        };
        let Some(slice) = mapping.slice(image.slices(), offset, loaded) else {
            return Ok(Some(mapping.missing(offset, guest)));
        };
        let mut updates = Vec::new();
        for number in 0..change.clusters {
            let cluster = change.guest + number * g.cluster_size();
            let entry = image.slices().entry(&slice, index + number);
            let old = image.decode_entry(entry, cluster)?;
            if let Some(new) = replace(number, &old).filter(|new| new != &old) {
                updates.push((index + number, old, new));
            }
        }
        if updates.is_empty() {
            return Ok(None);
        }
        if !image.header().has_data_file() {
            for (_, old, new) in &updates {
                if let Some(run) = unlink(old, new, change.punch, &g) {
                    mapping.unlink(run);
                }
            }
        }
        mapping.change_slice(offset, slice, change.barrier, |words| {
            for (index, _, new) in updates {
                image.slices().set_entry(words, index, new.encode(&g));
            }
        });
        Ok(None)
    }
}

/// The host clusters that `old` refers to and `new` does not.
fn unlink(old: &L2Mapping, new: &L2Mapping, punch: bool, g: &Geometry) -> Option<Unlinked> {
    if let L2Mapping::Compressed(descriptor) = old {
        let (first, last) = descriptor.host_clusters(g);
        // Neighbours share these clusters: their space is not the guest's to give up.
        return Some(Unlinked { cluster: first, count: last - first + 1, punch: false });
    }
    let host = host_of(old).filter(|&host| host_of(new) != Some(host))?;
    Some(Unlinked { cluster: g.cluster_index(host), count: 1, punch })
}

/// The host cluster of a standard mapping.
fn host_of(mapping: &L2Mapping) -> Option<u64> {
    match *mapping {
        L2Mapping::Data { host, .. } => Some(host.0),
        L2Mapping::Zero { host, .. } | L2Mapping::Subclusters { host, .. } => host.map(|h| h.0),
        L2Mapping::Unallocated | L2Mapping::Compressed(_) => None,
    }
}
