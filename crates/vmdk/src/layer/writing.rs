//! An image that is written to: its extents, and the CID, which changes with the first request.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use parking_lot::Mutex;
use qcow2_core::disk::{DiskOptions, OldBytes, WriteLayer};
use qcow2_core::layer::Layer;
use qcow2_core::space::Preallocation;
use qcow2_core::{Error, ErrorKind, Job, Mem, MemMut, Result, StorageExt};

use super::Vmdk;
use super::extent::{Data, Extent};
use super::write::Tables;
use crate::cid::random_cid;
use crate::descriptor::Access;
use crate::fields::SECTOR;

/// The state of writing to an image.
#[derive(Debug)]
pub(super) struct Writing {
    options: DiskOptions,
    /// The CID since the first request; 0 before that.
    cid: AtomicU32,
    changing_cid: Mutex<()>,
    /// The descriptor was written to since the last flush.
    pub(super) descriptor_touched: AtomicBool,
    /// One for each extent that is a plain file: written to since the last flush.
    plain_touched: Vec<AtomicBool>,
}

impl Writing {
    /// The CID, once it changed.
    pub(super) fn cid(&self) -> Option<u32> {
        Some(self.cid.load(Ordering::Acquire)).filter(|cid| *cid != 0)
    }
}

impl Vmdk {
    pub(super) fn begin_writing(&mut self, options: DiskOptions) -> Result<()> {
        self.judge_writing()?;
        for extent in &mut self.extents {
            if let Data::Grains(grains) = &mut extent.data {
                grains.make_writable(&self.options)?;
            }
        }
        self.writing = Some(Writing {
            options,
            cid: AtomicU32::new(0),
            changing_cid: Mutex::default(),
            descriptor_touched: AtomicBool::new(false),
            plain_touched: self.extents.iter().map(|_| AtomicBool::new(false)).collect(),
        });
        Ok(())
    }

    /// Refuses what cannot be written to, before anything is.
    fn judge_writing(&self) -> Result<()> {
        let refuse = |kind, message: &str, field: &'static str| {
            Err(self.storage.located(Error::new(kind, message).with_field(field)))
        };
        if let Some(file) = self.files().into_iter().find(|file| !file.traits().writable) {
            return Err(file.located(Error::new(ErrorKind::ReadOnly, "the file is open for reading only")));
        }
        let split = |extent: &Extent| {
            extent
                .grains()
                .is_some_and(|grains| !extent.start.is_multiple_of(grains.geometry().grain_bytes()))
        };
        if self.has_parent() && self.extents.iter().any(split) {
            let message = "the image has a parent, and extents that begin inside a grain: it is only read";
            return refuse(ErrorKind::UnsupportedFeature, message, "extent");
        }
        if self.descriptor.change_tracking.is_some() {
            let message =
                "changed blocks of the image are tracked in another file, which a write would leave wrong";
            return refuse(ErrorKind::UnsupportedFeature, message, "changeTrackPath");
        }
        for extent in &self.extents {
            match (&extent.data, extent.line.access) {
                (_, Access::None | Access::ReadOnly) => {
                    return refuse(
                        ErrorKind::ReadOnly,
                        "the descriptor says that an extent is not written to",
                        "extent",
                    );
                }
                (Data::Missing, _) => return Err(self.not_open(extent)),
                (Data::Zero, _) => {
                    let message = "an extent of zeroes has no file to write to";
                    return refuse(ErrorKind::UnsupportedFeature, message, "extent");
                }
                (Data::Plain(_) | Data::Grains(_), Access::ReadWrite) => {}
            }
        }
        Ok(())
    }

    fn writing(&self) -> Result<&Writing> {
        let message = "the image is open for reading only";
        self.writing.as_ref().ok_or_else(|| self.storage.located(Error::new(ErrorKind::ReadOnly, message)))
    }

    /// Gives the image another CID before it changes: children see that their parent is not what it was. The digits are replaced
    /// where they are, as many as there are, by one write inside a sector.
    pub(super) fn change_cid(&self) -> Result<&Writing> {
        let writing = self.writing()?;
        if writing.cid().is_some() {
            return Ok(writing);
        }
        let _alone = writing.changing_cid.lock();
        if writing.cid().is_some() {
            return Ok(writing);
        }
        let digits = &self.descriptor.cid_digits;
        let width = digits.len().min(8);
        let cid = random_cid(width as u32, self.descriptor.cid)?;
        let text = format!("{cid:0width$x}");
        let place = self.descriptor_room.start + digits.start as u64;
        self.storage.write_all_at(Mem::from(text.as_bytes()), place)?;
        writing.descriptor_touched.store(true, Ordering::Release);
        writing.cid.store(cid, Ordering::Release);
        Ok(writing)
    }

    /// Runs `then` on the parts of a range: the number of the extent, the extent, the first byte in it, and how many.
    fn parts(
        &self,
        offset: u64,
        length: u64,
        mut then: impl FnMut(usize, &Extent, u64, u64) -> Result<()>,
    ) -> Result<()> {
        let end = offset + length;
        for (index, extent) in self.from(offset) {
            let (from, to) = (offset.max(extent.start), end.min(extent.end()));
            if from >= to {
                break;
            }
            then(index, extent, from - extent.start, to - from)?;
        }
        Ok(())
    }

    fn write_parts(&self, buf: Mem<'_>, offset: u64, old: Option<OldBytes<'_>>) -> Result<()> {
        if buf.is_empty() {
            return Ok(());
        }
        let writing = self.change_cid()?;
        let mut rest = buf;
        self.parts(offset, buf.len() as u64, |index, extent, at, length| {
            let (part, behind) = rest.split_at(length as usize);
            rest = behind;
            match &extent.data {
                Data::Plain(storage) => {
                    let written = storage.write_all_at(part, plain_place(extent, at));
                    touch(writing, index);
                    written
                }
                Data::Grains(grains) => {
                    let inside = old.map(|old| move |buf: MemMut<'_>, at| old(buf, extent.start + at));
                    let inside = inside.as_ref().map(|old| old as OldBytes<'_>);
                    grains.write(self.tables(index), at, part, inside)
                }
                Data::Missing | Data::Zero => Err(self.not_open(extent)),
            }
        })
    }

    fn zero_parts(&self, offset: u64, length: u64, unmap: bool, old: Option<OldBytes<'_>>) -> Result<()> {
        if length == 0 {
            return Ok(());
        }
        let writing = self.change_cid()?;
        self.parts(offset, length, |index, extent, at, length| match (&extent.data, old) {
            (Data::Plain(storage), _) => {
                let zeroed = storage.zero(plain_place(extent, at), length, unmap);
                touch(writing, index);
                zeroed
            }
            (Data::Grains(grains), Some(old)) => {
                let inside = |buf: MemMut<'_>, at| old(buf, extent.start + at);
                grains.zero_over(self.tables(index), at, length, unmap, &inside)
            }
            (Data::Grains(grains), None) => {
                let zero = |host, length| grains.storage.zero(host, length, unmap);
                grains.stored(self.tables(index), at, length, zero)
            }
            (Data::Missing | Data::Zero, _) => Err(self.not_open(extent)),
        })
    }

    pub(super) fn tables(&self, extent: usize) -> Tables<'_> {
        Tables { cache: &self.tables, extent }
    }
}

fn plain_place(extent: &Extent, at: u64) -> u64 {
    extent.line.offset * SECTOR + at
}

/// Behind a write: a flush that ended before it has not seen it.
fn touch(writing: &Writing, index: usize) {
    if let Some(touched) = writing.plain_touched.get(index) {
        touched.store(true, Ordering::Release);
    }
}

impl WriteLayer for Vmdk {
    fn is_writable(&self) -> bool {
        self.writing.is_some()
    }

    fn disk_options(&self) -> DiskOptions {
        self.writing.as_ref().map(|writing| writing.options).unwrap_or_default()
    }

    fn write_at(&self, buf: Mem<'_>, offset: u64) -> Result<()> {
        self.write_parts(buf, offset, None)
    }

    /// What is not stored is zero already, without a parent.
    fn write_zeroes(&self, offset: u64, length: u64, unmap: bool) -> Result<()> {
        self.zero_parts(offset, length, unmap, None)
    }

    fn write_over(&self, buf: Mem<'_>, offset: u64, old: OldBytes<'_>) -> Result<()> {
        self.write_parts(buf, offset, Some(old).filter(|_| self.has_parent()))
    }

    fn zero_over(&self, offset: u64, length: u64, unmap: bool, old: OldBytes<'_>) -> Result<()> {
        self.zero_parts(offset, length, unmap, Some(old).filter(|_| self.has_parent()))
    }

    fn discard(&self, offset: u64, length: u64) -> Result<()> {
        if length == 0 {
            return Ok(());
        }
        let writing = self.change_cid()?;
        self.parts(offset, length, |index, extent, at, length| match &extent.data {
            Data::Plain(storage) => {
                let freed = storage.free(plain_place(extent, at), length);
                touch(writing, index);
                freed
            }
            Data::Grains(grains) => {
                let free = |host, length| grains.storage.free(host, length);
                grains.stored(self.tables(index), at, length, free)
            }
            Data::Missing | Data::Zero => Err(self.not_open(extent)),
        })
    }

    fn flush(&self) -> Result<()> {
        let Some(writing) = &self.writing else { return Ok(()) };
        for (index, extent) in self.extents.iter().enumerate() {
            match &extent.data {
                Data::Grains(grains) => grains.flush(self.tables(index))?,
                Data::Plain(storage) => {
                    let touched = writing.plain_touched.get(index);
                    if touched.is_some_and(|touched| touched.swap(false, Ordering::AcqRel)) {
                        storage.flush().inspect_err(|_| touch(writing, index))?;
                    }
                }
                Data::Missing | Data::Zero => {}
            }
        }
        if writing.descriptor_touched.swap(false, Ordering::AcqRel) {
            let failed = |_: &Error| writing.descriptor_touched.store(true, Ordering::Release);
            self.storage.flush().inspect_err(failed)?;
        }
        Ok(())
    }

    fn resize(&self, size: u64, preallocation: Preallocation, job: &Job) -> Result<()> {
        self.grow_to(size, preallocation, job)
    }
}
