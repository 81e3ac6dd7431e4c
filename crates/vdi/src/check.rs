//! Whether the block map keeps to the format, and its repair, which QEMU does not have.

use qcow2_core::blocks::{Scheme, UsedPlaces};
use qcow2_core::check::{CheckReport, FindingCode, Repair, Tally};
use qcow2_core::space::lengthen;
use qcow2_core::{Error, ErrorKind, Job, Layer, Mem, MemMut, Result, Storage, StorageExt};

use crate::Vdi;
use crate::structures::BLOCKS_ALLOCATED;

/// Bytes that are copied at once.
const PIECE: u64 = 1 << 20;

/// Notes damage: what it is, where, and its words.
type Corruption<'a> = dyn FnMut(FindingCode, u64, &dyn Fn() -> String) + 'a;

/// What a look at the block map found. Places are numbers, as entries have them.
#[derive(Default)]
struct Found {
    /// For a repair: all of it is kept.
    kept: bool,
    /// Entries that name what is no place in the file.
    outside: Vec<u32>,
    /// Entries that name another one's place, and that.
    shared: Vec<(u32, u32)>,
    /// All others that name a place, and it.
    sound: Vec<(u32, u32)>,
}

impl Found {
    fn outside(&mut self, index: u32) {
        if self.kept {
            self.outside.push(index);
        }
    }

    fn place(&mut self, shared: bool, index: u32, number: u32) {
        if self.kept {
            let list = if shared { &mut self.shared } else { &mut self.sound };
            list.push((index, number));
        }
    }
}

/// Holds the block map against itself, the header and the file, with QEMU's counters and words.
pub(crate) fn check(
    layer: &Vdi,
    repair: Option<Repair>,
    max_findings: usize,
    job: &Job,
) -> Result<CheckReport> {
    let (scheme, storage) = (layer.scheme(), &**layer.storage());
    let repairs = repair == Some(Repair::All);
    if repairs && !storage.traits().writable {
        let error = Error::new(ErrorKind::ReadOnly, "the file is open for reading only");
        return Err(storage.located(error));
    }
    let header = scheme.header();
    let mut tally = Tally::new(max_findings);
    let mut found = Found { kept: repairs, ..Found::default() };
    let mut corruption = |code, offset: u64, message: &dyn Fn() -> String| match repairs {
        true => tally.fixed_corruption(code, offset, message),
        false => tally.corruption(code, offset, message),
    };
    let allocated = look(layer, job, &mut found, &mut corruption)?;
    if allocated != header.blocks_allocated {
        corruption(FindingCode::Header, BLOCKS_ALLOCATED as u64, &|| {
            format!("allocated blocks mismatch, is {allocated}, should be {}", header.blocks_allocated)
        });
    }
    if repairs && tally.corruptions_fixed > 0 {
        mend(layer, found, job)?;
    }
    // As QEMU, which counts nothing else of this format.
    let mut report = CheckReport { image_end_offset: Some(0), ..CheckReport::default() };
    report.take(tally);
    Ok(report)
}

/// Reads the block map; how many entries name a place that an image of this size can have.
fn look(layer: &Vdi, job: &Job, found: &mut Found, corruption: &mut Corruption<'_>) -> Result<u32> {
    let (header, layout, length) =
        (layer.scheme().header(), layer.scheme().layout(), layer.storage().size()?);
    let end = layout.origin + u64::from(header.blocks_in_image) * layout.grain;
    let mut used = UsedPlaces::new(layout.origin, layout.grain, end.min(length));
    let mut allocated = 0u32;
    layer.places(job, |index, place| {
        let number = layout.entry_of(place).unwrap_or(u32::MAX);
        let offset = layout.table + u64::from(index) * 4;
        if number >= header.blocks_in_image {
            corruption(FindingCode::TableEntry, offset, &|| {
                format!("block index {index} too large, is {number}")
            });
            found.outside(index);
            return Ok(());
        }
        allocated += 1;
        if place >= length {
            corruption(FindingCode::BeyondEndOfFile, offset, &|| {
                format!("block {index} lies at {place:#x}, behind the end of the file")
            });
            found.outside(index);
        } else if !used.note(place) {
            corruption(FindingCode::BlockShared, offset, &|| {
                format!("block index {number} also used by {number}")
            });
            found.place(true, index, number);
        } else {
            found.place(false, index, number);
        }
        Ok(())
    })?;
    Ok(allocated)
}

/// Entries that name nothing are absent; blocks that share a place get a copy each; and the last ones go to places that nothing refers to,
/// so that there are as many as the header says. Copies, and a number in the header that is larger, are durable before an entry names them; a smaller
/// one is written when none lies behind it. A power cut leaves what another repair mends.
fn mend(layer: &Vdi, mut found: Found, job: &Job) -> Result<()> {
    let (layout, storage) = (layer.scheme().layout(), &**layer.storage());
    let total = (found.sound.len() + found.shared.len()) as u32;
    found.sound.sort_unstable_by_key(|(_, number)| *number);
    let mut taken = found.sound.iter().map(|(_, number)| *number).peekable();
    let holes: Vec<u32> = (0..total).filter(|number| taken.next_if_eq(number).is_none()).collect();
    let moved = found.shared.iter().chain(found.sound.iter().filter(|(_, number)| *number >= total));
    let place = |number: u32| layout.origin + u64::from(number) * layout.grain;
    let end = place(total);
    lengthen(storage, end)?;
    let mut entries: Vec<(u32, u32)> = found.outside.iter().map(|index| (*index, layout.absent)).collect();
    for ((index, from), to) in moved.zip(holes) {
        job.checkpoint()?;
        copy(storage, place(*from), place(to), layout.stride())?;
        entries.push((*index, to));
    }
    entries.sort_unstable();
    // Programs put new blocks behind as many as the header has: no entry names one there.
    if total > layer.scheme().header().blocks_allocated {
        layer.scheme().settle(storage, end)?;
    }
    storage.flush()?;
    layer.write_entries(&entries)?;
    storage.flush()?;
    layer.scheme().settle(storage, end)?;
    storage.flush()?;
    if storage.traits().block_device || storage.size()? <= end {
        return Ok(());
    }
    storage.resize(end)?;
    storage.flush()
}

/// Copies a place, also one that the end of the file cuts.
fn copy(storage: &dyn Storage, from: u64, to: u64, length: u64) -> Result<()> {
    let mut bytes = vec![0; length.min(PIECE) as usize];
    let mut at = 0;
    while at < length {
        let count = (length - at).min(PIECE);
        let part = bytes.get_mut(..count as usize).unwrap_or_default();
        storage.read_padded_at(MemMut::from(&mut *part), from + at)?;
        storage.write_all_at(Mem::from(&*part), to + at)?;
        at += count;
    }
    Ok(())
}
