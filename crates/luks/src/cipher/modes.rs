//! How blocks make a sector: CBC, CTR, ECB.

use cipher::Block;

use super::blocks::{BlockCipher, xor};
use super::iv::IvSource;
use super::{MAX_SECTOR, SECTOR};

/// A cipher over sectors of `size` bytes, of which `data` is a whole number and begins with number `sector`.
pub(super) trait Sectors: Send + Sync {
    fn encrypt(&self, sector: u64, size: usize, data: &mut [u8]);
    fn decrypt(&self, sector: u64, size: usize, data: &mut [u8]);
}

/// The largest block.
const MAX_BLOCK: usize = 16;
/// Sectors that are encrypted side by side, where the blocks of one wait for each other.
const SIDE_BY_SIDE: usize = 8;

/// Sector numbers from one sector to the next.
pub(super) fn step(size: usize) -> u64 {
    (size / SECTOR) as u64
}

/// Each block is encrypted for itself: equal blocks stay equal.
pub(super) struct Ecb<C> {
    pub(super) cipher: C,
}

impl<C: BlockCipher> Sectors for Ecb<C> {
    fn encrypt(&self, _: u64, _: usize, data: &mut [u8]) {
        self.cipher.encrypt_all(data);
    }

    fn decrypt(&self, _: u64, _: usize, data: &mut [u8]) {
        self.cipher.decrypt_all(data);
    }
}

/// Each block is added to the one before, encrypted.
pub(super) struct Cbc<C> {
    pub(super) cipher: C,
    pub(super) iv: IvSource,
}

impl<C: BlockCipher> Sectors for Cbc<C> {
    fn encrypt(&self, mut sector: u64, size: usize, data: &mut [u8]) {
        let block = Block::<C>::default().len();
        let mut chain = [0; SIDE_BY_SIDE * MAX_BLOCK];
        for group in data.chunks_mut(SIDE_BY_SIDE * size) {
            let count = group.len() / size;
            let (chain, _) = chain.split_at_mut(count * block);
            self.iv.fill(sector, step(size), block, chain);
            for at in (0..size).step_by(block) {
                // One block of each sector: those wait for nobody.
                for (link, sector) in chain.chunks_mut(block).zip(group.chunks_mut(size)) {
                    xor(link, sector.get(at..).unwrap_or_default());
                }
                self.cipher.encrypt_all(chain);
                for (link, sector) in chain.chunks(block).zip(group.chunks_mut(size)) {
                    for (to, from) in sector.iter_mut().skip(at).zip(link) {
                        *to = *from;
                    }
                }
            }
            sector = sector.wrapping_add(step(size) * count as u64);
        }
    }

    fn decrypt(&self, mut sector: u64, size: usize, data: &mut [u8]) {
        let block = Block::<C>::default().len();
        // What a block is added to: the vector, then the ciphertext.
        let mut before = [0; MAX_SECTOR + MAX_BLOCK];
        for data in data.chunks_mut(size) {
            let (before, _) = before.split_at_mut(size + block);
            let (iv, blocks) = before.split_at_mut(block);
            self.iv.fill(sector, 0, block, iv);
            blocks.copy_from_slice(data);
            self.cipher.decrypt_all(data);
            xor(data, before);
            sector = sector.wrapping_add(step(size));
        }
    }
}

/// A counter is encrypted and added to the data: both ways are the same.
pub(super) struct Ctr<C> {
    pub(super) cipher: C,
    pub(super) iv: IvSource,
}

impl<C: BlockCipher> Sectors for Ctr<C> {
    fn encrypt(&self, mut sector: u64, size: usize, data: &mut [u8]) {
        let block = Block::<C>::default().len();
        let mut stream = [0; MAX_SECTOR];
        let mut first = [0; MAX_BLOCK];
        for data in data.chunks_mut(size) {
            let (stream, _) = stream.split_at_mut(size);
            // The counter is one number of the whole block, the high byte first.
            let (high, low) = first.split_at_mut(MAX_BLOCK - block);
            high.fill(0);
            self.iv.fill(sector, 0, block, low);
            let mut counter = u128::from_be_bytes(first);
            for piece in stream.chunks_mut(block) {
                let bytes = counter.to_be_bytes();
                let (_, low) = bytes.split_at(MAX_BLOCK - block);
                for (to, from) in piece.iter_mut().zip(low) {
                    *to = *from;
                }
                counter = counter.wrapping_add(1);
            }
            self.cipher.encrypt_all(stream);
            xor(data, stream);
            sector = sector.wrapping_add(step(size));
        }
    }

    fn decrypt(&self, sector: u64, size: usize, data: &mut [u8]) {
        self.encrypt(sector, size, data);
    }
}
