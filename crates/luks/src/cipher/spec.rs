//! Which cipher, how its blocks make a sector, and where a sector begins; as LUKS and other tools name it.

use std::fmt;

use qcow2_core::{Error, ErrorKind, Result};

use crate::Hash;

/// A block cipher with the size of its key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "the names say it")]
pub enum Cipher {
    Aes128,
    Aes192,
    Aes256,
    Serpent128,
    Serpent192,
    Serpent256,
    Twofish128,
    Twofish192,
    Twofish256,
    /// Blocks of 8 bytes, a key of 16.
    Cast5,
}

/// How a sector's blocks are chained.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "the names say it")]
pub enum Mode {
    Xts,
    Cbc,
    Ctr,
    Ecb,
}

/// What a sector's encryption begins with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Iv {
    /// The low 32 bits of the sector's number.
    Plain,
    /// The sector's number.
    Plain64,
    /// The sector's number, encrypted with the key's hash.
    Essiv(Hash),
    /// Nothing: every sector begins alike.
    None,
}

/// A cipher over sectors, without its key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "the types say it")]
pub struct CipherSpec {
    pub cipher: Cipher,
    pub mode: Mode,
    pub iv: Iv,
}

impl Cipher {
    /// Every cipher.
    pub const ALL: [Self; 10] = [
        Self::Aes128,
        Self::Aes192,
        Self::Aes256,
        Self::Serpent128,
        Self::Serpent192,
        Self::Serpent256,
        Self::Twofish128,
        Self::Twofish192,
        Self::Twofish256,
        Self::Cast5,
    ];

    /// The name in options: `aes-256`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Aes128 => "aes-128",
            Self::Aes192 => "aes-192",
            Self::Aes256 => "aes-256",
            Self::Serpent128 => "serpent-128",
            Self::Serpent192 => "serpent-192",
            Self::Serpent256 => "serpent-256",
            Self::Twofish128 => "twofish-128",
            Self::Twofish192 => "twofish-192",
            Self::Twofish256 => "twofish-256",
            Self::Cast5 => "cast5-128",
        }
    }

    /// The cipher that an option names.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|cipher| cipher.name() == name)
    }

    /// The name in headers, without the key's size.
    pub fn family(self) -> &'static str {
        self.name().split('-').next().unwrap_or_default()
    }

    /// Bytes of the key of one cipher.
    pub fn key_bytes(self) -> usize {
        match self {
            Self::Aes128 | Self::Serpent128 | Self::Twofish128 | Self::Cast5 => 16,
            Self::Aes192 | Self::Serpent192 | Self::Twofish192 => 24,
            Self::Aes256 | Self::Serpent256 | Self::Twofish256 => 32,
        }
    }

    fn sized(family: &str, bytes: usize) -> Option<Self> {
        Self::ALL.into_iter().find(|cipher| cipher.family() == family && cipher.key_bytes() == bytes)
    }
}

impl Mode {
    /// Every mode.
    pub const ALL: [Self; 4] = [Self::Xts, Self::Cbc, Self::Ctr, Self::Ecb];

    /// The name in headers and options.
    pub fn name(self) -> &'static str {
        match self {
            Self::Xts => "xts",
            Self::Cbc => "cbc",
            Self::Ctr => "ctr",
            Self::Ecb => "ecb",
        }
    }

    /// The mode that an option names.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|mode| mode.name() == name)
    }
}

impl Iv {
    /// The vector that a header or an option names: `plain64`, `essiv:sha256`.
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "plain" => Some(Self::Plain),
            "plain64" => Some(Self::Plain64),
            _ => name.strip_prefix("essiv:").and_then(Hash::from_name).map(Self::Essiv),
        }
    }
}

impl fmt::Display for Iv {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Plain => f.write_str("plain"),
            Self::Plain64 => f.write_str("plain64"),
            Self::Essiv(hash) => write!(f, "essiv:{}", hash.name()),
            Self::None => f.write_str("none"),
        }
    }
}

impl fmt::Display for CipherSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.cipher.name(), self.cipher_mode())
    }
}

impl Default for CipherSpec {
    /// What QEMU and cryptsetup make: `aes-256-xts-plain64`.
    fn default() -> Self {
        Self { cipher: Cipher::Aes256, mode: Mode::Xts, iv: Iv::Plain64 }
    }
}

impl CipherSpec {
    /// From a LUKS header's `cipher-name`, `cipher-mode` and `key-bytes`.
    ///
    /// # Errors
    /// `UnsupportedFeature` for a name that is not known and for what cannot be combined, `InvalidHeader` for a key that does not
    /// go with the cipher.
    pub fn parse(name: &str, mode: &str, key_bytes: usize) -> Result<Self> {
        let (chaining, iv) = match mode.split_once('-') {
            Some((chaining, iv)) => (chaining, Some(iv)),
            None => (mode, None),
        };
        let unknown = || {
            let message = format!("the cipher mode {mode:?} is not supported");
            Error::new(ErrorKind::UnsupportedFeature, message).with_field("cipher-mode")
        };
        let chaining = Mode::from_name(chaining).ok_or_else(unknown)?;
        let iv = match iv {
            Some(iv) => Iv::from_name(iv).ok_or_else(unknown)?,
            None if chaining == Mode::Ecb => Iv::None,
            None => return Err(unknown()),
        };
        if !Cipher::ALL.iter().any(|cipher| cipher.family() == name) {
            let message = format!("the cipher {name:?} is not supported");
            return Err(Error::new(ErrorKind::UnsupportedFeature, message).with_field("cipher-name"));
        }
        let keys = if chaining == Mode::Xts { 2 } else { 1 };
        let sized = Some(key_bytes)
            .filter(|bytes| bytes.is_multiple_of(keys))
            .and_then(|bytes| Cipher::sized(name, bytes / keys));
        let cipher = sized.ok_or_else(|| {
            let message = format!("{name}-{mode} does not go with a key of {key_bytes} bytes");
            Error::new(ErrorKind::InvalidHeader, message).with_field("key-bytes")
        })?;
        let spec = Self { cipher, mode: chaining, iv };
        spec.check()?;
        Ok(spec)
    }

    /// A header's `cipher-name`.
    pub fn cipher_name(&self) -> &'static str {
        self.cipher.family()
    }

    /// A header's `cipher-mode`.
    pub fn cipher_mode(&self) -> String {
        match self.iv {
            Iv::None => self.mode.name().to_owned(),
            iv => format!("{}-{iv}", self.mode.name()),
        }
    }

    /// Bytes of the whole key: XTS has two.
    pub fn key_bytes(&self) -> usize {
        self.cipher.key_bytes() * if self.mode == Mode::Xts { 2 } else { 1 }
    }

    /// Whether it can be.
    ///
    /// # Errors
    /// `UnsupportedFeature` with what does not go together.
    pub fn check(&self) -> Result<()> {
        let unsupported =
            |why: &str| Err(Error::new(ErrorKind::UnsupportedFeature, why).with_field("cipher-mode"));
        if self.mode == Mode::Xts && self.cipher == Cipher::Cast5 {
            return unsupported("xts needs a cipher with blocks of 16 bytes, which cast5 has not");
        }
        match self.iv {
            Iv::Essiv(hash) => self.essiv_cipher(hash).map(drop),
            Iv::None if self.mode != Mode::Ecb => {
                unsupported("only ecb goes without an initialization vector")
            }
            _ => Ok(()),
        }
    }

    /// ESSIV uses the cipher of the data, with the hash as its key.
    pub(super) fn essiv_cipher(&self, hash: Hash) -> Result<Cipher> {
        Cipher::sized(self.cipher.family(), hash.size()).ok_or_else(|| {
            let message = format!(
                "essiv takes the hash for a key: {} has none of the {} bytes of {}",
                self.cipher.family(),
                hash.size(),
                hash.name()
            );
            Error::new(ErrorKind::UnsupportedFeature, message).with_field("cipher-mode")
        })
    }

    /// Why nobody should make a disk with it, where there is a reason.
    pub fn weakness(&self) -> Option<&'static str> {
        match (self.cipher, self.mode, self.iv) {
            (_, Mode::Ecb, _) => Some("ecb shows which blocks are equal"),
            (_, Mode::Ctr, _) => Some("ctr shows what changes when a sector is written again"),
            (Cipher::Cast5, ..) => Some("cast5 has blocks of 64 bits, too small for a disk"),
            (_, Mode::Cbc, Iv::Plain | Iv::Plain64) => {
                Some("cbc with a vector that can be foreseen shows prepared content")
            }
            (_, _, Iv::Plain) => Some("plain repeats itself after 2 TiB"),
            _ => None,
        }
    }
}
