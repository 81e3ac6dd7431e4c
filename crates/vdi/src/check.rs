//! Whether the block map keeps to the format.

use qcow2_core::blocks::{Scheme, UsedPlaces};
use qcow2_core::check::{CheckReport, FindingCode, Repair, Tally};
use qcow2_core::{Error, ErrorKind, Job, Layer, Result, StorageExt};

use crate::Vdi;
use crate::structures::BLOCKS_ALLOCATED;

/// Holds the block map against itself, the header and the file, with QEMU's counters and words.
pub(crate) fn check(
    layer: &Vdi,
    repair: Option<Repair>,
    max_findings: usize,
    job: &Job,
) -> Result<CheckReport> {
    let (scheme, storage) = (layer.scheme(), layer.storage());
    if repair.is_some() {
        let message = "repairing VDI images is not supported: convert the disk into another image";
        return Err(storage.located(Error::new(ErrorKind::UnsupportedFeature, message)));
    }
    let (header, layout, length) = (scheme.header(), scheme.layout(), storage.size()?);
    let mut tally = Tally::new(max_findings);
    let end = layout.origin + u64::from(header.blocks_in_image) * layout.grain;
    let mut used = UsedPlaces::new(layout.origin, layout.grain, end.min(length));
    let mut allocated = 0u32;
    layer.places(job, |index, place| {
        let number = layout.entry_of(place).unwrap_or(u32::MAX);
        let offset = layout.table + u64::from(index) * 4;
        if number >= header.blocks_in_image {
            tally.corruption(FindingCode::TableEntry, offset, || {
                format!("block index {index} too large, is {number}")
            });
            return Ok(());
        }
        allocated += 1;
        if place >= length {
            tally.corruption(FindingCode::BeyondEndOfFile, offset, || {
                format!("block {index} lies at {place:#x}, behind the end of the file")
            });
        } else if !used.note(place) {
            tally.corruption(FindingCode::BlockShared, offset, || {
                format!("block index {number} also used by {number}")
            });
        }
        Ok(())
    })?;
    if allocated != header.blocks_allocated {
        tally.corruption(FindingCode::Header, BLOCKS_ALLOCATED as u64, || {
            format!("allocated blocks mismatch, is {allocated}, should be {}", header.blocks_allocated)
        });
    }
    // As QEMU, which counts nothing else of this format.
    let mut report = CheckReport { image_end_offset: Some(0), ..CheckReport::default() };
    report.take(tally);
    Ok(report)
}
