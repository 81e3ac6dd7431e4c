//! A fixed disk: its bytes, and a footer behind them.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;
use qcow2_core::check::{CheckLayer, CheckReport, Repair};
use qcow2_core::disk::{DiskOptions, WriteLayer};
use qcow2_core::layer::{Holes, Layer, Segment};
use qcow2_core::space::{Preallocation, reserve, write_zero_bytes};
use qcow2_core::{Error, ErrorKind, Job, Mem, MemMut, Result, Storage, StorageExt};

use crate::layer::{geometry_for, judge_size};
use crate::parent::ParentId;
use crate::structures::{FOOTER_LENGTH, Footer};

/// An open fixed disk.
#[derive(Debug)]
pub struct Fixed {
    storage: Arc<dyn Storage>,
    footer: Arc<Mutex<Footer>>,
    size: Arc<AtomicU64>,
    /// Where the footer begins.
    end: Arc<AtomicU64>,
    options: Option<DiskOptions>,
}

impl Fixed {
    /// The disk in `storage`, whose footer begins at `end`.
    ///
    /// # Errors
    /// `Corrupt` for a disk that is larger than the file.
    pub(crate) fn new(storage: Arc<dyn Storage>, footer: &Footer, end: u64) -> Result<Self> {
        let size = footer.virtual_size();
        if size > end {
            let message = format!("the disk has {size} bytes, but its footer begins at {end}");
            let error = Error::new(ErrorKind::Corrupt, message).with_field("current_size");
            return Err(storage.located(error.with_offset(end)));
        }
        let (footer, size) = (Arc::new(Mutex::new(footer.clone())), Arc::new(AtomicU64::new(size)));
        Ok(Self { storage, footer, size, end: Arc::new(AtomicU64::new(end)), options: None })
    }

    /// Its footer.
    #[must_use]
    pub fn footer(&self) -> Footer {
        self.footer.lock().clone()
    }

    /// Makes the disk larger: its footer is at the new end, durably, before the old one is zeroed. A power cut between them leaves the
    /// larger disk with the bytes of that in it.
    fn grow(&self, size: u64, preallocation: Preallocation, job: &Job) -> Result<()> {
        let (storage, old, end) = (&*self.storage, self.virtual_size(), self.end.load(Ordering::Acquire));
        let (former, before) = (storage.size()?, self.footer());
        let footer = before.resized(size, geometry_for(&before, size));
        let begun = self.begin_growth(&footer, old..size, former, preallocation, job);
        let ended = begun.and_then(|()| {
            storage.zero(end.min(size), former.min(size).saturating_sub(end), false)?;
            storage.flush()
        });
        if let Err(error) = ended {
            // The old end as it was.
            storage.write_all_at(Mem::from(&before.bytes()[..]), end)?;
            storage.flush()?;
            storage.resize(end + FOOTER_LENGTH as u64)?;
            return Err(error);
        }
        if former > size + FOOTER_LENGTH as u64 {
            storage.resize(size + FOOTER_LENGTH as u64)?;
        }
        *self.footer.lock() = footer;
        self.size.store(size, Ordering::Release);
        self.end.store(size, Ordering::Release);
        Ok(())
    }

    /// Makes the disk smaller: its footer is at the new end, durably, before the file is cut off behind it. A power cut between them leaves
    /// the larger disk with the bytes of that in the part that was given up.
    fn shrink(&self, size: u64) -> Result<()> {
        let (storage, before) = (&*self.storage, self.footer());
        let footer = before.resized(size, geometry_for(&before, size));
        storage.write_all_at(Mem::from(&footer.bytes()[..]), size)?;
        storage.flush()?;
        storage.resize(size + FOOTER_LENGTH as u64)?;
        *self.footer.lock() = footer;
        self.size.store(size, Ordering::Release);
        self.end.store(size, Ordering::Release);
        storage.flush()
    }

    /// Writes the footer at the end of the `new` part of the disk in a file of `former` bytes.
    fn begin_growth(
        &self,
        footer: &Footer,
        new: Range<u64>,
        former: u64,
        preallocation: Preallocation,
        job: &Job,
    ) -> Result<()> {
        let (storage, end) = (&*self.storage, self.end.load(Ordering::Acquire));
        // What lies between the disk's end and the old footer was nobody's.
        storage.zero(new.start, end.min(new.end).saturating_sub(new.start), false)?;
        if new.end + FOOTER_LENGTH as u64 > former {
            storage.resize(new.end + FOOTER_LENGTH as u64)?;
            let added = former..new.end.max(former);
            match preallocation {
                Preallocation::Off | Preallocation::Metadata => {}
                Preallocation::Falloc => reserve(storage, added, job)?,
                Preallocation::Full => write_zero_bytes(storage, added.start, added.end - added.start, job)?,
            }
        }
        storage.write_all_at(Mem::from(&footer.bytes()[..]), new.end)?;
        storage.flush()
    }
}

impl Layer for Fixed {
    fn format(&self) -> &'static str {
        "vpc"
    }

    fn virtual_size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    fn unit(&self) -> Option<u64> {
        None
    }

    fn takes_backing(&self) -> bool {
        false
    }

    fn storage(&self) -> &Arc<dyn Storage> {
        &self.storage
    }

    fn file(&self, index: u32) -> Option<&Arc<dyn Storage>> {
        (index == 0).then_some(&self.storage)
    }

    fn plan(&self, range: Range<u64>, segments: &mut Vec<Segment>) -> Result<()> {
        if !range.is_empty() {
            segments.push(Segment::in_place(range));
        }
        Ok(())
    }

    fn read_segment(&self, segment: &Segment, buf: MemMut<'_>) -> Result<()> {
        self.storage.read_padded_at(buf, segment.start)
    }

    fn content_id(&self) -> Option<String> {
        Some(ParentId::of(&self.footer.lock()).to_string())
    }

    fn as_writable(&self) -> Option<&dyn WriteLayer> {
        self.options.is_some().then_some(self)
    }

    fn as_checkable(&self) -> Option<&dyn CheckLayer> {
        Some(self)
    }

    fn make_writable(&mut self, options: DiskOptions) -> Result<()> {
        if !self.storage.traits().writable {
            let error = Error::new(ErrorKind::ReadOnly, "the file is open for reading only");
            return Err(self.storage.located(error));
        }
        self.options = Some(options);
        Ok(())
    }

    fn reopen(&self) -> Result<Box<dyn Layer>> {
        Ok(Box::new(Self {
            storage: Arc::clone(&self.storage),
            footer: Arc::clone(&self.footer),
            size: Arc::clone(&self.size),
            end: Arc::clone(&self.end),
            options: None,
        }))
    }

    fn holes(&self) -> Result<Holes> {
        Ok(Holes::Preallocated)
    }
}

/// All that could be damaged is the footer, without which it is not open.
impl CheckLayer for Fixed {
    fn check(&self, _: usize, _: &Job) -> Result<CheckReport> {
        let end = self.end.load(Ordering::Acquire) + FOOTER_LENGTH as u64;
        Ok(CheckReport { image_end_offset: Some(end), ..CheckReport::default() })
    }

    fn repair(&self, _: Repair, max_findings: usize, job: &Job) -> Result<CheckReport> {
        self.check(max_findings, job)
    }
}

impl WriteLayer for Fixed {
    fn is_writable(&self) -> bool {
        self.options.is_some()
    }

    fn disk_options(&self) -> DiskOptions {
        self.options.unwrap_or_default()
    }

    fn write_at(&self, buf: Mem<'_>, offset: u64) -> Result<()> {
        self.storage.write_all_at(buf, offset)
    }

    fn write_zeroes(&self, offset: u64, length: u64, unmap: bool) -> Result<()> {
        self.storage.zero(offset, length, unmap)
    }

    /// What is left is zero, and not what the storage makes of a discard.
    fn discard(&self, offset: u64, length: u64) -> Result<()> {
        if length > 0 { self.write_zeroes(offset, length, true) } else { Ok(()) }
    }

    fn flush(&self) -> Result<()> {
        self.storage.flush()
    }

    fn resize(&self, size: u64, preallocation: Preallocation, job: &Job) -> Result<()> {
        job.checkpoint()?;
        let old = self.virtual_size();
        if size == old {
            return Ok(());
        }
        let judged =
            judge_size(&self.footer(), size).and_then(|()| match self.storage.traits().block_device {
                true => {
                    let message = "the disk on a device keeps its size: the footer is where the device ends";
                    Err(Error::new(ErrorKind::InvalidArgument, message).with_field("size"))
                }
                false => Ok(()),
            });
        judged.map_err(|e| self.storage.located(e))?;
        if size < old { self.shrink(size) } else { self.grow(size, preallocation, job) }
    }
}
