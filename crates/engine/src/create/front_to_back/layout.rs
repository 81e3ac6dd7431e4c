//! Which host clusters hold what.

use qcow2_format::limits::{MAX_HOST_OFFSET, MAX_REFCOUNT_TABLE_BYTES};
use qcow2_format::{Geometry, Header, HostOffset};

use crate::create::hosts::refcount_clusters;
use crate::create::options::L1_ENTRY_SIZE;
use crate::{Error, ErrorKind, Result};

/// What a host cluster is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Region {
    Header,
    RefcountTable,
    RefcountBlocks,
    L1,
    L2,
    Data,
}

/// First host cluster of each region, in their order; the header is cluster 0.
#[derive(Debug, Clone, Copy)]
pub(super) struct Layout {
    pub(super) refcount_table: u64,
    pub(super) refcount_blocks: u64,
    pub(super) l1: u64,
    pub(super) l2: u64,
    pub(super) data: u64,
    /// Behind the last one.
    pub(super) end: u64,
    /// Entries of the L1 table.
    l1_size: u32,
}

impl Layout {
    /// With so many L2 tables and data clusters.
    ///
    /// # Errors
    /// `Limit` for an image that is too large.
    pub(super) fn new(geometry: &Geometry, l1_size: u32, tables: u64, data: u64) -> Result<Self> {
        let l1_clusters = geometry.clusters_for(u64::from(l1_size) * L1_ENTRY_SIZE);
        let others = 1 + l1_clusters + tables + data;
        let (blocks, table) = refcount_clusters(geometry, others);
        let end = others + blocks + table;
        let table_bytes = geometry.cluster_offset(table);
        if table_bytes.is_none_or(|bytes| bytes > MAX_REFCOUNT_TABLE_BYTES.max(geometry.cluster_size())) {
            let message =
                "the image is too large: its refcount table would exceed 8 MiB; larger clusters allow more";
            return Err(Error::new(ErrorKind::Limit, message).with_field("refcount_table_clusters"));
        }
        if geometry.cluster_offset(end).is_none_or(|offset| offset > MAX_HOST_OFFSET) {
            let message = "the image is too large: host offsets end at 64 PiB";
            return Err(Error::new(ErrorKind::Limit, message));
        }
        let refcount_blocks = 1 + table;
        let l1 = refcount_blocks + blocks;
        let l2 = l1 + l1_clusters;
        Ok(Self { refcount_table: 1, refcount_blocks, l1, l2, data: l2 + tables, end, l1_size })
    }

    /// Says in the header where the tables are.
    ///
    /// # Errors
    /// `Internal`: it was checked that they can be there.
    pub(super) fn enter(&self, geometry: &Geometry, header: &mut Header) -> Result<()> {
        let at = |cluster: u64| HostOffset(cluster << geometry.cluster_bits());
        // A table without entries is nowhere, as QEMU has it.
        header.l1_table_offset = if self.l1_size == 0 { HostOffset(0) } else { at(self.l1) };
        header.refcount_table_offset = at(self.refcount_table);
        header.refcount_table_clusters = u32::try_from(self.refcount_blocks - self.refcount_table)
            .map_err(|_| Error::new(ErrorKind::Internal, "refcount table beyond the format's limit"))?;
        Ok(())
    }

    /// What a host cluster is, and which one of its region; `None` behind the end.
    pub(super) fn region(&self, cluster: u64) -> Option<(Region, u64)> {
        let firsts = [
            (Region::Data, self.data),
            (Region::L2, self.l2),
            (Region::L1, self.l1),
            (Region::RefcountBlocks, self.refcount_blocks),
            (Region::RefcountTable, self.refcount_table),
            (Region::Header, 0),
        ];
        let found = firsts.into_iter().find(|(_, first)| cluster >= *first).filter(|_| cluster < self.end);
        found.map(|(region, first)| (region, cluster - first))
    }
}

/// A bug: the plan says more, or less, than it holds.
pub(super) fn internal() -> Error {
    Error::new(ErrorKind::Internal, "a place of a stream is in no part of its plan")
}
