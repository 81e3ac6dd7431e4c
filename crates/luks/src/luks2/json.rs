//! Values of the metadata, with the name of what is missing or wrong.

use base64ct::{Base64, Encoding};
use qcow2_core::{Error, ErrorKind, Result};
use serde_json::Value;

use crate::{CipherSpec, Hash};

/// An object of the metadata.
#[derive(Clone, Copy)]
pub(super) struct Object<'a>(pub(super) &'a Value);

pub(super) fn damaged(field: &'static str) -> Error {
    Error::new(ErrorKind::Corrupt, format!("the metadata of the LUKS header have no sound {field:?}"))
        .with_field(field)
}

pub(super) fn unsupported(what: String, field: &'static str) -> Error {
    Error::new(ErrorKind::UnsupportedFeature, format!("{what} is not supported")).with_field(field)
}

impl<'a> Object<'a> {
    pub(super) fn object(self, field: &'static str) -> Result<Self> {
        self.0.get(field).filter(|value| value.is_object()).map(Self).ok_or_else(|| damaged(field))
    }

    /// What an object has, by name.
    pub(super) fn entries(self, field: &'static str) -> Result<impl Iterator<Item = (&'a str, Self)>> {
        let entries = self.0.get(field).and_then(Value::as_object).ok_or_else(|| damaged(field))?;
        Ok(entries.iter().map(|(name, value)| (name.as_str(), Self(value))))
    }

    pub(super) fn text(self, field: &'static str) -> Result<&'a str> {
        self.0.get(field).and_then(Value::as_str).ok_or_else(|| damaged(field))
    }

    /// A list of texts; none where the field is missing.
    pub(super) fn texts(self, field: &'static str) -> impl Iterator<Item = &'a str> {
        self.0.get(field).and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str)
    }

    pub(super) fn u32(self, field: &'static str) -> Result<u32> {
        self.0
            .get(field)
            .and_then(Value::as_u64)
            .and_then(|value| u32::try_from(value).ok())
            .ok_or_else(|| damaged(field))
    }

    /// What may exceed 53 bits is text.
    pub(super) fn u64(self, field: &'static str) -> Result<u64> {
        self.text(field)?.parse().map_err(|_| damaged(field))
    }

    pub(super) fn bytes(self, field: &'static str) -> Result<Vec<u8>> {
        Base64::decode_vec(self.text(field)?).map_err(|_| damaged(field))
    }

    pub(super) fn hash(self, field: &'static str) -> Result<Hash> {
        let name = self.text(field)?;
        Hash::from_name(name).ok_or_else(|| unsupported(format!("the hash {name:?}"), field))
    }

    /// `aes-xts-plain64`, for a key of that size.
    pub(super) fn cipher(self, field: &'static str, key_bytes: u32) -> Result<CipherSpec> {
        let (name, mode) = self.text(field)?.split_once('-').ok_or_else(|| damaged(field))?;
        CipherSpec::parse(name, mode, key_bytes as usize)
    }
}
