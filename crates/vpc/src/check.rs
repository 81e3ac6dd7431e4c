//! Whether footers and BAT keep to the format.

use qcow2_core::blocks::Scheme;
use qcow2_core::check::{CheckReport, FindingCode, Repair, Severity, Tally};
use qcow2_core::{Job, Layer, Result, Storage, StorageExt};

use crate::Vpc;
use crate::footers::{Footers, read_footers};

/// Holds the footers against each other, and the BAT against itself and the file. A repair writes the footer that counts over the other
/// one, and gives back what lies behind the last block.
pub(crate) fn check(
    layer: &Vpc,
    repair: Option<Repair>,
    max_findings: usize,
    job: &Job,
) -> Result<CheckReport> {
    let storage = &**layer.storage();
    let mut tally = Tally::new(max_findings);
    let (end, mut report) = check_table(layer, &mut tally, job)?;
    let footers = read_footers(storage)?;
    let is_sound = tally.corruptions == 0;
    let repairs = repair == Some(Repair::All);
    check_footers(&footers, repairs, &mut tally);
    let lost = footers.back_offset.saturating_sub(end);
    let frees = repair.is_some() && is_sound && !storage.traits().block_device;
    if lost > 0 && is_sound {
        let blocks = lost.div_ceil(layer.scheme().layout().stride());
        let message = || format!("{lost} bytes behind the last block at {end:#x}");
        match frees {
            true => tally.leaks_fixed += blocks,
            false => tally.leaks += blocks,
        }
        tally.announce(Severity::Leak, frees, FindingCode::Leak, end, message);
    }
    if (frees && lost > 0) || tally.corruptions_fixed > 0 {
        mend(layer, storage, if frees { end } else { footers.back_offset })?;
    }
    report.take(tally);
    Ok(report)
}

/// The footer is written where the file ends first: one of them is whole at any time.
fn mend(layer: &Vpc, storage: &dyn Storage, end: u64) -> Result<()> {
    layer.scheme().write_footer(storage, 0)?;
    storage.flush()?;
    layer.scheme().end_with_footer(storage, end)?;
    storage.flush()
}

/// Both have to be there, and to say the same.
fn check_footers(footers: &Footers, repairs: bool, tally: &mut Tally) {
    let mut add = |code, offset: u64, message: String| match repairs {
        true => tally.fixed_corruption(code, offset, || message),
        false => tally.corruption(code, offset, || message),
    };
    match (&footers.front, &footers.back) {
        (Ok(front), Ok(back)) if front != back => {
            let message =
                "the copy of the footer at the start of the file differs from the footer".to_owned();
            add(FindingCode::Copy, footers.back_offset, message);
        }
        (Ok(_), Ok(_)) => {}
        (front, back) => {
            for (what, found, offset) in
                [("the copy of the footer", front, 0), ("the footer", back, footers.back_offset)]
            {
                if let Err(error) = found {
                    add(FindingCode::Copy, offset, format!("{what} is damaged: {}", error.message()));
                }
            }
        }
    }
}

/// Where the last block ends.
fn check_table(layer: &Vpc, tally: &mut Tally, job: &Job) -> Result<(u64, CheckReport)> {
    let (layout, length) = (layer.scheme().layout(), layer.storage().size()?);
    let blocks = layout.size.div_ceil(layout.block);
    let mut report = CheckReport { total_clusters: blocks, ..CheckReport::default() };
    let (mut places, mut last) = (Vec::new(), 0);
    layer.places(job, |index, place| {
        let offset = layout.table + u64::from(index) * 4;
        let end = place + layout.stride();
        if layout.metadata.iter().any(|part| part.start < end && place < part.end) {
            tally.corruption(FindingCode::TableEntry, offset, || {
                format!("BAT entry {index} names {place:#x}, inside the format's own structures")
            });
        } else if end > length {
            tally.corruption(FindingCode::BeyondEndOfFile, offset, || {
                format!("BAT entry {index} names {place:#x}, whose block ends behind the end of the file")
            });
        } else {
            report.allocated_clusters += 1;
            report.fragmented_clusters += u64::from(last != 0 && last != place);
            last = end;
            places.push((place, index));
        }
        Ok(())
    })?;
    places.sort_unstable();
    let mut end = 0;
    for (place, index) in places {
        if place < end {
            tally.corruption(FindingCode::BlockShared, layout.table + u64::from(index) * 4, || {
                format!("BAT entry {index} names {place:#x}, inside another block")
            });
        }
        end = end.max(place + layout.stride());
    }
    // Names of parents can lie behind all blocks.
    let end = layout.metadata.iter().map(|part| part.end).fold(end.max(layout.data), u64::max);
    report.image_end_offset = Some(end + crate::structures::FOOTER_LENGTH as u64);
    Ok((end, report))
}
