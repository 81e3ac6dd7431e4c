//! Inflating compressed clusters, each once for small reads that follow each other.

use std::cell::RefCell;
use std::sync::Arc;

use qcow2_core::{Error, ErrorKind, MemMut, Result, Storage, StorageExt};
use qcow2_transform::{Codec, Decompressor};
use quick_cache::sync::{Cache, GuardResult};

/// Most bytes of inflated clusters that are kept.
const KEPT_BYTES: u64 = 16 << 20;

/// Per thread: a context costs more to make than a cluster to inflate, and the input buffer is used again.
#[derive(Default)]
struct Scratch {
    inflater: Option<Decompressor>,
    input: Vec<u8>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Where a stream is in the file, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Stream {
    pub(crate) offset: u64,
    /// Less than a cluster.
    pub(crate) length: u64,
}

#[derive(Debug)]
pub(crate) struct Inflated {
    clusters: Cache<Stream, Arc<[u8]>>,
    cluster_size: usize,
}

impl Inflated {
    pub(crate) fn new(cluster_size: u64) -> Self {
        let kept = (KEPT_BYTES / cluster_size) as usize;
        Self { clusters: Cache::new(kept), cluster_size: cluster_size as usize }
    }

    /// The inflated cluster, from the cache or inflated now, by one thread only.
    pub(crate) fn get(&self, storage: &dyn Storage, stream: Stream) -> Result<Arc<[u8]>> {
        match self.clusters.get_value_or_guard(&stream, None) {
            GuardResult::Value(cluster) => Ok(cluster),
            GuardResult::Guard(guard) => {
                let cluster = self.run_to_new(storage, stream)?;
                let _ = guard.insert(Arc::clone(&cluster));
                Ok(cluster)
            }
            GuardResult::Timeout => self.run_to_new(storage, stream),
        }
    }

    fn run_to_new(&self, storage: &dyn Storage, stream: Stream) -> Result<Arc<[u8]>> {
        let mut cluster = vec![0; self.cluster_size];
        run(storage, stream, &mut cluster)?;
        Ok(cluster.into())
    }
}

/// Inflates into `cluster`, exactly one.
pub(crate) fn run(storage: &dyn Storage, stream: Stream, cluster: &mut [u8]) -> Result<()> {
    SCRATCH.with_borrow_mut(|Scratch { inflater, input }| {
        input.resize(stream.length as usize, 0);
        // What is missing at the end of the file is not a part of a stream that ends before.
        storage.read_padded_at(MemMut::from(&mut input[..]), stream.offset)?;
        if inflater.is_none() {
            let made = Decompressor::new(Codec::Zlib);
            *inflater =
                Some(made.map_err(|e| Error::new(ErrorKind::Internal, e.to_string()).with_source(e))?);
        }
        let Some(inflater) = inflater else { return Ok(()) };
        inflater.decompress(input, cluster).map_err(|e| {
            let message = format!("a compressed cluster cannot be decompressed: {e}");
            let error = Error::new(ErrorKind::Corrupt, message).with_source(e);
            storage.located(error).with_offset(stream.offset)
        })
    })
}
