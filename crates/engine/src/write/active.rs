//! What a change of a disk needs.

use crate::image::{Image, Qcow2};
use crate::writer::Writer;

/// A disk whose top is open for writing: the whole of it, that top, and what writing needs beside its mapping.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Active<'a> {
    /// What guests read.
    pub(crate) disk: &'a Image,
    /// Its top layer.
    pub(crate) image: &'a Qcow2,
    /// The top's writer.
    pub(crate) writer: &'a Writer,
}
