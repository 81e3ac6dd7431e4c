//! The parent locator of a differencing image ([MS-VHDX] 2.6.2.6): pairs of names and values in UTF-16.

use qcow2_core::parent_name::ParentName;
use qcow2_core::{Error, ErrorKind, Result};

use super::fields::{Fields, Guid, invalid};

/// The only type of locator that there is: the parent is an image of this format, too.
const VHDX: Guid = Guid::new(0xb04a_efb7, 0xd19e, 0x4a81, [0xb7, 0x89, 0x25, 0xb8, 0xe9, 0x44, 0x59, 0x13]);
/// Longest name of a parent in a new image, in bytes.
const MAX_NAME: usize = 4096;
/// More pairs than any writer makes: five are known.
const MAX_PAIRS: u16 = 64;

/// Where the parent is, and how to tell that it is the right one.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ParentLocator {
    /// Names and values, as they are stored.
    pub pairs: Vec<(String, String)>,
}

impl ParentLocator {
    /// Reads the item's bytes.
    ///
    /// # Errors
    /// `InvalidHeader`, `Corrupt` for pairs that lie outside the item or are no text; `UnsupportedFeature` for another type.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let mut fields = Fields::new("parent locator", bytes);
        let kind = fields.guid("LocatorType")?;
        if kind != VHDX {
            return Err(invalid(ErrorKind::UnsupportedFeature, "LocatorType", kind, "the type is not known"));
        }
        fields.u16("Reserved")?;
        let count = fields.u16("KeyValueCount")?;
        if count > MAX_PAIRS {
            return Err(invalid(ErrorKind::Limit, "KeyValueCount", count, "more than 64 pairs"));
        }
        let mut pairs = Vec::new();
        for _ in 0..count {
            let (key, value) = (fields.u32("KeyOffset")?, fields.u32("ValueOffset")?);
            let (key_length, value_length) = (fields.u16("KeyLength")?, fields.u16("ValueLength")?);
            pairs.push((text(bytes, key, key_length)?, text(bytes, value, value_length)?));
        }
        Ok(Self { pairs })
    }

    /// That of an image whose parent has this `DataWriteGuid` and name: relative to the image with the slashes of Windows, or absolute.
    ///
    /// # Errors
    /// `InvalidArgument` for a name that is no text, that has backslashes which are no separators, or that is too long.
    pub fn new(filename: &[u8], linkage: Guid) -> Result<Self> {
        let name = ParentName::new(filename)?;
        if filename.len() > MAX_NAME {
            return Err(name.too_long());
        }
        let key = if name.is_absolute { "absolute_win32_path" } else { "relative_path" };
        let pairs = [("parent_linkage", format!("{{{linkage}}}")), (key, name.stored)];
        Ok(Self { pairs: pairs.into_iter().map(|(key, value)| (key.to_owned(), value)).collect() })
    }

    /// The item's bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = VHDX.0.to_vec();
        bytes.extend([0; 2]);
        bytes.extend((self.pairs.len() as u16).to_le_bytes());
        let first = bytes.len() + self.pairs.len() * 12;
        let mut texts: Vec<u8> = Vec::new();
        let mut add = |text: &str| {
            let at = first + texts.len();
            texts.extend(text.encode_utf16().flat_map(u16::to_le_bytes));
            (at as u32, (first + texts.len() - at) as u16)
        };
        for (key, value) in &self.pairs {
            let ((key, key_length), (value, value_length)) = (add(key), add(value));
            bytes.extend(key.to_le_bytes());
            bytes.extend(value.to_le_bytes());
            bytes.extend(key_length.to_le_bytes());
            bytes.extend(value_length.to_le_bytes());
        }
        bytes.extend(texts);
        bytes
    }

    /// The value of a name.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.pairs.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    /// What the parent's `DataWriteGuid` has to be, as it is stored: `{guid}`. A second one is allowed while parent and child
    /// are merged.
    pub fn linkages(&self) -> impl Iterator<Item = &str> {
        ["parent_linkage", "parent_linkage2"].into_iter().filter_map(|name| self.get(name))
    }

    /// The parent's name: relative to the image where the locator has such a one, with the slashes of other systems; else as Windows
    /// had it.
    pub fn name(&self) -> Option<String> {
        match self.get("relative_path") {
            Some(relative) => Some(relative.replace('\\', "/")),
            None => self.get("absolute_win32_path").or_else(|| self.get("volume_path")).map(str::to_owned),
        }
    }
}

fn text(bytes: &[u8], offset: u32, length: u16) -> Result<String> {
    let start = offset as usize;
    let Some(stored) = bytes.get(start..).and_then(|rest| rest.get(..length.into())) else {
        let reason = format_args!("{length} bytes there lie outside the locator");
        return Err(invalid(ErrorKind::Corrupt, "KeyOffset", format_args!("{offset:#x}"), reason));
    };
    let units = stored.as_chunks::<2>().0.iter().map(|unit| u16::from_le_bytes(*unit));
    let text: std::result::Result<String, _> = char::decode_utf16(units).collect();
    match text {
        Ok(text) if length.is_multiple_of(2) && !text.contains('\0') => Ok(text),
        _ => {
            let message = format!("the parent locator has no UTF-16 text at {offset:#x}");
            Err(Error::new(ErrorKind::Corrupt, message).with_field("KeyLength"))
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn encode(pairs: &[(&str, &str)]) -> Vec<u8> {
        let pairs = pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
        ParentLocator { pairs: pairs.collect() }.encode()
    }

    #[test]
    fn the_parent_is_named_relative_to_the_image() {
        let both = [
            ("parent_linkage", "{1}"),
            ("relative_path", ".\\a\\b.vhdx"),
            ("absolute_win32_path", "C:\\b.vhdx"),
        ];
        let locator = ParentLocator::parse(&encode(&both)).unwrap();
        assert_eq!(locator.name().as_deref(), Some("./a/b.vhdx"));
        assert_eq!(locator.linkages().collect::<Vec<_>>(), ["{1}"]);
        let absolute = ParentLocator::parse(&encode(&both[2..])).unwrap();
        assert_eq!(absolute.name().as_deref(), Some("C:\\b.vhdx"));
        assert_eq!(ParentLocator::parse(&encode(&[])).unwrap().name(), None);
    }

    #[test]
    fn what_is_no_locator_is_refused() {
        let sound = encode(&[("k", "v")]);
        let with = |at: usize, byte: u8| {
            let mut bytes = sound.clone();
            bytes[at] = byte;
            ParentLocator::parse(&bytes).unwrap_err().field()
        };
        assert_eq!(with(0, 0), Some("LocatorType"));
        assert_eq!(with(18, 65), Some("KeyValueCount"));
        assert_eq!(with(18, 3), Some("ValueOffset"));
        assert_eq!(with(20, 200), Some("KeyOffset"));
        assert_eq!(with(28, 1), Some("KeyLength"));
        // Half of a pair of surrogates.
        assert_eq!(with(33, 0xd8), Some("KeyLength"));
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_locator_or_an_error(rest in prop::collection::vec(any::<u8>(), 0..80)) {
            let mut bytes = VHDX.0.to_vec();
            bytes.extend(rest);
            let _ = ParentLocator::parse(&bytes);
        }
    }
}
