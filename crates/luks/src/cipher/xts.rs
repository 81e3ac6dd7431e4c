//! XTS (IEEE 1619): each block is added to a tweak before and after it is encrypted; tweaks follow from the sector and the place in it.

use cipher::consts::U16;

use super::MAX_SECTOR;
use super::blocks::{BlockCipher, xor};
use super::iv::IvSource;
use super::modes::{Sectors, step};

const BLOCK: usize = 16;
/// Bytes whose tweaks are made at once: many blocks are encrypted side by side, and all of it stays in the first cache.
const GROUP: usize = MAX_SECTOR;

pub(super) struct Xts<C> {
    pub(super) data: C,
    pub(super) tweak: C,
    pub(super) iv: IvSource,
}

impl<C: BlockCipher<BlockSize = U16>> Xts<C> {
    fn run(&self, mut sector: u64, size: usize, data: &mut [u8], pass: impl Fn(&mut [u8])) {
        let mut tweaks = [0; GROUP];
        let mut ivs = [0; GROUP / super::SECTOR * BLOCK];
        let group = GROUP / size * size;
        for data in data.chunks_mut(group) {
            let count = data.len() / size;
            let (ivs, _) = ivs.split_at_mut(count * BLOCK);
            let (tweaks, _) = tweaks.split_at_mut(data.len());
            self.iv.fill(sector, step(size), BLOCK, ivs);
            self.tweak.encrypt_all(ivs);
            let (ivs, _) = ivs.as_chunks::<BLOCK>();
            for (tweaks, iv) in tweaks.chunks_mut(size).zip(ivs) {
                spread(u128::from_le_bytes(*iv), tweaks);
            }
            xor(data, tweaks);
            pass(data);
            xor(data, tweaks);
            sector = sector.wrapping_add(step(size) * count as u64);
        }
    }
}

/// The tweaks of a sector's blocks: each is the one before, times x in the field of 2^128 elements.
fn spread(mut tweak: u128, out: &mut [u8]) {
    let (blocks, _) = out.as_chunks_mut::<BLOCK>();
    for block in blocks {
        *block = tweak.to_le_bytes();
        // x^128 is x^7 + x^2 + x + 1.
        tweak = (tweak << 1) ^ ((tweak >> 127) * 0x87);
    }
}

impl<C: BlockCipher<BlockSize = U16>> Sectors for Xts<C> {
    fn encrypt(&self, sector: u64, size: usize, data: &mut [u8]) {
        self.run(sector, size, data, |data| self.data.encrypt_all(data));
    }

    fn decrypt(&self, sector: u64, size: usize, data: &mut [u8]) {
        self.run(sector, size, data, |data| self.data.decrypt_all(data));
    }
}
