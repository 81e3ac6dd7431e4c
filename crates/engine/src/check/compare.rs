//! Holds the counted references against the stored refcounts.

use qcow2_format::refcount;

use super::counts::{PAGE, Page, ReferenceCounts};
use super::stored::{Block, StoredRefcounts};
use super::target::{Stop, Target};
use qcow2_core::check::{FindingCode, Tally};

/// Which differences a repair removes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Fix {
    /// Refcounts that are too high.
    pub(super) leaks: bool,
    /// Refcounts that are too low.
    pub(super) errors: bool,
}

impl Fix {
    /// The refcount of a cluster that has `stored` and is referred to `counted` times, behind the repair.
    pub(super) fn target(self, stored: u64, counted: u64) -> u64 {
        let fixed = if stored > counted { self.leaks } else { self.errors };
        if fixed { counted } else { stored }
    }
}

/// What the comparison tells beside its findings.
pub(super) struct Compared {
    /// The highest cluster that is referenced or counted as such.
    pub(super) highest: u64,
    /// A cluster in use has no refcount at all: whatever is allocated next may overwrite it.
    pub(super) rebuild: bool,
}

/// Compares every cluster of the file. What `fix` covers is told as repaired; nothing is written here.
pub(super) fn compare(
    target: &Target<'_>,
    stored: &mut StoredRefcounts<'_>,
    counts: &ReferenceCounts,
    fix: Fix,
    tally: &mut Tally,
) -> Result<Compared, Stop> {
    let geometry = &target.header.geometry;
    let entries = geometry.refcount_block_entries();
    let mut judge = Judge {
        counts,
        tally,
        cluster_bits: geometry.cluster_bits(),
        order: geometry.refcount_order(),
        fix,
        highest: 0,
        rebuild: false,
    };
    for index in 0..counts.clusters().div_ceil(entries) {
        target.job.checkpoint()?;
        let first = index * entries;
        let end = (first + entries).min(counts.clusters());
        if stored.all(true, first, end - first) && counts.all_one(first, end) {
            // Most of a large image: known without another look at the block.
            judge.highest = end - 1;
            continue;
        }
        match stored.block(index)? {
            Block::Unreadable(reason) => judge.unreadable(first, end, reason),
            Block::Absent => judge.block(None, first, end),
            Block::Present(block) => judge.block(Some(block), first, end),
        }
    }
    Ok(Compared { highest: judge.highest, rebuild: judge.rebuild })
}

struct Judge<'a> {
    counts: &'a ReferenceCounts,
    tally: &'a mut Tally,
    cluster_bits: u32,
    order: u32,
    fix: Fix,
    highest: u64,
    rebuild: bool,
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
        self.rebuild |= stored == 0 && counted > 0;
        let code = FindingCode::RefcountTooLow;
        if stored < counted && stored > 0 && self.fix.errors {
            self.tally.fixed_corruption(code, offset, message);
        } else if stored < counted {
            self.tally.corruption(code, offset, message);
        } else if stored > counted && self.fix.leaks {
            self.tally.fixed_leak(offset, message);
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
