//! Bounds-checked big-endian access.

use crate::{FormatError, FormatResult};

/// The `N` bytes at `at`, or `Truncated`.
pub(crate) fn array<const N: usize>(bytes: &[u8], at: usize, field: &'static str) -> FormatResult<[u8; N]> {
    at.checked_add(N).and_then(|end| bytes.get(at..end)).and_then(|slice| slice.try_into().ok()).ok_or(
        FormatError::Truncated {
            field,
            needed: (at as u64).saturating_add(N as u64),
            available: bytes.len() as u64,
        },
    )
}

/// The `len` bytes at `at`, or `Truncated`.
pub(crate) fn slice<'a>(
    bytes: &'a [u8],
    at: usize,
    len: usize,
    field: &'static str,
) -> FormatResult<&'a [u8]> {
    at.checked_add(len).and_then(|end| bytes.get(at..end)).ok_or(FormatError::Truncated {
        field,
        needed: (at as u64).saturating_add(len as u64),
        available: bytes.len() as u64,
    })
}

pub(crate) fn be16(bytes: &[u8], at: usize, field: &'static str) -> FormatResult<u16> {
    array(bytes, at, field).map(u16::from_be_bytes)
}

pub(crate) fn be32(bytes: &[u8], at: usize, field: &'static str) -> FormatResult<u32> {
    array(bytes, at, field).map(u32::from_be_bytes)
}

pub(crate) fn be64(bytes: &[u8], at: usize, field: &'static str) -> FormatResult<u64> {
    array(bytes, at, field).map(u64::from_be_bytes)
}

/// `len` rounded up to a multiple of 8, as extensions and table entries are padded.
pub(crate) const fn padded8(len: usize) -> usize {
    len.saturating_add(7) & !7
}
