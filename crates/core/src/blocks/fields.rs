//! Numbers at fixed places of a structure.

/// The bytes of a structure. What lies behind their end is zero: who reads a structure checked its length.
#[derive(Debug, Clone, Copy)]
pub struct Fields<'a> {
    bytes: &'a [u8],
    big_endian: bool,
}

impl<'a> Fields<'a> {
    /// A structure of little-endian numbers.
    #[must_use]
    pub fn little_endian(bytes: &'a [u8]) -> Self {
        Self { bytes, big_endian: false }
    }

    /// A structure of big-endian numbers.
    #[must_use]
    pub fn big_endian(bytes: &'a [u8]) -> Self {
        Self { bytes, big_endian: true }
    }

    /// The `N` bytes at `at`.
    #[must_use]
    pub fn bytes<const N: usize>(&self, at: usize) -> [u8; N] {
        let field = self.bytes.get(at..).and_then(|rest| rest.first_chunk::<N>());
        field.copied().unwrap_or([0; N])
    }

    /// One byte.
    #[must_use]
    pub fn u8(&self, at: usize) -> u8 {
        u8::from_le_bytes(self.bytes(at))
    }

    /// A number of 2 bytes.
    #[must_use]
    pub fn u16(&self, at: usize) -> u16 {
        let field = self.bytes(at);
        if self.big_endian { u16::from_be_bytes(field) } else { u16::from_le_bytes(field) }
    }

    /// A number of 4 bytes.
    #[must_use]
    pub fn u32(&self, at: usize) -> u32 {
        let field = self.bytes(at);
        if self.big_endian { u32::from_be_bytes(field) } else { u32::from_le_bytes(field) }
    }

    /// A number of 8 bytes.
    #[must_use]
    pub fn u64(&self, at: usize) -> u64 {
        let field = self.bytes(at);
        if self.big_endian { u64::from_be_bytes(field) } else { u64::from_le_bytes(field) }
    }
}

/// Puts a field into a structure, where that is long enough.
pub fn put(structure: &mut [u8], at: usize, field: &[u8]) {
    if let Some(slot) = structure.get_mut(at..at + field.len()) {
        slot.copy_from_slice(field);
    }
}
