//! Opening for writing.

use std::any::Any;

use qcow2_format::SnapshotRecord;
use qcow2_format::header::feature::Incompatible;

use crate::check::{self, CheckOptions, Repair};
use crate::image::{Qcow2, l1_damage};
use crate::writer::{WriteOptions, Writer};
use crate::{Error, ErrorKind, Job, Layer, Result, StorageExt};

/// What this crate knows of a layer beyond what every format has: the one table of formats.
pub trait LayerExt {
    /// The qcow2 image, if the layer is one.
    fn as_qcow2(&self) -> Option<&Qcow2>;

    /// As [`LayerExt::as_qcow2`], to prepare it.
    fn as_qcow2_mut(&mut self) -> Option<&mut Qcow2>;

    /// Makes the layer writable: as the top of a chain.
    ///
    /// # Errors
    /// As [`Qcow2::enable_writing`]; `ReadOnly` for a raw file that is open for reading only; `UnsupportedFeature` for a
    /// format that is only read.
    fn enable_writing(&mut self, options: WriteOptions) -> Result<()>;
}

impl LayerExt for dyn Layer {
    fn as_qcow2(&self) -> Option<&Qcow2> {
        Qcow2::of(self)
    }

    fn as_qcow2_mut(&mut self) -> Option<&mut Qcow2> {
        (self as &mut dyn Any).downcast_mut()
    }

    fn enable_writing(&mut self, options: WriteOptions) -> Result<()> {
        if let Some(qcow2) = self.as_qcow2_mut() {
            return qcow2.enable_writing(options);
        }
        if options.lazy_refcounts {
            let message = format!("a {} disk has no refcounts", self.format());
            let error = Error::new(ErrorKind::InvalidArgument, message).with_field("lazy_refcounts");
            return Err(self.storage().located(error));
        }
        self.make_writable((&options).into())
    }
}

impl Qcow2 {
    /// Makes the image writable. One that was not closed cleanly (its dirty bit is set) is repaired first, as QEMU does:
    /// the caller holds the file alone.
    ///
    /// # Errors
    /// See [`Writer::new`]; `Corrupt` for an image that stays dirty because not all of it could be repaired.
    pub fn enable_writing(&mut self, options: WriteOptions) -> Result<()> {
        self.refuse_damaged_snapshots()?;
        let marks = self.header().incompatible;
        if marks.contains(Incompatible::DIRTY)
            && !marks.contains(Incompatible::CORRUPT)
            && self.viewed_snapshot().is_none()
            && self.storage().traits().writable
        {
            self.repair_dirty()?;
        }
        let writer = Writer::new(self, options)?;
        self.set_writer(writer);
        Ok(())
    }

    /// Refuses to write where snapshots are not known, or would be given up by the repair of an image that was not closed
    /// cleanly: that is for the user to decide.
    fn refuse_damaged_snapshots(&self) -> Result<()> {
        let length = self.storage().size()?;
        let geometry = self.geometry();
        let records = self.snapshots();
        let lost = |s: &SnapshotRecord| l1_damage(s.l1_table_offset.get(), s.l1_size, geometry, length);
        let dirty = self.header().incompatible.contains(Incompatible::DIRTY);
        let reason = match self.snapshot_error() {
            Some(error) => error.message().to_owned(),
            None => match records.iter().filter(|_| dirty).find_map(lost) {
                Some(reason) => reason,
                None => return Ok(()),
            },
        };
        let message = format!(
            "the snapshot table is damaged ({reason}): the image can be opened for reading, and a repair of all \
             keeps the snapshots that are left"
        );
        Err(self.error(ErrorKind::Corrupt, message).with_field("snapshot table"))
    }

    fn repair_dirty(&mut self) -> Result<()> {
        let options = CheckOptions { limits: *self.limits(), max_findings: 0, ..CheckOptions::default() };
        let report = check::repair(&**self.storage(), Repair::All, &options, &Job::new())?;
        let left = report.corruptions + report.check_errors;
        if left > 0 {
            let message = format!(
                "the image was not closed cleanly, and {left} of its errors could not be repaired: check it"
            );
            let error = self.error(ErrorKind::Corrupt, message).with_field("incompatible_features");
            return Err(match report.failure {
                Some(failure) => error.with_source(failure),
                None => error,
            });
        }
        self.reload()
    }
}
