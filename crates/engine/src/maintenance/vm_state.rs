//! Reading and writing the state of a virtual machine: bytes behind the disk, which a snapshot keeps with it.

use std::ops::Range;

use qcow2_format::limits::MAX_L1_BYTES;

use super::session::Session;
use crate::image::{Image, Qcow2};
use crate::write::{Active, Payload, Top};
use crate::{Error, ErrorKind, Mem, MemMut, Result};

impl Image {
    /// Fills `buf` with the state of a virtual machine from its byte `offset` on. What was not written is zero.
    ///
    /// # Errors
    /// `UnsupportedFeature` for a top layer that is not qcow2; `InvalidArgument` beyond 64 bits; else as [`Image::read_at`].
    pub fn read_vm_state(&self, buf: MemMut<'_>, offset: u64) -> Result<()> {
        let image = self.top_qcow2().ok_or_else(no_state)?;
        let range = place(image, offset, buf.len() as u64)?;
        image.read_own(buf, range.start)
    }

    /// Writes `buf` to the state of a virtual machine, from its byte `offset` on; the L1 table grows as far as that needs. Durable after
    /// the next [`Image::flush`]. The state is part of the disk's tables, and so of every snapshot that is made then; a disk that grows
    /// gives it up.
    ///
    /// # Errors
    /// As [`Image::write_at`]; `UnsupportedFeature` for a top layer that is not qcow2, and for a data file that is a raw image by itself,
    /// which would have the state as part of its disk; `Limit` where the L1 table cannot reach.
    pub fn write_vm_state(&self, buf: Mem<'_>, offset: u64) -> Result<()> {
        let Top::Qcow2(active) = self.top()? else { return Err(no_state()) };
        let Active { image, writer, .. } = active;
        if image.header().data_file_raw() {
            let message = "the data file is a raw image by itself, where the state of a virtual machine would be part of the disk";
            return Err(image.error(ErrorKind::UnsupportedFeature, message));
        }
        loop {
            let shared = writer.gate.read();
            // The disk may have got another size meanwhile.
            let range = place(image, offset, buf.len() as u64)?;
            let entries = image.geometry().l1_entries_for(range.end);
            if entries > MAX_L1_BYTES / 8 {
                let message = format!(
                    "the state of a virtual machine cannot reach {} bytes: the L1 table ends",
                    range.end
                );
                return Err(image.error(ErrorKind::Limit, message).with_field("l1_size"));
            }
            if entries > image.mapping().l1().len() as u64 {
                drop(shared);
                let session = Session::begin(self)?;
                if entries > image.mapping().l1().len() as u64 {
                    session.writer.grow_l1(image, entries)?;
                }
                continue;
            }
            writer.begin(image)?;
            return active.write_unseen(Payload::Bytes(buf), range);
        }
    }
}

/// Where bytes of the state are, as guest offsets.
fn place(image: &Qcow2, offset: u64, length: u64) -> Result<Range<u64>> {
    let start = image.state_start().checked_add(offset);
    let range = start.and_then(|start| Some(start..start.checked_add(length)?));
    range.filter(|range| range.end <= i64::MAX as u64).ok_or_else(|| {
        let message = format!(
            "{length} bytes at {offset} of the state of a virtual machine are beyond what can be addressed"
        );
        Error::new(ErrorKind::InvalidArgument, message)
    })
}

fn no_state() -> Error {
    Error::new(ErrorKind::UnsupportedFeature, "only qcow2 images hold the state of a virtual machine")
}
