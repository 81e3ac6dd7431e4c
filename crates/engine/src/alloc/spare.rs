//! Free clusters that have space in the file system: what is written there needs none.

use super::allocator::Allocator;
use super::overlap::MetadataMap;
use crate::{Result, StorageExt};

impl Allocator {
    /// Takes contiguous free clusters inside the file with space for `bytes` from their start on, if it has such. Nothing may be
    /// reserved. They hold bytes of former use; their refcounts are durable with the next barrier.
    pub(crate) fn take_spare(&mut self, bytes: u64, metadata: &MetadataMap) -> Result<Option<u64>> {
        let count = self.geometry.clusters_for(bytes);
        // What is free at the end of the file goes only when the image is closed.
        let end = match self.storage.traits().block_device {
            true => self.end,
            false => self.end.max(self.geometry.clusters_for(self.storage.size()?)),
        };
        let mut at = 0;
        while at < end {
            let (found, next) = self.refcounts.find_free(at, end, u64::MAX, u64::MAX)?;
            let Some((start, length)) = found else { return Ok(None) };
            let mut first = start;
            while first + count <= start + length {
                // Behind the first cluster of these that will not do.
                let Some(go_on) = self.unfit(first, bytes, metadata)? else {
                    (first..first + count).try_for_each(|cluster| self.refcounts.set(cluster, 1))?;
                    self.end = self.end.max(first + count);
                    return Ok(Some(first));
                };
                first = go_on;
            }
            at = next;
        }
        Ok(None)
    }

    /// The cluster to go on from where not all of these have space, are counted, and hold no structure: a damaged image may
    /// have a structure there.
    fn unfit(&self, first: u64, bytes: u64, metadata: &MetadataMap) -> Result<Option<u64>> {
        let size = self.geometry.cluster_size();
        let count = self.geometry.clusters_for(bytes);
        for cluster in first..first + count {
            if !self.refcounts.is_covered(cluster) || metadata.hit(cluster, cluster + 1).is_some() {
                return Ok(Some(cluster + 1));
            }
        }
        let (mut at, end) = (first * size, first * size + bytes);
        while at < end {
            let run = self.storage.run(at..end)?;
            if !run.data {
                return Ok(Some((run.end / size).max(first + 1)));
            }
            at = run.end;
        }
        Ok(None)
    }
}
