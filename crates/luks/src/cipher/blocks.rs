//! Block ciphers, of whichever crate.

use cipher::{Array, BlockCipherDecrypt, BlockCipherEncrypt, KeyInit};

/// A block cipher that goes both ways.
pub(super) trait BlockCipher:
    BlockCipherEncrypt + BlockCipherDecrypt + KeyInit + Send + Sync + 'static
{
    /// Encrypts whole blocks in place, each for itself.
    fn encrypt_all(&self, data: &mut [u8]) {
        self.encrypt_blocks(Array::slice_as_chunks_mut(data).0);
    }

    /// Decrypts whole blocks in place, each for itself.
    fn decrypt_all(&self, data: &mut [u8]) {
        self.decrypt_blocks(Array::slice_as_chunks_mut(data).0);
    }
}

impl<C: BlockCipherEncrypt + BlockCipherDecrypt + KeyInit + Send + Sync + 'static> BlockCipher for C {}

/// Adds `from` to `to`, bit by bit.
#[inline(always)]
pub(super) fn xor(to: &mut [u8], from: &[u8]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to ^= from;
    }
}
