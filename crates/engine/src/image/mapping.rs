//! Planning a read: from a guest range to the segments of one layer.

use std::ops::Range;

use qcow2_format::{
    CompressedDescriptor, GuestOffset, HostOffset, L1Entry, L2Entry, L2Mapping, SubclusterBitmap,
    SubclusterKind,
};

use super::qcow2::Qcow2;
use crate::{Error, ErrorKind, Result};

/// A run of guest bytes that one layer stores in one way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// First guest byte.
    pub start: u64,
    /// Length in bytes, never 0.
    pub length: u64,
    /// How it is stored.
    pub kind: SegmentKind,
}

/// How one layer stores a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SegmentKind {
    /// As it is, from this offset of the data file (of the image, without an external one).
    Data {
        /// Offset of the segment's first byte.
        host: u64,
    },
    /// Not at all: reads as zeroes. `host` is a preallocation.
    Zero {
        /// Offset of the segment's first byte.
        host: Option<u64>,
    },
    /// Compressed, as part of one cluster.
    Compressed(CompressedDescriptor),
    /// Not in this layer: the backing file decides.
    Unallocated {
        /// Where the range would be: the cluster has other subclusters and so a host cluster.
        host: Option<u64>,
    },
}

impl SegmentKind {
    /// Whether `next`, which starts `length` bytes behind the start of `self`, continues it.
    fn continues(&self, length: u64, next: &Self) -> bool {
        match (self, next) {
            (Self::Data { host: a }, Self::Data { host: b })
            | (Self::Zero { host: Some(a) }, Self::Zero { host: Some(b) })
            | (Self::Unallocated { host: Some(a) }, Self::Unallocated { host: Some(b) }) => a + length == *b,
            (Self::Zero { host: None }, Self::Zero { host: None })
            | (Self::Unallocated { host: None }, Self::Unallocated { host: None }) => true,
            (Self::Compressed(a), Self::Compressed(b)) => a == b,
            _ => false,
        }
    }
}

/// Collects segments, merging neighbours.
struct Plan<'a> {
    segments: &'a mut Vec<Segment>,
    /// Segments before this one belong to earlier plans in the same list.
    first: usize,
}

impl Plan<'_> {
    fn push(&mut self, start: u64, length: u64, kind: SegmentKind) {
        if length == 0 {
            return;
        }
        let own = self.segments.len() > self.first;
        if let Some(last) = self.segments.last_mut().filter(|_| own)
            && last.kind.continues(last.length, &kind)
        {
            last.length += length;
            return;
        }
        self.segments.push(Segment { start, length, kind });
    }
}

impl Qcow2 {
    /// Appends the segments of `range`, which must lie inside the disk, to `segments`; neighbours that continue each
    /// other are merged. Compressed segments stay one per cluster.
    ///
    /// # Errors
    /// `Corrupt` for entries that break the format, naming the guest offset; `Io` from reading tables.
    pub fn plan_read(&self, range: Range<u64>, segments: &mut Vec<Segment>) -> Result<()> {
        let first = segments.len();
        let mut plan = Plan { segments, first };
        let g = *self.geometry();
        let mut at = range.start;
        while at < range.end {
            let table_end = (at - at % g.l2_coverage()).saturating_add(g.l2_coverage()).min(range.end);
            let index = g.l1_index(GuestOffset(at));
            let entry = L1Entry(self.l1().get(index as usize).copied().unwrap_or(0));
            let table = entry.table(&g).map_err(|e| self.corrupt_entry(e, at))?;
            match table {
                None => plan.push(at, table_end - at, SegmentKind::Unallocated { host: None }),
                Some(table) => self.plan_table(table, at..table_end, &mut plan)?,
            }
            at = table_end;
        }
        Ok(())
    }

    /// Plans a range that one L2 table maps, slice by slice.
    fn plan_table(&self, table: HostOffset, range: Range<u64>, plan: &mut Plan<'_>) -> Result<()> {
        let g = *self.geometry();
        let mut at = range.start;
        while at < range.end {
            let l2_index = g.l2_index(GuestOffset(at));
            let (slice, mut index) =
                self.slices.get(&**self.storage(), table.0, l2_index).map_err(|e| self.in_table(e, at))?;
            while index < self.slices.entries() && at < range.end {
                let cluster = g.cluster_start(at);
                let end = (cluster + (g.cluster_size() - 1)).min(range.end - 1) + 1;
                self.plan_cluster(self.slices.entry(&slice, index), cluster, at..end, plan)?;
                at = end;
                index += 1;
            }
        }
        Ok(())
    }

    fn plan_cluster(
        &self,
        entry: L2Entry,
        cluster: u64,
        range: Range<u64>,
        plan: &mut Plan<'_>,
    ) -> Result<()> {
        let external = self.header().has_data_file();
        let mapping = entry
            .decode(self.geometry(), self.header().version, external)
            .map_err(|e| self.corrupt_entry(e, cluster))?;
        let within = range.start - cluster;
        let length = range.end - range.start;
        let at = |host: HostOffset| host.0 + within;
        if external {
            self.check_external(&mapping, cluster)?;
        }
        match mapping {
            L2Mapping::Unallocated => plan.push(range.start, length, SegmentKind::Unallocated { host: None }),
            L2Mapping::Zero { host, .. } => {
                plan.push(range.start, length, SegmentKind::Zero { host: host.map(at) });
            }
            L2Mapping::Data { host, .. } => {
                plan.push(range.start, length, SegmentKind::Data { host: at(host) });
            }
            L2Mapping::Compressed(descriptor) => {
                plan.push(range.start, length, SegmentKind::Compressed(descriptor));
            }
            L2Mapping::Subclusters { host, bitmap, .. } => {
                self.plan_subclusters(host, bitmap, cluster, range, plan);
            }
        }
        Ok(())
    }

    fn plan_subclusters(
        &self,
        host: Option<HostOffset>,
        bitmap: SubclusterBitmap,
        cluster: u64,
        range: Range<u64>,
        plan: &mut Plan<'_>,
    ) {
        let g = self.geometry();
        let mut at = range.start;
        while at < range.end {
            let index = g.subcluster_index(at) as u32;
            let run_end = cluster + u64::from(index + bitmap.run_length(index)) * g.subcluster_size();
            let end = run_end.min(range.end);
            let here = host.map(|h| h.0 + (at - cluster));
            let kind = match (bitmap.kind(index), here) {
                (SubclusterKind::Zero, host) => SegmentKind::Zero { host },
                (SubclusterKind::Data, Some(host)) => SegmentKind::Data { host },
                // Data without a host cluster does not decode.
                (SubclusterKind::Data, None) => SegmentKind::Unallocated { host: None },
                (SubclusterKind::Unallocated, host) => SegmentKind::Unallocated { host },
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

    fn corrupt_entry(&self, error: qcow2_format::FormatError, guest: u64) -> Error {
        let field = error.field();
        let message = format!("{error} (guest offset {guest:#x})");
        let mut e = self.error(ErrorKind::Corrupt, message).with_source(error);
        if let Some(field) = field {
            e = e.with_field(field);
        }
        e
    }

    /// A table that could not be read, with the guest offset that needed it.
    fn in_table(&self, error: Error, guest: u64) -> Error {
        if error.kind() == ErrorKind::Corrupt {
            let message = format!("the L2 table for guest offset {guest:#x} lies outside the file");
            let mut e = self.error(ErrorKind::Corrupt, message).with_field("L1 entry");
            if let Some(offset) = error.offset() {
                e = e.with_offset(offset);
            }
            return e.with_source(error);
        }
        error
    }
}
