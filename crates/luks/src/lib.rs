//! Encryption of disks: the headers and key slots of LUKS, and ciphers over sectors.
//!
//! Structures and cryptography only. What is read comes through a closure, what is to be written is handed out as bytes with their
//! offsets, in the order that a power cut may interrupt. Offsets are bytes from the start of the LUKS header, wherever it lies.
//!
//! No error, debug print or message holds a secret or a key, and what holds one is overwritten when it is dropped.

#![forbid(unsafe_code)]
#![cfg_attr(not(test), deny(clippy::disallowed_methods))]

pub mod cipher;
mod hash;
mod kdf;
mod limits;
pub mod luks1;
pub mod luks2;
mod secret;
mod split;

pub use cipher::{Cipher, CipherSpec, Iv, Mode, SectorCipher, legacy_aes};
pub use hash::Hash;
pub use kdf::Cost;
pub use limits::Limits;
pub use luks1::{Details, FormatOptions, Formatted, KeySlot, Luks1Header, Plan, SlotDetails, Write};
pub use luks2::Luks2Header;
pub use secret::VolumeKey;

use qcow2_core::{Error, ErrorKind, Result};

/// Reads bytes of the LUKS header and its key material: fills the buffer from the offset, which counts from the header's start.
pub type Read<'a> = dyn Fn(u64, &mut [u8]) -> Result<()> + 'a;

/// What a secret opened.
#[derive(Debug)]
pub struct Unlocked {
    /// The key slot that the secret opened.
    pub slot: usize,
    /// The key that encrypts the data.
    pub key: VolumeKey,
    /// The cipher of the data, with that key.
    pub cipher: SectorCipher,
    /// Where the data begins, in bytes from the header's start; 0 where the header is detached from its data.
    pub payload_offset: u64,
    /// Bytes of the data; nothing where it ends with the file, as always in version 1.
    pub payload_size: Option<u64>,
}

/// The version of the LUKS header that the bytes begin with: 1 and 2 are known.
pub fn version(bytes: &[u8]) -> Option<u16> {
    let (magic, rest) = bytes.split_first_chunk()?;
    (*magic == MAGIC).then(|| rest.first_chunk().copied().map(u16::from_be_bytes))?
}

const MAGIC: [u8; 6] = *b"LUKS\xba\xbe";

/// No key slot opens: why.
fn refused(tried: usize, passed_over: Option<Error>) -> Error {
    match (tried, passed_over) {
        (0, None) => {
            Error::new(ErrorKind::BadSecret, "no key slot is in use: nothing opens this disk any more")
        }
        (0, Some(e)) => e,
        (_, None) => Error::new(ErrorKind::BadSecret, "the secret opens no key slot"),
        (_, Some(e)) => {
            let message = format!("the secret opens no key slot that can be read; {}", e.message());
            Error::new(ErrorKind::BadSecret, message).with_source(e)
        }
    }
}
