//! A differencing disk's parent: how it is named, and how it is known again.

use std::fmt;
use std::path::Path;

use qcow2_core::layer::{BackingReference, References};
use qcow2_core::parent_name::ParentName;
use qcow2_core::{Mem, MemMut, Result, Storage, StorageExt};

use crate::structures::{Footer, Geometry, Header, Locator, MAX_LOCATED_NAME, MAX_PARENT_NAME};

/// The file that the header names: relative to the image's folder where that is said, else an absolute name of this system, else the
/// last part of another one, as Windows' absolute names mean nothing elsewhere and images are moved together.
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
        // Whether this system follows the name from the root of its file system.
        if Path::new(&name).is_absolute() {
            return Some(name);
        }
        let last = name.rsplit(['/', '\\']).next()?;
        (!last.is_empty()).then(|| last.to_owned())
    });
    let backing =
        name.map(|name| BackingReference { filename: name.into_bytes(), format: Some(b"vpc".to_vec()) });
    Ok(References { backing, ..References::default() })
}

/// The bytes of a name, fewer where the file ends before.
fn read(storage: &dyn Storage, locator: &Locator) -> Result<Vec<u8>> {
    let mut bytes = vec![0; locator.length.min(MAX_LOCATED_NAME) as usize];
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

/// What a child keeps of its parent: the UUID, when it was made, and the disk that both have. As text, numbers with spaces between.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ParentId {
    /// Its UUID.
    pub uuid: [u8; 16],
    /// When it was made, in seconds since 2000.
    pub time_stamp: u32,
    /// Bytes of its disk.
    pub size: u64,
    /// The geometry of that.
    pub geometry: Geometry,
}

impl ParentId {
    /// That of the image with this footer.
    #[must_use]
    pub fn of(footer: &Footer) -> Self {
        Self {
            uuid: footer.uuid(),
            time_stamp: footer.time_stamp(),
            size: footer.virtual_size(),
            geometry: footer.geometry(),
        }
    }

    /// The one of this text.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split(' ');
        let uuid = u128::from_str_radix(parts.next()?, 16).ok()?.to_be_bytes();
        Some(Self {
            uuid,
            time_stamp: parts.next()?.parse().ok()?,
            size: parts.next()?.parse().ok()?,
            geometry: Geometry {
                cylinders: parts.next()?.parse().ok()?,
                heads: parts.next()?.parse().ok()?,
                sectors: parts.next()?.parse().ok()?,
            },
        })
    }
}

impl fmt::Display for ParentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Geometry { cylinders, heads, sectors } = self.geometry;
        let uuid = u128::from_be_bytes(self.uuid);
        write!(f, "{uuid:032x} {} {} {cylinders} {heads} {sectors}", self.time_stamp, self.size)
    }
}

/// The parent of a new image.
#[derive(Debug, Clone)]
pub struct Parent {
    /// Its name: a relative one is relative to the image's folder.
    pub filename: Vec<u8>,
    /// How it is known again.
    pub id: ParentId,
    /// When its file was last changed, in seconds since 2000.
    pub changed: u32,
}

/// A parent's names as they are stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct StoredName {
    /// Of the header.
    pub(crate) plain: Vec<u16>,
    locator: Locator,
    bytes: Vec<u8>,
}

impl StoredName {
    /// Those of `filename`, of which one lies at `offset`: `W2ru` of a name that is relative to the image, with Windows' slashes; `W2ku` of
    /// one that is not.
    ///
    /// # Errors
    /// `InvalidArgument` for a name that is no text, that has backslashes which are no separators, or that is too long.
    pub(crate) fn new(filename: &[u8], offset: u64) -> Result<Self> {
        let name = ParentName::new(filename)?;
        let platform = if name.is_absolute { *b"W2ku" } else { *b"W2ru" };
        let bytes: Vec<u8> = name.stored.encode_utf16().flat_map(u16::to_le_bytes).collect();
        let last = name.name.rsplit(['/', '\\']).next().unwrap_or(name.name);
        let plain: Vec<u16> = last.encode_utf16().collect();
        match u32::try_from(bytes.len()) {
            Ok(length) if length <= MAX_LOCATED_NAME && plain.len() <= MAX_PARENT_NAME => {
                Ok(Self { plain, locator: Locator { platform, length, offset }, bytes })
            }
            _ => Err(name.too_long()),
        }
    }

    /// Behind the name.
    pub(crate) fn end(&self) -> u64 {
        self.locator.offset + u64::from(self.locator.space())
    }

    pub(crate) fn locators(&self) -> [Locator; 1] {
        [self.locator]
    }

    pub(crate) fn write(&self, storage: &dyn Storage) -> Result<()> {
        let mut bytes = self.bytes.clone();
        bytes.resize(self.locator.space() as usize, 0);
        storage.write_all_at(Mem::from(&bytes[..]), self.locator.offset)
    }
}
