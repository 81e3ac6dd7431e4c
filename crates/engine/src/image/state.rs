//! The state of a virtual machine, which lies behind the disk: no guest sees it.

use qcow2_core::Layer;
use qcow2_core::layer::SegmentKind;

use super::qcow2::Qcow2;
use crate::{MemMut, Result};

impl Qcow2 {
    /// Guest offset at which the state of a virtual machine begins: behind the disk, with L2 tables of its own.
    pub(crate) fn state_start(&self) -> u64 {
        self.virtual_size().next_multiple_of(self.geometry().l2_coverage())
    }

    /// Fills `buf` with what this layer maps from the guest offset `at` on; what it does not have is zero, whatever lies below.
    pub(crate) fn read_own(&self, mut buf: MemMut<'_>, at: u64) -> Result<()> {
        // Keeps planned places from being used again while they are read.
        let _pin = self.pin();
        let mut segments = Vec::new();
        self.plan_read(at..at.saturating_add(buf.len() as u64), &mut segments)?;
        for segment in &segments {
            let mut part = buf.take_front(segment.length as usize);
            match segment.kind {
                SegmentKind::Zero(_) | SegmentKind::Unallocated(_) => part.fill_zero(),
                SegmentKind::Data(_) | SegmentKind::Opaque(_) => self.read_segment(segment, part)?,
            }
        }
        Ok(())
    }
}
