//! Several transfers in one call.

use std::io;

use super::{ReadStorage, Storage};
use crate::{Mem, MemMut};

/// One read of a batch.
#[derive(Debug)]
pub struct ReadTransfer<'a> {
    /// What is filled.
    pub buf: MemMut<'a>,
    /// From where.
    pub offset: u64,
    /// How many bytes were read, once the batch is done; fewer than asked are no error.
    pub done: io::Result<usize>,
}

impl<'a> ReadTransfer<'a> {
    /// Fills `buf` from `offset`.
    pub fn new(buf: MemMut<'a>, offset: u64) -> Self {
        Self { buf, offset, done: Ok(0) }
    }
}

/// One write of a batch.
#[derive(Debug)]
pub struct WriteTransfer<'a> {
    /// What is written, one behind the other.
    pub bufs: &'a [Mem<'a>],
    /// To where.
    pub offset: u64,
    /// How many bytes were written, once the batch is done; fewer than asked are no error.
    pub done: io::Result<usize>,
}

impl<'a> WriteTransfer<'a> {
    /// Writes `bufs` to `offset`.
    pub fn new(bufs: &'a [Mem<'a>], offset: u64) -> Self {
        Self { bufs, offset, done: Ok(0) }
    }
}

/// Does the reads of a batch one behind the other.
pub fn read_each<S: ReadStorage + ?Sized>(storage: &S, batch: &mut [ReadTransfer<'_>]) {
    for transfer in batch {
        transfer.done = storage.read_at(transfer.buf.reborrow(), transfer.offset);
    }
}

/// Does the writes of a batch one behind the other.
pub fn write_each<S: Storage + ?Sized>(storage: &S, batch: &mut [WriteTransfer<'_>]) {
    for transfer in batch {
        transfer.done = storage.write_vectored_at(transfer.bufs, transfer.offset);
    }
}
