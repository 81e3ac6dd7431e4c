//! Whether the block map keeps to the format.

use qcow2_core::blocks::Entry;
use qcow2_core::{Job, Result};

use crate::Vdi;

/// One thing that is wrong. All of them can cost data when the image is written to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// Where in the file.
    pub offset: u64,
    /// A sentence that names place and value, in QEMU's words where it has some.
    pub message: String,
}

/// Holds the block map against itself, the header and the file. `layer` was opened for that: entries that are not in the file yet are
/// not looked at.
///
/// # Errors
/// `Io`; `Aborted`.
pub fn check(layer: &Vdi, job: &Job) -> Result<Vec<Fault>> {
    let scheme = layer.scheme();
    let (header, layout) = (scheme.header(), qcow2_core::blocks::Scheme::layout(scheme));
    let length = qcow2_core::StorageExt::size(&**qcow2_core::Layer::storage(layer))?;
    let (mut faults, mut allocated) = (Vec::new(), 0u32);
    // A bit for each block that the image can have.
    let mut used = vec![0u64; (header.blocks_in_image as usize).div_ceil(64)];
    layer.walk(|index, entry| {
        if index.is_multiple_of(1 << 16) {
            job.checkpoint()?;
        }
        let Entry::At(place) = entry else { return Ok(()) };
        let number = layout.entry_of(place).unwrap_or(u32::MAX);
        let offset = layout.table + u64::from(index) * 4;
        let mut fault = |message: String| faults.push(Fault { offset, message });
        if number >= header.blocks_in_image {
            fault(format!("block index {index} too large, is {number}"));
            return Ok(());
        }
        allocated += 1;
        if place >= length {
            fault(format!("block index {index} lies behind the end of the file, at {place:#x}"));
        }
        if let Some(word) = used.get_mut(number as usize / 64) {
            let bit = 1 << (number % 64);
            if *word & bit != 0 {
                fault(format!("block index {number} also used by {number}"));
            }
            *word |= bit;
        }
        Ok(())
    })?;
    if allocated != header.blocks_allocated {
        let message =
            format!("allocated blocks mismatch, is {allocated}, should be {}", header.blocks_allocated);
        faults.push(Fault { offset: crate::structures::BLOCKS_ALLOCATED as u64, message });
    }
    Ok(faults)
}
