//! The hashes that LUKS names.

use digest::Digest;
use ripemd::Ripemd160;
use sha1::Sha1;
use sha2::{Sha224, Sha256, Sha384, Sha512};

/// A hash, as key derivation, anti-forensic split and ESSIV use it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "the names say it")]
pub enum Hash {
    Sha1,
    Sha224,
    Sha256,
    Sha384,
    Sha512,
    Ripemd160,
}

/// Runs the body with `$D` standing for the hash's type.
macro_rules! with_hash {
    ($hash:expr, $D:ident => $body:expr) => {
        match $hash {
            $crate::Hash::Sha1 => {
                type $D = ::sha1::Sha1;
                $body
            }
            $crate::Hash::Sha224 => {
                type $D = ::sha2::Sha224;
                $body
            }
            $crate::Hash::Sha256 => {
                type $D = ::sha2::Sha256;
                $body
            }
            $crate::Hash::Sha384 => {
                type $D = ::sha2::Sha384;
                $body
            }
            $crate::Hash::Sha512 => {
                type $D = ::sha2::Sha512;
                $body
            }
            $crate::Hash::Ripemd160 => {
                type $D = ::ripemd::Ripemd160;
                $body
            }
        }
    };
}
pub(crate) use with_hash;

impl Hash {
    /// Every hash.
    pub const ALL: [Self; 6] =
        [Self::Sha1, Self::Sha224, Self::Sha256, Self::Sha384, Self::Sha512, Self::Ripemd160];

    /// The hash that a header or an option names.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|hash| hash.name().eq_ignore_ascii_case(name))
    }

    /// The name in headers and options.
    pub fn name(self) -> &'static str {
        match self {
            Self::Sha1 => "sha1",
            Self::Sha224 => "sha224",
            Self::Sha256 => "sha256",
            Self::Sha384 => "sha384",
            Self::Sha512 => "sha512",
            Self::Ripemd160 => "ripemd160",
        }
    }

    /// Bytes of a digest.
    pub fn size(self) -> usize {
        match self {
            Self::Sha1 => <Sha1 as Digest>::output_size(),
            Self::Sha224 => <Sha224 as Digest>::output_size(),
            Self::Sha256 => <Sha256 as Digest>::output_size(),
            Self::Sha384 => <Sha384 as Digest>::output_size(),
            Self::Sha512 => <Sha512 as Digest>::output_size(),
            Self::Ripemd160 => <Ripemd160 as Digest>::output_size(),
        }
    }
}
