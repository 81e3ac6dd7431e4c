//! Guest operations, and sectors that carry their identity.
//!
//! Every written sector of 512 bytes says where it belongs and which operation wrote it, so that a sector that turns
//! up at another place, or comes back from the past, is seen for what it is.

use qcow2_engine::{Error, ErrorKind, Result};

use crate::Rng;

/// Bytes of a sector: the unit in which a disk tears.
pub const SECTOR: u64 = 512;

const PLACE: u64 = 0x7163_6f77_0000_0000;
const GENERATION: u64 = 0x6765_6e65_0000_0000;

/// What a sector contains.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Value {
    /// Zeroes.
    Zero,
    /// What the operation of this number wrote there.
    Written(u32),
}

/// What was found where a [`Value`] should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    /// A value of this place.
    Value(Value),
    /// The value of another sector.
    Stray {
        /// The sector it belongs to.
        sector: u64,
        /// The operation that wrote it.
        generation: u32,
    },
    /// No whole sector that was ever written; the first bytes of it.
    Garbage([u8; 16]),
}

/// Fills one sector with the bytes that operation `generation` writes to it. Three of four generations compress well.
pub fn stamp(sector: u64, generation: u32, out: &mut [u8]) {
    let (place, tag) = (PLACE | sector, GENERATION | u64::from(generation));
    let mut noise = (generation % 4 == 3).then(|| Rng::new(sector << 32 | u64::from(generation)));
    for (i, word) in out.chunks_exact_mut(8).enumerate() {
        let value = match (i, &mut noise) {
            (2.., Some(noise)) => noise.next_u64(),
            _ if i % 2 == 0 => place,
            _ => tag,
        };
        word.copy_from_slice(&value.to_le_bytes());
    }
}

/// The bytes that operation `generation` writes to a range, which need not begin or end with a sector.
pub fn stamped(offset: u64, len: u64, generation: u32) -> Vec<u8> {
    let first = offset / SECTOR;
    let mut out = vec![0; ((offset + len).div_ceil(SECTOR) - first) as usize * SECTOR as usize];
    for (i, sector) in out.chunks_exact_mut(SECTOR as usize).enumerate() {
        stamp(first + i as u64, generation, sector);
    }
    let skip = (offset % SECTOR) as usize;
    out.drain(..skip);
    out.truncate(len as usize);
    out
}

/// Says what the 512 bytes of a sector are.
pub fn identify(sector: u64, bytes: &[u8]) -> Found {
    let word = |i: usize| u64::from_le_bytes(bytes[i * 8..i * 8 + 8].try_into().unwrap());
    let (place, tag) = (word(0), word(1));
    if place == 0 && bytes.iter().all(|b| *b == 0) {
        return Found::Value(Value::Zero);
    }
    let (at, generation) = (place ^ PLACE, (tag & 0xffff_ffff) as u32);
    if place & !0xffff_ffff == PLACE && tag & !0xffff_ffff == GENERATION {
        let mut expected = [0; SECTOR as usize];
        stamp(at, generation, &mut expected);
        if expected == *bytes {
            return match at == sector {
                true => Found::Value(Value::Written(generation)),
                false => Found::Stray { sector: at, generation },
            };
        }
    }
    Found::Garbage(bytes[..16].try_into().unwrap())
}

/// What a guest does. Offsets, lengths and sizes are in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "the fields are what every operation has")]
pub enum Op {
    Write { offset: u64, len: u64 },
    Compressed { offset: u64, len: u64 },
    Zero { offset: u64, len: u64, unmap: bool },
    Discard { offset: u64, len: u64 },
    Read { offset: u64, len: u64 },
    Flush,
    Grow { size: u64 },
    Shrink { size: u64 },
    Reopen,
}

/// A disk that operations run on: an image of the engine, or a raw file.
#[allow(clippy::missing_errors_doc, reason = "every method fails as the engine's of the same name does")]
pub trait Target: Send + Sync {
    /// Size in bytes.
    fn size(&self) -> u64;
    /// Fills `out` from `offset`.
    fn read(&self, offset: u64, out: &mut [u8]) -> Result<()>;
    /// Writes `data`.
    fn write(&self, offset: u64, data: &[u8]) -> Result<()>;
    /// Writes whole clusters, compressed.
    fn write_compressed(&self, offset: u64, data: &[u8]) -> Result<()>;
    /// Makes a range read as zeroes.
    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> Result<()>;
    /// Gives a range up.
    fn discard(&self, offset: u64, len: u64) -> Result<()>;
    /// Makes everything completed durable.
    fn flush(&self) -> Result<()>;
    /// Extends the disk with zeroes.
    fn grow(&self, size: u64) -> Result<()>;
    /// Cuts the disk off.
    fn shrink(&self, size: u64) -> Result<()> {
        let message = format!("no disk of {size} bytes is made smaller");
        Err(Error::new(ErrorKind::UnsupportedFeature, message))
    }
    /// Flushes and gives back what was reserved.
    fn close(&self) -> Result<()>;
}

/// Which operations a sequence has, and on what.
#[derive(Debug, Clone)]
pub struct Menu {
    /// Cluster size in bytes: most ranges begin or end near its multiples.
    pub cluster: u64,
    /// Size of the disk in bytes at the start.
    pub size: u64,
    /// Granularity of ranges in bytes.
    pub granularity: u64,
    /// With compressed writes.
    pub compression: bool,
    /// With discards.
    pub discard: bool,
    /// With growing the disk.
    pub grow: bool,
    /// With making the disk smaller, which then grows as well.
    pub shrink: bool,
    /// With closing and opening again.
    pub reopen: bool,
    /// Most clusters that one range covers.
    pub span: u64,
}

impl Menu {
    /// Everything, in whole sectors.
    pub fn new(cluster: u64, size: u64) -> Self {
        Self {
            cluster,
            size,
            granularity: SECTOR,
            compression: true,
            discard: true,
            grow: true,
            shrink: false,
            reopen: true,
            span: 3,
        }
    }

    /// `count` operations of a seed.
    pub fn sequence(&self, seed: u64, count: usize) -> Vec<Op> {
        let mut rng = Rng::new(seed);
        let mut size = self.size;
        let mut hot = rng.below(size);
        (0..count)
            .map(|_| {
                if rng.below(8) == 0 {
                    hot = rng.below(size);
                }
                let op = self.draw(&mut rng, size, hot);
                if let Op::Grow { size: new } | Op::Shrink { size: new } = op {
                    size = new;
                }
                op
            })
            .collect()
    }

    fn draw(&self, rng: &mut Rng, size: u64, hot: u64) -> Op {
        let (offset, len) = self.range(rng, size, hot);
        let (first, last) =
            (offset / self.cluster * self.cluster, (offset + len).div_ceil(self.cluster) * self.cluster);
        match rng.below(100) {
            0..40 => Op::Write { offset, len },
            40..50 if self.compression => {
                // Whole clusters; the last one of the disk may be cut.
                let clusters = 1 + rng.below(2);
                Op::Compressed { offset: first, len: (clusters * self.cluster).min(size - first) }
            }
            50..62 => Op::Zero { offset, len, unmap: rng.below(2) == 0 },
            62..68 => Op::Zero { offset: first, len: last.min(size) - first, unmap: rng.below(2) == 0 },
            68..74 if self.discard => Op::Discard { offset, len },
            74..80 if self.discard => Op::Discard { offset: first, len: last.min(size) - first },
            80..86 => Op::Flush,
            86..90 if !self.shrink => Op::Flush,
            90..92 if self.shrink && size > self.size => {
                let less = 1 + rng.below(2 * self.cluster);
                Op::Shrink { size: (size - less.min(size / 2)).next_multiple_of(SECTOR) }
            }
            86..90 if self.shrink => {
                let less = 1 + rng.below(5 * self.cluster);
                Op::Shrink { size: (size - less.min(size / 2)).next_multiple_of(SECTOR) }
            }
            90..92 if self.grow => {
                let more = 1 + rng.below(3 * self.cluster);
                Op::Grow { size: (size + more).next_multiple_of(SECTOR) }
            }
            92..94 if self.reopen => Op::Reopen,
            94..98 => Op::Read { offset, len },
            _ => Op::Write { offset: first, len: last.min(size) - first },
        }
    }

    /// A range of the disk, never empty, mostly near the hot place.
    fn range(&self, rng: &mut Rng, size: u64, hot: u64) -> (u64, u64) {
        let grain = self.granularity;
        let near = match rng.below(4) {
            0 => rng.below(size),
            _ => (hot / self.cluster * self.cluster + rng.below(4 * self.cluster)) % size,
        };
        let near = if rng.below(4) == 0 { near / self.cluster * self.cluster } else { near };
        let offset = (near / grain * grain).min((size - 1) / grain * grain);
        let wanted = match rng.below(4) {
            0 => grain,
            1 => 1 + rng.below((self.cluster / 2).max(grain)),
            2 => self.cluster * (1 + rng.below(self.span)),
            _ => 1 + rng.below(self.cluster * self.span),
        };
        (offset, wanted.next_multiple_of(grain).min(size - offset))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sectors_know_where_they_belong() {
        let bytes = stamped(1024, 1024, 7);
        assert_eq!(identify(2, &bytes[..512]), Found::Value(Value::Written(7)));
        assert_eq!(identify(9, &bytes[512..]), Found::Stray { sector: 3, generation: 7 });
        let mut torn = bytes[..512].to_vec();
        torn[300] ^= 1;
        assert!(matches!(identify(2, &torn), Found::Garbage(_)));
        assert_eq!(identify(0, &[0; 512]), Found::Value(Value::Zero));
        assert_eq!(stamped(1030, 700, 7), bytes[6..706]);
    }

    #[test]
    fn sequences_stay_inside_the_disk() {
        let menu = Menu { granularity: 1, ..Menu::new(65536, 45 * 65536 + 512) };
        let mut size = menu.size;
        for op in menu.sequence(5, 5000) {
            match op {
                Op::Write { offset, len }
                | Op::Compressed { offset, len }
                | Op::Zero { offset, len, .. }
                | Op::Discard { offset, len }
                | Op::Read { offset, len } => assert!(len > 0 && offset + len <= size, "{op:?} of {size}"),
                Op::Grow { size: new } => {
                    assert!(new > size);
                    size = new;
                }
                Op::Flush | Op::Shrink { .. } | Op::Reopen => {}
            }
        }
    }
}
