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
mod secret;
mod split;

pub use cipher::{Cipher, CipherSpec, Iv, Mode, SectorCipher, legacy_aes};
pub use hash::Hash;
pub use kdf::Cost;
pub use limits::Limits;
pub use luks1::{FormatOptions, Formatted, KeySlot, Luks1Header, Plan, Write};
pub use secret::VolumeKey;

use qcow2_core::Result;

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
}
