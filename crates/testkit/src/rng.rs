//! A small deterministic generator: a failing seed in a message is enough to repeat a test.

/// xorshift64*.
#[derive(Debug, Clone)]
pub struct Rng(u64);

impl Rng {
    /// A generator; equal seeds give equal sequences.
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// The next 64 bits.
    pub fn next_u64(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A value below `bound`, which must not be 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.next_u64() % bound
    }

    /// `len` incompressible bytes.
    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut out: Vec<u8> = Vec::with_capacity(len + 8);
        while out.len() < len {
            out.extend_from_slice(&self.next_u64().to_le_bytes());
        }
        out.truncate(len);
        out
    }

    /// `len` bytes that compress to roughly a third: words from a small vocabulary.
    pub fn text(&mut self, len: usize) -> Vec<u8> {
        const WORDS: [&str; 8] =
            ["cluster ", "table ", "guest ", "offset ", "entry\n", "block ", "chain ", "zero "];
        let mut out: Vec<u8> = Vec::with_capacity(len + 16);
        while out.len() < len {
            let draw = self.next_u64();
            out.extend_from_slice(WORDS[(draw % 8) as usize].as_bytes());
            out.push((draw >> 32) as u8);
        }
        out.truncate(len);
        out
    }
}
