//! Which parts of the file are in use: where new blocks go.

use std::collections::VecDeque;
use std::sync::Arc;

use qcow2_core::layer::Pin;
use qcow2_core::{Error, ErrorKind, Result};

use crate::structures::MIB;

/// Places of former blocks that are remembered to be used again: the space of more is given back all the same.
const MOST_FREE: usize = 1 << 16;

/// A set of parts of the file, in MiB.
#[derive(Debug, Default)]
pub(crate) struct Used(Vec<u64>);

impl Used {
    /// Nothing, in a file of `length` bytes.
    pub(crate) fn new(length: u64) -> Self {
        Self(vec![0; (length.div_ceil(MIB) / 64 + 1) as usize])
    }

    fn is_set(&self, at: u64) -> bool {
        self.0.get((at / 64) as usize).is_some_and(|word| word >> (at % 64) & 1 == 1)
    }

    /// Adds `start..end`, in bytes; what lies behind the file is left out. `false` where some of it was in already.
    pub(crate) fn add(&mut self, start: u64, end: u64) -> bool {
        let mut is_new = true;
        for at in start / MIB..end.div_ceil(MIB).min(self.0.len() as u64 * 64) {
            is_new &= !self.is_set(at);
            if let Some(word) = self.0.get_mut((at / 64) as usize) {
                *word |= 1 << (at % 64);
            }
        }
        is_new
    }

    /// Places for blocks of `size` bytes that are free, in a file of `length` bytes, in their order.
    pub(crate) fn free(&self, size: u64, length: u64) -> impl Iterator<Item = u64> {
        let (blocks, end) = (size / MIB, length / MIB);
        let mut at = 0;
        std::iter::from_fn(move || {
            let mut run = 0;
            while at < end {
                run = if self.is_set(at) { 0 } else { run + 1 };
                at += 1;
                if run == blocks {
                    return Some((at - blocks) * MIB);
                }
            }
            None
        })
    }
}

/// A place for a new block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Room {
    pub(crate) offset: u64,
    /// The file has to be made longer for it. Others hold the bytes of something else.
    pub(crate) is_new: bool,
}

/// Places for blocks.
#[derive(Debug)]
pub(crate) struct Space {
    block_size: u64,
    /// Where the file ends, or will.
    end: u64,
    /// The file cannot be made longer.
    fixed: bool,
    free: VecDeque<u64>,
    /// Blocks whose entries were changed since the last time that entries became durable.
    given_up: Vec<u64>,
    /// Blocks that no entry in the file has any more, and that somebody may still read, by the requests that may: oldest first.
    leaving: VecDeque<(Pin, Vec<u64>)>,
    pin: Pin,
}

impl Space {
    pub(crate) fn new(used: &Used, block_size: u64, length: u64, fixed: bool) -> Self {
        let free = used.free(block_size, length).take(MOST_FREE).collect();
        Self {
            block_size,
            end: length,
            fixed,
            free,
            given_up: Vec::new(),
            leaving: VecDeque::new(),
            pin: Arc::default(),
        }
    }

    /// To be held from before a plan until its places are not used any more.
    pub(crate) fn pin(&self) -> Pin {
        Arc::clone(&self.pin)
    }

    /// Takes a place for a block.
    pub(crate) fn take(&mut self) -> Result<Room> {
        if let Some(offset) = self.free.pop_front() {
            return Ok(Room { offset, is_new: false });
        }
        let offset = self.end.next_multiple_of(MIB);
        let end = offset.checked_add(self.block_size).filter(|end| *end <= i64::MAX as u64 && !self.fixed);
        let Some(end) = end else {
            let message = format!(
                "there is no room for another block: the file cannot be longer than {} bytes",
                self.end
            );
            return Err(Error::new(ErrorKind::Limit, message));
        };
        self.end = end;
        Ok(Room { offset, is_new: true })
    }

    /// Takes `length` bytes at the end of the file.
    pub(crate) fn take_at_end(&mut self, length: u64) -> Result<u64> {
        let offset = self.end.next_multiple_of(MIB);
        if self.fixed {
            return Err(Error::new(ErrorKind::Limit, "the file cannot be made longer"));
        }
        self.end = offset + length;
        Ok(offset)
    }

    /// Nothing was stored there after all.
    pub(crate) fn put_back(&mut self, room: Room) {
        self.free.push_back(room.offset);
    }

    /// The entry of this block was changed: it is free when that is durable, and nobody reads it any more.
    pub(crate) fn give_up(&mut self, offset: u64) {
        self.given_up.push(offset);
    }

    /// Blocks that were given up until now. Take them before the entries that are made durable.
    pub(crate) fn take_given_up(&mut self) -> Vec<u64> {
        std::mem::take(&mut self.given_up)
    }

    /// Their entries were not made durable.
    pub(crate) fn keep_given_up(&mut self, blocks: Vec<u64>) {
        self.given_up.extend(blocks);
    }

    /// Their entries are durable: from now on no plan has them.
    pub(crate) fn leave(&mut self, blocks: Vec<u64>) {
        if !blocks.is_empty() {
            let pin = std::mem::take(&mut self.pin);
            self.leaving.push_back((pin, blocks));
        }
    }

    /// Blocks that nobody reads any more: they are free when their space was given back, see [`Space::freed`].
    pub(crate) fn left(&mut self) -> Vec<u64> {
        let mut left = Vec::new();
        while let Some((pin, _)) = self.leaving.front()
            && Arc::strong_count(pin) == 1
            && let Some((_, blocks)) = self.leaving.pop_front()
        {
            left.extend(blocks);
        }
        left
    }

    /// These can be used again.
    pub(crate) fn freed(&mut self, blocks: Vec<u64>) {
        let room = MOST_FREE.saturating_sub(self.free.len());
        self.free.extend(blocks.into_iter().take(room));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_are_found_and_overlaps_told() {
        let mut used = Used::new(100 * MIB);
        assert!(used.add(0, 2 * MIB) && used.add(4 * MIB, 4 * MIB + 1) && used.add(70 * MIB, 80 * MIB));
        assert!(!used.add(79 * MIB, 90 * MIB));
        assert!(used.add(99 * MIB, 1 << 50));
        assert_eq!(used.free(2 * MIB, 10 * MIB).collect::<Vec<_>>(), [2 * MIB, 5 * MIB, 7 * MIB]);
        assert_eq!(used.free(32 * MIB, 100 * MIB).collect::<Vec<_>>(), [5 * MIB, 37 * MIB]);
    }

    #[test]
    fn a_block_is_used_again_when_it_is_durable_and_nobody_reads_it() {
        let mut used = Used::new(2 * MIB);
        used.add(0, 2 * MIB);
        let mut space = Space::new(&used, MIB, 2 * MIB, false);
        let first = space.take().unwrap();
        assert_eq!(first, Room { offset: 2 * MIB, is_new: true });
        let reader = space.pin();
        space.give_up(first.offset);
        let blocks = space.take_given_up();
        space.leave(blocks);
        assert!(space.left().is_empty());
        drop(reader);
        let left = space.left();
        assert_eq!(left, [first.offset]);
        space.freed(left);
        assert_eq!(space.take().unwrap(), Room { is_new: false, ..first });
        assert_eq!(space.take_at_end(MIB).unwrap(), 3 * MIB);
        let mut fixed = Space::new(&used, MIB, 2 * MIB, true);
        assert_eq!(fixed.take().unwrap_err().kind(), ErrorKind::Limit);
    }
}
