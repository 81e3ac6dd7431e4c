//! Checking the metadata of one image, of any format: the seam ([`CheckLayer`]), and the result: QEMU's counters, and a bounded list of
//! what they stand for.

use std::collections::HashSet;
use std::fmt;
use std::ops::Range;

use crate::layer::Layer;
use crate::{Error, ErrorKind, Job, Result, StorageExt};

/// What to repair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Repair {
    /// Leaked clusters.
    Leaks,
    /// Everything that can be.
    All,
}

/// A layer whose metadata can be held against itself.
pub trait CheckLayer: Layer {
    /// Checks the metadata without changing it. At most `max_findings` are kept with their message; all are counted.
    ///
    /// # Errors
    /// `Aborted`; `Limit` where counting would take too much memory; `Io`. What is so damaged that the check cannot go on is no error
    /// but [`CheckReport::failure`].
    fn check(&self, max_findings: usize, job: &Job) -> Result<CheckReport>;

    /// As [`CheckLayer::check`], and repairs what `repair` allows. The caller has the file to itself, and uses the layer for nothing
    /// afterwards. An error leaves the image no worse than it was.
    ///
    /// # Errors
    /// As [`CheckLayer::check`]; `ReadOnly`; `UnsupportedFeature` for a format that is only checked.
    fn repair(&self, repair: Repair, max_findings: usize, job: &Job) -> Result<CheckReport> {
        let _ = (repair, max_findings, job);
        let message = format!("repairing {} images is not supported", self.format());
        Err(self.storage().located(Error::new(ErrorKind::UnsupportedFeature, message)))
    }
}

/// Which of the counters a finding adds to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Severity {
    /// Guest data or metadata is or can come to harm.
    Corruption,
    /// Space is lost, nothing else.
    Leak,
    /// Part of the metadata could not be judged.
    CheckError,
    /// None of them: says what a repair does.
    Note,
}

/// What is wrong. Stable, unlike the messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum FindingCode {
    /// The stored refcount is lower than the number of references.
    RefcountTooLow,
    /// The stored refcount is higher than the number of references.
    Leak,
    /// The stored refcount could not be read.
    RefcountUnreadable,
    /// More references than the refcount width can count.
    RefcountOverflow,
    /// A reference to a region behind the end of the file.
    BeyondEndOfFile,
    /// Reserved bits of an L1 entry are set.
    L1Reserved,
    /// Reserved bits of a standard L2 entry are set.
    L2Reserved,
    /// The COPIED flag of an L1 entry contradicts the refcount.
    L1Copied,
    /// The COPIED flag of an L2 entry contradicts the refcount.
    L2Copied,
    /// An L2 table is not cluster aligned.
    L2TableUnaligned,
    /// A host cluster is not cluster aligned.
    ClusterUnaligned,
    /// A compressed cluster with flags or in an image that must not have it.
    CompressedInvalid,
    /// A subcluster bitmap that contradicts itself or its entry.
    SubclusterBitmap,
    /// An entry of the refcount table with reserved bits, an unaligned or a far offset.
    RefcountTableEntry,
    /// A refcount block that something else refers to as well.
    RefcountBlockShared,
    /// An entry of the snapshot table that contradicts the format.
    Snapshot,
    /// The bitmap directory or a bitmap table contradicts the format.
    Bitmap,
    /// A repair writes new refcount structures.
    Rebuild,
    /// An entry of a table of blocks, in a format that has one, that contradicts the format.
    TableEntry,
    /// Two entries of tables of blocks refer to the same place.
    BlockShared,
    /// A copy of a structure that differs from the other one, or is damaged.
    Copy,
    /// A checksum that is not that of its structure.
    Checksum,
    /// A field of the header that contradicts the format or the file.
    Header,
    /// The image was not closed.
    NotClosed,
    /// A log that cannot be replayed.
    Log,
}

impl FindingCode {
    /// The code as JavaScript sees it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::RefcountTooLow => "REFCOUNT_TOO_LOW",
            Self::Leak => "LEAK",
            Self::RefcountUnreadable => "REFCOUNT_UNREADABLE",
            Self::RefcountOverflow => "REFCOUNT_OVERFLOW",
            Self::BeyondEndOfFile => "BEYOND_END_OF_FILE",
            Self::L1Reserved => "L1_RESERVED_BITS",
            Self::L2Reserved => "L2_RESERVED_BITS",
            Self::L1Copied => "L1_COPIED_FLAG",
            Self::L2Copied => "L2_COPIED_FLAG",
            Self::L2TableUnaligned => "L2_TABLE_UNALIGNED",
            Self::ClusterUnaligned => "CLUSTER_UNALIGNED",
            Self::CompressedInvalid => "COMPRESSED_INVALID",
            Self::SubclusterBitmap => "SUBCLUSTER_BITMAP",
            Self::RefcountTableEntry => "REFCOUNT_TABLE_ENTRY",
            Self::RefcountBlockShared => "REFCOUNT_BLOCK_SHARED",
            Self::Snapshot => "SNAPSHOT",
            Self::Bitmap => "BITMAP",
            Self::Rebuild => "REBUILD",
            Self::TableEntry => "TABLE_ENTRY",
            Self::BlockShared => "BLOCK_SHARED",
            Self::Copy => "COPY",
            Self::Checksum => "CHECKSUM",
            Self::Header => "HEADER",
            Self::NotClosed => "NOT_CLOSED",
            Self::Log => "LOG",
        }
    }
}

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// Which counter it adds to.
    pub severity: Severity,
    /// Whether it was repaired: then it adds to the counter of what was.
    pub repaired: bool,
    /// What is wrong.
    pub code: FindingCode,
    /// A sentence that names place and value.
    pub message: String,
    /// The byte offset in the image file that it is about.
    pub offset: Option<u64>,
}

impl Finding {
    /// Whether QEMU words it with a colon, which programs compare.
    fn has_colon(&self) -> bool {
        [
            "counting reference",
            "overflow cluster",
            "coffset=",
            "Unallocated cluster",
            "block index",
            "allocated blocks",
        ]
        .iter()
        .any(|start| self.message.starts_with(start))
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.severity {
            _ if self.repaired => "Repairing ",
            // Not one by one: what lies behind all that is in use.
            Severity::Leak if self.message.starts_with("space leaked") => "ERROR ",
            Severity::Leak => "Leaked ",
            Severity::Corruption if self.has_colon() => "ERROR: ",
            Severity::Corruption => "ERROR ",
            Severity::CheckError | Severity::Note => "",
        })?;
        f.write_str(&self.message)
    }
}

/// Counters with QEMU's names and meaning (`ImageCheck` in its QAPI schema), and the findings behind them.
#[derive(Debug, Default)]
pub struct CheckReport {
    /// End of the last cluster that is in use or counted as such; `None` when the check failed before it was known.
    pub image_end_offset: Option<u64>,
    /// Clusters of the virtual disk.
    pub total_clusters: u64,
    /// Of those, clusters that have a host cluster or compressed data.
    pub allocated_clusters: u64,
    /// Allocated clusters that do not follow their predecessor in the file.
    pub fragmented_clusters: u64,
    /// Compressed clusters.
    pub compressed_clusters: u64,
    /// Corruptions.
    pub corruptions: u64,
    /// Leaked clusters.
    pub leaks: u64,
    /// Places that could not be judged.
    pub check_errors: u64,
    /// Corruptions that a repair removed; `corruptions` counts the others.
    pub corruptions_fixed: u64,
    /// Leaked clusters that a repair freed; `leaks` counts the others.
    pub leaks_fixed: u64,
    /// What was found, in the order QEMU reports it; not more than `CheckOptions::max_findings`.
    pub findings: Vec<Finding>,
    /// Findings that were counted and not kept.
    pub omitted_findings: u64,
    /// Why the check ended early. The counters then tell only what was seen before.
    pub failure: Option<Error>,
}

impl CheckReport {
    /// Whether nothing is wrong.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.failure.is_none() && self.corruptions == 0 && self.leaks == 0 && self.check_errors == 0
    }

    /// Takes over what was counted.
    pub fn take(&mut self, tally: Tally) {
        self.corruptions = tally.corruptions;
        self.leaks = tally.leaks;
        self.check_errors = tally.check_errors;
        self.corruptions_fixed = tally.corruptions_fixed;
        self.leaks_fixed = tally.leaks_fixed;
        self.findings = tally.findings;
        self.omitted_findings = tally.omitted;
    }
}

/// Counters and findings while they are collected.
#[derive(Debug)]
pub struct Tally {
    /// See [`CheckReport`], as the next four.
    pub corruptions: u64,
    /// Leaked clusters.
    pub leaks: u64,
    /// Places that could not be judged.
    pub check_errors: u64,
    /// Corruptions that were repaired.
    pub corruptions_fixed: u64,
    /// Leaks that were repaired.
    pub leaks_fixed: u64,
    /// Corruptions behind which references may be hidden that could not be counted.
    pub hidden: u64,
    findings: Vec<Finding>,
    omitted: u64,
    limit: usize,
}

impl Tally {
    /// Nothing yet; keeps `limit` findings.
    pub fn new(limit: usize) -> Self {
        Self {
            corruptions: 0,
            leaks: 0,
            check_errors: 0,
            corruptions_fixed: 0,
            leaks_fixed: 0,
            hidden: 0,
            findings: Vec::new(),
            omitted: 0,
            limit,
        }
    }

    /// Counts a corruption.
    pub fn corruption(
        &mut self,
        code: FindingCode,
        offset: impl Into<Option<u64>>,
        message: impl FnOnce() -> String,
    ) {
        use FindingCode::{
            L1Copied, L2Copied, RefcountBlockShared, RefcountOverflow, RefcountTableEntry, RefcountTooLow,
        };
        self.corruptions += 1;
        if !matches!(
            code,
            L1Copied
                | L2Copied
                | RefcountBlockShared
                | RefcountOverflow
                | RefcountTableEntry
                | RefcountTooLow
        ) {
            self.hidden += 1;
        }
        self.add(Severity::Corruption, false, code, offset.into(), message);
    }

    /// Counts a leaked cluster.
    pub fn leak(&mut self, offset: u64, message: impl FnOnce() -> String) {
        self.leaks += 1;
        self.add(Severity::Leak, false, FindingCode::Leak, Some(offset), message);
    }

    /// Counts a place that cannot be judged.
    pub fn check_error(
        &mut self,
        code: FindingCode,
        offset: impl Into<Option<u64>>,
        message: impl FnOnce() -> String,
    ) {
        self.check_errors += 1;
        self.add(Severity::CheckError, false, code, offset.into(), message);
    }

    /// A corruption that is repaired.
    pub fn fixed_corruption(&mut self, code: FindingCode, offset: u64, message: impl FnOnce() -> String) {
        self.corruptions_fixed += 1;
        self.add(Severity::Corruption, true, code, Some(offset), message);
    }

    /// A leak that is repaired.
    pub fn fixed_leak(&mut self, offset: u64, message: impl FnOnce() -> String) {
        self.leaks_fixed += 1;
        self.add(Severity::Leak, true, FindingCode::Leak, Some(offset), message);
    }

    /// A finding that is counted elsewhere.
    pub fn announce(
        &mut self,
        severity: Severity,
        repaired: bool,
        code: FindingCode,
        offset: impl Into<Option<u64>>,
        message: impl FnOnce() -> String,
    ) {
        self.add(severity, repaired, code, offset.into(), message);
    }

    /// Messages are only made for findings that are kept: a ruined image has millions.
    fn add(
        &mut self,
        severity: Severity,
        repaired: bool,
        code: FindingCode,
        offset: Option<u64>,
        message: impl FnOnce() -> String,
    ) {
        if self.findings.len() < self.limit {
            self.findings.push(Finding { severity, repaired, code, message: message(), offset });
        } else {
            self.omitted += 1;
        }
    }

    /// Adds what `later` holds behind what is here.
    pub fn append(&mut self, later: Self) {
        self.corruptions += later.corruptions;
        self.leaks += later.leaks;
        self.check_errors += later.check_errors;
        self.corruptions_fixed += later.corruptions_fixed;
        self.leaks_fixed += later.leaks_fixed;
        self.hidden += later.hidden;
        self.append_findings(later);
    }

    /// Tells again, as repaired, the leaks that are told here and that `later` does not tell as left.
    pub fn append_freed(&mut self, later: &Self) {
        let leaked = |f: &&Finding| f.code == FindingCode::Leak && !f.repaired;
        let left: HashSet<_> = later.findings.iter().filter(leaked).map(|f| f.offset).collect();
        let freed = self.findings.iter().filter(leaked).filter(|f| !left.contains(&f.offset));
        let freed: Vec<_> = freed.map(|f| Finding { repaired: true, ..f.clone() }).collect();
        for Finding { severity, repaired, code, message, offset } in freed {
            self.add(severity, repaired, code, offset, || message);
        }
    }

    /// Forgets what is told about clusters in `range`, which is not counted as repaired.
    pub fn forget(&mut self, range: &Range<u64>) {
        self.findings.retain(|f| !f.offset.is_some_and(|offset| range.contains(&offset)));
    }

    /// Adds the findings of `later` alone.
    pub fn append_findings(&mut self, mut later: Self) {
        let room = self.limit.saturating_sub(self.findings.len());
        self.omitted += later.omitted + later.findings.len().saturating_sub(room) as u64;
        later.findings.truncate(room);
        self.findings.append(&mut later.findings);
    }
}
