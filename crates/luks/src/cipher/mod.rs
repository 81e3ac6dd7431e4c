//! Ciphers over sectors.

mod blocks;
mod iv;
mod modes;
mod spec;
mod twofish;
mod xts;

use std::fmt;

use ::cipher::{KeyInit, consts::U16};
use aes::{Aes128, Aes192, Aes256};
use cast5::Cast5;
use qcow2_core::storage::SectorCodec;
use qcow2_core::{Error, ErrorKind, Result};
use serpent::Serpent;
use zeroize::Zeroizing;

use self::blocks::BlockCipher;
use self::iv::IvSource;
use self::modes::{Cbc, Ctr, Ecb, Sectors};
pub use self::spec::{Cipher, CipherSpec, Iv, Mode};
use self::twofish::Twofish;
use self::xts::Xts;

/// Bytes of what sector numbers count.
pub const SECTOR: usize = 512;
/// The largest sector that is encrypted as one.
pub const MAX_SECTOR: usize = 4096;

/// A cipher over sectors, with its key: encrypts and decrypts in place.
pub struct SectorCipher {
    spec: CipherSpec,
    sector_size: usize,
    /// Added to the number of each sector.
    shift: u64,
    inner: Box<dyn Sectors>,
}

impl SectorCipher {
    /// The cipher for sectors of 512 bytes. `key` has [`CipherSpec::key_bytes`].
    ///
    /// # Errors
    /// `InvalidArgument` for a key of another length, `UnsupportedFeature` for what the spec combines and nothing can do.
    pub fn new(spec: &CipherSpec, key: &[u8]) -> Result<Self> {
        spec.check()?;
        if key.len() != spec.key_bytes() {
            let message = format!("{spec} takes a key of {} bytes, not {}", spec.key_bytes(), key.len());
            return Err(Error::new(ErrorKind::InvalidArgument, message).with_field("key-bytes"));
        }
        let iv = IvSource::new(spec, key)?;
        let inner = match spec.cipher {
            Cipher::Aes128 => wide::<Aes128>(spec.mode, iv, key),
            Cipher::Aes192 => wide::<Aes192>(spec.mode, iv, key),
            Cipher::Aes256 => wide::<Aes256>(spec.mode, iv, key),
            Cipher::Serpent128 | Cipher::Serpent192 | Cipher::Serpent256 => {
                wide::<Serpent>(spec.mode, iv, key)
            }
            Cipher::Twofish128 | Cipher::Twofish192 | Cipher::Twofish256 => {
                wide::<Twofish>(spec.mode, iv, key)
            }
            Cipher::Cast5 => any::<Cast5>(spec.mode, iv, key),
        }?;
        Ok(Self { spec: *spec, sector_size: SECTOR, shift: 0, inner })
    }

    /// The same cipher over sectors of `size` bytes, whose numbers go on counting 512 bytes, with `shift` added to each.
    ///
    /// # Errors
    /// `UnsupportedFeature` for sectors that are not 512, 1024, 2048 or 4096 bytes.
    pub fn with_sectors(self, size: usize, shift: u64) -> Result<Self> {
        if !size.is_power_of_two() || !(SECTOR..=MAX_SECTOR).contains(&size) {
            let message = format!("encrypted sectors of {size} bytes are not supported");
            return Err(Error::new(ErrorKind::UnsupportedFeature, message).with_field("sector_size"));
        }
        Ok(Self { sector_size: size, shift, ..self })
    }

    /// What it is.
    pub fn spec(&self) -> &CipherSpec {
        &self.spec
    }

    /// Bytes that are encrypted as one: every range begins and ends at a multiple of it.
    pub fn sector_size(&self) -> usize {
        self.sector_size
    }

    /// Encrypts whole sectors; the first one begins at `sector` times 512 bytes.
    ///
    /// # Panics
    /// For a part of a sector: what is left would be stored in clear.
    pub fn encrypt(&self, sector: u64, data: &mut [u8]) {
        assert!(data.len().is_multiple_of(self.sector_size), "whole sectors are encrypted");
        self.inner.encrypt(sector.wrapping_add(self.shift), self.sector_size, data);
    }

    /// Decrypts whole sectors; the first one begins at `sector` times 512 bytes.
    ///
    /// # Panics
    /// For a part of a sector.
    pub fn decrypt(&self, sector: u64, data: &mut [u8]) {
        assert!(data.len().is_multiple_of(self.sector_size), "whole sectors are decrypted");
        self.inner.decrypt(sector.wrapping_add(self.shift), self.sector_size, data);
    }
}

impl SectorCodec for SectorCipher {
    fn sector_size(&self) -> usize {
        self.sector_size
    }
    fn encode(&self, sector: u64, data: &mut [u8]) {
        self.encrypt(sector, data);
    }
    fn decode(&self, sector: u64, data: &mut [u8]) {
        self.decrypt(sector, data);
    }
}

impl fmt::Debug for SectorCipher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SectorCipher({}, sectors of {} bytes)", self.spec, self.sector_size)
    }
}

/// The cipher of qcow2 images with `crypt_method` 1: AES-128-CBC over the sectors of the guest. The key is the password, cut or filled
/// up with zeroes to 16 bytes.
///
/// # Errors
/// None that a password can cause.
pub fn legacy_aes(password: &[u8]) -> Result<SectorCipher> {
    let mut key = Zeroizing::new([0; 16]);
    for (to, from) in key.iter_mut().zip(password) {
        *to = *from;
    }
    SectorCipher::new(&CipherSpec { cipher: Cipher::Aes128, mode: Mode::Cbc, iv: Iv::Plain64 }, &*key)
}

/// What has blocks of 16 bytes goes with every mode.
fn wide<C: BlockCipher<BlockSize = U16>>(mode: Mode, iv: IvSource, key: &[u8]) -> Result<Box<dyn Sectors>> {
    if mode != Mode::Xts {
        return any::<C>(mode, iv, key);
    }
    let (data, tweak) = key.split_at(key.len() / 2);
    Ok(Box::new(Xts { data: keyed::<C>(data)?, tweak: keyed::<C>(tweak)?, iv }))
}

fn any<C: BlockCipher>(mode: Mode, iv: IvSource, key: &[u8]) -> Result<Box<dyn Sectors>> {
    let cipher = keyed::<C>(key)?;
    match mode {
        Mode::Cbc => Ok(Box::new(Cbc { cipher, iv })),
        Mode::Ctr => Ok(Box::new(Ctr { cipher, iv })),
        Mode::Ecb => Ok(Box::new(Ecb { cipher })),
        Mode::Xts => Err(Error::new(ErrorKind::UnsupportedFeature, "xts needs blocks of 16 bytes")
            .with_field("cipher-mode")),
    }
}

fn keyed<C: KeyInit>(key: &[u8]) -> Result<C> {
    C::new_from_slice(key).map_err(|_| {
        Error::new(ErrorKind::InvalidArgument, "a key of this length does not go with the cipher")
    })
}

#[cfg(test)]
mod tests;
