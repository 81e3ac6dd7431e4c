//! Space in an external data file that nothing refers to. Its clusters are not counted: what is in use is what the L2
//! tables say.

use std::ops::Range;

use qcow2_format::L2Mapping;

use super::space::preallocated;
use super::tables::{entry_at, guest_of, read_words, tables};
use crate::image::Qcow2;
use crate::maintenance::Session;
use crate::{ErrorKind, Job, Result, StorageExt};

impl Session<'_> {
    /// Punches a hole for what nothing refers to. A data file that is a raw image by itself keeps its bytes: its readers
    /// see all of them.
    pub(super) fn punch_stale_data(&self, job: &Job) -> Result<()> {
        if !has_stale_data(self.image) {
            return Ok(());
        }
        // That nothing refers to it is durable first.
        self.barrier()?;
        self.end_reads()?;
        let data = &**self.image.data_host()?;
        let all = preallocated(data)? > 0;
        // Reads that planned before it was given up may still be on their way to it: they find zeroes.
        let free = |offset, length| data.zero(offset, length, true);
        stale_data(self.image, job, &mut |range| {
            self.free_run(data, range.start, range.end - range.start, all, &free)
        })
    }
}

/// Whether an image has a data file in which anything can be stale.
pub(super) fn has_stale_data(image: &Qcow2) -> bool {
    image.header().has_data_file() && !image.header().data_file_raw()
}

/// Calls `visit` with each range of the data file that no entry refers to.
pub(super) fn stale_data(
    image: &Qcow2,
    job: &Job,
    visit: &mut dyn FnMut(Range<u64>) -> Result<()>,
) -> Result<()> {
    let g = image.geometry();
    let end = image.data_host()?.size()?;
    let clusters = g.clusters_for(end);
    let limit = image.limits().max_memory;
    if clusters / 8 > limit {
        let message = format!("{clusters} clusters of the data file exceed the limit of {limit} bytes");
        return Err(image.error(ErrorKind::Limit, message));
    }
    // One bit for each cluster of the file.
    let mut used = vec![0u64; clusters.div_ceil(64) as usize];
    for table in tables(image)? {
        job.checkpoint()?;
        let words = read_words(image, table.offset)?;
        for number in 0..g.l2_entries() as usize {
            let entry = entry_at(image, &words, number);
            let host = match image.decode_entry(entry, guest_of(image, table.l1_index, number))? {
                L2Mapping::Data { host, .. } => Some(host),
                L2Mapping::Zero { host, .. } | L2Mapping::Subclusters { host, .. } => host,
                L2Mapping::Unallocated | L2Mapping::Compressed(_) => None,
            };
            let Some(cluster) = host.map(|host| g.cluster_index(host.0)) else { continue };
            if let Some(word) = used.get_mut((cluster / 64) as usize) {
                *word |= 1 << (cluster % 64);
            }
        }
    }
    let is_used = |cluster: u64| {
        cluster >= clusters
            || used.get((cluster / 64) as usize).is_some_and(|word| word >> (cluster % 64) & 1 == 1)
    };
    let mut first = 0;
    while first < clusters {
        let stop = (first..clusters).find(|cluster| is_used(*cluster)).unwrap_or(clusters);
        if stop > first {
            job.checkpoint()?;
            visit(first * g.cluster_size()..(stop * g.cluster_size()).min(end))?;
        }
        first = (stop..clusters).find(|cluster| !is_used(*cluster)).unwrap_or(clusters);
    }
    Ok(())
}
