//! References that a walk does not count, since what they refer to ends a cluster or more behind the file. It reads as
//! zeroes there, or as what is in the part inside the file; a repair that makes the file longer must keep clear of it.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::{Error, ErrorKind, Result};

/// Clusters behind the file that a repair may always reach. Beyond them, and a share of the file: new refcount structures
/// take less, with refcounts of 64 bits and clusters of 512 bytes too.
const MIN_REACH: u64 = 1 << 16;
const SHARE: u64 = 16;

/// Bytes of memory per cluster that is referred to.
const MEMORY: u64 = 64;

/// Regions, in clusters.
pub(super) struct Uncounted {
    regions: Vec<Range<u64>>,
    /// Regions from here on are out of any repair's reach.
    reach: u64,
    memory_limit: u64,
}

impl Uncounted {
    /// For a file of so many clusters.
    pub(super) fn new(clusters: u64, memory_limit: u64) -> Self {
        Self { regions: Vec::new(), reach: clusters + clusters / SHARE + MIN_REACH, memory_limit }
    }

    /// Notes a reference to a region.
    pub(super) fn note(&mut self, clusters: Range<u64>) -> Result<()> {
        if clusters.start < self.reach {
            self.regions.push(clusters);
        }
        self.limit(self.regions.len() as u64)
    }

    fn limit(&self, clusters: u64) -> Result<()> {
        if clusters <= self.memory_limit / MEMORY {
            return Ok(());
        }
        let message = "the references behind the end of the file exceed the limit of memory";
        Err(Error::new(ErrorKind::Limit, message))
    }

    /// All clusters that are referred to, as sorted ranges that do not touch.
    pub(super) fn clusters(&self) -> Vec<Range<u64>> {
        let mut regions = self.regions.clone();
        regions.sort_unstable_by_key(|r| r.start);
        let mut merged: Vec<Range<u64>> = Vec::new();
        for region in regions {
            match merged.last_mut().filter(|last| region.start <= last.end) {
                Some(last) => last.end = last.end.max(region.end),
                None => merged.push(region),
            }
        }
        merged
    }

    /// References per cluster that count once the file has `clusters` clusters.
    pub(super) fn inside(&self, clusters: u64) -> Result<BTreeMap<u64, u64>> {
        let mut references = BTreeMap::new();
        let mut total = 0;
        // The file's last cluster may be cut short: the one behind it is still counted.
        for region in self.regions.iter().filter(|region| region.end <= clusters + 1) {
            total += region.end - region.start;
            self.limit(total)?;
            region.clone().for_each(|cluster| *references.entry(cluster).or_insert(0) += 1);
        }
        Ok(references)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regions_count_when_the_file_reaches_them() {
        let mut uncounted = Uncounted::new(10, 1 << 20);
        for region in [8..20, 12..13, 12..13, 1 << 40..1 << 41] {
            uncounted.note(region).unwrap();
        }
        let one = |range| std::iter::once(range).collect::<Vec<Range<u64>>>();
        assert_eq!(uncounted.clusters(), one(8..20));
        assert_eq!(uncounted.inside(11).unwrap(), BTreeMap::new());
        assert_eq!(uncounted.inside(12).unwrap(), BTreeMap::from([(12, 2)]));
        assert_eq!(uncounted.inside(19).unwrap().len(), 12);
        let mut bounded = Uncounted::new(10, 128);
        assert!(bounded.note(10..11).is_ok() && bounded.note(10..11).is_ok());
        assert_eq!(bounded.note(10..11).unwrap_err().kind(), ErrorKind::Limit);
    }
}
