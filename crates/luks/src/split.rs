//! The anti-forensic split: a key is spread over many stripes, so that overwriting any of them destroys it.

use digest::Digest;
use qcow2_core::{Error, ErrorKind, Result};
use zeroize::Zeroizing;

use crate::Hash;
use crate::hash::with_hash;

/// `key` as stripes, of which all but the last are random.
pub(crate) fn split(hash: Hash, key: &[u8], stripes: u32) -> Result<Zeroizing<Vec<u8>>> {
    let mut out = Zeroizing::new(vec![0; key.len() * stripes as usize]);
    let at = out.len().checked_sub(key.len()).ok_or_else(|| Error::new(ErrorKind::Internal, "no stripes"))?;
    let (random, last) = out.split_at_mut(at);
    qcow2_core::random::fill(random)?;
    let sum = diffused_sum(hash, random, key.len());
    for ((to, sum), key) in last.iter_mut().zip(sum.iter()).zip(key) {
        *to = sum ^ key;
    }
    Ok(out)
}

/// The key of `len` bytes that these stripes are made of.
pub(crate) fn merge(hash: Hash, stripes: &[u8], len: usize) -> Zeroizing<Vec<u8>> {
    let (front, last) = stripes.split_at(stripes.len().saturating_sub(len));
    let mut key = diffused_sum(hash, front, len);
    for (to, from) in key.iter_mut().zip(last) {
        *to ^= from;
    }
    key
}

/// Every stripe is added to the sum, and the sum spread by the hash.
fn diffused_sum(hash: Hash, stripes: &[u8], len: usize) -> Zeroizing<Vec<u8>> {
    let mut sum = Zeroizing::new(vec![0; len]);
    for stripe in stripes.chunks(len.max(1)) {
        for (to, from) in sum.iter_mut().zip(stripe) {
            *to ^= from;
        }
        with_hash!(hash, D => diffuse::<D>(&mut sum));
    }
    sum
}

/// Each piece of a digest's size becomes the digest of its number and itself; the last one may be shorter.
fn diffuse<D: Digest>(bytes: &mut [u8]) {
    for (number, piece) in (0_u32..).zip(bytes.chunks_mut(<D as Digest>::output_size())) {
        let digest = D::new().chain_update(number.to_be_bytes()).chain_update(&*piece).finalize();
        for (to, from) in piece.iter_mut().zip(digest) {
            *to = from;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_comes_out_of_its_stripes_with_every_hash() {
        for hash in Hash::ALL {
            for len in [16, 24, 32, 48, 64] {
                let key: Vec<u8> = (0..len).collect();
                let mut stripes = split(hash, &key, 13).unwrap();
                assert_eq!(*merge(hash, &stripes, key.len()), key, "{hash:?} {len}");
                stripes[5] ^= 1;
                assert_ne!(*merge(hash, &stripes, key.len()), key, "{hash:?} {len}");
            }
        }
    }
}
