//! Where a sector's encryption begins: its initialization vector.

use aes::{Aes128, Aes192, Aes256};
use cipher::KeyInit;
use digest::Digest;
use qcow2_core::{Error, ErrorKind, Result};
use serpent::Serpent;
use zeroize::Zeroizing;

use super::blocks::BlockCipher;
use super::spec::{Cipher, CipherSpec, Iv};
use super::twofish::Twofish;
use crate::hash::with_hash;

/// Makes the vectors of sectors.
pub(super) enum IvSource {
    Zero,
    Plain,
    Plain64,
    Essiv(Box<dyn EncryptAll>),
}

/// A block cipher as ESSIV uses it.
pub(super) trait EncryptAll: Send + Sync {
    fn encrypt(&self, data: &mut [u8]);
}

impl<C: BlockCipher> EncryptAll for C {
    fn encrypt(&self, data: &mut [u8]) {
        self.encrypt_all(data);
    }
}

impl IvSource {
    /// ESSIV encrypts sector numbers with the hash of the key.
    pub(super) fn new(spec: &CipherSpec, key: &[u8]) -> Result<Self> {
        let hash = match spec.iv {
            Iv::None => return Ok(Self::Zero),
            Iv::Plain => return Ok(Self::Plain),
            Iv::Plain64 => return Ok(Self::Plain64),
            Iv::Essiv(hash) => hash,
        };
        let mut salt = Zeroizing::new(vec![0; hash.size()]);
        with_hash!(hash, D => salt.copy_from_slice(&D::digest(key)));
        Ok(Self::Essiv(match spec.essiv_cipher(hash)? {
            Cipher::Aes128 => keyed::<Aes128>(&salt)?,
            Cipher::Aes192 => keyed::<Aes192>(&salt)?,
            Cipher::Aes256 => keyed::<Aes256>(&salt)?,
            Cipher::Serpent128 | Cipher::Serpent192 | Cipher::Serpent256 => keyed::<Serpent>(&salt)?,
            Cipher::Twofish128 | Cipher::Twofish192 | Cipher::Twofish256 => keyed::<Twofish>(&salt)?,
            Cipher::Cast5 => keyed::<cast5::Cast5>(&salt)?,
        }))
    }

    /// The vectors of sectors that lie `step` sector numbers apart, each as long as a block.
    pub(super) fn fill(&self, sector: u64, step: u64, block: usize, out: &mut [u8]) {
        let mut sector = sector;
        for iv in out.chunks_mut(block.max(1)) {
            let number = match self {
                Self::Zero => 0,
                Self::Plain => sector & u64::from(u32::MAX),
                Self::Plain64 | Self::Essiv(_) => sector,
            };
            iv.fill(0);
            for (to, from) in iv.iter_mut().zip(number.to_le_bytes()) {
                *to = from;
            }
            sector = sector.wrapping_add(step);
        }
        if let Self::Essiv(cipher) = self {
            cipher.encrypt(out);
        }
    }
}

fn keyed<C: BlockCipher + KeyInit>(salt: &[u8]) -> Result<Box<dyn EncryptAll>> {
    let cipher = C::new_from_slice(salt)
        .map_err(|_| Error::new(ErrorKind::Internal, "essiv with a digest that is no key"))?;
    Ok(Box::new(cipher))
}
