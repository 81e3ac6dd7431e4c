//! What of the state of writing a layer is asked for.

use std::sync::Arc;

use super::qcow2::Qcow2;
use crate::writer::Writer;
use crate::{ErrorKind, Result};

impl Qcow2 {
    /// Whether the image is open for writing.
    pub fn is_writable(&self) -> bool {
        self.writer.is_some()
    }

    /// What is needed to write, where the image is open for writing.
    pub(crate) fn open_writer(&self) -> Option<&Writer> {
        self.writer.as_ref()
    }

    /// Opens the image for writing.
    pub(crate) fn set_writer(&mut self, writer: Writer) {
        self.writer = Some(writer);
    }

    pub(crate) fn writer(&self) -> Result<&Writer> {
        self.writer
            .as_ref()
            .ok_or_else(|| self.error(ErrorKind::ReadOnly, "the image is open for reading only"))
    }

    /// Held while host offsets that were planned are in use. Take it before planning.
    pub(crate) fn pin(&self) -> Option<Arc<()>> {
        self.writer.as_ref().map(|_| Arc::clone(&self.mapping.read().epoch))
    }
}
