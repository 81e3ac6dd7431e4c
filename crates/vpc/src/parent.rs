//! The name of a differencing disk's parent.

use qcow2_core::layer::{BackingReference, References};
use qcow2_core::{MemMut, Result, Storage, StorageExt};

use crate::structures::{Header, Locator};

/// Longest name that is read, in bytes.
const MAX_NAME: u32 = 4096;

/// The file that the header names: relative to the image's folder where that is said, else the last part of another name, as Windows'
/// absolute names mean nothing elsewhere and images are moved together.
pub(crate) fn references(storage: &dyn Storage, header: &Header) -> Result<References> {
    let mut relative = None;
    let mut other = None;
    for locator in header.locators() {
        match &locator.platform {
            b"W2ru" => relative = relative.or(utf16(&read(storage, &locator)?)),
            b"MacX" => relative = relative.or(url(&read(storage, &locator)?)),
            b"W2ku" => other = other.or(utf16(&read(storage, &locator)?)),
            _ => {}
        }
    }
    let stored = || String::from_utf16(&header.parent_name()).ok().filter(|name| !name.is_empty());
    let name = relative.map(|name| name.replace('\\', "/")).or_else(|| {
        let name = other.or_else(stored)?;
        let last = name.rsplit(['/', '\\']).next()?;
        (!last.is_empty()).then(|| last.to_owned())
    });
    let backing =
        name.map(|name| BackingReference { filename: name.into_bytes(), format: Some(b"vpc".to_vec()) });
    Ok(References { backing, ..References::default() })
}

/// The bytes of a name, fewer where the file ends before.
fn read(storage: &dyn Storage, locator: &Locator) -> Result<Vec<u8>> {
    let mut bytes = vec![0; locator.length.min(MAX_NAME) as usize];
    let got = match locator.offset.checked_add(bytes.len() as u64) {
        Some(end) if end <= i64::MAX as u64 => {
            storage.read_up_to_at(MemMut::from(&mut bytes[..]), locator.offset)?
        }
        _ => 0,
    };
    bytes.truncate(got);
    Ok(bytes)
}

/// A name in UTF-16, in little endian whatever the rest of the image has.
fn utf16(bytes: &[u8]) -> Option<String> {
    let units = bytes.as_chunks::<2>().0.iter().map(|unit| u16::from_le_bytes(*unit));
    let name: Vec<u16> = units.take_while(|unit| *unit != 0).collect();
    String::from_utf16(&name).ok().filter(|name| !name.is_empty())
}

/// A file's URL, as XenServer writes it: `file://./base.vhd`.
fn url(bytes: &[u8]) -> Option<String> {
    let name = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
    let name = std::str::from_utf8(name).ok()?;
    let name = name.strip_prefix("file://").unwrap_or(name);
    (!name.is_empty()).then(|| name.to_owned())
}
