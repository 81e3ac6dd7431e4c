//! Holds the counted references against the stored refcounts.

use qcow2_format::refcount;

use super::counts::{PAGE, Page, ReferenceCounts};
use super::report::{FindingCode, Tally};
use super::stored::{Block, StoredRefcounts};
use super::{Stop, Target};

/// Compares every cluster of the file, and returns the highest that is referenced or counted as such.
pub(super) fn compare(
    target: &Target<'_>,
    stored: &mut StoredRefcounts<'_>,
    counts: &ReferenceCounts,
    tally: &mut Tally,
) -> Result<u64, Stop> {
    let geometry = &target.header.geometry;
    let entries = geometry.refcount_block_entries();
    let mut judge = Judge {
        counts,
        tally,
        cluster_bits: geometry.cluster_bits(),
        order: geometry.refcount_order(),
        highest: 0,
    };
    for index in 0..counts.clusters().div_ceil(entries) {
        target.job.checkpoint()?;
        let first = index * entries;
        let end = (first + entries).min(counts.clusters());
        match stored.block(index)? {
            Block::Unreadable(reason) => judge.unreadable(first, end, reason),
            Block::Absent => judge.block(None, first, end),
            Block::Present(block) => judge.block(Some(block), first, end),
        }
    }
    Ok(judge.highest)
}

struct Judge<'a> {
    counts: &'a ReferenceCounts,
    tally: &'a mut Tally,
    cluster_bits: u32,
    order: u32,
    highest: u64,
}

impl Judge<'_> {
    /// Compares the clusters `first..end` of one refcount block, in steps that lie in one page of counters.
    fn block(&mut self, block: Option<&[u8]>, first: u64, end: u64) {
        let mut start = first;
        while start < end {
            let stop = (start / PAGE as u64 + 1).saturating_mul(PAGE as u64).min(end);
            let page = usize::try_from(start / PAGE as u64).ok().and_then(|i| self.counts.page(i));
            let from = (start - first) as usize;
            let at = (start % PAGE as u64) as usize;
            if !self.equal(block, from, page, at, (stop - start) as usize, start) {
                for cluster in start..stop {
                    let count = |b| refcount::get(b, (cluster - first) as usize, self.order).unwrap_or(0);
                    self.cluster(cluster, block.map_or(0, count), self.counts.get(cluster));
                }
            }
            start = stop;
        }
    }

    /// The common case, at the speed of memory: no references and no refcounts, or 16-bit refcounts that all agree with
    /// counters of one byte. False when a closer look is needed.
    fn equal(
        &mut self,
        block: Option<&[u8]>,
        from: usize,
        page: Option<&Page>,
        at: usize,
        length: usize,
        first: u64,
    ) -> bool {
        match (block, page) {
            (None, None | Some(Page::Empty)) => true,
            (Some(block), Some(Page::Byte(counts))) if self.order == 4 => {
                let stored = block.as_chunks::<2>().0.get(from..from + length).unwrap_or_default();
                let counts = counts.get(at..at + length).unwrap_or_default();
                let differ = |(s, c): (&[u8; 2], &u8)| u16::from_be_bytes(*s) ^ u16::from(*c);
                // Folded without a branch, so that the loop runs in vector registers.
                if stored.iter().zip(counts).map(differ).fold(0, |all, one| all | one) != 0 {
                    return false;
                }
                if let Some(last) = counts.iter().rposition(|c| *c != 0) {
                    self.highest = self.highest.max(first + last as u64);
                }
                true
            }
            _ => false,
        }
    }

    fn cluster(&mut self, cluster: u64, stored: u64, counted: u64) {
        if stored > 0 || counted > 0 {
            self.highest = self.highest.max(cluster);
        }
        let offset = cluster << self.cluster_bits;
        let message = || format!("cluster {cluster} refcount={stored} reference={counted}");
        if stored < counted {
            self.tally.corruption(FindingCode::RefcountTooLow, offset, message);
        } else if stored > counted {
            self.tally.leak(offset, message);
        }
    }

    fn unreadable(&mut self, first: u64, end: u64, reason: &str) {
        for cluster in first..end {
            let offset = cluster << self.cluster_bits;
            self.tally.check_error(FindingCode::RefcountUnreadable, offset, || {
                format!("Can't get refcount for cluster {cluster}: {reason}")
            });
        }
    }
}
