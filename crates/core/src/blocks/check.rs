//! What a check of a table looks at.

use super::layer::BlockLayer;
use super::layout::{Entry, Scheme};
use crate::{Job, Result};

/// Entries between two looks at whether the job was cancelled.
const CHECKPOINT: u32 = 1 << 16;

/// Which places have a block already: a bit for each piece of the file that a place takes.
#[derive(Debug)]
pub struct UsedPlaces {
    origin: u64,
    step: u64,
    bits: Vec<u64>,
}

impl UsedPlaces {
    /// Of a file of `length` bytes, whose places begin at `origin` and lie `step` bytes apart at least.
    #[must_use]
    pub fn new(origin: u64, step: u64, length: u64) -> Self {
        let pieces = length.saturating_sub(origin).div_ceil(step.max(1)) + 1;
        let words = usize::try_from(pieces.div_ceil(64)).unwrap_or(usize::MAX);
        Self { origin, step: step.max(1), bits: vec![0; words] }
    }

    /// Notes a place; false where it, or another one that begins in the same piece, was noted before.
    pub fn note(&mut self, place: u64) -> bool {
        let piece = place.saturating_sub(self.origin) / self.step;
        let Some(word) = self.bits.get_mut((piece / 64) as usize) else { return true };
        let bit = 1 << (piece % 64);
        let is_new = *word & bit == 0;
        *word |= bit;
        is_new
    }
}

impl<S: Scheme> BlockLayer<S> {
    /// Calls `f` with the index and the place of every block that has one, as the file has it.
    ///
    /// # Errors
    /// Those of `f`; `Io`; `Aborted`.
    pub fn places(&self, job: &Job, mut f: impl FnMut(u32, u64) -> Result<()>) -> Result<()> {
        self.walk(|index, entry| {
            if index.is_multiple_of(CHECKPOINT) {
                job.checkpoint()?;
            }
            match entry {
                Entry::At(place) => f(index, place),
                Entry::Absent | Entry::Zero => Ok(()),
            }
        })
    }
}
