//! Subcluster allocation bitmaps (section "Extended L2 Entries").

/// State of one subcluster of a standard cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SubclusterKind {
    /// Neither bit: the backing file decides.
    Unallocated,
    /// Reads as zeroes.
    Zero,
    /// Data in the host cluster.
    Data,
}

/// The second word of an extended L2 entry: bits 0-31 allocated, bits 32-63 reads as zeroes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct SubclusterBitmap(pub u64);

impl SubclusterBitmap {
    /// All 32 subclusters allocated.
    pub const ALL_DATA: Self = Self(0xffff_ffff);
    /// All 32 subclusters read as zeroes.
    pub const ALL_ZERO: Self = Self(0xffff_ffff << 32);

    /// Bits of subclusters that hold data.
    pub const fn data(self) -> u32 {
        self.0 as u32
    }
    /// Bits of subclusters that read as zeroes.
    pub const fn zero(self) -> u32 {
        (self.0 >> 32) as u32
    }
    /// Whether no subcluster is both allocated and zero, which the format forbids.
    pub const fn is_valid(self) -> bool {
        self.data() & self.zero() == 0
    }
    /// Whether any subcluster is allocated.
    pub const fn has_data(self) -> bool {
        self.data() != 0
    }

    /// State of subcluster `index` (0..32; higher indices wrap).
    pub const fn kind(self, index: u32) -> SubclusterKind {
        let bit = 1u32 << (index % 32);
        if self.zero() & bit != 0 {
            SubclusterKind::Zero
        } else if self.data() & bit != 0 {
            SubclusterKind::Data
        } else {
            SubclusterKind::Unallocated
        }
    }

    /// Number of subclusters from `index` (below 32) on that share its state; at least 1.
    pub const fn run_length(self, index: u32) -> u32 {
        let differs = match self.kind(index) {
            SubclusterKind::Zero => !self.zero(),
            SubclusterKind::Data => !self.data() | self.zero(),
            SubclusterKind::Unallocated => self.data() | self.zero(),
        };
        let run = (differs >> (index % 32)).trailing_zeros();
        let left = 32 - index % 32;
        if run < left { run } else { left }
    }

    /// The mask of subclusters `first..end`, in the low 32 bits.
    const fn mask(first: u32, end: u32) -> u64 {
        (((1u64 << end) - 1) >> first) << first
    }
    /// This bitmap with subclusters `first..end` (0..=32) holding data.
    #[must_use]
    pub const fn with_data(self, first: u32, end: u32) -> Self {
        let m = Self::mask(first, end);
        Self((self.0 | m) & !(m << 32))
    }
    /// This bitmap with subclusters `first..end` (0..=32) reading as zeroes.
    #[must_use]
    pub const fn with_zero(self, first: u32, end: u32) -> Self {
        let m = Self::mask(first, end);
        Self((self.0 | (m << 32)) & !m)
    }
    /// This bitmap with subclusters `first..end` (0..=32) unallocated.
    #[must_use]
    pub const fn with_unallocated(self, first: u32, end: u32) -> Self {
        let m = Self::mask(first, end);
        Self(self.0 & !(m | m << 32))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn runs_agree_with_single_bits(bits in any::<u64>(), index in 0u32..32) {
            let b = SubclusterBitmap(bits);
            let run = b.run_length(index);
            prop_assert!(run >= 1 && index + run <= 32);
            for i in index..index + run {
                prop_assert_eq!(b.kind(i), b.kind(index));
            }
            if index + run < 32 {
                prop_assert_ne!(b.kind(index + run), b.kind(index));
            }
        }

        #[test]
        fn updates_change_only_their_range(bits in any::<u64>(), a in 0u32..=32, b in 0u32..=32) {
            let (first, end) = (a.min(b), a.max(b));
            let start = SubclusterBitmap(bits);
            let states = [
                (start.with_data(first, end), SubclusterKind::Data),
                (start.with_zero(first, end), SubclusterKind::Zero),
                (start.with_unallocated(first, end), SubclusterKind::Unallocated),
            ];
            for (after, kind) in states {
                for i in 0..32 {
                    let expected = if (first..end).contains(&i) { kind } else { start.kind(i) };
                    prop_assert_eq!(after.kind(i), expected);
                }
            }
        }
    }
}
