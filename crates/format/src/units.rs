//! Offsets as types, so that a guest offset is never used as a host offset.

use std::fmt;

macro_rules! offset_type {
    ($name:ident, $doc:literal) => {
        #[doc = $doc]
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $name(pub u64);

        impl $name {
            /// The offset in bytes.
            pub const fn get(self) -> u64 {
                self.0
            }
            /// `self + bytes`, or `None` beyond 64 bits.
            pub const fn checked_add(self, bytes: u64) -> Option<Self> {
                match self.0.checked_add(bytes) {
                    Some(sum) => Some(Self(sum)),
                    None => None,
                }
            }
            /// Whether the offset is a multiple of `unit`, a power of two.
            pub const fn is_aligned(self, unit: u64) -> bool {
                self.0 & (unit - 1) == 0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }
    };
}

offset_type!(GuestOffset, "Byte offset on the virtual disk, as the guest sees it.");
offset_type!(HostOffset, "Byte offset in the image file (or in the external data file).");
