//! Numbers of a structure, little-endian, one behind the other; and the checksum that most structures have.

use std::fmt;

use qcow2_core::{Error, ErrorKind, Result};

/// A GUID as it is stored ([MS-DTYP] 2.3.4.2: the first three fields are little-endian).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Guid(pub [u8; 16]);

impl Guid {
    /// The GUID with these fields, in the order in which it is printed.
    pub const fn new(a: u32, b: u16, c: u16, d: [u8; 8]) -> Self {
        let ([a0, a1, a2, a3], [b0, b1], [c0, c1]) = (a.to_le_bytes(), b.to_le_bytes(), c.to_le_bytes());
        let [d0, d1, d2, d3, d4, d5, d6, d7] = d;
        Self([a0, a1, a2, a3, b0, b1, c0, c1, d0, d1, d2, d3, d4, d5, d6, d7])
    }

    /// Whether it is nothing but zeroes: none.
    pub fn is_zero(&self) -> bool {
        self.0 == [0; 16]
    }
}

impl fmt::Display for Guid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a0, a1, a2, a3, b0, b1, c0, c1, d0, d1, rest @ ..] = self.0;
        let (a, b, c) = (
            u32::from_le_bytes([a0, a1, a2, a3]),
            u16::from_le_bytes([b0, b1]),
            u16::from_le_bytes([c0, c1]),
        );
        write!(f, "{a:08x}-{b:04x}-{c:04x}-{d0:02x}{d1:02x}-")?;
        rest.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Guid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Reads fields, and names the one that is missing.
pub(crate) struct Fields<'a> {
    rest: &'a [u8],
    what: &'static str,
}

impl<'a> Fields<'a> {
    pub(crate) fn new(what: &'static str, bytes: &'a [u8]) -> Self {
        Self { rest: bytes, what }
    }

    pub(crate) fn take<const N: usize>(&mut self, field: &'static str) -> Result<[u8; N]> {
        let Some((bytes, rest)) = self.rest.split_first_chunk::<N>() else {
            let message = format!("the {} is truncated: {field} is missing", self.what);
            return Err(Error::new(ErrorKind::InvalidHeader, message).with_field(field));
        };
        self.rest = rest;
        Ok(*bytes)
    }

    pub(crate) fn u16(&mut self, field: &'static str) -> Result<u16> {
        self.take(field).map(u16::from_le_bytes)
    }

    pub(crate) fn u32(&mut self, field: &'static str) -> Result<u32> {
        self.take(field).map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self, field: &'static str) -> Result<u64> {
        self.take(field).map(u64::from_le_bytes)
    }

    pub(crate) fn guid(&mut self, field: &'static str) -> Result<Guid> {
        self.take(field).map(Guid)
    }

    /// Refuses a structure that does not begin with its signature.
    pub(crate) fn signature<const N: usize>(&mut self, wanted: &[u8; N]) -> Result<()> {
        let found = self.take::<N>("Signature")?;
        if found == *wanted {
            return Ok(());
        }
        let message = format!(
            "the {} begins with '{}', not with '{}'",
            self.what,
            found.escape_ascii(),
            wanted.escape_ascii()
        );
        Err(Error::new(ErrorKind::InvalidHeader, message).with_field("Signature"))
    }
}

/// An error of a structure's field.
pub(crate) fn invalid(
    kind: ErrorKind,
    field: &'static str,
    value: impl fmt::Display,
    reason: impl fmt::Display,
) -> Error {
    Error::new(kind, format!("invalid {field} {value}: {reason}")).with_field(field)
}

/// Where the checksum is in every structure that has one.
const CHECKSUM: usize = 4;

/// CRC-32C of a structure whose checksum field counts as zeroes.
pub(crate) fn checksum(bytes: &[u8]) -> u32 {
    let (front, rest) = bytes.split_at(CHECKSUM.min(bytes.len()));
    let crc = crc32c::crc32c_append(crc32c::crc32c(front), &[0; 4]);
    crc32c::crc32c_append(crc, rest.get(4..).unwrap_or_default())
}

/// Refuses a structure with another checksum than it says.
pub(crate) fn verify(what: &str, bytes: &[u8]) -> Result<()> {
    let stored =
        bytes.get(CHECKSUM..).and_then(|rest| rest.first_chunk()).map(|word| u32::from_le_bytes(*word));
    let counted = checksum(bytes);
    if stored == Some(counted) {
        return Ok(());
    }
    let message = format!(
        "the {what} is damaged: its checksum is {:#x}, its bytes have {counted:#x}",
        stored.unwrap_or(0)
    );
    Err(Error::new(ErrorKind::InvalidHeader, message).with_field("Checksum"))
}

/// Puts the checksum into a structure that is complete but for it.
pub fn seal(bytes: &mut [u8]) {
    let sum = checksum(bytes);
    put(bytes, CHECKSUM, &sum.to_le_bytes());
}

/// Copies `field` to `at`; what does not fit is a bug of the caller, and left out.
pub(crate) fn put(bytes: &mut [u8], at: usize, field: &[u8]) {
    if let Some(to) = bytes.get_mut(at..at + field.len()) {
        to.copy_from_slice(field);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guid_is_printed_as_microsoft_does() {
        let guid = Guid::new(0x2dc2_7766, 0xf623, 0x4200, [0x9d, 0x64, 0x11, 0x5e, 0x9b, 0xfd, 0x4a, 0x08]);
        assert_eq!(guid.to_string(), "2dc27766-f623-4200-9d64-115e9bfd4a08");
        assert_eq!(guid.0[..4], [0x66, 0x77, 0xc2, 0x2d]);
        assert!(!guid.is_zero() && Guid::default().is_zero());
    }

    #[test]
    fn what_is_sealed_is_valid_and_nothing_else() {
        let mut bytes: Vec<u8> = (0..64).collect();
        verify("test", &bytes).unwrap_err();
        seal(&mut bytes);
        verify("test", &bytes).unwrap();
        bytes[63] ^= 1;
        assert_eq!(verify("test", &bytes).unwrap_err().field(), Some("Checksum"));
    }
}
