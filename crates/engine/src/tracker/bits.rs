//! The bits of one bitmap in memory.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::{Error, ErrorKind, Result};

/// Dirty bits of a disk; each stands for `1 << granularity_bits` bytes. Setting bits needs no lock.
#[derive(Debug, Default)]
pub struct Bits {
    words: Vec<AtomicU64>,
    size: u64,
    granularity_bits: u8,
    /// The stored form, where there is one, has other bits.
    changed: AtomicBool,
}

impl Bits {
    /// No bit set, for a disk of `size` bytes.
    ///
    /// # Errors
    /// `Limit` when that takes more than `max_memory` bytes.
    pub fn new(size: u64, granularity_bits: u8, max_memory: u64) -> Result<Self> {
        let words = Self::words_for(size, granularity_bits, max_memory)?;
        let words = (0..words).map(|_| AtomicU64::new(0)).collect();
        Ok(Self { words, size, granularity_bits, changed: AtomicBool::new(false) })
    }

    /// Words for the bits of a disk of `size` bytes.
    ///
    /// # Errors
    /// As [`Bits::new`].
    pub(crate) fn words_for(size: u64, granularity_bits: u8, max_memory: u64) -> Result<u64> {
        let words = size.div_ceil(1 << granularity_bits).div_ceil(64);
        if words.saturating_mul(8) > max_memory {
            let message = format!("a bitmap of {} bytes exceeds the limit of {max_memory}", words * 8);
            return Err(Error::new(ErrorKind::Limit, message).with_field("bitmap"));
        }
        Ok(words)
    }

    /// Size of the disk in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }
    /// log2 of the bytes per bit.
    pub fn granularity_bits(&self) -> u8 {
        self.granularity_bits
    }
    fn count(&self) -> u64 {
        self.size.div_ceil(1 << self.granularity_bits)
    }

    /// Marks guest bytes `range` dirty, clamped to the disk.
    pub fn mark(&self, range: &Range<u64>) {
        let end = range.end.min(self.size);
        if range.start >= end {
            return;
        }
        self.set_bits(range.start >> self.granularity_bits, ((end - 1) >> self.granularity_bits) + 1);
    }

    /// Sets bits `first..end`.
    pub(crate) fn set_bits(&self, first: u64, end: u64) {
        let mut at = first;
        while at < end {
            let in_word = at % 64;
            let stop = end.min(at - in_word + 64);
            let mask = (u64::MAX >> (64 - (stop - at))) << in_word;
            if let Some(word) = self.words.get((at / 64) as usize) {
                // Most writes hit bits that are set: looking first keeps the cache line shared.
                if word.load(Ordering::Relaxed) & mask != mask {
                    word.fetch_or(mask, Ordering::Relaxed);
                    self.changed.store(true, Ordering::Release);
                }
            }
            at = stop;
        }
    }

    /// Whether the bits differ from the stored ones: from those that were loaded, or stored last.
    pub(crate) fn is_changed(&self) -> bool {
        self.changed.load(Ordering::Acquire)
    }

    /// The stored bits are these.
    pub(crate) fn note_stored(&self) {
        self.changed.store(false, Ordering::Release);
    }

    /// The same bits for a disk of another size; what is new is clean.
    pub(crate) fn resized(&self, size: u64, max_memory: u64) -> Result<Self> {
        let new = Self::new(size, self.granularity_bits, max_memory)?;
        for (to, from) in new.words.iter().zip(&self.words) {
            to.store(from.load(Ordering::Relaxed), Ordering::Relaxed);
        }
        new.trim();
        new.changed.store(true, Ordering::Release);
        Ok(new)
    }

    /// Clears what lies behind the last bit.
    pub(crate) fn trim(&self) {
        let used = self.count() % 64;
        if let Some(last) = self.words.last().filter(|_| used != 0) {
            last.fetch_and(u64::MAX >> (64 - used), Ordering::Relaxed);
        }
    }

    /// Marks what is dirty in `other`, whose granularity may differ.
    pub fn merge(&self, other: &Self) {
        other.extents().for_each(|range| self.mark(&range));
    }

    /// The dirty guest bytes as ranges, in order.
    pub fn extents(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        let mut at = 0;
        std::iter::from_fn(move || {
            let first = self.next(at, true)?;
            let end = self.next(first, false).unwrap_or_else(|| self.count());
            at = end;
            let start = first << self.granularity_bits;
            Some(start..(end << self.granularity_bits).min(self.size))
        })
    }

    /// The first bit from `from` on that is set (or clear).
    fn next(&self, from: u64, set: bool) -> Option<u64> {
        let mut at = from;
        while at < self.count() {
            let word = self.words.get((at / 64) as usize)?.load(Ordering::Relaxed);
            let rest = (if set { word } else { !word }) >> (at % 64);
            if rest != 0 {
                let found = at + u64::from(rest.trailing_zeros());
                return (found < self.count()).then_some(found);
            }
            at = at - at % 64 + 64;
        }
        None
    }

    /// The bytes `range` of the stored form (section "Bitmap data"): bit n is bit n % 8 of byte n / 8.
    pub(crate) fn stored(&self, range: Range<u64>) -> Vec<u8> {
        let words = self.words.get((range.start / 8) as usize..).unwrap_or_default();
        let mut bytes: Vec<u8> = words
            .iter()
            .take((range.end - range.start).div_ceil(8) as usize)
            .flat_map(|word| word.load(Ordering::Relaxed).to_le_bytes())
            .collect();
        bytes.resize((range.end - range.start) as usize, 0);
        bytes
    }

    /// Takes over stored bytes from byte `start` on, a multiple of 8.
    pub(crate) fn take_stored(&self, start: u64, bytes: &[u8]) {
        let words = self.words.get((start / 8) as usize..).unwrap_or_default();
        for (word, chunk) in words.iter().zip(bytes.chunks(8)) {
            let mut le = [0u8; 8];
            le.iter_mut().zip(chunk).for_each(|(to, from)| *to = *from);
            word.store(u64::from_le_bytes(le), Ordering::Relaxed);
        }
    }

    /// Bytes of the stored form.
    pub(crate) fn stored_length(&self) -> u64 {
        self.count().div_ceil(8)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn marks_read_back_as_extents(
            size in 1u64..200_000,
            marks in proptest::collection::vec((0u64..200_000, 1u64..9_000), 0..12),
        ) {
            let bits = Bits::new(size, 9, 1 << 20).unwrap();
            let mut model = vec![false; size.div_ceil(512) as usize];
            for (start, length) in marks {
                bits.mark(&(start..start + length));
                for (i, dirty) in model.iter_mut().enumerate() {
                    let (a, b) = (i as u64 * 512, (i as u64 * 512 + 512).min(size));
                    *dirty |= start < b && start + length > a;
                }
            }
            let mut found = vec![false; model.len()];
            let mut last = 0;
            for range in bits.extents() {
                prop_assert!(range.start >= last && range.start < range.end && range.end <= size);
                last = range.end + 1;
                (range.start / 512..range.end.div_ceil(512)).for_each(|i| found[i as usize] = true);
            }
            prop_assert_eq!(&found, &model);
            let copy = Bits::new(size, 9, 1 << 20).unwrap();
            copy.take_stored(0, &bits.stored(0..bits.stored_length()));
            prop_assert_eq!(copy.extents().collect::<Vec<_>>(), bits.extents().collect::<Vec<_>>());
        }

        #[test]
        fn merging_into_another_granularity_covers_it(start in 0u64..100_000, length in 1u64..30_000, to in 9u8..16) {
            let from = Bits::new(100_000, 12, 1 << 20).unwrap();
            from.mark(&(start..start + length));
            let into = Bits::new(100_000, to, 1 << 20).unwrap();
            into.merge(&from);
            for range in from.extents() {
                prop_assert!(into.extents().any(|r| r.start <= range.start && r.end >= range.end));
            }
        }
    }

    #[test]
    fn a_limit_before_the_allocation() {
        assert_eq!(Bits::new(1 << 60, 9, 1 << 20).unwrap_err().kind(), ErrorKind::Limit);
    }

    #[test]
    fn resizing_keeps_what_fits() {
        let bits = Bits::new(100 << 9, 9, 1 << 20).unwrap();
        bits.mark(&(0..100 << 9));
        let smaller = bits.resized(70 << 9, 1 << 20).unwrap();
        assert!(smaller.extents().eq(std::iter::once(0..70 << 9)));
        let larger = smaller.resized(200 << 9, 1 << 20).unwrap();
        assert!(larger.extents().eq(std::iter::once(0..70 << 9)));
    }
}
