//! Zero detection: most of a disk image is zero, so these loops see every byte of a convert.

/// Bytes folded before the next look at the result: long enough to run in vector registers without a branch,
/// short enough to stop early in data.
const BLOCK: usize = 256;

/// Whether every byte is zero. True for an empty slice. Returns at the first block of data.
#[must_use]
pub fn is_zero(bytes: &[u8]) -> bool {
    let (blocks, tail) = bytes.as_chunks::<BLOCK>();
    blocks.iter().all(|block| fold(block) == 0) && fold(tail) == 0
}

fn fold(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |all, byte| all | byte)
}

/// A stretch of a buffer that is all zero or all data, at the granularity asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// First byte of the run in the buffer.
    pub start: usize,
    /// Length in bytes, never 0.
    pub length: usize,
    /// Whether every byte is zero.
    pub zero: bool,
}

/// Splits `bytes` into runs of zero and data, judged in blocks of `granularity` bytes counted from the start;
/// the last block may be shorter. Neighbouring runs differ in kind, and together cover the buffer.
/// A granularity of 0 is taken as 1.
pub fn runs(bytes: &[u8], granularity: usize) -> Runs<'_> {
    Runs { bytes, granularity: granularity.max(1), start: 0, next: None }
}

/// Iterator of [`runs`].
#[derive(Debug, Clone)]
pub struct Runs<'a> {
    bytes: &'a [u8],
    granularity: usize,
    start: usize,
    /// The kind of the block at `start`, where the previous run's end already showed it.
    next: Option<bool>,
}

impl Iterator for Runs<'_> {
    type Item = Run;

    fn next(&mut self) -> Option<Run> {
        let rest = self.bytes.get(self.start..)?;
        let mut blocks = rest.chunks(self.granularity);
        let first = blocks.next()?;
        let zero = self.next.take().unwrap_or_else(|| is_zero(first));
        let mut length = first.len();
        for block in blocks {
            let kind = is_zero(block);
            if kind != zero {
                self.next = Some(kind);
                break;
            }
            length += block.len();
        }
        let run = Run { start: self.start, length, zero };
        self.start += length;
        Some(run)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_byte_anywhere_is_seen() {
        for length in [1, 255, 256, 257, 511, 4096 + 3] {
            let mut bytes = vec![0u8; length];
            assert!(is_zero(&bytes));
            for place in [0, length / 2, length - 1] {
                bytes[place] = 1;
                assert!(!is_zero(&bytes), "{place} of {length}");
                bytes[place] = 0;
            }
        }
        assert!(is_zero(&[]));
    }

    #[test]
    fn runs_alternate_and_end_with_the_short_block() {
        let mut bytes = vec![0u8; 4096 * 3 + 10];
        bytes[4096] = 7;
        bytes[4096 * 3 + 9] = 7;
        let found: Vec<_> = runs(&bytes, 4096).map(|r| (r.start, r.length, r.zero)).collect();
        assert_eq!(found, [(0, 4096, true), (4096, 4096, false), (8192, 4096, true), (12288, 10, false)]);
        assert_eq!(runs(&[], 512).next(), None);
    }
}
