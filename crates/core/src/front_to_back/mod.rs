//! The seam of streams: a new image of which all places are decided before its first byte is there, so that its bytes can be had front
//! to back, and from any offset on, without a file that they are written to.
//!
//! Such an image depends on the source and its map alone: its bytes are the same from run to run, and on every machine.

mod flat;
mod identity;
mod lengths;
mod runs;

use std::num::NonZeroUsize;

pub use self::flat::Flat;
pub use self::lengths::{Counter, Latest, Lengths, Pool, changed};
pub use self::runs::{Part, Runs};
use crate::convert::Compression;
use crate::{GuestSource, Job, MemMut, Result};

/// An image as the bytes of its file, which are made when they are asked for.
pub trait FrontToBack: Send + Sync {
    /// Bytes of the file.
    fn length(&self) -> u64;

    /// Fills `buf` with the bytes of the file from `offset` on, all of which it has. `source` is the disk that it was planned for, with
    /// the same data where the plan found some. Several may fill at the same time.
    ///
    /// # Errors
    /// What reading the source gives; `Aborted` through `job`.
    fn fill(&self, source: &dyn GuestSource, offset: u64, buf: MemMut<'_>, job: &Job) -> Result<()>;
}

/// What an image is planned for.
#[derive(Clone, Copy)]
pub struct Planning<'a> {
    /// The disk.
    pub source: &'a dyn GuestSource,
    /// Compress, where the format does.
    pub compression: Option<Compression>,
    /// Threads that compress; by default the cores, at most 8.
    pub concurrency: Option<NonZeroUsize>,
    /// Most bytes that the plan may take.
    pub max_memory: u64,
    /// Cancels it. Compressing is its progress.
    pub job: &'a Job,
}

/// Fills `buf` with the disk from `offset` on; behind its end with zeroes.
///
/// # Errors
/// What reading the source gives.
pub fn read_padded(source: &dyn GuestSource, mut buf: MemMut<'_>, offset: u64) -> Result<()> {
    let inside = source.virtual_size().saturating_sub(offset).min(buf.len() as u64);
    let here = buf.take_front(inside as usize);
    if !here.is_empty() {
        source.read_at(here, offset)?;
    }
    buf.fill_zero();
    Ok(())
}
