//! XTS (IEEE 1619): each block is added to a tweak before and after it is encrypted; tweaks follow from the sector and the place in it.

use cipher::consts::U16;
use cipher::{
    Array, Block, BlockCipherDecBackend, BlockCipherDecClosure, BlockCipherEncBackend, BlockCipherEncClosure,
    BlockSizeUser, ParBlocks,
};

use super::blocks::BlockCipher;
use super::iv::IvSource;
use super::modes::{Sectors, step};
use super::{MAX_SECTOR, SECTOR};

const BLOCK: usize = 16;
/// Bytes whose tweaks are made at once: many blocks are encrypted side by side, and all of it stays in the first cache.
const GROUP: usize = MAX_SECTOR;

pub(super) struct Xts<C> {
    pub(super) data: C,
    pub(super) tweak: C,
    pub(super) iv: IvSource,
}

impl<C: BlockCipher<BlockSize = U16>> Xts<C> {
    fn run(&self, sector: u64, size: usize, data: &mut [u8], pass: impl Fn(Pass<'_>)) {
        if data.len() <= SECTOR {
            self.groups::<SECTOR>(sector, size, data, pass);
        } else {
            self.groups::<GROUP>(sector, size, data, pass);
        }
    }

    #[inline]
    fn groups<const GROUP: usize>(
        &self,
        mut sector: u64,
        size: usize,
        data: &mut [u8],
        pass: impl Fn(Pass<'_>),
    ) {
        let mut tweaks = [0; GROUP];
        let mut ivs = [0; MAX_SECTOR / SECTOR * BLOCK];
        for data in data.chunks_mut(GROUP / size * size) {
            let count = data.len() / size;
            let (ivs, _) = ivs.split_at_mut(count * BLOCK);
            let (tweaks, _) = tweaks.split_at_mut(data.len());
            self.iv.fill(sector, step(size), BLOCK, ivs);
            self.tweak.encrypt_all(ivs);
            pass(Pass { ivs, size, tweaks, data });
            sector = sector.wrapping_add(step(size) * count as u64);
        }
    }
}

impl<C: BlockCipher<BlockSize = U16>> Sectors for Xts<C> {
    fn encrypt(&self, sector: u64, size: usize, data: &mut [u8]) {
        self.run(sector, size, data, |pass| self.data.encrypt_with_backend(pass));
    }

    fn decrypt(&self, sector: u64, size: usize, data: &mut [u8]) {
        self.run(sector, size, data, |pass| self.data.decrypt_with_backend(pass));
    }
}

/// Some sectors with their encrypted vectors. What a cipher calls with its backend is compiled for the instructions of that backend, the
/// arithmetic of the tweaks too.
struct Pass<'a> {
    ivs: &'a [u8],
    size: usize,
    tweaks: &'a mut [u8],
    data: &'a mut [u8],
}

impl Pass<'_> {
    /// The tweaks of each sector's blocks: each is the one before, times x in the field of 2^128 elements.
    #[inline(always)]
    fn spread(&mut self) {
        let (ivs, _) = self.ivs.as_chunks::<BLOCK>();
        for (sector, iv) in self.tweaks.chunks_exact_mut(self.size).zip(ivs) {
            let tweak = u128::from_le_bytes(*iv);
            let (mut low, mut high) = (tweak as u64, (tweak >> 64) as u64);
            for block in sector.as_chunks_mut::<BLOCK>().0 {
                *block = (u128::from(high) << 64 | u128::from(low)).to_le_bytes();
                // x^128 is x^7 + x^2 + x + 1.
                let carry = 0x87 & 0_u64.wrapping_sub(high >> 63);
                high = high << 1 | low >> 63;
                low = low << 1 ^ carry;
            }
        }
    }
}

impl BlockSizeUser for Pass<'_> {
    type BlockSize = U16;
}

impl BlockCipherEncClosure for Pass<'_> {
    #[inline(always)]
    fn call<B: BlockCipherEncBackend<BlockSize = U16>>(mut self, backend: &B) {
        self.spread();
        let (blocks, rest): (&mut [ParBlocks<B>], _) =
            Array::slice_as_chunks_mut(Block::<B>::slice_as_chunks_mut(self.data).0);
        let (tweaks, last): (&mut [ParBlocks<B>], _) =
            Array::slice_as_chunks_mut(Block::<B>::slice_as_chunks_mut(self.tweaks).0);
        for (blocks, tweaks) in blocks.iter_mut().zip(tweaks) {
            xor_all(blocks, tweaks);
            backend.encrypt_par_blocks_inplace(blocks);
            xor_all(blocks, tweaks);
        }
        xor_all(rest, last);
        backend.encrypt_tail_blocks_inplace(rest);
        xor_all(rest, last);
    }
}

impl BlockCipherDecClosure for Pass<'_> {
    #[inline(always)]
    fn call<B: BlockCipherDecBackend<BlockSize = U16>>(mut self, backend: &B) {
        self.spread();
        let (blocks, rest): (&mut [ParBlocks<B>], _) =
            Array::slice_as_chunks_mut(Block::<B>::slice_as_chunks_mut(self.data).0);
        let (tweaks, last): (&mut [ParBlocks<B>], _) =
            Array::slice_as_chunks_mut(Block::<B>::slice_as_chunks_mut(self.tweaks).0);
        for (blocks, tweaks) in blocks.iter_mut().zip(tweaks) {
            xor_all(blocks, tweaks);
            backend.decrypt_par_blocks_inplace(blocks);
            xor_all(blocks, tweaks);
        }
        xor_all(rest, last);
        backend.decrypt_tail_blocks_inplace(rest);
        xor_all(rest, last);
    }
}

#[inline(always)]
fn xor_all(blocks: &mut [Array<u8, U16>], tweaks: &[Array<u8, U16>]) {
    for (block, tweak) in blocks.iter_mut().zip(tweaks) {
        block.0 = (u128::from_ne_bytes(block.0) ^ u128::from_ne_bytes(tweak.0)).to_ne_bytes();
    }
}
