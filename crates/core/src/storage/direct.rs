//! Any request on a storage that takes aligned ones only (direct I/O).
//!
//! Aligned parts go straight between the caller's memory and the disk. The rest goes through reused aligned
//! buffers: a read bounces the blocks at its edges, a write reads the block at its edge, puts its bytes in,
//! and writes the block. Every write holds its blocks in a [`RangeLock`], alone if it rewrites bytes that are
//! not its own: two neighbours in one block never lose each other's bytes.
//!
//! The file's length stays exact: a write that ends inside the last block writes the whole block and cuts the
//! file again, with all other writes kept out. A crash in between leaves zeroes behind the end.

use std::io;
use std::sync::Arc;

use parking_lot::{Mutex, RwLock};

use super::range_lock::RangeLock;
use super::{ReadStorage, Storage, Traits};
use crate::{Mem, MemMut, forward_storage};

/// Bytes per bounce buffer at least: large enough that the copy, not the call, is the cost.
const BUFFER: usize = 1 << 20;
/// Bounce buffers kept for the next request.
const KEPT: usize = 4;
/// Up to this much, one call through a buffer beats two calls that spare the copy.
const WORTH_A_COPY: u64 = 64 << 10;
/// A transfer that moves less than one block this often in a row does not get anywhere.
const STALLS: u32 = 16;

/// Memory that starts at a multiple of a power of two.
#[derive(Debug)]
pub(super) struct AlignedBuffer {
    bytes: Vec<u8>,
    start: usize,
    length: usize,
}

impl AlignedBuffer {
    pub(super) fn new(length: usize, alignment: usize) -> Self {
        let bytes = vec![0; length + alignment];
        let start = bytes.as_ptr().align_offset(alignment).min(alignment);
        Self { bytes, start, length }
    }

    pub(super) fn bytes(&mut self) -> &mut [u8] {
        self.bytes.get_mut(self.start..self.start + self.length).unwrap_or_default()
    }
}

/// Makes a storage with alignment rules take any request.
#[derive(Debug)]
pub struct DirectStorage {
    inner: Arc<dyn Storage>,
    /// Offsets and lengths: a power of two.
    block: u64,
    /// Addresses: a power of two.
    memory: usize,
    /// Bytes per bounce buffer: whole blocks.
    buffer: usize,
    ranges: RangeLock,
    /// Shared by everything that writes; exclusive for a change of the file's length to one that is not a
    /// multiple of the block.
    length: RwLock<()>,
    buffers: Mutex<Vec<AlignedBuffer>>,
}

/// The bytes of a write, one behind the other.
#[derive(Clone, Copy)]
enum Source<'a> {
    Bytes(&'a [Mem<'a>]),
    Zeroes,
}

impl Source<'_> {
    /// Fills `out` with the bytes from `skip` on.
    fn copy_to(self, mut skip: usize, mut out: &mut [u8]) {
        let Self::Bytes(bufs) = self else { return out.fill(0) };
        for buf in bufs {
            let (skipped, rest) = buf.split_at(skip);
            skip -= skipped.len();
            let copied = rest.copy_to(out);
            out = out.get_mut(copied..).unwrap_or_default();
        }
    }
}

impl DirectStorage {
    /// `inner` itself where it takes any request already.
    pub fn over(inner: Arc<dyn Storage>) -> Arc<dyn Storage> {
        let traits = inner.traits();
        if traits.alignment <= 1 && traits.memory_alignment <= 1 {
            return inner;
        }
        // An alignment is the size of a sector or page: below 2^31, where the next power of two exists.
        let block = traits.alignment.clamp(1, 1 << 30).next_power_of_two();
        Arc::new(Self {
            inner,
            block: u64::from(block),
            buffer: BUFFER.max(4 * block as usize),
            memory: traits.memory_alignment.clamp(1, 1 << 30).next_power_of_two() as usize,
            ranges: RangeLock::default(),
            length: RwLock::default(),
            buffers: Mutex::default(),
        })
    }

    fn down(&self, offset: u64) -> u64 {
        offset & !(self.block - 1)
    }

    fn up(&self, offset: u64) -> io::Result<u64> {
        offset.checked_next_multiple_of(self.block).ok_or_else(too_far)
    }

    fn is_block(&self, value: u64) -> bool {
        value & (self.block - 1) == 0
    }

    fn with_buffer<T>(&self, work: impl FnOnce(&mut [u8]) -> T) -> T {
        let kept = self.buffers.lock().pop();
        // The page size suits every device, whatever the file asks for.
        let mut buffer = kept.unwrap_or_else(|| AlignedBuffer::new(self.buffer, self.memory.max(4096)));
        let result = work(buffer.bytes());
        let mut kept = self.buffers.lock();
        if kept.len() < KEPT {
            kept.push(buffer);
        }
        result
    }

    /// Reads whole blocks from `start` until `buf` is full or the file ends; returns how many bytes.
    fn read_blocks(&self, buf: &mut [u8], start: u64) -> io::Result<usize> {
        let (mut got, mut stalls) = (0, 0);
        while let Some(rest) = buf.get_mut(got..).filter(|rest| !rest.is_empty()) {
            let at = start + got as u64;
            let wanted = rest.len();
            let n = self.inner.read_at(rest.into(), at)?;
            if n == wanted || n == 0 || at + n as u64 >= self.inner.len()? {
                return Ok(got + n);
            }
            // Short without being at the end: again from the last whole block.
            let whole = self.down(n as u64) as usize;
            stalls = stalled(whole, stalls)?;
            got += whole;
        }
        Ok(got)
    }

    /// Reads through a buffer as much as fits one; returns how many bytes of `buf` were filled.
    fn read_bounced(&self, mut buf: MemMut<'_>, offset: u64) -> io::Result<usize> {
        let start = self.down(offset);
        let head = (offset - start) as usize;
        let wanted = buf.len().min(self.buffer - head);
        let length = (self.up(offset + wanted as u64)? - start) as usize;
        self.with_buffer(|bounce| {
            let blocks = bounce.get_mut(..length).unwrap_or_default();
            let got = self.read_blocks(blocks, start)?.clamp(head, head + wanted);
            Ok(buf.copy_from(blocks.get(head..got).unwrap_or_default()))
        })
    }

    /// Writes `total` bytes of `source` at `offset`, which fit one buffer, preserving what else is in the
    /// blocks; returns how many. The caller holds the blocks.
    fn write_bounced(&self, source: Source<'_>, total: u64, offset: u64) -> io::Result<u64> {
        let (start, end) = (self.down(offset), offset + total);
        self.with_buffer(|bounce| {
            let length = (self.up(end)? - start) as usize;
            let blocks = bounce.get_mut(..length).unwrap_or_default();
            self.fill_edges(blocks, start, offset, end)?;
            let (from, to) = ((offset - start) as usize, (end - start) as usize);
            source.copy_to(0, blocks.get_mut(from..to).unwrap_or_default());
            self.write_blocks(&mut [Mem::from(&*blocks)], start)?;
            Ok(end - offset)
        })
    }

    /// Reads the first and the last block of `blocks`, which lie at `start`, where `offset..end` does not
    /// cover them; what lies behind the end of the file is zero.
    fn fill_edges(&self, blocks: &mut [u8], start: u64, offset: u64, end: u64) -> io::Result<()> {
        let block = self.block as usize;
        let last = blocks.len().saturating_sub(block);
        let (head, tail) = (offset != start, !self.is_block(end));
        let edges = [(0, head), (last, tail && !(head && last == 0))];
        for (at, _) in edges.into_iter().filter(|(_, needed)| *needed) {
            let edge = blocks.get_mut(at..at + block).unwrap_or_default();
            let got = self.read_blocks(edge, start + at as u64)?;
            edge.get_mut(got..).unwrap_or_default().fill(0);
        }
        Ok(())
    }

    /// Writes all of `bufs`, whole blocks, at `start`. A short write is taken up again at its last whole block.
    fn write_blocks(&self, bufs: &mut [Mem<'_>], start: u64) -> io::Result<()> {
        let (mut rest, mut at, mut stalls) = (bufs, start, 0);
        loop {
            let empty = rest.iter().take_while(|b| b.is_empty()).count();
            rest = rest.get_mut(empty..).unwrap_or_default();
            if rest.is_empty() {
                return Ok(());
            }
            let written = self.inner.write_vectored_at(rest, at)?;
            let mut whole = self.down(written as u64) as usize;
            stalls = stalled(whole, stalls)?;
            at += whole as u64;
            for buf in rest.iter_mut() {
                let done = whole.min(buf.len());
                *buf = buf.split_at(done).1;
                whole -= done;
            }
        }
    }

    /// Writes one long buffer whose middle can go straight to the disk: its edges, and the middle, in one call.
    fn write_around(&self, buf: Mem<'_>, offset: u64) -> io::Result<u64> {
        let end = offset + buf.len() as u64;
        let (start, stop) = (self.down(offset), self.up(end)?);
        let (from, to) = (self.up(offset)?, self.down(end));
        let (first, rest) = buf.split_at((from - offset) as usize);
        let (middle, last) = rest.split_at((to - from) as usize);
        let block = self.block as usize;
        self.with_buffer(|bounce| {
            let (head, bounce) = bounce.split_at_mut(if first.is_empty() { 0 } else { block });
            let tail = bounce.get_mut(..if last.is_empty() { 0 } else { block }).unwrap_or_default();
            for (edge, bytes, at, skip) in [
                (&mut *head, first, start, (offset - start) as usize),
                (&mut *tail, last, stop - self.block, 0),
            ] {
                if !bytes.is_empty() {
                    let got = self.read_blocks(edge, at)?;
                    edge.get_mut(got..).unwrap_or_default().fill(0);
                    bytes.copy_to(edge.get_mut(skip..).unwrap_or_default());
                }
            }
            self.write_blocks(&mut [Mem::from(&*head), middle, Mem::from(&*tail)], start)?;
            Ok(end - offset)
        })
    }

    /// Runs `write`, which fills the blocks of `offset..end`, and keeps the file's length exact.
    fn keeping_length<T>(&self, end: u64, write: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        if self.is_block(end) {
            let _shared = self.length.read();
            return write();
        }
        let stop = self.up(end)?;
        {
            let _shared = self.length.read();
            if stop <= self.inner.len()? {
                return write();
            }
        }
        let _exclusive = self.length.write();
        let before = self.inner.len()?;
        let result = write();
        let wanted = before.max(end);
        // A failed write too can have extended the file: what it wrote is unspecified, its padding is not.
        if self.inner.len()? > wanted {
            self.inner.set_len(wanted)?;
        }
        result
    }

    /// One step of a write that is not aligned; returns how many of `total` bytes it wrote.
    fn write_unaligned(&self, source: Source<'_>, total: u64, offset: u64) -> io::Result<u64> {
        let straight = match source {
            Source::Bytes([buf]) if total > WORTH_A_COPY + 2 * self.block => {
                let first = (self.up(offset)? - offset) as usize;
                let middle = buf.split_at(first).1;
                self.suits(middle.as_ptr()).then_some(*buf)
            }
            _ => None,
        };
        let total = match straight {
            Some(_) => total,
            None => total.min(self.down(offset) + self.buffer as u64 - offset),
        };
        let end = offset.checked_add(total).ok_or_else(too_far)?;
        let _held = self.ranges.hold(self.down(offset), self.up(end)?, true);
        self.keeping_length(end, || match straight {
            Some(buf) => self.write_around(buf, offset),
            None => self.write_bounced(source, total, offset),
        })
    }

    fn suits(&self, address: *const u8) -> bool {
        address.addr() & (self.memory - 1) == 0
    }

    fn zero_bytes(&self, mut offset: u64, end: u64) -> io::Result<()> {
        while offset < end {
            offset += self.write_unaligned(Source::Zeroes, end - offset, offset)?;
        }
        Ok(())
    }

    /// Runs a change of whole or unspecified bytes of a range that a read-modify-write must not straddle.
    fn beside_writes<T>(
        &self,
        offset: u64,
        length: u64,
        change: impl FnOnce() -> io::Result<T>,
    ) -> io::Result<T> {
        let end = offset.checked_add(length).ok_or_else(too_far)?;
        let exclusive = !self.is_block(offset) || !self.is_block(end);
        let _held = self.ranges.hold(self.down(offset), self.up(end)?, exclusive);
        let _shared = self.length.read();
        change()
    }
}

/// Counts transfers in a row that moved no whole block.
fn stalled(whole: usize, stalls: u32) -> io::Result<u32> {
    match (whole, stalls) {
        (0, STALLS..) => Err(io::ErrorKind::WriteZero.into()),
        (0, _) => Ok(stalls + 1),
        _ => Ok(0),
    }
}

fn too_far() -> io::Error {
    io::ErrorKind::InvalidInput.into()
}

#[deny(clippy::missing_trait_methods, reason = "in front of another storage: a new method must be passed on")]
impl ReadStorage for DirectStorage {
    fn read_at(&self, mut buf: MemMut<'_>, offset: u64) -> io::Result<usize> {
        let length = buf.len() as u64;
        let end = offset.checked_add(length).ok_or_else(too_far)?;
        let whole = self.down(length);
        let straight = self.is_block(offset) && whole > 0 && self.suits(buf.as_mut_ptr());
        if straight && (whole == length || length > WORTH_A_COPY) {
            return self.inner.read_at(buf.split_at(whole as usize).0, offset);
        }
        let first = self.up(offset)? - offset;
        if first > 0 && end - self.down(offset) > WORTH_A_COPY {
            let rest = buf.as_mut_ptr().wrapping_add(first as usize);
            if self.suits(rest) {
                // The block at the edge; the caller comes back for the rest, which then is straight.
                return self.read_bounced(buf.split_at(first as usize).0, offset);
            }
        }
        self.read_bounced(buf, offset)
    }

    fn len(&self) -> io::Result<u64> {
        let _shared = self.length.read();
        self.inner.len()
    }

    fn traits(&self) -> Traits {
        Traits { alignment: 1, memory_alignment: 1, ..self.inner.traits() }
    }

    forward_storage!(inner: is_empty run_in allocated_bytes identity io_limits path operation is_transient lock forget arriving as_fd read_each);
}

#[deny(clippy::missing_trait_methods, reason = "in front of another storage: a new method must be passed on")]
impl Storage for DirectStorage {
    fn write_at(&self, buf: Mem<'_>, offset: u64) -> io::Result<usize> {
        self.write_vectored_at(&[buf], offset)
    }

    fn write_vectored_at(&self, bufs: &[Mem<'_>], offset: u64) -> io::Result<usize> {
        let total: u64 = bufs.iter().map(|b| b.len() as u64).sum();
        let end = offset.checked_add(total).ok_or_else(too_far)?;
        if total == 0 {
            return Ok(0);
        }
        let straight = self.is_block(offset)
            && bufs.iter().all(|b| self.is_block(b.len() as u64) && (b.is_empty() || self.suits(b.as_ptr())));
        if straight {
            let _held = self.ranges.hold(offset, end, false);
            let _shared = self.length.read();
            return self.inner.write_vectored_at(bufs, offset);
        }
        // At most `total`, which is the sum of lengths in memory.
        self.write_unaligned(Source::Bytes(bufs), total, offset).map(|n| n as usize)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let _exclusive = self.length.write();
        self.inner.set_len(len)
    }

    fn write_zeroes(&self, offset: u64, length: u64, unmap: bool) -> io::Result<()> {
        let end = offset.checked_add(length).ok_or_else(too_far)?;
        let (from, to) = (self.up(offset)?, self.down(end));
        if from >= to {
            return self.zero_bytes(offset, end);
        }
        self.zero_bytes(offset, from)?;
        self.beside_writes(from, to - from, || self.inner.write_zeroes(from, to - from, unmap))?;
        self.zero_bytes(to, end)
    }

    fn discard(&self, offset: u64, length: u64) -> io::Result<()> {
        let end = offset.checked_add(length).ok_or_else(too_far)?;
        let (from, to) = (self.up(offset)?, self.down(end));
        if from >= to {
            return Ok(());
        }
        self.beside_writes(from, to - from, || self.inner.discard(from, to - from))
    }

    fn allocate(&self, offset: u64, length: u64) -> io::Result<()> {
        self.beside_writes(offset, length, || self.inner.allocate(offset, length))
    }

    fn clone_range(
        &self,
        from: &dyn ReadStorage,
        from_offset: u64,
        offset: u64,
        length: u64,
    ) -> io::Result<()> {
        self.beside_writes(offset, length, || self.inner.clone_range(from, from_offset, offset, length))
    }

    // Not ahead: what is taken lies in blocks that a write may have to read first.
    forward_storage!(inner: sync_data begin_sync check_close write_each never_ahead);
}
