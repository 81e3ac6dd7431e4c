//! Guest bytes that are stored as something else: what a cipher does to them, without a key.

use std::collections::BTreeSet;
use std::sync::Arc;

use qcow2_engine::storage::{SectorCodec, Sectors};
use qcow2_engine::{DataDoor, Storage};

use crate::Sparse;
use crate::forge::{COMPRESSED, field};

/// The offset in an L1 or L2 entry.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// Bytes that are scrambled as a whole.
const SECTOR: usize = 512;

/// A door that scrambles each sector by its number in the file. No zero byte of the guest's is one in the file, and the other way
/// round; a sector that is read at another place, or of which a part was written by itself, is garbage.
#[derive(Debug, Clone, Copy, Default)]
pub struct Scrambling;

impl Scrambling {
    /// The door, as options have it.
    pub fn door() -> Option<Arc<dyn DataDoor>> {
        Some(Arc::new(Self))
    }
}

impl DataDoor for Scrambling {
    fn open(&self, host: Arc<dyn Storage>) -> Arc<dyn Storage> {
        Arc::new(Sectors::new(host, Arc::new(*self)))
    }
}

impl SectorCodec for Scrambling {
    fn encode(&self, sector: u64, data: &mut [u8]) {
        scramble(data, sector * SECTOR as u64);
    }
    fn decode(&self, sector: u64, data: &mut [u8]) {
        unscramble(data, sector * SECTOR as u64);
    }
}

/// Turns guest bytes into those of the file, where the first is at `offset`: whole sectors.
pub fn scramble(bytes: &mut [u8], offset: u64) {
    each_sector(bytes, offset, |sector, key| {
        sector.reverse();
        sector.iter_mut().zip(key).for_each(|(byte, key)| *byte ^= key);
    });
}

/// As `scramble`, the other way.
pub fn unscramble(bytes: &mut [u8], offset: u64) {
    each_sector(bytes, offset, |sector, key| {
        sector.iter_mut().zip(key).for_each(|(byte, key)| *byte ^= key);
        sector.reverse();
    });
}

/// A plain image as it would be behind the door: each standard cluster that an L2 table refers to is scrambled.
pub fn scrambled_image(plain: &Sparse) -> Sparse {
    let mut file = plain.clone();
    let cluster = 1u64 << plain.u32(field::CLUSTER_BITS);
    let extended =
        plain.u32(field::VERSION) >= 3 && plain.u64(field::INCOMPATIBLE) & field::INCOMPAT_EXTENDED_L2 != 0;
    let width = if extended { 16 } else { 8 };
    let mut hosts = BTreeSet::new();
    for (l1, entries) in l1_tables(plain) {
        for table in (0..entries).map(|n| plain.u64(l1 + n * 8) & OFFSET).filter(|table| *table != 0) {
            let words = (0..cluster / width).map(|n| plain.u64(table + n * width));
            hosts.extend(words.filter(|word| word & COMPRESSED == 0).map(|word| word & OFFSET));
        }
    }
    for host in hosts.into_iter().filter(|host| *host != 0) {
        let mut bytes = plain.get(host, cluster as usize);
        scramble(&mut bytes, host);
        file.write(host, &bytes);
    }
    file
}

/// Place and length of the active L1 table and of each snapshot's.
fn l1_tables(file: &Sparse) -> Vec<(u64, u64)> {
    let mut tables = vec![(file.u64(field::L1_OFFSET), u64::from(file.u32(field::L1_SIZE)))];
    let mut at = file.u64(field::SNAPSHOTS_OFFSET);
    for _ in 0..file.u32(field::SNAPSHOTS) {
        tables.push((file.u64(at), u64::from(file.u32(at + 8))));
        let names = file.u32(at + 12);
        let length = 40 + file.u32(at + 36) + (names >> 16) + (names & 0xffff);
        at = (at + u64::from(length)).next_multiple_of(8);
    }
    tables
}

fn each_sector(bytes: &mut [u8], offset: u64, change: impl Fn(&mut [u8], [u8; SECTOR])) {
    assert!(offset.is_multiple_of(SECTOR as u64) && bytes.len().is_multiple_of(SECTOR), "whole sectors");
    for (number, sector) in (offset / SECTOR as u64..).zip(bytes.chunks_exact_mut(SECTOR)) {
        change(sector, key(number));
    }
}

/// Bytes that are never 0, of each sector its own.
fn key(sector: u64) -> [u8; SECTOR] {
    let mut key = [0; SECTOR];
    let mut state = sector.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0xd1b5_4a32_d192_ed03;
    for word in key.chunks_exact_mut(8) {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        let mixed = state.wrapping_mul(0x2545_f491_4f6c_dd1d) | 0x0101_0101_0101_0101;
        word.copy_from_slice(&mixed.to_le_bytes());
    }
    key
}

#[cfg(test)]
mod tests {
    use qcow2_engine::storage::MemoryStorage;
    use qcow2_engine::{Mem, MemMut};

    use super::*;

    #[test]
    fn sectors_are_scrambled_by_their_place_and_parts_of_them_are_kept() {
        let host = Arc::new(MemoryStorage::new());
        let door = Scrambling.open(host.clone());
        let plain: Vec<u8> = (0..2048u32).map(|n| (n / 7) as u8).collect();
        door.write_at(Mem::from(&plain[..]), 512).unwrap();
        door.write_at(Mem::from(&[9; 700][..]), 1000).unwrap();
        door.write_zeroes(1300, 600, true).unwrap();
        let mut expected = vec![0; 512];
        expected.extend_from_slice(&plain);
        expected[1000..1700].fill(9);
        expected[1300..1900].fill(0);
        let mut found = vec![1; 3000];
        assert_eq!(door.read_at(MemMut::from(&mut found[..]), 3).unwrap(), 2557);
        assert!(found[509..2557] == expected[512..]);
        let stored = host.to_vec();
        assert!(found[..509].iter().all(|byte| *byte != 0), "a hole of the file is no zero");
        assert!(stored[1536..1792].iter().all(|byte| *byte != 0), "a zero is none in the file");
        assert!(stored[512..1024] != stored[1024..1536]);
    }
}
