//! Checking the metadata of one image: what every structure refers to, against what the refcounts say.
//!
//! Three steps, each of its own file, so that a repair can run between them: the walk ([`visit`]) visits every
//! structure and counts references ([`counts`]), the comparison ([`compare`]) holds the counts against the stored
//! refcounts ([`stored`]), and the COPIED flags are judged by the stored refcounts. A check that only reads judges the
//! flags during the walk, so that each L2 table is read once.
//!
//! What counts as an error, a leak or a failure is what QEMU's own check counts, so that both report the same numbers
//! for the same image. Memory is bounded by [`qcow2_format::Limits::max_memory`], not by what the image claims.

mod bitmaps;
mod compare;
mod counts;
mod l2;
mod read_ahead;
mod repair;
mod snapshots;
mod stored;
mod target;
mod uncounted;
mod visit;
mod walk;

use qcow2_format::Header;

pub use qcow2_core::check::{CheckReport, Finding, FindingCode, Repair, Severity};
pub use repair::repair;
pub(crate) use repair::{expand_zeroes, restructure};
pub use target::CheckOptions;

use crate::{Job, Result, Storage};
use compare::Fix;
use qcow2_core::check::Tally;
use target::{File, SECTOR, Stop, Target};
use visit::walk_all;

/// Checks the image in `storage`, whose header is `header`, without changing it. Neither a backing file nor an external
/// data file is looked at. Progress is told in guest bytes, those of each snapshot included.
///
/// # Errors
/// `Aborted` through `job`; `Limit` where the counters would exceed [`qcow2_format::Limits::max_memory`]; `Io`. Metadata so damaged
/// that the check cannot go on is no error of this call but [`CheckReport::failure`].
pub fn check(
    storage: &dyn Storage,
    header: &Header,
    options: &CheckOptions,
    job: &Job,
) -> Result<CheckReport> {
    let mut tally = Tally::new(options.max_findings);
    let mut report = CheckReport::default();
    let target = Target { storage, header, options, job, repair: None };
    let outcome = run(&target, &mut tally, &mut report);
    conclude(outcome, tally, report)
}

/// What refers to the clusters of an image file.
pub(crate) struct References {
    counts: counts::ReferenceCounts,
    /// Leaked clusters.
    pub(crate) leaks: u64,
    /// Corruptions, and places that could not be looked at.
    pub(crate) errors: u64,
}

impl References {
    /// References to one host cluster.
    pub(crate) fn get(&self, cluster: u64) -> u64 {
        self.counts.get(cluster)
    }

    /// Host clusters of the file.
    pub(crate) fn clusters(&self) -> u64 {
        self.counts.clusters()
    }
}

/// Checks the image as [`check`] does, and keeps the counters.
pub(crate) fn count_references(
    storage: &dyn Storage,
    header: &Header,
    options: &CheckOptions,
    job: &Job,
) -> Result<References> {
    let target = Target { storage, header, options, job, repair: None };
    let mut tally = Tally::new(options.max_findings);
    let mut copied = Tally::new(options.max_findings);
    let counted = (|| {
        let snapshots = snapshots::read(&target, &mut tally)?;
        tally.corruptions += snapshots.corruptions();
        let file = File::measure(&target)?;
        let mut stored = stored::StoredRefcounts::load(&target, file.clusters)?;
        let walked = walk_all(&target, &file, &snapshots, &mut stored, &mut tally, &mut copied)?;
        compare::compare(&target, &mut stored, &walked.counts, Fix::default(), &mut tally)?;
        Ok(walked.counts)
    })();
    let counts = match counted {
        Ok(counts) => counts,
        Err(Stop::Failed(error) | Stop::Error(error)) => return Err(error),
    };
    // Flags that are too few cost copies; they are no reason to trust the references less.
    Ok(References {
        counts,
        leaks: tally.leaks,
        errors: tally.corruptions + tally.check_errors + copied.check_errors,
    })
}

/// Makes a report of how a check ended.
fn conclude(outcome: Result<(), Stop>, mut tally: Tally, mut report: CheckReport) -> Result<CheckReport> {
    let failure = match outcome {
        Ok(()) => None,
        Err(Stop::Failed(error)) => {
            tally.check_errors = tally.check_errors.max(1);
            Some(error)
        }
        Err(Stop::Error(error)) => return Err(error),
    };
    report.take(tally);
    report.failure = failure;
    Ok(report)
}

fn run(target: &Target<'_>, tally: &mut Tally, report: &mut CheckReport) -> Result<(), Stop> {
    let snapshots = snapshots::read(target, tally)?;
    tally.corruptions += snapshots.corruptions();
    let file = File::measure(target)?;
    let mut stored = stored::StoredRefcounts::load(target, file.clusters)?;
    let mut copied = Tally::new(target.options.max_findings);
    let walked = walk_all(target, &file, &snapshots, &mut stored, tally, &mut copied)?;
    describe(target, &walked, report);
    let compared = compare::compare(target, &mut stored, &walked.counts, Fix::default(), tally)?;
    tally.append(copied);
    report.image_end_offset = Some((compared.highest + 1) << target.header.geometry.cluster_bits());
    Ok(())
}

/// What a walk says about the active disk.
fn describe(target: &Target<'_>, walked: &walk::Walked, report: &mut CheckReport) {
    let header = target.header;
    report.total_clusters = header.geometry.clusters_for(header.size / SECTOR * SECTOR);
    report.allocated_clusters = walked.fragmentation.allocated;
    report.fragmented_clusters = walked.fragmentation.fragmented;
    report.compressed_clusters = walked.fragmentation.compressed;
}
