//! Inflating compressed clusters, and the cache of recently inflated ones: small sequential reads of a compressed
//! image inflate each cluster once, and who cannot wait finds the rest of it here (`Layer::at_hand`).

use std::cell::RefCell;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use qcow2_format::{CompressedDescriptor, CompressionType, Geometry};
use qcow2_transform::{Codec, Decompressor};
use quick_cache::sync::{Cache, GuardResult};

use crate::{Error, ErrorKind, MemMut, Result, Storage, StorageExt};

const DEFAULT_BYTES: u64 = 16 << 20;

#[derive(Debug)]
pub(super) struct InflatedCache {
    clusters: Cache<CompressedDescriptor, Arc<[u8]>>,
    /// Whether any cluster was ever kept. Most images have none, and need not be looked through.
    used: AtomicBool,
}

/// Per thread: contexts cost more to make than a cluster to inflate, and the input buffer is reused.
#[derive(Default)]
struct Scratch {
    zlib: Option<Decompressor>,
    zstd: Option<Decompressor>,
    input: Vec<u8>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

impl InflatedCache {
    pub(super) fn new(geometry: &Geometry, limit: Option<u64>) -> Self {
        let clusters = (limit.unwrap_or(DEFAULT_BYTES) / geometry.cluster_size()).max(4);
        Self { clusters: Cache::new(clusters as usize), used: AtomicBool::new(false) }
    }

    /// Whether there may be a cluster here.
    pub(super) fn is_used(&self) -> bool {
        self.used.load(Ordering::Relaxed)
    }

    /// The inflated cluster, where it is here.
    pub(super) fn peek(&self, descriptor: &CompressedDescriptor) -> Option<Arc<[u8]>> {
        self.clusters.get(descriptor)
    }

    /// Forgets a cluster: other data is now stored there.
    pub(super) fn remove(&self, descriptor: &CompressedDescriptor) {
        self.clusters.remove(descriptor);
    }

    /// The inflated cluster, from the cache or inflated now, by one thread only.
    pub(super) fn get(&self, inflate: &Inflate<'_>) -> Result<Arc<[u8]>> {
        match self.clusters.get_value_or_guard(&inflate.descriptor, None) {
            GuardResult::Value(cluster) => Ok(cluster),
            GuardResult::Guard(guard) => {
                let cluster = inflate.run_to_new()?;
                let _ = guard.insert(cluster.clone());
                self.used.store(true, Ordering::Relaxed);
                Ok(cluster)
            }
            GuardResult::Timeout => inflate.run_to_new(),
        }
    }
}

/// One compressed cluster and all that is needed to inflate it.
pub(super) struct Inflate<'a> {
    pub(super) storage: &'a dyn Storage,
    pub(super) descriptor: CompressedDescriptor,
    pub(super) compression: CompressionType,
    pub(super) cluster_size: usize,
}

impl Inflate<'_> {
    fn run_to_new(&self) -> Result<Arc<[u8]>> {
        // In its last place: a copy of each cluster is a part of what inflating costs.
        let mut cluster: Arc<[u8]> = std::iter::repeat_n(0, self.cluster_size).collect();
        self.run(Arc::get_mut(&mut cluster).unwrap_or_default())?;
        Ok(cluster)
    }

    /// Inflates into `cluster`, exactly one cluster.
    pub(super) fn run(&self, cluster: &mut [u8]) -> Result<()> {
        SCRATCH.with_borrow_mut(|scratch| {
            let length = self.descriptor.max_length() as usize;
            scratch.input.resize(length.max(scratch.input.len()), 0);
            let input = scratch.input.get_mut(..length).unwrap_or_default();
            // The last sector may end behind the file: its rest is never needed.
            self.storage.read_padded_at(MemMut::from(&mut *input), self.descriptor.offset.0)?;
            let context = match self.compression {
                CompressionType::Zlib => context(&mut scratch.zlib, Codec::Zlib)?,
                CompressionType::Zstd => context(&mut scratch.zstd, Codec::Zstd)?,
            };
            context.decompress(input, cluster).map_err(|e| {
                let message = format!("a compressed cluster cannot be decompressed: {e}");
                let error = Error::new(ErrorKind::Corrupt, message).with_source(e);
                self.storage.located(error).with_offset(self.descriptor.offset.0)
            })
        })
    }
}

/// Whether `data` inflates to `cluster`, all of it.
pub(super) fn inflates(compression: CompressionType, data: &[u8], cluster: &mut [u8]) -> bool {
    SCRATCH.with_borrow_mut(|scratch| {
        let context = match compression {
            CompressionType::Zlib => context(&mut scratch.zlib, Codec::Zlib),
            CompressionType::Zstd => context(&mut scratch.zstd, Codec::Zstd),
        };
        context.is_ok_and(|context| context.decompress(data, cluster).is_ok())
    })
}

fn context(slot: &mut Option<Decompressor>, codec: Codec) -> Result<&mut Decompressor> {
    if slot.is_none() {
        let made = Decompressor::new(codec);
        *slot = Some(made.map_err(|e| Error::new(ErrorKind::Internal, e.to_string()).with_source(e))?);
    }
    slot.as_mut().ok_or_else(|| Error::new(ErrorKind::Internal, "no decompression context"))
}
