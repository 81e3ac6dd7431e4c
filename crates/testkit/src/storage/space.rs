//! A file system with so much space.

use std::collections::BTreeSet;
use std::io;
use std::ops::Range;

use parking_lot::Mutex;
use qcow2_engine::{MemMut, Storage, StorageExt};

use super::Op;
use super::hooked::Before;

const ENOSPC: i32 = 28;
const BLOCK: u64 = 4096;

/// The blocks of one file, of which there are so many: holes have none.
#[derive(Debug, Default)]
pub struct Space {
    used: Mutex<BTreeSet<u64>>,
    most: Mutex<Option<usize>>,
}

impl Space {
    /// Those of a file as it is, where blocks of zeroes are holes.
    pub fn of(file: &dyn Storage) -> Self {
        let mut bytes = vec![0; file.size().unwrap() as usize];
        file.read_exact_at(MemMut::from(&mut bytes[..]), 0).unwrap();
        let blocks = (0..).zip(bytes.chunks(BLOCK as usize));
        let used = blocks.filter(|(_, block)| block.iter().any(|&b| b != 0)).map(|(number, _)| number);
        Self { used: Mutex::new(used.collect()), most: Mutex::default() }
    }

    /// From here on there are `more` blocks left.
    pub fn fill_up(&self, more: usize) {
        *self.most.lock() = Some(self.used.lock().len() + more);
    }
}

impl Before for Space {
    fn before(&self, op: Op, range: Range<u64>) -> io::Result<()> {
        let mut used = self.used.lock();
        match op {
            Op::Write | Op::Allocate => {
                let blocks = range.start / BLOCK..range.end.div_ceil(BLOCK);
                let new: Vec<u64> = blocks.filter(|block| !used.contains(block)).collect();
                if self.most.lock().is_some_and(|most| used.len() + new.len() > most) {
                    return Err(io::Error::from_raw_os_error(ENOSPC));
                }
                used.extend(new);
            }
            Op::Zero | Op::Discard => {
                let inner = range.start.div_ceil(BLOCK)..range.end / BLOCK;
                used.retain(|block| !inner.contains(block));
            }
            Op::SetLen => used.retain(|block| block * BLOCK < range.start),
            _ => {}
        }
        Ok(())
    }
}

/// The host clusters of an image of 64 KiB clusters and refcounts of 16 bits that nothing uses, below the end of what one
/// refcount block counts.
pub fn free_clusters(image: &[u8]) -> Vec<u64> {
    let word = |at: usize| u64::from_be_bytes(image[at..at + 8].try_into().unwrap());
    let table = word(48) as usize;
    let block = word(table) as usize;
    let clusters = image.len().div_ceil(64 << 10);
    let count = |cluster: &usize| {
        let at = block + 2 * cluster;
        u16::from_be_bytes([image[at], image[at + 1]])
    };
    (0..clusters).filter(|cluster| count(cluster) == 0).map(|cluster| cluster as u64).collect()
}
