//! Whether an image keeps to its format: headers, region tables, log, and the block allocation table.

use std::sync::Arc;

use qcow2_core::{Error, ErrorKind, Job, Layer, Result, Storage, StorageExt};

use crate::file::{read_header, read_regions};
use crate::space::Used;
use crate::structures::{MIB, Payload, anchor, bitmap_block};
use crate::{OpenOptions, Vhdx};

/// Findings that are told one by one.
const MOST_FINDINGS: usize = 1000;
/// Entries between two looks at whether the job was cancelled.
const STEP: u64 = 1 << 16;

/// Something that is not as it should be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Damage {
    /// The byte of the file that it is about.
    pub offset: Option<u64>,
    /// A sentence that names place and value.
    pub message: String,
}

/// What a check found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// What makes reading fail or wrong; the first thousand.
    pub damages: Vec<Damage>,
    /// How many there are.
    pub corruptions: u64,
    /// MiB of the file that nothing refers to.
    pub leaked_mib: u64,
    /// The log has to be brought in: opening for writing does.
    pub dirty: bool,
    /// Blocks of the disk.
    pub blocks: u64,
    /// Those that are in the file, in whole or in part.
    pub allocated: u64,
    /// Where the last of them ends, in bytes.
    pub image_end: u64,
}

impl CheckReport {
    fn add(&mut self, error: &Error) {
        self.corruptions += 1;
        if self.damages.len() < MOST_FINDINGS {
            let message = match error.field() {
                Some(field) => format!("{} (field {field})", error.message()),
                None => error.message().to_owned(),
            };
            self.damages.push(Damage { offset: error.offset(), message });
        }
    }

    /// An error is damage, unless it is one of reading.
    fn take<T>(&mut self, result: Result<T>) -> Result<Option<T>> {
        match result {
            Ok(value) => Ok(Some(value)),
            Err(error) if matches!(error.kind(), ErrorKind::Io | ErrorKind::Aborted) => Err(error),
            Err(error) => {
                self.add(&error);
                Ok(None)
            }
        }
    }
}

/// Checks the image in `storage`, with its log brought in in memory. Takes a bit for each MiB of the file, and reads no data.
///
/// # Errors
/// As [`Vhdx::open`] for an image that cannot be opened at all; `Io`; `Aborted`.
pub fn check(storage: Arc<dyn Storage>, options: &OpenOptions, job: &Job) -> Result<CheckReport> {
    let image = Vhdx::open(storage, options)?;
    image.check(job)
}

impl Vhdx {
    /// As [`check()`], of an open image.
    ///
    /// # Errors
    /// `Io`; `Aborted`.
    pub fn check(&self, job: &Job) -> Result<CheckReport> {
        let mut report = CheckReport { dirty: self.is_dirty(), ..CheckReport::default() };
        for slot in 0..2 {
            report.take(read_header(&*self.data, slot))?;
        }
        self.check_regions(&mut report)?;
        self.check_table(&mut report, job)?;
        Ok(report)
    }

    fn check_regions(&self, report: &mut CheckReport) -> Result<()> {
        let first = report.take(read_regions(&*self.data, 0))?;
        let second = report.take(read_regions(&*self.data, 1))?;
        if let (Some(first), Some(second)) = (first, second)
            && first != second
        {
            report.add(
                &Error::new(ErrorKind::Corrupt, "the two region tables differ").with_field("Region Table"),
            );
        }
        Ok(())
    }

    fn check_table(&self, report: &mut CheckReport, job: &Job) -> Result<()> {
        let geometry = self.geometry();
        let length = self.data.size()?;
        let mut used = Used::new(length);
        for range in &self.places.read().reserved {
            used.add(range.start, range.end);
            report.image_end = report.image_end.max(range.end);
        }
        report.blocks = geometry.blocks(self.virtual_size());
        let mut anchors = Vec::new();
        self.for_each_entry(&mut |index, entry| {
            if index.is_multiple_of(STEP) {
                job.checkpoint()?;
            }
            let (place, bytes) = match geometry.block_of(index) {
                Some(block) => match report.take(self.judged(block, entry))? {
                    Some(Payload::Present(place) | Payload::Partial(place)) => {
                        report.allocated += 1;
                        (place, geometry.block_size)
                    }
                    _ => {
                        anchors.extend(anchor(entry));
                        return Ok(());
                    }
                },
                None => match report.take(self.judged_bitmap(index, entry))?.flatten() {
                    Some(place) => (place, MIB),
                    None => return Ok(()),
                },
            };
            if !used.add(place, place + bytes) {
                let message =
                    format!("the block of entry {index} of the table, at {place:#x}, overlaps another one");
                report
                    .add(&Error::new(ErrorKind::Corrupt, message).with_field("BAT entry").with_offset(place));
            }
            report.image_end = report.image_end.max(place + bytes);
            Ok(())
        })?;
        for place in anchors {
            used.add(place, place.saturating_add(geometry.block_size));
        }
        let end = report.image_end.min(length);
        report.leaked_mib = used.free_mib(length) - used.free_mib(end);
        Ok(())
    }

    fn judged_bitmap(&self, index: u64, entry: u64) -> Result<Option<u64>> {
        let found = bitmap_block(entry).and_then(|place| match place {
            Some(place) => self.check_place(place, MIB).map(|()| Some(place)),
            None => Ok(None),
        });
        found.map_err(|e| {
            let message = format!("the sector bitmap of entry {index} of the table: {}", e.message());
            let new = Error::new(e.kind(), message).with_field("BAT entry");
            e.offset().into_iter().fold(new, Error::with_offset)
        })
    }
}
