//! A new header, with one key slot in use.

use std::fmt;

use qcow2_core::{Error, ErrorKind, Job, Result, random};
use zeroize::Zeroizing;

use super::header::{DIGEST, KeySlot, Luks1Header, SALT, SLOTS};
use super::keys;
use crate::cipher::SECTOR;
use crate::kdf::{MIN_ITERATIONS, pbkdf2};
use crate::{CipherSpec, Cost, Hash, SectorCipher, VolumeKey};

/// Stripes of a key slot, as every tool writes them.
pub(super) const STRIPES: u32 = 4000;
/// What key material and data are aligned to.
const ALIGN: u64 = 4096;

/// What a new header is to be.
#[derive(Clone)]
pub struct FormatOptions<'a> {
    /// How data is encrypted.
    pub spec: CipherSpec,
    /// The hash of key derivation and anti-forensic split.
    pub hash: Hash,
    /// What opens the disk.
    pub secret: &'a [u8],
    /// What opening costs.
    pub cost: Cost,
    /// Takes a weak cipher, too.
    pub allow_weak: bool,
    /// The header lies in a file of its own: the data begins at 0 of another one.
    pub detached: bool,
}

impl<'a> FormatOptions<'a> {
    /// What QEMU makes: `aes-256-xts-plain64`, sha256, two seconds for opening it.
    pub fn new(secret: &'a [u8]) -> Self {
        Self {
            spec: CipherSpec::default(),
            hash: Hash::Sha256,
            secret,
            cost: Cost::default(),
            allow_weak: false,
            detached: false,
        }
    }

    /// Whether such a header can be made: before any file is touched.
    ///
    /// # Errors
    /// `UnsupportedFeature` for what cannot be combined, `InvalidArgument` for a weak cipher without `allow_weak`.
    pub fn check(&self) -> Result<()> {
        self.spec.check()?;
        match self.spec.weakness() {
            Some(why) if !self.allow_weak => {
                let message = format!("{} is weak: {why}; say explicitly that it may be", self.spec);
                Err(Error::new(ErrorKind::InvalidArgument, message).with_field("cipher-mode"))
            }
            _ => Ok(()),
        }
    }

    /// Bytes from the header's start to the data: header and key material.
    pub fn length(&self) -> u64 {
        ALIGN + slot_room(&self.spec) * SLOTS as u64
    }
}

impl fmt::Debug for FormatOptions<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FormatOptions({}, {}, {:?})", self.spec, self.hash.name(), self.cost)
    }
}

/// A new header.
pub struct Formatted {
    /// The header as structure.
    pub header: Luks1Header,
    /// Header and key material as they are stored: [`FormatOptions::length`] bytes.
    pub bytes: Vec<u8>,
    /// The cipher of the data.
    pub cipher: SectorCipher,
    /// The key of the data.
    pub key: VolumeKey,
}

impl fmt::Debug for Formatted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Formatted({:?}, {} bytes)", self.cipher, self.bytes.len())
    }
}

/// Bytes from one slot's key material to the next one's.
fn slot_room(spec: &CipherSpec) -> u64 {
    let material = (spec.key_bytes() as u64 * u64::from(STRIPES)).next_multiple_of(SECTOR as u64);
    material.next_multiple_of(ALIGN)
}

/// A header with a new random key, which `options.secret` opens in slot 0.
///
/// # Errors
/// As [`FormatOptions::check`]; `Aborted` once the job is cancelled; `Io` where the system has no randomness.
pub fn format(options: &FormatOptions<'_>, job: &Job) -> Result<Formatted> {
    options.check()?;
    let (spec, hash) = (options.spec, options.hash);
    let mut key = Zeroizing::new(vec![0; spec.key_bytes()]);
    random::fill(&mut key)?;
    let mut mk_digest_salt = [0; SALT];
    random::fill(&mut mk_digest_salt)?;
    // The digest is asked once for each slot that is tried: an eighth of the time, as other tools do it.
    let mk_digest_iter = (options.cost.iterations(hash, DIGEST, job)? / SLOTS as u32).max(MIN_ITERATIONS);
    let digest = pbkdf2(hash, &key, &mk_digest_salt, mk_digest_iter, DIGEST, job)?;
    let mut mk_digest = [0; DIGEST];
    mk_digest.copy_from_slice(&digest);
    let mut at = ALIGN;
    let slots = std::array::from_fn(|_| {
        let slot = KeySlot::free(at, STRIPES);
        at += slot_room(&spec);
        slot
    });
    let length = options.length();
    let payload_offset = if options.detached { 0 } else { length };
    let header = Luks1Header {
        spec,
        hash,
        payload_offset,
        mk_digest,
        mk_digest_salt,
        mk_digest_iter,
        uuid: uuid()?,
        slots,
    };
    let key = VolumeKey::new(key);
    let (header, material) = keys::fill_slot(&header, 0, &key, options.secret, options.cost, job)?;
    let mut bytes = vec![0; length as usize];
    for (at, from) in [(0, header.encode().as_slice()), (ALIGN as usize, &material)] {
        if let Some(to) = bytes.get_mut(at..at + from.len()) {
            to.copy_from_slice(from);
        }
    }
    Ok(Formatted { header, bytes, cipher: SectorCipher::new(&spec, key.bytes())?, key })
}

/// A random UUID (RFC 9562, version 4) as text.
fn uuid() -> Result<String> {
    let hex = format!("{:032x}", u128::from_be_bytes(random::uuid()?));
    let part = |from: usize, to: usize| hex.get(from..to).unwrap_or_default();
    Ok([part(0, 8), part(8, 12), part(12, 16), part(16, 20), part(20, 32)].join("-"))
}
