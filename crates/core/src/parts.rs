//! A request on a format of blocks: the part of it in each block, and what it leaves there.

use crate::{Mem, Result, Storage, StorageExt};

/// A part of a request, inside one block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    /// Number of the block.
    pub block: u64,
    /// First byte, in the block.
    pub inside: u64,
    /// Bytes, at least one.
    pub length: u64,
}

impl Part {
    /// First byte behind it, in the block.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.inside + self.length
    }
}

/// Cuts `length` bytes at `offset` at blocks of `block` bytes. The end must be no more than 2^64 - 1.
pub fn cut(block: u64, offset: u64, length: u64) -> impl Iterator<Item = Part> {
    let (mut at, end) = (offset, offset + length);
    std::iter::from_fn(move || {
        let (number, inside) = (at / block, at % block);
        let length = (block - inside).min(end - at);
        at += length;
        (length > 0).then_some(Part { block: number, inside, length })
    })
}

/// What a request leaves in a range.
#[derive(Debug, Clone, Copy)]
pub enum NewBytes<'a> {
    /// These.
    Bytes(Mem<'a>),
    /// Zeroes, which take no space if this says so.
    Zeroes(bool),
}

impl NewBytes<'_> {
    /// Stores `length` of them at `offset`: as many as there are bytes.
    ///
    /// # Errors
    /// `Io`.
    pub fn put(self, storage: &dyn Storage, offset: u64, length: u64) -> Result<()> {
        match self {
            Self::Bytes(bytes) => storage.write_all_at(bytes, offset),
            Self::Zeroes(unmap) => storage.zero(offset, length, unmap),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_cut_at_blocks() {
        let part = |block, inside, length| Part { block, inside, length };
        assert_eq!(cut(10, 7, 16).collect::<Vec<_>>(), [part(0, 7, 3), part(1, 0, 10), part(2, 0, 3)]);
        assert_eq!(cut(10, 20, 10).collect::<Vec<_>>(), [part(2, 0, 10)]);
        assert_eq!(cut(10, 20, 0).count(), 0);
        assert_eq!(part(1, 4, 5).end(), 9);
    }
}
