//! What a header says about itself: QAPI's `QCryptoBlockInfoLUKS`, and its like for version 2.

use crate::{Iv, Luks1Header, Luks2Header};

/// What a header says, by QEMU's names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Details {
    /// 1 or 2.
    pub version: u16,
    /// `aes-256`.
    pub cipher_alg: &'static str,
    /// `xts`.
    pub cipher_mode: &'static str,
    /// `plain64`; nothing for a mode that goes without.
    pub ivgen_alg: Option<&'static str>,
    /// The hash of `essiv`.
    pub ivgen_hash_alg: Option<&'static str>,
    /// `sha256`: of version 1, where it is that of every slot.
    pub hash_alg: Option<&'static str>,
    /// As text.
    pub uuid: String,
    /// Where the data begins, in bytes from the header's start.
    pub payload_offset: u64,
    /// Iterations of the digest: of version 1.
    pub master_key_iters: Option<u32>,
    /// Bytes that are encrypted as one.
    pub sector_size: u32,
    /// Of version 1: all eight. Of version 2: those that are in use and can be read.
    pub slots: Vec<SlotDetails>,
}

/// What a header says of a key slot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SlotDetails {
    /// Its number.
    pub number: usize,
    /// Whether a secret opens it.
    pub active: bool,
    /// Iterations of the derivation: of a slot in use that has such.
    pub iters: Option<u32>,
    /// Anti-forensic stripes, of a slot in use.
    pub stripes: Option<u32>,
    /// Where its key material lies, in bytes from the header's start.
    pub key_offset: u64,
}

impl From<&Luks1Header> for Details {
    fn from(header: &Luks1Header) -> Self {
        let slots = header.slots.iter().enumerate().map(|(number, slot)| {
            let active = slot.is_active();
            SlotDetails {
                number,
                active,
                iters: active.then_some(slot.iterations),
                stripes: active.then_some(slot.stripes),
                key_offset: slot.key_offset,
            }
        });
        let (ivgen_alg, ivgen_hash_alg) = iv_names(header.spec.iv);
        Self {
            version: 1,
            cipher_alg: header.spec.cipher.name(),
            cipher_mode: header.spec.mode.name(),
            ivgen_alg,
            ivgen_hash_alg,
            hash_alg: Some(header.hash.name()),
            uuid: header.uuid.clone(),
            payload_offset: header.payload_offset,
            master_key_iters: Some(header.mk_digest_iter),
            sector_size: crate::cipher::SECTOR as u32,
            slots: slots.collect(),
        }
    }
}

impl From<&Luks2Header> for Details {
    fn from(header: &Luks2Header) -> Self {
        let (ivgen_alg, ivgen_hash_alg) = iv_names(header.spec.iv);
        Self {
            version: 2,
            cipher_alg: header.spec.cipher.name(),
            cipher_mode: header.spec.mode.name(),
            ivgen_alg,
            ivgen_hash_alg,
            hash_alg: None,
            uuid: header.uuid.clone(),
            payload_offset: header.payload_offset,
            master_key_iters: None,
            sector_size: header.sector_size as u32,
            slots: header.slot_details(),
        }
    }
}

fn iv_names(iv: Iv) -> (Option<&'static str>, Option<&'static str>) {
    match iv {
        Iv::Plain => (Some("plain"), None),
        Iv::Plain64 => (Some("plain64"), None),
        Iv::Essiv(hash) => (Some("essiv"), Some(hash.name())),
        Iv::None => (None, None),
    }
}
