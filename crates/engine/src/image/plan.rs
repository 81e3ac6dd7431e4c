//! Planning a read: from a guest range to the segments of one layer.

use std::ops::Range;

use qcow2_core::layer::{Place, PlanBuilder, Segment, SegmentKind, Token};
use qcow2_format::{
    CompressedDescriptor, Geometry, GuestOffset, HostOffset, L1Entry, L2Entry, L2Mapping, SubclusterBitmap,
    SubclusterKind,
};

use super::mapping::{Loaded, Mapping, Missing};
use super::qcow2::Qcow2;
use crate::{Error, ErrorKind, Result};

/// Clusters in one plan from which on it reads tables in larger pieces than slices.
const WIDE: u64 = 4096;
/// L1 entries that are looked through for a table at once: a walk over a very large disk does that at every step.
const MOST_ENTRIES: usize = 4096;
/// Bytes of such a piece.
const MAX_PIECE: u64 = 64 << 10;

/// The place of an offset in the file that holds guest data, the only one that a segment of this format can lie in.
fn place(host: u64) -> Place {
    Place { file: 0, host }
}

/// The compressed cluster that a segment's token stands for: what its L2 entry says.
pub(super) fn descriptor(token: Token, geometry: &Geometry) -> CompressedDescriptor {
    CompressedDescriptor::decode(token.0, geometry)
}

impl Qcow2 {
    /// Bytes from the guest offset `at` to the next one that has an L2 table, at least: no further than is looked at. Beyond the last one,
    /// all that there are.
    pub(super) fn bytes_without_table(&self, at: u64) -> u64 {
        let g = self.geometry();
        let first = g.l1_index(GuestOffset(at));
        let mapping = self.mapping.read();
        let rest = mapping.l1.get(first as usize..).unwrap_or_default();
        let near = rest.get(..MOST_ENTRIES).unwrap_or(rest);
        match near.iter().position(|entry| L1Entry(*entry).offset_bits() != 0) {
            Some(0) => 0,
            None if near.len() == rest.len() => u64::MAX,
            found => {
                let index = found.unwrap_or(near.len()) as u64;
                (first + index).saturating_mul(g.l2_coverage()).saturating_sub(at)
            }
        }
    }
}

impl Qcow2 {
    /// Appends the segments of `range`, which must lie inside the disk, to `segments`; neighbours that continue each
    /// other are merged. Compressed segments stay one per cluster.
    ///
    /// # Errors
    /// `Corrupt` for entries that break the format, naming the guest offset; `Io` from reading tables.
    pub fn plan_read(&self, range: Range<u64>, segments: &mut Vec<Segment>) -> Result<()> {
        let mut plan = PlanBuilder::new(segments);
        let mut at = range.start;
        let mut loaded = Loaded::default();
        let mut stopped = None;
        while at < range.end {
            let missing =
                self.plan_from_memory(&self.mapping.read(), &mut at, range.end, &loaded, &mut plan)?;
            let Some(missing) = missing else { break };
            let pieces = self.pieces(at..range.end, missing.offset);
            loaded = match pieces {
                // What is not kept is not found where the mapping changed meanwhile: the second time it is.
                2.. if stopped != Some(at) => self.load_slices(missing, pieces)?,
                _ => self.load_slice(missing)?,
            };
            stopped = Some(at);
        }
        Ok(())
    }

    /// What the bytes of `range` are, where all of them are the same and memory says so.
    pub(super) fn peek(&self, mapping: &Mapping, range: Range<u64>) -> Option<SegmentKind> {
        let mut segments = Vec::new();
        let mut plan = PlanBuilder::new(&mut segments);
        let mut at = range.start;
        let planned = self.plan_from_memory(mapping, &mut at, range.end, &Loaded::default(), &mut plan);
        match (planned, segments.as_slice()) {
            (Ok(None), [segment]) => Some(segment.kind),
            _ => None,
        }
    }

    /// How many slices from the one at `offset`, which maps the start of `guest`, are worth reading at once, past the cache:
    /// those of the table, where so much is planned that nobody means to read all of it.
    fn pieces(&self, guest: Range<u64>, offset: HostOffset) -> u64 {
        let g = self.geometry();
        if (guest.end - guest.start) >> g.cluster_bits() < WIDE {
            return 1;
        }
        (g.cluster_size() - g.in_cluster(offset.0)).min(MAX_PIECE) / self.slices.slice_bytes()
    }

    /// Reads `count` slices of a table at once, without the lock, and keeps them for the caller alone.
    fn load_slices(&self, missing: Missing, count: u64) -> Result<Loaded> {
        match self.slices.load_uncached(&**self.storage(), missing.offset.0, count) {
            Ok(slices) => Ok(Loaded { offset: missing.offset, slices, generation: missing.generation }),
            // A table that the file's end cuts is an error only where it is needed.
            Err(error) if error.kind() == ErrorKind::Corrupt => self.load_slice(missing),
            Err(error) => Err(self.in_table(error, missing.guest)),
        }
    }

    /// Reads a slice that was missing, without the lock.
    pub(crate) fn load_slice(&self, missing: Missing) -> Result<Loaded> {
        let slice = self.slices.load(&**self.storage(), missing.offset.0);
        let slice = slice.map_err(|e| self.in_table(e, missing.guest))?;
        Ok(Loaded { offset: missing.offset, slices: vec![slice], generation: missing.generation })
    }

    /// Plans from `at` as far as memory reaches, under the shared lock; returns the slice that stopped it. Compiled into each of its two
    /// callers: called, it makes a lookup 34 instructions longer, of 700.
    #[inline(always)]
    fn plan_from_memory(
        &self,
        mapping: &Mapping,
        at: &mut u64,
        end: u64,
        loaded: &Loaded,
        plan: &mut PlanBuilder<'_>,
    ) -> Result<Option<Missing>> {
        let g = *self.geometry();
        while *at < end {
            let index = g.l1_index(GuestOffset(*at));
            let entry = L1Entry(mapping.l1.get(index as usize).copied().unwrap_or(0));
            let table = entry.table(&g).map_err(|e| self.corrupt_entry(e, *at))?;
            let Some(table) = table else {
                let table_end = (*at - *at % g.l2_coverage()).saturating_add(g.l2_coverage()).min(end);
                plan.push(*at, table_end - *at, SegmentKind::Unallocated(None));
                *at = table_end;
                continue;
            };
            let (offset, mut index) = self.slices.locate(table, g.l2_index(GuestOffset(*at)));
            let Some(slice) = mapping.slice(&self.slices, offset, loaded) else {
                return Ok(Some(mapping.missing(offset, GuestOffset(*at))));
            };
            while index < self.slices.entries() && *at < end {
                let cluster = g.cluster_start(*at);
                let run = self.slices.run(&slice, index, g.clusters_for(end - cluster));
                let run_end = (cluster + (run * g.cluster_size() - 1)).min(end - 1) + 1;
                self.plan_cluster(self.slices.entry(&slice, index), cluster, *at..run_end, plan)?;
                *at = run_end;
                index += run;
            }
        }
        Ok(None)
    }

    /// Plans a range that begins in the cluster at guest offset `cluster`, whose entry is given. What goes on behind that
    /// cluster is a run, see `SliceCache::run`.
    fn plan_cluster(
        &self,
        entry: L2Entry,
        cluster: u64,
        range: Range<u64>,
        plan: &mut PlanBuilder<'_>,
    ) -> Result<()> {
        let within = range.start - cluster;
        let length = range.end - range.start;
        let at = |host: HostOffset| place(host.0 + within);
        match self.decode_entry(entry, cluster)? {
            L2Mapping::Unallocated => plan.push(range.start, length, SegmentKind::Unallocated(None)),
            L2Mapping::Zero { host, .. } => {
                plan.push(range.start, length, SegmentKind::Zero(host.map(at)));
            }
            L2Mapping::Data { host, .. } => {
                plan.push(range.start, length, SegmentKind::Data(at(host)));
            }
            L2Mapping::Compressed(descriptor) => {
                plan.push(
                    range.start,
                    length,
                    SegmentKind::Opaque(Token(descriptor.encode(self.geometry()))),
                );
            }
            L2Mapping::Subclusters { host, bitmap, .. } => {
                self.plan_subclusters(host, bitmap, cluster, range, plan);
            }
        }
        Ok(())
    }

    /// What an L2 entry says about the cluster at guest offset `cluster`.
    pub(crate) fn decode_entry(&self, entry: L2Entry, cluster: u64) -> Result<L2Mapping> {
        let external = self.header().has_data_file();
        let mapping = entry
            .decode(self.geometry(), self.header().version, external)
            .map_err(|e| self.corrupt_entry(e, cluster))?;
        if external {
            self.check_external(&mapping, cluster)?;
        }
        Ok(mapping)
    }

    fn plan_subclusters(
        &self,
        host: Option<HostOffset>,
        bitmap: SubclusterBitmap,
        cluster: u64,
        range: Range<u64>,
        plan: &mut PlanBuilder<'_>,
    ) {
        let g = self.geometry();
        let mut at = range.start;
        while at < range.end {
            let index = g.subcluster_index(at) as u32;
            let run_end = cluster + u64::from(index + bitmap.run_length(index)) * g.subcluster_size();
            let end = run_end.min(range.end);
            let here = host.map(|h| place(h.0 + (at - cluster)));
            let kind = match (bitmap.kind(index), here) {
                (SubclusterKind::Zero, here) => SegmentKind::Zero(here),
                (SubclusterKind::Data, Some(here)) => SegmentKind::Data(here),
                // Data without a host cluster does not decode.
                (SubclusterKind::Data, None) => SegmentKind::Unallocated(None),
                (SubclusterKind::Unallocated, here) => SegmentKind::Unallocated(here),
            };
            plan.push(at, end - at, kind);
            at = end;
        }
    }

    /// In an external data file, host offsets are guest offsets.
    fn check_external(&self, mapping: &L2Mapping, cluster: u64) -> Result<()> {
        let host = match *mapping {
            L2Mapping::Data { host, .. } => Some(host),
            L2Mapping::Zero { host, .. } | L2Mapping::Subclusters { host, .. } => host,
            L2Mapping::Unallocated | L2Mapping::Compressed(_) => None,
        };
        match host {
            Some(host) if host.0 != cluster => {
                let message = format!(
                    "the cluster at guest offset {cluster:#x} has host offset {host} in the external data file, \
                     where both must be equal"
                );
                Err(self.error(ErrorKind::Corrupt, message))
            }
            _ => Ok(()),
        }
    }

    pub(crate) fn corrupt_entry(&self, error: qcow2_format::FormatError, guest: u64) -> Error {
        let field = error.field();
        let message = format!("{error} (guest offset {guest:#x})");
        let mut e = self.error(ErrorKind::Corrupt, message).with_source(error);
        if let Some(field) = field {
            e = e.with_field(field);
        }
        e
    }

    /// A table that could not be read, with the guest offset that needed it.
    fn in_table(&self, error: Error, guest: GuestOffset) -> Error {
        if error.kind() == ErrorKind::Corrupt {
            let message = format!("the L2 table for guest offset {guest} lies outside the file");
            let mut e = self.error(ErrorKind::Corrupt, message).with_field("L1 entry");
            if let Some(offset) = error.offset() {
                e = e.with_offset(offset);
            }
            return e.with_source(error);
        }
        error
    }
}
