//! The system's source of randomness.

use crate::{Error, ErrorKind, Result};

/// Fills `bytes` with random ones.
///
/// # Errors
/// `Io` where the system has none.
pub fn fill(bytes: &mut [u8]) -> Result<()> {
    getrandom::fill(bytes).map_err(|e| {
        let io = e.raw_os_error().map(std::io::Error::from_raw_os_error);
        match io {
            Some(io) => Error::io(io, "getrandom"),
            None => Error::new(ErrorKind::Io, format!("the system gives no randomness: {e}")),
        }
    })
}

/// A random UUID (RFC 9562, version 4), its fields in network byte order.
///
/// # Errors
/// As [`fill`].
pub fn uuid() -> Result<[u8; 16]> {
    let mut bytes = [0; 16];
    fill(&mut bytes)?;
    let [_, _, _, _, _, _, version, _, variant, ..] = &mut bytes;
    *version = *version & 0x0f | 0x40;
    *variant = *variant & 0x3f | 0x80;
    Ok(bytes)
}

/// A random GUID: [`uuid`] with its first three fields in little-endian byte order, as Windows and VirtualBox store them.
///
/// # Errors
/// As [`fill`].
pub fn guid() -> Result<[u8; 16]> {
    let [a, b, c, d, e, f, g, h, rest @ ..] = uuid()?;
    let [i, j, k, l, m, n, o, p] = rest;
    Ok([d, c, b, a, f, e, h, g, i, j, k, l, m, n, o, p])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uuids_say_their_version_where_it_belongs() {
        let (uuid, guid, other) = (uuid().unwrap(), guid().unwrap(), guid().unwrap());
        assert_eq!((uuid[6] >> 4, uuid[8] >> 6), (4, 2));
        assert_eq!((guid[7] >> 4, guid[8] >> 6), (4, 2));
        assert_ne!(guid, other);
    }
}
