//! Whether an image keeps to its format: headers, region tables, log, and the block allocation table.
//!
//! Parts of the file that nothing refers to are no leaks: they are found when the image is opened for writing, and used.

use std::sync::Arc;

use qcow2_core::check::{CheckLayer, CheckReport, FindingCode, Repair, Tally};
use qcow2_core::{Error, ErrorKind, Job, Layer, Mem, Result, StorageExt};

use crate::Vhdx;
use crate::file::{Front, read_header, read_regions, replay_on_disk, write_headers};
use crate::space::Used;
use crate::structures::{Guid, HEADER_OFFSETS, Header, MIB, Payload, REGION_TABLE_OFFSETS, bitmap_block};

/// Entries between two looks at whether the job was cancelled.
const STEP: u64 = 1 << 16;

/// Counts an error as damage, unless it is one of reading.
fn take<T>(tally: &mut Tally, code: FindingCode, result: Result<T>) -> Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if matches!(error.kind(), ErrorKind::Io | ErrorKind::Aborted) => Err(error),
        Err(error) => {
            tally.corruption(code, error.offset(), || error.message().to_owned());
            Ok(None)
        }
    }
}

/// What is known of the blocks while the table is walked.
struct Walk {
    used: Used,
    allocated: u64,
    fragmented: u64,
    /// Where the block before ends.
    last_end: Option<u64>,
    image_end: u64,
}

impl Vhdx {
    fn check_copies(&self, tally: &mut Tally) -> Result<()> {
        for slot in 0..2 {
            take(tally, FindingCode::Copy, read_header(&*self.data, slot))?;
        }
        let first = take(tally, FindingCode::Copy, read_regions(&*self.data, 0))?;
        let second = take(tally, FindingCode::Copy, read_regions(&*self.data, 1))?;
        if let (Some(first), Some(second)) = (first, second)
            && first != second
        {
            let [_, at] = REGION_TABLE_OFFSETS;
            tally.corruption(FindingCode::Copy, at, || "the two region tables differ".to_owned());
        }
        Ok(())
    }

    fn walk(&self) -> Result<Walk> {
        let mut used = Used::new(self.data.size()?);
        let mut image_end = 0;
        for range in &self.places.read().reserved {
            used.add(range.start, range.end);
            image_end = image_end.max(range.end);
        }
        Ok(Walk { used, allocated: 0, fragmented: 0, last_end: None, image_end })
    }

    fn check_entry(&self, index: u64, entry: u64, walk: &mut Walk, tally: &mut Tally) -> Result<()> {
        let code = FindingCode::TableEntry;
        let block_size = self.geometry().block_size;
        let (place, bytes) = match self.geometry().block_of(index) {
            Some(block) => match take(tally, code, self.judged(block, entry))? {
                Some(Payload::Present(place) | Payload::Partial(place)) => {
                    walk.allocated += 1;
                    walk.fragmented += u64::from(walk.last_end.is_some_and(|end| end != place));
                    walk.last_end = Some(place + block_size);
                    (place, block_size)
                }
                _ => return Ok(()),
            },
            None => match take(tally, code, self.judged_bitmap(index, entry))?.flatten() {
                Some(place) => (place, MIB),
                None => return Ok(()),
            },
        };
        if !walk.used.add(place, place + bytes) {
            tally.corruption(FindingCode::BlockShared, place, || {
                format!("the block of entry {index} of the block allocation table, at {place:#x}, overlaps another one")
            });
        }
        walk.image_end = walk.image_end.max(place + bytes);
        Ok(())
    }

    pub(crate) fn judged_bitmap(&self, index: u64, entry: u64) -> Result<Option<u64>> {
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

    fn check_now(&self, max_findings: usize, job: &Job) -> Result<CheckReport> {
        let mut tally = Tally::new(max_findings);
        if self.is_dirty() {
            let message = || "the image was not closed cleanly: its log has to be brought in".to_owned();
            tally.corruption(FindingCode::NotClosed, self.front.header.log_offset, message);
        }
        self.check_with(tally, job)
    }

    fn check_with(&self, mut tally: Tally, job: &Job) -> Result<CheckReport> {
        self.check_copies(&mut tally)?;
        let mut walk = self.walk()?;
        self.for_each_entry(&mut |index, entry| {
            if index.is_multiple_of(STEP) {
                job.checkpoint()?;
            }
            self.check_entry(index, entry, &mut walk, &mut tally)
        })?;
        let mut report = CheckReport {
            image_end_offset: Some(walk.image_end),
            total_clusters: self.geometry().blocks(self.virtual_size()),
            allocated_clusters: walk.allocated,
            fragmented_clusters: walk.fragmented,
            ..CheckReport::default()
        };
        report.take(tally);
        Ok(report)
    }

    /// Writes the copies anew that are damaged, from those that are whole.
    fn repair_copies(&self, front: &Front, tally: &mut Tally) -> Result<()> {
        let storage = &**self.storage();
        for (slot, at) in HEADER_OFFSETS.into_iter().enumerate() {
            if read_header(storage, slot).is_err() {
                write_headers(storage, &front.header, front.slot)?;
                tally.fixed_corruption(FindingCode::Copy, at, || "a damaged header".to_owned());
            }
        }
        let whole = self.tables.regions.encode();
        for (slot, at) in REGION_TABLE_OFFSETS.into_iter().enumerate() {
            if read_regions(storage, slot).is_ok_and(|regions| regions == self.tables.regions) {
                continue;
            }
            storage.write_all_at(Mem::from(&whole[..]), at)?;
            tally.fixed_corruption(FindingCode::Copy, at, || "a damaged region table".to_owned());
        }
        storage.flush()
    }
}

impl CheckLayer for Vhdx {
    /// As the file is now: a repair may have changed it since the layer was opened.
    fn check(&self, max_findings: usize, job: &Job) -> Result<CheckReport> {
        match self.writer {
            Some(_) => self.check_now(max_findings, job),
            None => Self::open(Arc::clone(self.storage()), &self.options)?.check_now(max_findings, job),
        }
    }

    /// Brings the log in, and replaces damaged copies by whole ones. Entries of the table stay as they are: what they lost is not known.
    fn repair(&self, repair: Repair, max_findings: usize, job: &Job) -> Result<CheckReport> {
        let storage = self.storage();
        if !storage.traits().writable {
            let error = Error::new(ErrorKind::ReadOnly, "the file is open for reading only");
            return Err(storage.located(error));
        }
        if repair == Repair::Leaks {
            return self.check(max_findings, job);
        }
        let mut tally = Tally::new(max_findings);
        // As it is now: one that was opened for writing has brought its log in already.
        let mut front = Front::read(&**storage, &self.options).map_err(|e| storage.located(e))?;
        if let Some(log) = &front.log {
            replay_on_disk(&**storage, log)?;
            let clean = Header { log_guid: Guid::default(), ..front.header };
            front.header = write_headers(&**storage, &clean, front.slot)?;
            let place = front.header.log_offset;
            tally.fixed_corruption(FindingCode::NotClosed, place, || {
                "a log that was not brought in".to_owned()
            });
        }
        self.repair_copies(&front, &mut tally)?;
        Self::open(Arc::clone(storage), &self.options)?.check_with(tally, job)
    }
}
