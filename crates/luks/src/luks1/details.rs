//! What a header says, in the terms in which QEMU tells it.

use super::header::{KeySlot, Luks1Header};
use crate::Iv;

/// A header without its secrets: nothing in it helps to open the disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Details {
    /// `aes-256`.
    pub cipher_alg: &'static str,
    /// `xts`.
    pub cipher_mode: &'static str,
    /// `plain64`; `none` where sectors begin alike.
    pub ivgen_alg: &'static str,
    /// The hash of `essiv`.
    pub ivgen_hash_alg: Option<&'static str>,
    /// `sha256`.
    pub hash_alg: &'static str,
    /// The header lies in a file of its own.
    pub detached_header: bool,
    /// The UUID, as text.
    pub uuid: String,
    /// Where the data begins, in bytes from the header's start.
    pub payload_offset: u64,
    /// Iterations of the volume key's digest.
    pub master_key_iters: u32,
    /// The key slots, the first one first.
    pub slots: Vec<SlotDetails>,
}

/// A key slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SlotDetails {
    /// Whether a secret opens it.
    pub active: bool,
    /// Iterations of the derivation from the secret, of an active slot.
    pub iters: Option<u32>,
    /// Anti-forensic stripes of the key material, of an active slot.
    pub stripes: Option<u32>,
    /// Where the key material lies, in bytes from the header's start.
    pub key_offset: u64,
}

impl Luks1Header {
    /// What the header says.
    pub fn details(&self) -> Details {
        let (ivgen_alg, ivgen_hash_alg) = match self.spec.iv {
            Iv::Plain => ("plain", None),
            Iv::Plain64 => ("plain64", None),
            Iv::Essiv(hash) => ("essiv", Some(hash.name())),
            Iv::None => ("none", None),
        };
        Details {
            cipher_alg: self.spec.cipher.name(),
            cipher_mode: self.spec.mode.name(),
            ivgen_alg,
            ivgen_hash_alg,
            hash_alg: self.hash.name(),
            detached_header: self.payload_offset == 0,
            uuid: self.uuid.clone(),
            payload_offset: self.payload_offset,
            master_key_iters: self.mk_digest_iter,
            slots: self.slots.iter().map(SlotDetails::from).collect(),
        }
    }
}

impl From<&KeySlot> for SlotDetails {
    fn from(slot: &KeySlot) -> Self {
        let of_active = |number: u32| slot.is_active().then_some(number);
        Self {
            active: slot.is_active(),
            iters: of_active(slot.iterations),
            stripes: of_active(slot.stripes),
            key_offset: slot.key_offset,
        }
    }
}
