//! Repairing an image, in an order in which a crash at any point leaves it no worse than it was.
//!
//! 1. The walk counts the references, as in a check; nothing is written before it is complete. Snapshots that the header
//!    counts and that cannot be there are given up then, with a lower count; those whose L1 table is nowhere, with a new
//!    snapshot table; bitmaps that are damaged, with their bit in the header.
//! 2. L2 entries that read as zeroes but name an impossible cluster lose it.
//! 3. Refcounts that are too low are raised. Where that is not enough (a cluster in use without any refcount, damaged
//!    refcount structures, a new snapshot table to be placed), all refcount structures are written anew to clusters
//!    that nothing uses ([`rebuild`]), and the header switches to them when they are durable.
//! 4. COPIED flags follow the counted references ([`flags`]). A table whose cluster is guest data as well gets a cluster of
//!    its own first ([`detach`]).
//! 5. Refcounts that are too high are lowered ([`refcounts`]).
//! 6. The dirty and the corrupt bit go.
//!
//! Each step is durable before the next. Refcounts are only lowered while nothing else is wrong that may hide
//! references: what looks like leaked clusters may be what a damaged entry pointed to. What a rebuild replaced is freed in
//! any case ([`former`]).

mod bytes;
mod detach;
mod flags;
mod former;
mod judge;
mod metadata;
mod rebuild;
mod refcounts;
mod restructure;

use qcow2_format::Header;
use qcow2_format::header::feature::{Autoclear, Incompatible};
use qcow2_format::header::field::{self, Patch};

use self::bytes::write;
use self::former::Former;
use self::judge::Flags;
use self::metadata::Metadata;
pub(crate) use self::restructure::{expand_zeroes, restructure};
use super::compare::{self, Compared, Fix};
use super::snapshots::{self, SnapshotTable};
use super::stored::StoredRefcounts;
use super::target::{CheckOptions, File, Stop, Target, short_l1};
use super::visit::walk_all;
use super::walk::Walked;
use super::{conclude, describe};
use crate::image::read_header_for_check;
use crate::patch::write_patch;
use crate::{Error, ErrorKind, Job, Result, Storage, StorageExt};
use qcow2_core::check::{CheckReport, FindingCode, Repair, Severity, Tally};

/// Checks the image in `storage` and repairs what `repair` allows. The caller has the file to itself: no other user,
/// in this process or another. The report counts what is left, and what was repaired; check again to be sure.
///
/// # Errors
/// As [`super::check()`], `ReadOnly`, and as [`read_header_for_check`]. An error leaves the image no worse than it was.
pub fn repair(
    storage: &dyn Storage,
    repair: Repair,
    options: &CheckOptions,
    job: &Job,
) -> Result<CheckReport> {
    if !storage.traits().writable {
        let message = "the file is open for reading only: it cannot be repaired";
        return Err(storage.located(Error::new(ErrorKind::ReadOnly, message)));
    }
    let mut header = read_header_for_check(storage)?;
    clear_autoclear(storage, &mut header)?;
    let mut tally = Tally::new(options.max_findings);
    let mut report = CheckReport::default();
    let target = Target { storage, header: &header, options, job, repair: Some(repair) };
    let outcome = run(&target, repair, &mut tally, &mut report);
    conclude(outcome, tally, report)
}

/// Clears the autoclear bits that this library does not know, before anything else is changed.
fn clear_autoclear(storage: &dyn Storage, header: &mut Header) -> Result<()> {
    let keep = header.autoclear & Autoclear::SUPPORTED;
    if header.version < 3 || header.autoclear == keep {
        return Ok(());
    }
    header.autoclear = keep;
    write_patch(storage, &header.steady(), &Patch::new().set(field::AUTOCLEAR_FEATURES, keep))?;
    storage.flush()
}

fn run(target: &Target<'_>, repair: Repair, tally: &mut Tally, report: &mut CheckReport) -> Result<(), Stop> {
    let snapshots = snapshots::read(target, tally)?;
    let done = refcounts_and_flags(target, repair, &snapshots, tally, report);
    if done.is_err() || repair != Repair::All {
        tally.corruptions += snapshots.corruptions();
    } else {
        tally.corruptions_fixed += snapshots.corruptions();
    }
    done?;
    if tally.check_errors == 0 && tally.corruptions == 0 {
        clear_marks(target)?;
    }
    Ok(())
}

/// Clears the dirty and the corrupt bit of an image that is neither.
fn clear_marks(target: &Target<'_>) -> Result<()> {
    let marks = Incompatible::DIRTY | Incompatible::CORRUPT;
    let header = target.header;
    if header.version < 3 || !header.incompatible.intersects(marks) {
        return Ok(());
    }
    target.storage.flush()?;
    let patch = Patch::new().set(field::INCOMPATIBLE_FEATURES, header.incompatible - marks);
    write_patch(target.storage, &header.steady(), &patch)?;
    target.storage.flush()
}

fn refcounts_and_flags(
    target: &Target<'_>,
    repair: Repair,
    snapshots: &SnapshotTable,
    tally: &mut Tally,
    report: &mut CheckReport,
) -> Result<(), Stop> {
    let file = File::measure(target)?;
    let mut stored = StoredRefcounts::load(target, file.clusters)?;
    // The flags are not judged by this walk.
    let mut unused = Tally::new(0);
    let mut walked = walk_all(target, &file, snapshots, &mut stored, tally, &mut unused)?;
    describe(target, &walked, report);
    if repair == Repair::All && snapshots.overhanging > 0 {
        // Before what they alone referred to is freed, and before the file grows to where they were read as nothing.
        let patch = Patch::new().set(field::NB_SNAPSHOTS, snapshots.entries.len() as u32);
        write_patch(target.storage, &target.header.steady(), &patch)?;
        target.storage.flush()?;
    }
    let header = without_lost(target, &file, &walked, tally)?;
    let target = &Target { header: &header, ..*target };
    let metadata = Metadata::of(target, snapshots, &stored)?;
    write_entries(target, &walked, &metadata, tally)?;
    let before = (tally.corruptions, tally.leaks, tally.check_errors);
    let compared = compare::compare(target, &mut stored, &walked.counts, Fix::default(), tally)?;
    let broken = walked.rebuild || compared.rebuild;
    let fix = Fix { leaks: tally.hidden == 0, errors: repair == Repair::All };
    if repair == Repair::All && (broken || snapshots.damaged > 0) {
        if broken {
            tally.announce(Severity::Note, false, FindingCode::Rebuild, None, || {
                "Rebuilding refcount structure".to_owned()
            });
        }
        let former = former::structures(target, snapshots, &stored);
        let header = rebuild::rebuild(target, snapshots, &mut stored, &walked, fix)?;
        return rebuilt(target, &header, &former, (fix, broken), tally, report);
    }
    if broken {
        let message = "need to rebuild refcount structures";
        tally.check_error(FindingCode::Rebuild, None, || format!("ERROR {message}"));
        return Err(Stop::corrupt(message, target.header.refcount_table_offset.get()));
    }
    let mut highest = compared.highest;
    if tally.leaks > 0 || tally.corruptions > 0 {
        // What the comparison counted is counted again, as repaired or not.
        (tally.corruptions, tally.leaks, tally.check_errors) = before;
        highest = compare::compare(target, &mut stored, &walked.counts, fix, tally)?.highest;
    }
    settle(target, &mut stored, &mut walked, fix, &metadata, tally)?;
    report.image_end_offset =
        Some((highest.max(walked.moved_to) + 1) << target.header.geometry.cluster_bits());
    Ok(())
}

/// Gives up bitmaps that are damaged, and gives the file the length that its active L1 table needs: before anything
/// is freed or placed. Gives the header as it is then.
fn without_lost(
    target: &Target<'_>,
    file: &File,
    walked: &Walked,
    tally: &mut Tally,
) -> Result<Header, Stop> {
    let mut header = target.header.clone();
    if target.repair != Some(Repair::All) {
        return Ok(header);
    }
    if walked.without_bitmaps {
        header.autoclear -= Autoclear::BITMAPS;
        let patch = Patch::new().set(field::AUTOCLEAR_FEATURES, header.autoclear);
        write_patch(target.storage, &header.steady(), &patch)?;
        target.storage.flush()?;
    }
    let end = header.l1_table_offset.get().saturating_add(u64::from(header.l1_size) * 8);
    if short_l1(target.storage, &header)? && end < file.length.saturating_add(header.geometry.cluster_size())
    {
        target.storage.resize(end.next_multiple_of(header.geometry.cluster_size()))?;
        target.storage.flush()?;
        tally.corruptions -= 1;
        tally.hidden -= 1;
        tally.fixed_corruption(FindingCode::BeyondEndOfFile, header.l1_table_offset.get(), || {
            "the file ends inside the active L1 table".to_owned()
        });
    }
    Ok(header)
}

/// Goes on behind a rebuild: the references are counted again, and the former structures are freed. All that is freed
/// is told with `tell`, else only what was told as leaked.
fn rebuilt(
    target: &Target<'_>,
    header: &Header,
    former: &Former,
    (fix, tell): (Fix, bool),
    tally: &mut Tally,
    report: &mut CheckReport,
) -> Result<(), Stop> {
    let old_snapshots = target.header.snapshots_offset;
    let target = &Target { header, ..*target };
    let limit = target.options.max_findings;
    let mut again = Tally::new(limit);
    let snapshots = snapshots::read(target, &mut again)?;
    let file = File::measure(target)?;
    let mut stored = StoredRefcounts::load(target, file.clusters)?;
    let mut walked = walk_all(target, &file, &snapshots, &mut stored, &mut again, &mut Tally::new(0))?;
    // Entries in a table that shared its cluster with the former structures can be written now; others still cannot.
    let metadata = Metadata::of(target, &snapshots, &stored)?;
    write_entries(target, &walked, &metadata, &mut again)?;
    // What may hide references is judged anew: behind a reference to what was no part of the file, there is none now.
    let fix = Fix { leaks: again.hidden == 0, ..fix };
    let mut freed = Tally::new(limit);
    if !fix.leaks {
        former::free(target, former, &mut stored, &walked, &mut freed)?;
    }
    let Compared { highest, rebuild } =
        compare::compare(target, &mut stored, &walked.counts, Fix { errors: false, ..fix }, &mut freed)?;
    if rebuild || walked.rebuild {
        let message = "rebuilt refcount structure is still broken";
        return Err(Stop::corrupt(message, header.refcount_table_offset.get()));
    }
    // What remains is what the second walk found; the difference was repaired.
    let left = again.corruptions + freed.corruptions;
    tally.corruptions_fixed += tally.corruptions.saturating_sub(left);
    tally.corruptions = left;
    tally.leaks_fixed += tally.leaks.saturating_sub(freed.leaks);
    tally.leaks = freed.leaks;
    tally.check_errors = again.check_errors + freed.check_errors;
    if tell {
        // A former snapshot table was not leaked: it goes with the repair of its entries.
        if header.snapshots_offset != old_snapshots {
            freed.forget(&former.snapshots);
        }
        tally.append_findings(freed);
    } else {
        tally.append_freed(&freed);
    }
    settle(target, &mut stored, &mut walked, fix, &metadata, tally)?;
    report.image_end_offset = Some((highest.max(walked.moved_to) + 1) << header.geometry.cluster_bits());
    Ok(())
}

/// Writes refcounts and flags, in the safe order.
fn settle(
    target: &Target<'_>,
    stored: &mut StoredRefcounts<'_>,
    walked: &mut Walked,
    fix: Fix,
    metadata: &Metadata,
    tally: &mut Tally,
) -> Result<(), Stop> {
    if fix.errors {
        refcounts::write(target, stored, &walked.counts, Fix { errors: true, leaks: false })?;
    }
    // Without the right to repair everything, flags are only touched where the refcounts are beyond doubt.
    let sure = tally.corruptions == 0 && tally.leaks == 0 && tally.check_errors == 0;
    let mut flags = Tally::new(target.options.max_findings);
    flags::check(
        &mut Flags { target, stored, walked, fix, metadata, tally: &mut flags },
        fix.errors || sure,
    )?;
    tally.append(flags);
    if fix.leaks {
        refcounts::write(target, stored, &walked.counts, Fix { errors: false, leaks: true })?;
    }
    Ok(())
}

/// Writes the L2 entries that the walk replaced, unless they lie in what is something else as well.
fn write_entries(
    target: &Target<'_>,
    walked: &Walked,
    metadata: &Metadata,
    tally: &mut Tally,
) -> Result<(), Stop> {
    let geometry = &target.header.geometry;
    for (&at, entry) in &walked.entries {
        let cluster = geometry.cluster_index(at);
        if metadata.covers(cluster) || !walked.is_table_alone(cluster) {
            tally.corruptions_fixed = tally.corruptions_fixed.saturating_sub(1);
            tally.corruptions += 1;
            tally.hidden += 1;
            tally.check_error(FindingCode::ClusterUnaligned, at, || "ERROR: Overlap check failed".into());
            continue;
        }
        let mut bytes = vec![0; geometry.l2_entry_size() as usize];
        entry.write(&mut bytes);
        write(target.storage, &bytes, at)?;
    }
    if !walked.entries.is_empty() {
        target.storage.flush()?;
    }
    Ok(())
}
