//! Builds a new image from front to back: clusters are placed in guest order, L2 tables and refcount blocks
//! are written as soon as they are final, then the L1 and refcount tables, the header last. Until then the
//! file is no image; memory is bounded by the L1 table, the refcount table and one chunk's tables.

use std::collections::VecDeque;
use std::sync::Arc;

use qcow2_format::header::extension::Extension;
use qcow2_format::header::raw::MAGIC;
use qcow2_format::{Geometry, GuestOffset, Header, HostOffset, L1Entry, L2Mapping, SubclusterBitmap};

use super::Preallocation;
use super::hosts::{Finished, HostClusters};
use super::options::{CreateOptions, L1_ENTRY_SIZE};
use crate::invalid::invalid;
use crate::{Error, ErrorKind, Mem, Result, Storage, StorageExt};

/// Finished metadata that is held back to be written in larger pieces, in bytes.
const HELD_BACK: usize = 1 << 20;
/// Most pieces of one vectored write.
const MAX_PIECES: usize = 512;

/// What to place for one guest cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NewCluster {
    /// Nothing: the backing file, or zeroes.
    Unallocated,
    /// Reads as zeroes without a host cluster. The bitmap counts with extended L2 entries only.
    Zero(SubclusterBitmap),
    /// A host cluster. The bitmap counts with extended L2 entries only; 0 is a preallocated cluster.
    Data(SubclusterBitmap),
    /// A host cluster that is not read: its flag says that the guest reads zeroes. Not with extended L2 entries.
    Reserved,
    /// This many compressed bytes.
    Compressed(u32),
}

/// An L2 table that is being filled.
#[derive(Debug)]
struct OpenTable {
    l1_index: u64,
    host: HostOffset,
    bytes: Vec<u8>,
}

/// A new image that is being built.
pub(crate) struct ImageBuilder {
    storage: Arc<dyn Storage>,
    header: Header,
    hosts: HostClusters,
    l1: Vec<u8>,
    open: VecDeque<OpenTable>,
    finished: Vec<Finished>,
    /// Clusters up to the end of the L1 table.
    fixed: u64,
    /// Byte behind the L1 table.
    l1_end: u64,
    /// Most clusters that the image can have.
    most: u64,
}

impl ImageBuilder {
    /// Starts an image in `storage`, whose content is lost. `compressed` makes room for the refcounts of
    /// compressed clusters.
    pub(crate) fn new(storage: Arc<dyn Storage>, options: &CreateOptions, compressed: bool) -> Result<Self> {
        let mut header = options.header()?;
        let geometry = header.geometry;
        let l1_bytes = u64::from(header.l1_size) * L1_ENTRY_SIZE;
        let l1_clusters = geometry.clusters_for(l1_bytes);
        let tables = u64::from(header.l1_size);
        let data = if options.data_file.is_some() { 0 } else { geometry.clusters_for(header.size) };
        // Packing starts a new cluster behind every table: at worst one cluster more each time.
        let packing = if compressed { tables + data / geometry.refcount_block_entries() + 2 } else { 0 };
        let crypto = options.crypto_header().unwrap_or_default();
        let crypto_clusters = geometry.clusters_for(crypto.len() as u64);
        let most = 1 + l1_clusters + crypto_clusters + tables + data + packing;
        let mut hosts = HostClusters::new(geometry, most)?;
        header.refcount_table_offset = HostOffset(geometry.cluster_size());
        header.refcount_table_clusters = u32::try_from(hosts.table_clusters())
            .map_err(|_| Error::new(ErrorKind::Internal, "refcount table beyond the format's limit"))?;
        let l1 = hosts.contiguous(l1_clusters)?;
        // A table without entries is nowhere, as QEMU has it: nothing would refer to a cluster of it.
        header.l1_table_offset = if l1_clusters == 0 { HostOffset(0) } else { l1 };
        // Refcount blocks of a long L1 table lie behind it.
        let fixed = geometry.cluster_index(l1.get()) + l1_clusters;
        let l1_end = l1.get() + l1_bytes;
        prepare(storage.as_ref(), geometry.cluster_size())?;
        if !crypto.is_empty() {
            let place = hosts.contiguous(crypto_clusters)?;
            storage.write_all_at(Mem::from(crypto), place.get())?;
            for extension in &mut header.extensions {
                if let Extension::CryptoHeader { offset, .. } = extension {
                    *offset = place;
                }
            }
        }
        Ok(Self {
            storage,
            header,
            hosts,
            l1: vec![0; l1_bytes as usize],
            open: VecDeque::new(),
            finished: Vec::new(),
            fixed,
            l1_end,
            most,
        })
    }

    /// Makes the file as long as the image can get, until it is finished: writes that do not extend their file
    /// cost the file system less.
    pub(crate) fn extend(&self) {
        let longest = self.most.checked_mul(self.geometry().cluster_size());
        if let Some(length) = longest.filter(|_| !self.storage.traits().block_device) {
            // Only an attempt: file systems have smaller limits than the format.
            let _longer = self.storage.set_len(length);
        }
    }

    pub(crate) fn geometry(&self) -> Geometry {
        self.header.geometry
    }

    /// End of what is allocated in the file, in bytes.
    pub(crate) fn end(&self) -> u64 {
        self.hosts.end() << self.geometry().cluster_bits()
    }

    /// Virtual size in bytes.
    pub(crate) fn size(&self) -> u64 {
        self.header.size
    }

    /// Places the clusters from `guest` on, which is behind everything placed before. `places` gets one host
    /// offset per cluster, `None` where nothing is to be written.
    pub(crate) fn place(
        &mut self,
        guest: u64,
        clusters: &[NewCluster],
        places: &mut Vec<Option<HostOffset>>,
    ) -> Result<()> {
        let g = self.geometry();
        places.clear();
        // The tables first, so that the data behind them is in one piece.
        let starts = (0u64..).map(|i| GuestOffset(guest + (i << g.cluster_bits())));
        for (at, cluster) in starts.clone().zip(clusters) {
            if *cluster != NewCluster::Unallocated {
                self.open_table(g.l1_index(at))?;
            }
        }
        for (at, cluster) in starts.zip(clusters) {
            let mapping = match *cluster {
                NewCluster::Unallocated => {
                    places.push(None);
                    continue;
                }
                NewCluster::Zero(bitmap) if g.extended_l2() => {
                    L2Mapping::Subclusters { host: None, copied: false, bitmap }
                }
                NewCluster::Zero(_) => L2Mapping::Zero { host: None, copied: false },
                NewCluster::Data(bitmap) => self.data(at, bitmap)?,
                NewCluster::Reserved => L2Mapping::Zero { host: Some(self.host(at)?), copied: true },
                NewCluster::Compressed(length) => {
                    L2Mapping::Compressed(self.hosts.compressed(length.into())?)
                }
            };
            places.push(match mapping {
                L2Mapping::Data { host, .. } => Some(host),
                L2Mapping::Subclusters { host, .. } => host,
                L2Mapping::Compressed(descriptor) => Some(descriptor.offset),
                L2Mapping::Zero { .. } | L2Mapping::Unallocated => None,
            });
            self.map(at, &mapping)?;
        }
        self.retire(1)?;
        self.hosts.finish_blocks(false, &mut self.finished)?;
        if self.finished.iter().map(|f| f.bytes.len()).sum::<usize>() > HELD_BACK {
            self.write_finished()?;
        }
        Ok(())
    }

    /// A host cluster, or the place in the external data file, which is the guest's.
    fn host(&mut self, at: GuestOffset) -> Result<HostOffset> {
        if self.header.has_data_file() { Ok(HostOffset(at.get())) } else { self.hosts.cluster() }
    }

    /// A data cluster.
    fn data(&mut self, at: GuestOffset, bitmap: SubclusterBitmap) -> Result<L2Mapping> {
        let host = self.host(at)?;
        Ok(match self.geometry().extended_l2() {
            true => L2Mapping::Subclusters { host: Some(host), copied: true, bitmap },
            false => L2Mapping::Data { host, copied: true },
        })
    }

    fn open_table(&mut self, l1_index: u64) -> Result<()> {
        if self.open.back().is_some_and(|t| t.l1_index == l1_index) {
            return Ok(());
        }
        let host = self.hosts.cluster()?;
        let at = l1_index as usize * L1_ENTRY_SIZE as usize;
        let entry = self.l1.get_mut(at..at + L1_ENTRY_SIZE as usize);
        let entry =
            entry.ok_or_else(|| Error::new(ErrorKind::Internal, "guest offset beyond the L1 table"))?;
        entry.copy_from_slice(&L1Entry::new(host, true).to_bytes());
        let bytes = vec![0; self.geometry().cluster_len()];
        self.open.push_back(OpenTable { l1_index, host, bytes });
        Ok(())
    }

    fn map(&mut self, at: GuestOffset, mapping: &L2Mapping) -> Result<()> {
        let g = self.geometry();
        let entry = mapping.encode(&g);
        let start = (g.l2_index(at) * g.l2_entry_size()) as usize;
        let table = self.open.iter_mut().find(|t| t.l1_index == g.l1_index(at));
        let slot = table
            .and_then(|t| t.bytes.get_mut(start..start + g.l2_entry_size() as usize))
            .ok_or_else(|| Error::new(ErrorKind::Internal, "cluster placed without an L2 table"))?;
        entry.write(slot);
        Ok(())
    }

    /// Gives up all but the last `keep` tables: guest offsets only grow.
    fn retire(&mut self, keep: usize) -> Result<()> {
        while self.open.len() > keep {
            if let Some(table) = self.open.pop_front() {
                self.finished.push(Finished { host: table.host, bytes: table.bytes });
            }
        }
        Ok(())
    }

    /// Writes what is final, neighbours in one call.
    fn write_finished(&mut self) -> Result<()> {
        let mut finished = std::mem::take(&mut self.finished);
        finished.sort_by_key(|f| f.host);
        let neighbours = |a: &Finished, b: &Finished| a.host.get() + a.bytes.len() as u64 == b.host.get();
        for run in finished.chunk_by(neighbours) {
            for piece in run.chunks(MAX_PIECES) {
                let Some(first) = piece.first() else { continue };
                let mut bufs: Vec<Mem<'_>> = piece.iter().map(|f| Mem::from(&f.bytes[..])).collect();
                self.storage.write_all_vectored_at(&mut bufs, first.host.get())?;
            }
        }
        Ok(())
    }

    /// Completes the image: the remaining tables, then the header, each behind a sync where `durable`.
    /// Returns the length of the image in bytes.
    pub(crate) fn finish(self, preallocation: Preallocation, durable: bool) -> Result<u64> {
        self.complete(preallocation, durable, MAGIC).map(|(end, _)| end)
    }

    /// As `finish`, durably, but for the first bytes: the file is no image before [`publish`] writes them.
    pub(crate) fn withhold(self, preallocation: Preallocation) -> Result<Header> {
        let (_, first) = self.complete(preallocation, true, [0; 4])?;
        Header::parse(&first).map_err(|e| invalid(e, ErrorKind::Internal))
    }

    /// Gives also the first cluster as it is with its magic; `magic` is what is written in its place.
    fn complete(
        mut self,
        preallocation: Preallocation,
        durable: bool,
        magic: [u8; 4],
    ) -> Result<(u64, Vec<u8>)> {
        let g = self.geometry();
        self.retire(0)?;
        self.hosts.finish_blocks(true, &mut self.finished)?;
        self.write_finished()?;
        let traits = self.storage.traits();
        let mut table = self.hosts.table_bytes();
        if traits.block_device {
            // What a device held before must not be taken for refcount blocks.
            table.resize((self.hosts.table_clusters() << g.cluster_bits()) as usize, 0);
        }
        self.storage.write_all_at(Mem::from(&table[..]), self.header.refcount_table_offset.get())?;
        self.storage.write_all_at(Mem::from(&self.l1[..]), self.header.l1_table_offset.get())?;
        let end = match self.hosts.end() {
            end if end > self.fixed => end << g.cluster_bits(),
            _ => self.l1_end,
        };
        if !traits.block_device && self.storage.size()? != end {
            self.storage.resize(end)?;
        }
        if matches!(preallocation, Preallocation::Falloc | Preallocation::Full) {
            self.storage.reserve(0, end)?;
        }
        if durable {
            self.storage.flush()?;
        }
        let mut first = self.header.encode().map_err(|e| invalid(e, ErrorKind::Internal))?;
        first.resize(g.cluster_len(), 0);
        let mut written = first.clone();
        written.iter_mut().zip(magic).for_each(|(byte, magic)| *byte = magic);
        self.storage.write_all_at(Mem::from(&written[..]), 0)?;
        if durable {
            self.storage.flush()?;
        }
        Ok((end, first))
    }
}

/// Makes an image of a withheld one, durably. All else is durable.
pub(crate) fn publish(storage: &dyn Storage) -> Result<()> {
    storage.write_all_at(Mem::from(&MAGIC[..]), 0)?;
    storage.flush()
}

/// Empties a file; on a device, removes what would be taken for a header should this end early.
fn prepare(storage: &dyn Storage, cluster_size: u64) -> Result<()> {
    match storage.traits().block_device {
        true => {
            storage.zero(0, cluster_size, false)?;
            storage.flush()
        }
        false => super::empty(storage),
    }
}
