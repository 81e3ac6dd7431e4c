//! Little-endian numbers, one behind the other, and the errors of what they say.

use std::fmt::Display;

use qcow2_core::{Error, ErrorKind, Result};

/// A sector in bytes: what all offsets of the format count.
pub const SECTOR: u64 = 512;

/// Bytes that are decoded from the front.
pub(crate) struct Fields<'a>(pub(crate) &'a [u8]);

impl<'a> Fields<'a> {
    pub(crate) fn bytes(&mut self, count: usize, field: &'static str) -> Result<&'a [u8]> {
        let Some((bytes, rest)) = self.0.split_at_checked(count) else {
            let message = format!("{field} is truncated: the file ends inside the header");
            return Err(Error::new(ErrorKind::InvalidHeader, message).with_field(field));
        };
        self.0 = rest;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self, field: &'static str) -> Result<[u8; N]> {
        let bytes = self.bytes(N, field)?;
        bytes.try_into().map_err(|_| Error::new(ErrorKind::Internal, "a field has another length"))
    }

    pub(crate) fn u64(&mut self, field: &'static str) -> Result<u64> {
        self.array(field).map(u64::from_le_bytes)
    }

    pub(crate) fn u32(&mut self, field: &'static str) -> Result<u32> {
        self.array(field).map(u32::from_le_bytes)
    }

    pub(crate) fn u16(&mut self, field: &'static str) -> Result<u16> {
        self.array(field).map(u16::from_le_bytes)
    }
}

/// A field that breaks the format.
pub(crate) fn invalid(kind: ErrorKind, field: &'static str, value: impl Display, reason: &str) -> Error {
    Error::new(kind, format!("invalid {field} {value}: {reason}")).with_field(field)
}
