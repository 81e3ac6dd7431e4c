//! Host clusters of an image that is written from front to back, and their refcounts.
//!
//! Clusters are handed out in ascending order only and never given back, so a refcount block is final as soon
//! as the clusters behind its range are reached: memory is bounded however large the image. A refcount block
//! is the first cluster of the range that it counts, except inside a contiguous table.

use std::collections::VecDeque;

use qcow2_format::limits::{MAX_HOST_OFFSET, MAX_REFCOUNT_TABLE_BYTES};
use qcow2_format::{CompressedDescriptor, Geometry, HostOffset, refcount, words};

use crate::invalid::invalid;
use crate::{Error, ErrorKind, Result};

/// Bytes of a refcount table entry.
const TABLE_ENTRY_SIZE: u64 = 8;

/// A piece of metadata that will not change any more.
#[derive(Debug)]
pub(super) struct Finished {
    pub(super) host: HostOffset,
    pub(super) bytes: Vec<u8>,
}

/// The refcounts of one range of host clusters.
#[derive(Debug)]
struct Block {
    range: u64,
    host: Option<u64>,
    bytes: Vec<u8>,
}

/// The host cluster that compressed data is being packed into.
#[derive(Debug, Clone, Copy)]
struct Packing {
    /// Where the next compressed cluster starts.
    at: u64,
    /// End of the host cluster.
    end: u64,
    /// Compressed clusters that touch it.
    users: u64,
}

/// Allocator of host clusters.
#[derive(Debug)]
pub(super) struct HostClusters {
    geometry: Geometry,
    /// First cluster that is not handed out.
    next: u64,
    /// Blocks that can still change, in ascending order of their ranges.
    open: VecDeque<Block>,
    /// Host offsets of the refcount blocks.
    table: Vec<u64>,
    table_clusters: u64,
    packing: Option<Packing>,
}

/// Refcount blocks, and clusters of the refcount table, of an image of up to `clusters` host clusters beside them.
pub(super) fn refcount_clusters(geometry: &Geometry, clusters: u64) -> (u64, u64) {
    let per_block = geometry.refcount_block_entries();
    let (mut blocks, mut table) = (0u64, 1u64);
    loop {
        let needed = clusters.saturating_add(blocks).saturating_add(table).div_ceil(per_block);
        let wanted = geometry.clusters_for(needed.saturating_mul(TABLE_ENTRY_SIZE)).max(1);
        if needed == blocks && wanted == table {
            return (blocks, table);
        }
        (blocks, table) = (needed, wanted);
    }
}

/// Clusters that the refcount table takes then; cut to the format's limit.
fn table_clusters_for(geometry: &Geometry, clusters: u64) -> u64 {
    let (_, table) = refcount_clusters(geometry, clusters);
    table.min((MAX_REFCOUNT_TABLE_BYTES >> geometry.cluster_bits()).max(1))
}

impl HostClusters {
    /// An image of at most `most` host clusters without refcount structures: header and refcount table are
    /// allocated, in this order, then the first refcount block.
    pub(super) fn new(geometry: Geometry, most: u64) -> Result<Self> {
        let table_clusters = table_clusters_for(&geometry, most);
        let mut hosts = Self {
            geometry,
            next: 0,
            open: VecDeque::new(),
            table: Vec::new(),
            table_clusters,
            packing: None,
        };
        hosts.contiguous(1 + table_clusters)?;
        Ok(hosts)
    }

    pub(super) fn table_clusters(&self) -> u64 {
        self.table_clusters
    }

    /// First cluster behind everything allocated.
    pub(super) fn end(&self) -> u64 {
        self.next
    }

    /// `count` clusters in a row, for a table. Refcount blocks of ranges that it covers follow behind it.
    pub(super) fn contiguous(&mut self, count: u64) -> Result<HostOffset> {
        self.packing = None;
        let start = self.next;
        for _ in 0..count {
            self.take(None)?;
        }
        // A block that lands in a range without one counts itself.
        while let Some(pending) = self.open.iter().position(|b| b.host.is_none()) {
            let cluster = self.next;
            if self.take(Some(cluster))? {
                continue;
            }
            if let Some(block) = self.open.get_mut(pending) {
                block.host = Some(cluster);
            }
        }
        self.offset_of(start)
    }

    /// One cluster with refcount 1. What is left of a packed cluster stays open for what fits in.
    pub(super) fn cluster(&mut self) -> Result<HostOffset> {
        if self.at_new_range() {
            self.take(Some(self.next))?;
        }
        let cluster = self.next;
        self.take(None)?;
        self.offset_of(cluster)
    }

    /// Room for `length` compressed bytes (at most a cluster), directly behind the previous ones where the
    /// format allows it.
    pub(super) fn compressed(&mut self, length: u64) -> Result<CompressedDescriptor> {
        let g = self.geometry;
        let max = g.refcount_max();
        let contiguous = !self.at_new_range();
        let next_host = self.next << g.cluster_bits();
        let offset = match self.packing {
            Some(p) if p.users < max && length <= p.end - p.at => {
                self.add_user(p)?;
                self.pack(p.at, length, p.end, p.users + 1);
                p.at
            }
            Some(p) if p.users < max && contiguous && p.at < p.end && next_host == p.end => {
                self.add_user(p)?;
                self.cluster()?;
                self.pack(p.at, length, p.end + g.cluster_size(), 1);
                p.at
            }
            _ => {
                let start = self.cluster()?.get();
                self.pack(start, length, start + g.cluster_size(), 1);
                start
            }
        };
        CompressedDescriptor::for_data(HostOffset(offset), length, &g)
            .map_err(|e| invalid(e, ErrorKind::Limit))
    }

    fn pack(&mut self, at: u64, length: u64, end: u64, users: u64) {
        self.packing = Some(Packing { at: at + length, end, users });
    }

    /// One more compressed cluster in the host cluster that is being packed.
    fn add_user(&mut self, packing: Packing) -> Result<()> {
        let cluster = self.geometry.cluster_index(packing.end - 1);
        self.count(cluster, packing.users + 1)
    }

    fn at_new_range(&self) -> bool {
        let range = self.geometry.refcount_table_index(self.next);
        self.open.back().is_none_or(|b| b.range != range)
    }

    /// Hands out the next cluster with refcount 1. Opens the block of a new range, placed at `block_host` or
    /// later; returns whether it did.
    fn take(&mut self, block_host: Option<u64>) -> Result<bool> {
        let cluster = self.next;
        let opened = self.at_new_range();
        if opened {
            self.packing = None;
            let range = self.geometry.refcount_table_index(cluster);
            let limit = self.table_clusters.saturating_mul(self.geometry.cluster_size()) / TABLE_ENTRY_SIZE;
            if range >= limit {
                let message =
                    format!("the image is too large: its refcount table would exceed {limit} entries");
                return Err(Error::new(ErrorKind::Limit, message).with_field("refcount_table_clusters"));
            }
            let bytes = vec![0; self.geometry.cluster_len()];
            self.open.push_back(Block { range, host: block_host, bytes });
        }
        self.next += 1;
        self.count(cluster, 1)?;
        Ok(opened)
    }

    fn count(&mut self, cluster: u64, value: u64) -> Result<()> {
        let range = self.geometry.refcount_table_index(cluster);
        let index = self.geometry.refcount_block_index(cluster) as usize;
        self.open
            .iter_mut()
            .rev()
            .find(|b| b.range == range)
            .and_then(|b| refcount::set(&mut b.bytes, index, self.geometry.refcount_order(), value))
            .ok_or_else(|| {
                Error::new(ErrorKind::Internal, format!("refcount block of cluster {cluster} is gone"))
            })
    }

    fn offset_of(&self, cluster: u64) -> Result<HostOffset> {
        match self.geometry.cluster_offset(cluster) {
            Some(offset) if offset < MAX_HOST_OFFSET => Ok(HostOffset(offset)),
            _ => Err(Error::new(ErrorKind::Limit, "the image is too large: host offsets end at 64 PiB")),
        }
    }

    /// Moves the blocks that cannot change any more to `out`: all but that of the current range, or all.
    pub(super) fn finish_blocks(&mut self, all: bool, out: &mut Vec<Finished>) -> Result<()> {
        let current = self.geometry.refcount_table_index(self.next);
        while self.open.front().is_some_and(|b| all || b.range < current) {
            let Some(block) = self.open.pop_front() else { break };
            let internal = || Error::new(ErrorKind::Internal, "refcount block without a place");
            let host = self.offset_of(block.host.ok_or_else(internal)?)?;
            let entry = block.range as usize;
            if self.table.len() <= entry {
                self.table.resize(entry + 1, 0);
            }
            *self.table.get_mut(entry).ok_or_else(internal)? = host.get();
            out.push(Finished { host, bytes: block.bytes });
        }
        Ok(())
    }

    /// The refcount table up to its last entry.
    pub(super) fn table_bytes(&self) -> Vec<u8> {
        words::encode(&self.table)
    }
}
