//! Planning one step of a write: what can be written in place, and what needs host clusters.

use std::ops::Range;

use qcow2_format::{GuestOffset, HostOffset, L2Mapping, SubclusterKind};

use super::table::{SlicePlace, exclusive_slice};
use crate::Result;
use crate::alloc::{Wish, chunk_clusters};
use crate::image::{Loaded, Mapping, Missing, Qcow2, Slice};
use crate::writer::Registration;
use crate::writer::Writer;

/// Most guest bytes that one run of new clusters covers.
const RUN_BYTES: u64 = 8 << 20;

/// The next step of a write.
#[derive(Debug)]
pub(super) enum Step<'a> {
    /// `length` bytes go to allocated, exclusive clusters.
    InPlace {
        /// Offset in the data file.
        host: u64,
        length: u64,
        /// Keeps changes of the mapping away, where the data file is a raw image by itself: it must stay the same disk.
        registration: Option<Registration<'a>>,
    },
    /// The run's clusters need a host cluster each, or a change of their mapping.
    Change(Run<'a>),
    /// The L2 table is missing or shared.
    NeedsTable,
    /// Another request changes these guest clusters: wait, then plan again.
    Busy(Range<u64>),
    /// A slice must be loaded.
    Missing(Missing),
}

/// Guest clusters in one L2 slice, registered for a change.
#[derive(Debug)]
pub(super) struct Run<'a> {
    /// Guest offset of the first cluster.
    pub(super) guest: u64,
    /// Number of clusters, at least 1.
    pub(super) clusters: u64,
    /// Their old mappings, where the plan looked at them; they do not change while the run is registered.
    pub(super) old: Vec<L2Mapping>,
    /// The host cluster that the entry keeps: the run is then this one cluster.
    pub(super) reuse: Option<HostOffset>,
    /// Where its new host clusters should be.
    pub(super) wish: Wish,
    /// Keeps other changes away.
    pub(super) registration: Registration<'a>,
}

/// The host cluster in which bytes `range` of the cluster can be overwritten, if all of them are stored there and
/// nobody else refers to it.
fn in_place(image: &Qcow2, mapping: &L2Mapping, range: &Range<u64>) -> Option<HostOffset> {
    match *mapping {
        L2Mapping::Data { host, copied: true } => Some(host),
        L2Mapping::Subclusters { host: Some(host), copied: true, bitmap } => {
            let g = image.geometry();
            let (first, last) = (g.subcluster_index(range.start), g.subcluster_index(range.end - 1));
            (first..=last).all(|i| bitmap.kind(i as u32) == SubclusterKind::Data).then_some(host)
        }
        _ => None,
    }
}

/// The host cluster that an entry keeps although bytes of it must be filled.
fn reusable(mapping: &L2Mapping) -> Option<HostOffset> {
    match *mapping {
        L2Mapping::Zero { host: Some(host), copied: true }
        | L2Mapping::Subclusters { host: Some(host), copied: true, .. } => Some(host),
        _ => None,
    }
}

/// The host cluster that an entry of a slice names.
fn host_in(image: &Qcow2, slice: &Slice, index: u64) -> Option<u64> {
    let g = image.geometry();
    let entry = image.slices().entry(slice, index);
    match entry.decode(g, image.header().version, false) {
        Ok(L2Mapping::Data { host, .. } | L2Mapping::Subclusters { host: Some(host), .. }) => {
            Some(g.cluster_index(host.0))
        }
        _ => None,
    }
}

/// The host cluster of the guest cluster before `first`, which is in another slice, where that is in memory.
fn before_slice(image: &Qcow2, mapping: &Mapping, first: u64) -> Option<u64> {
    let guest = GuestOffset(first.checked_sub(1)? * image.geometry().cluster_size());
    let SlicePlace { offset, index } = exclusive_slice(image, mapping.l1(), guest).ok()??;
    let slice = mapping.slice(image.slices(), offset, &Loaded::default())?;
    host_in(image, &slice, index)
}

/// The best places for new clusters of the run of `count` guest clusters from `first` on, whose first entry has
/// `index` in the slice. Looks at the entries of its chunk only, and at the one before.
fn wish(image: &Qcow2, mapping: &Mapping, slice: &Slice, index: u64, first: u64, count: u64) -> Wish {
    let chunk = chunk_clusters(image.geometry());
    let host = |index| host_in(image, slice, index);
    // The cluster right before counts even across the chunk's border: that is how a disk is written in order.
    let before = (first % chunk).max(1).min(index);
    let left = match index {
        0 => before_slice(image, mapping, first).map(|host| host + 1),
        _ => (1..=before).find_map(|d| Some(host(index - d)? + d)),
    };
    let end = first + count;
    let after =
        (end.next_multiple_of(chunk) - end).min(image.slices().entries().saturating_sub(index + count));
    let right = (0..after).find_map(|d| host(index + count + d)?.checked_sub(count + d));
    Wish { near: [left, right], within: Some(first % chunk), sparse: false }
}

impl Writer {
    /// Plans the start of `range` (not empty). Everything in the result was true at one moment under the lock.
    pub(super) fn plan_write(&self, image: &Qcow2, range: Range<u64>, loaded: &Loaded) -> Result<Step<'_>> {
        let g = image.geometry();
        let mapping = image.mapping();
        let start = GuestOffset(range.start);
        let Some(SlicePlace { offset, index }) = exclusive_slice(image, mapping.l1(), start)? else {
            return Ok(Step::NeedsTable);
        };
        let Some(slice) = mapping.slice(image.slices(), offset, loaded) else {
            return Ok(Step::Missing(mapping.missing(offset, start)));
        };
        let guest = g.cluster_start(range.start);
        let mut old = Vec::new();
        let mut run: Option<(u64, u64)> = None;
        let mut reuse = None;
        for (number, index) in (index..image.slices().entries()).enumerate() {
            let cluster = guest + number as u64 * g.cluster_size();
            if cluster >= range.end {
                break;
            }
            let entry = image.decode_entry(image.slices().entry(&slice, index), cluster)?;
            let (start, end) = (range.start.max(cluster), range.end.min(cluster + g.cluster_size()));
            let within = start - cluster..end - cluster;
            match (in_place(image, &entry, &within), run) {
                (Some(host), None) if old.is_empty() => run = Some((host.0 + within.start, end - start)),
                (Some(host), Some((first, length))) if host.0 + within.start == first + length => {
                    run = Some((first, length + (end - start)));
                }
                (Some(_), _) | (None, Some(_)) => break,
                (None, None) => match reusable(&entry) {
                    Some(host) if old.is_empty() => {
                        reuse = Some(host);
                        old.push(entry);
                        break;
                    }
                    Some(_) => break,
                    None => old.push(entry),
                },
            }
            if old.len() as u64 * g.cluster_size() >= RUN_BYTES {
                break;
            }
        }
        let first = g.cluster_index(guest);
        if let Some((host, length)) = run {
            if !image.header().data_file_raw() {
                return Ok(Step::InPlace { host, length, registration: None });
            }
            let clusters = first..g.clusters_for(range.start + length);
            return Ok(match self.inflight.try_register(clusters.clone()) {
                Some(registration) => Step::InPlace { host, length, registration: Some(registration) },
                None => Step::Busy(clusters),
            });
        }
        let clusters = first..first + old.len() as u64;
        let wish = wish(image, &mapping, &slice, index, first, old.len() as u64);
        Ok(match self.inflight.try_register(clusters.clone()) {
            Some(registration) => {
                Step::Change(Run { guest, clusters: old.len() as u64, old, reuse, wish, registration })
            }
            None => Step::Busy(clusters),
        })
    }

    /// Registers the clusters of `range` (not empty) that one exclusive slice maps, for a change of their mapping.
    pub(super) fn plan_change(&self, image: &Qcow2, range: Range<u64>) -> Result<Step<'_>> {
        let g = image.geometry();
        let mapping = image.mapping();
        let start = GuestOffset(range.start);
        let Some(SlicePlace { index, .. }) = exclusive_slice(image, mapping.l1(), start)? else {
            return Ok(Step::NeedsTable);
        };
        let first = g.cluster_index(range.start);
        let left = image.slices().entries() - index;
        let clusters = first..(g.clusters_for(range.end)).min(first + left);
        Ok(match self.inflight.try_register(clusters.clone()) {
            Some(registration) => Step::Change(Run {
                guest: g.cluster_start(range.start),
                clusters: clusters.end - clusters.start,
                old: Vec::new(),
                reuse: None,
                wish: Wish::default(),
                registration,
            }),
            None => Step::Busy(clusters),
        })
    }
}
