//! Twofish, with tables that depend on the key: the four of them are made once, and a round looks eight words up.

use cipher::consts::{U1, U16, U32};
use cipher::inout::InOut;
use cipher::{
    Block, BlockCipherDecBackend, BlockCipherDecClosure, BlockCipherDecrypt, BlockCipherEncBackend,
    BlockCipherEncClosure, BlockCipherEncrypt, BlockSizeUser, InvalidLength, Key, KeyInit, KeySizeUser,
    ParBlocksSizeUser,
};
use zeroize::{Zeroize, Zeroizing};

const ROUNDS: usize = 16;
/// The polynomials of the two fields.
const MDS_FIELD: u16 = 0x169;
const RS_FIELD: u16 = 0x14d;
/// What spreads the bytes of a word.
const MDS: [[u8; 4]; 4] =
    [[0x01, 0xef, 0x5b, 0x5b], [0x5b, 0xef, 0xef, 0x01], [0xef, 0x5b, 0x01, 0xef], [0xef, 0x01, 0xef, 0x5b]];
/// What makes words of the tables of a key.
const RS: [[u8; 8]; 4] = [
    [0x01, 0xa4, 0x55, 0x87, 0x5a, 0x58, 0xdb, 0x9e],
    [0xa4, 0x56, 0x82, 0xf3, 0x1e, 0xc6, 0x68, 0xe5],
    [0x02, 0xa1, 0xfc, 0xc1, 0x47, 0xae, 0x3d, 0x19],
    [0xa4, 0x55, 0x87, 0x5a, 0x58, 0xdb, 0x9e, 0x03],
];
/// The two fixed permutations of bytes, each made of four permutations of half bytes.
const HALVES: [[u64; 4]; 2] = [
    [0x817d_6f32_0b59_eca4, 0xecb8_1235_f4a6_709d, 0xba5e_6d90_c8f3_2471, 0xd7f4_126e_9b30_85ca],
    [0x28bd_f76e_3194_0ac5, 0x1e2b_4c37_6da5_f908, 0x4c75_169a_0ed8_2b3f, 0xb951_c3de_647f_208a],
];
/// Which permutation each byte of a word passes, first that of the fourth word of a key with 256 bits.
const ORDER: [[usize; 5]; 4] = [[1, 1, 0, 0, 1], [0, 1, 1, 0, 0], [0, 0, 0, 1, 1], [1, 0, 1, 1, 0]];

/// A key, with what is made of it.
pub(super) struct Twofish {
    tables: Box<[[u32; 256]; 4]>,
    /// Added in front of the first round and behind the last one.
    white: [[u32; 4]; 2],
    rounds: [[u32; 2]; ROUNDS],
}

impl Drop for Twofish {
    fn drop(&mut self) {
        self.tables.zeroize();
        self.white.zeroize();
        self.rounds.zeroize();
    }
}

/// A product in a field of 256 elements.
fn product(mut a: u8, mut b: u8, field: u16) -> u8 {
    let mut sum = 0;
    while a != 0 {
        if a & 1 == 1 {
            sum ^= b;
        }
        let carry = if b & 0x80 == 0 { 0 } else { (field & 0xff) as u8 };
        b = (b << 1) ^ carry;
        a >>= 1;
    }
    sum
}

/// One of the two permutations.
fn permuted(which: usize, byte: u8) -> u8 {
    let halves = HALVES.get(which).copied().unwrap_or_default();
    let look = |table: u64, at: u8| ((table >> (60 - 4 * u32::from(at & 15))) & 15) as u8;
    let mix = |a: u8, b: u8| (a ^ b, (a ^ ((b >> 1) | (b << 3)) ^ (a << 3)) & 15);
    let (a, b) = mix(byte >> 4, byte & 15);
    let (a, b) = mix(look(halves[0], a), look(halves[1], b));
    look(halves[3], b) << 4 | look(halves[2], a)
}

/// A byte at a place of a word, through the permutations and the words (those of highest number first), then spread.
fn spread(place: usize, byte: u8, words: &[[u8; 4]]) -> u32 {
    let order = ORDER.get(place).copied().unwrap_or_default();
    let order = order.get(4_usize.saturating_sub(words.len())..).unwrap_or_default();
    let mut value = byte;
    for (which, word) in order.iter().zip(words.iter().rev().map(Some).chain([None])) {
        value = permuted(*which, value) ^ word.and_then(|word| word.get(place)).copied().unwrap_or_default();
    }
    u32::from_le_bytes(MDS.map(|row| product(row.get(place).copied().unwrap_or_default(), value, MDS_FIELD)))
}

impl KeySizeUser for Twofish {
    type KeySize = U32;
}

impl KeyInit for Twofish {
    fn new(key: &Key<Self>) -> Self {
        Self::expand(key)
    }

    fn new_from_slice(key: &[u8]) -> Result<Self, InvalidLength> {
        if matches!(key.len(), 16 | 24 | 32) { Ok(Self::expand(key)) } else { Err(InvalidLength) }
    }
}

impl Twofish {
    fn expand(key: &[u8]) -> Self {
        let words = key.as_chunks::<4>().0;
        let even: Zeroizing<Vec<[u8; 4]>> = Zeroizing::new(words.iter().step_by(2).copied().collect());
        let odd: Zeroizing<Vec<[u8; 4]>> = Zeroizing::new(words.iter().skip(1).step_by(2).copied().collect());
        let of_tables = |half: &[u8; 8]| {
            RS.map(|row| row.iter().zip(half).fold(0, |sum, (a, b)| sum ^ product(*a, *b, RS_FIELD)))
        };
        // The last piece of the key goes in first.
        let of_tables: Zeroizing<Vec<[u8; 4]>> =
            Zeroizing::new(key.as_chunks::<8>().0.iter().rev().map(of_tables).collect());
        let mut tables = Box::new([[0; 256]; 4]);
        for (place, table) in tables.iter_mut().enumerate() {
            for (byte, entry) in (0..=u8::MAX).zip(table.iter_mut()) {
                *entry = spread(place, byte, &of_tables);
            }
        }
        let word =
            |byte: u8, words: &[[u8; 4]]| (0..4).fold(0, |sum, place| sum ^ spread(place, byte, words));
        let pair = |number: usize| {
            let a = word(2 * number as u8, &even);
            let b = word(2 * number as u8 + 1, &odd).rotate_left(8);
            [a.wrapping_add(b), a.wrapping_add(b.wrapping_mul(2)).rotate_left(9)]
        };
        let four = |number: usize| {
            let ([a, b], [c, d]) = (pair(number), pair(number + 1));
            [a, b, c, d]
        };
        Self { tables, white: [four(0), four(2)], rounds: std::array::from_fn(|round| pair(round + 4)) }
    }

    #[inline(always)]
    fn word(&self, word: u32) -> u32 {
        let look = |table: &[u32; 256], byte: u8| table.get(usize::from(byte)).copied().unwrap_or_default();
        let [a, b, c, d] = word.to_le_bytes();
        let [ta, tb, tc, td] = &*self.tables;
        look(ta, a) ^ look(tb, b) ^ look(tc, c) ^ look(td, d)
    }

    /// What a round adds to the other half.
    #[inline(always)]
    fn round(&self, a: u32, b: u32, [first, second]: [u32; 2]) -> (u32, u32) {
        let (a, b) = (self.word(a), self.word(b.rotate_left(8)));
        (a.wrapping_add(b).wrapping_add(first), a.wrapping_add(b.wrapping_mul(2)).wrapping_add(second))
    }
}

fn load(block: &[u8], white: [u32; 4]) -> [u32; 4] {
    let mut words = white;
    for (word, bytes) in words.iter_mut().zip(block.as_chunks::<4>().0) {
        *word ^= u32::from_le_bytes(*bytes);
    }
    words
}

fn store(words: [u32; 4], white: [u32; 4], block: &mut [u8]) {
    for ((bytes, word), white) in block.as_chunks_mut::<4>().0.iter_mut().zip(words).zip(white) {
        *bytes = (word ^ white).to_le_bytes();
    }
}

impl BlockSizeUser for Twofish {
    type BlockSize = U16;
}

impl ParBlocksSizeUser for Twofish {
    type ParBlocksSize = U1;
}

impl BlockCipherEncBackend for Twofish {
    #[inline]
    fn encrypt_block(&self, mut block: InOut<'_, '_, Block<Self>>) {
        let [mut a, mut b, mut c, mut d] = load(block.get_in(), self.white[0]);
        for keys in &self.rounds {
            let (first, second) = self.round(a, b, *keys);
            (a, b, c, d) = ((c ^ first).rotate_right(1), d.rotate_left(1) ^ second, a, b);
        }
        store([c, d, a, b], self.white[1], block.get_out());
    }
}

impl BlockCipherDecBackend for Twofish {
    #[inline]
    fn decrypt_block(&self, mut block: InOut<'_, '_, Block<Self>>) {
        let [mut c, mut d, mut a, mut b] = load(block.get_in(), self.white[1]);
        for keys in self.rounds.iter().rev() {
            let (first, second) = self.round(c, d, *keys);
            (a, b, c, d) = (c, d, a.rotate_left(1) ^ first, (b ^ second).rotate_right(1));
        }
        store([a, b, c, d], self.white[0], block.get_out());
    }
}

impl BlockCipherEncrypt for Twofish {
    fn encrypt_with_backend(&self, f: impl BlockCipherEncClosure<BlockSize = U16>) {
        f.call(self);
    }
}

impl BlockCipherDecrypt for Twofish {
    fn decrypt_with_backend(&self, f: impl BlockCipherDecClosure<BlockSize = U16>) {
        f.call(self);
    }
}

#[cfg(test)]
mod tests {
    use super::super::blocks::BlockCipher;
    use super::*;

    /// Against the crate `twofish`, which looks nothing up and is many times slower.
    #[test]
    fn every_key_size_agrees_with_another_implementation() {
        for len in [16, 24, 32] {
            for seed in 0..20_u8 {
                let key: Vec<u8> = (0..len)
                    .map(|at: u8| at.wrapping_mul(seed.wrapping_mul(29)).wrapping_add(seed))
                    .collect();
                let (ours, theirs) = (
                    Twofish::new_from_slice(&key).unwrap(),
                    ::twofish::Twofish::new_from_slice(&key).unwrap(),
                );
                let plain = Block::<Twofish>::from([seed.wrapping_mul(17); 16]);
                let (mut a, mut b) = (plain, plain);
                ours.encrypt_all(&mut a);
                theirs.encrypt_all(&mut b);
                assert_eq!(a, b, "{len} {seed}");
                ours.decrypt_all(&mut a);
                assert_eq!(a, plain, "{len} {seed}");
            }
        }
    }
}
