//! Whole blocks of what is slow to reach, kept for a while.
//!
//! Each byte of a remote file costs little and each request much. So a block is asked for as a whole, once however many want it at the
//! same time (one flight), neighbours in one request, and those behind a reader that goes forward before it comes to them.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use parking_lot::{Condvar, Mutex, MutexGuard};

use super::read_ahead::ReadAhead;
use super::{ReadStorage, ReadTransfer, Storage};
use crate::error::GivenUp;
use crate::{Mem, MemMut, forward_storage};

/// What a fetch ends with: all bytes of its range, or why there are none.
pub type Fetched = Box<dyn for<'a> FnOnce(io::Result<Mem<'a>>) + Send>;

/// A storage whose reads can be begun without waiting for them.
pub trait Fetch: Storage {
    /// Begins to read a range that lies inside the storage; `done` is called once, by any thread, also by this one before this returns.
    /// What is returned names the fetch for [`Fetch::give_up`].
    fn fetch(&self, range: Range<u64>, done: Fetched) -> u64;

    /// Nobody waits for that fetch any more.
    fn give_up(&self, fetch: u64);

    /// Looked at again and again while somebody waits for a fetch: what ends the waiting.
    fn given_up(&self) -> Option<io::Error>;

    /// Around every wait for a fetch.
    fn waiting(&self, wait: &mut dyn FnMut()) {
        wait();
    }
}

/// How much is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockCacheShape {
    /// Bytes of a block.
    pub block: u64,
    /// Bytes of all blocks that are kept. What is on its way comes on top.
    pub size: u64,
    /// Bytes that are read ahead, at most.
    pub ahead: u64,
}

/// Blocks of one fetch, and of one [`ReadStorage::read_at`], at most: others go on meanwhile.
const RUN: u64 = 4;

/// Reads of a batch that are asked for at once.
const AT_ONCE: usize = 8;

/// Who waits looks this often whether it was given up.
const LOOK: Duration = Duration::from_millis(20);

/// A storage whose reads are kept in blocks. Writes go through; what they change is forgotten here.
pub struct BlockCache<S> {
    inner: Arc<S>,
    block: u64,
    shared: Arc<Shared>,
}

struct Shared {
    table: Mutex<Table>,
    landed: Condvar,
}

struct Table {
    blocks: HashMap<u64, Block>,
    /// Blocks that are here, at most.
    most: usize,
    here: usize,
    /// Counts uses.
    clock: u64,
    ahead: ReadAhead,
}

enum Block {
    Here { bytes: Arc<[u8]>, used: u64 },
    Coming(Arc<Flight>),
}

/// One fetch of neighbouring blocks.
struct Flight {
    first: u64,
    count: u64,
    /// Once it has landed.
    landed: OnceLock<Result<Vec<Arc<[u8]>>, Failed>>,
    waiters: AtomicUsize,
    fetch: OnceLock<u64>,
}

/// The failure of a fetch, for each of those who waited for it.
#[derive(Debug, Clone)]
struct Failed(Arc<io::Error>);

impl Failed {
    fn again(&self) -> io::Error {
        match self.0.raw_os_error() {
            Some(number) => io::Error::from_raw_os_error(number),
            None if self.0.get_ref().is_some_and(|error| error.is::<GivenUp>()) => GivenUp.into(),
            None => io::Error::new(self.0.kind(), self.clone()),
        }
    }
}

impl fmt::Display for Failed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl std::error::Error for Failed {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.source()
    }
}

/// What an error of a storage carries, also where it comes through a [`BlockCache`].
pub fn carried<T: std::error::Error + 'static>(error: &io::Error) -> Option<&T> {
    let inner = error.get_ref()?;
    match inner.downcast_ref::<Failed>() {
        Some(failed) => carried(&failed.0),
        None => inner.downcast_ref(),
    }
}

/// One block of what somebody reads.
enum Part<'a, S: Fetch> {
    Here(Arc<[u8]>),
    Coming(Arc<Waiter<'a, S>>, usize),
}

/// Waits for a flight. The last one that goes before it landed gives it up.
struct Waiter<'a, S: Fetch> {
    cache: &'a BlockCache<S>,
    flight: Arc<Flight>,
}

impl<S: Fetch> Drop for Waiter<'_, S> {
    fn drop(&mut self) {
        let mut table = self.cache.shared.table.lock();
        let last = self.flight.waiters.fetch_sub(1, Ordering::Relaxed) == 1;
        if !last || self.flight.landed.get().is_some() {
            return;
        }
        table.lose(&self.flight);
        drop(table);
        if let Some(fetch) = self.flight.fetch.get() {
            self.cache.inner.give_up(*fetch);
        }
    }
}

impl Table {
    /// No block is on its way by this flight any more.
    fn lose(&mut self, flight: &Arc<Flight>) {
        for index in flight.blocks() {
            if self.comes_by(index, flight) {
                self.blocks.remove(&index);
            }
        }
    }

    fn comes_by(&self, index: u64, flight: &Arc<Flight>) -> bool {
        matches!(self.blocks.get(&index), Some(Block::Coming(coming)) if Arc::ptr_eq(coming, flight))
    }

    fn keep(&mut self, index: u64, bytes: Arc<[u8]>) {
        self.clock += 1;
        self.blocks.insert(index, Block::Here { bytes, used: self.clock });
        self.here += 1;
        while self.here > self.most {
            let used = |(index, block): (&u64, &Block)| match block {
                Block::Here { used, .. } => Some((*used, *index)),
                Block::Coming(_) => None,
            };
            let Some((_, oldest)) = self.blocks.iter().filter_map(used).min() else { return };
            self.remove(oldest);
        }
    }

    fn remove(&mut self, index: u64) {
        if let Some(Block::Here { .. }) = self.blocks.remove(&index) {
            self.here -= 1;
        }
    }

    /// Begins a flight of the blocks from `index` on that nobody has asked for, up to `end`.
    fn begin(&mut self, index: u64, end: u64) -> Arc<Flight> {
        let end = end.min(index + RUN);
        let behind = (index + 1..end).find(|next| self.blocks.contains_key(next)).unwrap_or(end);
        let flight = Arc::new(Flight {
            first: index,
            count: behind - index,
            landed: OnceLock::new(),
            waiters: AtomicUsize::new(0),
            fetch: OnceLock::new(),
        });
        for index in flight.blocks() {
            self.blocks.insert(index, Block::Coming(Arc::clone(&flight)));
        }
        flight
    }
}

impl Flight {
    fn blocks(&self) -> Range<u64> {
        self.first..self.first + self.count
    }
}

impl<S: Fetch> BlockCache<S> {
    /// Keeps blocks of `inner`.
    pub fn new(inner: Arc<S>, shape: BlockCacheShape) -> Self {
        let block = shape.block.max(1);
        let blocks = |bytes: u64| bytes / block;
        let table = Table {
            blocks: HashMap::new(),
            most: usize::try_from(blocks(shape.size)).unwrap_or(usize::MAX).max(1),
            here: 0,
            clock: 0,
            ahead: ReadAhead::new(blocks(shape.ahead)),
        };
        let shared = Arc::new(Shared { table: Mutex::new(table), landed: Condvar::new() });
        Self { inner, block, shared }
    }

    /// The parts of blocks `first` to `last`, of a storage of `size` bytes: those that nobody has asked for yet are asked for.
    fn parts(&self, first: u64, last: u64, size: u64) -> Vec<Part<'_, S>> {
        let (mut parts, mut begun, mut waiters) = (Vec::new(), Vec::new(), Vec::<Arc<Waiter<'_, S>>>::new());
        let mut table = self.shared.table.lock();
        for index in first..=last {
            table.clock += 1;
            let now = table.clock;
            let flight = match table.blocks.get_mut(&index) {
                Some(Block::Here { bytes, used }) => {
                    *used = now;
                    parts.push(Part::Here(Arc::clone(bytes)));
                    continue;
                }
                Some(Block::Coming(flight)) => Arc::clone(flight),
                None => {
                    let flight = table.begin(index, last + 1);
                    begun.push(Arc::clone(&flight));
                    flight
                }
            };
            let waiter = match waiters.last() {
                Some(waiter) if Arc::ptr_eq(&waiter.flight, &flight) => Arc::clone(waiter),
                _ => {
                    flight.waiters.fetch_add(1, Ordering::Relaxed);
                    let waiter = Arc::new(Waiter { cache: self, flight });
                    waiters.push(Arc::clone(&waiter));
                    waiter
                }
            };
            let number = usize::try_from(index - waiter.flight.first).unwrap_or(usize::MAX);
            parts.push(Part::Coming(waiter, number));
        }
        self.look_ahead(&mut table, first, last, size, &mut begun);
        drop(table);
        for flight in begun {
            self.start(flight, size);
        }
        parts
    }

    /// Begins what a reader that goes forward wants next.
    fn look_ahead(
        &self,
        table: &mut MutexGuard<'_, Table>,
        first: u64,
        last: u64,
        size: u64,
        begun: &mut Vec<Arc<Flight>>,
    ) {
        let ahead = table.ahead.read(first, last);
        let end = ahead.end.min(size.div_ceil(self.block));
        for index in ahead.start..end {
            if !table.blocks.contains_key(&index) {
                begun.push(table.begin(index, end));
            }
        }
    }

    fn start(&self, flight: Arc<Flight>, size: u64) {
        let range =
            flight.first * self.block..((flight.first + flight.count).saturating_mul(self.block)).min(size);
        let (shared, block, landing) = (Arc::clone(&self.shared), self.block, Arc::clone(&flight));
        let done = move |result: io::Result<Mem<'_>>| shared.land(&landing, block, result);
        let fetch = self.inner.fetch(range, Box::new(done));
        // Set once: this is the only place.
        let _ = flight.fetch.set(fetch);
    }

    /// Asks for the blocks of a range, or of its beginning; for none where nothing of it is there.
    fn ask(&self, length: usize, offset: u64) -> io::Result<Vec<Part<'_, S>>> {
        let size = self.inner.len()?;
        let end = offset.saturating_add(length as u64).min(size);
        if offset >= end {
            return Ok(Vec::new());
        }
        let first = offset / self.block;
        Ok(self.parts(first, ((end - 1) / self.block).min(first + RUN - 1), size))
    }

    /// Waits for what was asked for at `offset`; how many bytes came before the first failure, or that.
    fn collect(&self, parts: Vec<Part<'_, S>>, mut buf: MemMut<'_>, offset: u64) -> io::Result<usize> {
        let (mut got, mut skip) = (0, usize::try_from(offset % self.block).unwrap_or(usize::MAX));
        for part in parts {
            let bytes = match part {
                Part::Here(bytes) => bytes,
                Part::Coming(waiter, number) => match self.block_of(&waiter, number) {
                    Ok(bytes) => bytes,
                    Err(_) if got > 0 => return Ok(got),
                    Err(error) => return Err(error),
                },
            };
            let part = bytes.get(std::mem::take(&mut skip)..).unwrap_or_default();
            got += buf.take_front(part.len()).copy_from(part);
        }
        Ok(got)
    }

    /// Waits for a flight, and gives one of its blocks.
    fn block_of(&self, waiter: &Waiter<'_, S>, number: usize) -> io::Result<Arc<[u8]>> {
        let flight = &waiter.flight;
        let mut result = Ok(());
        let mut wait = || result = self.wait_for(flight);
        if flight.landed.get().is_none() {
            self.inner.waiting(&mut wait);
        }
        result?;
        match flight.landed.get() {
            Some(Ok(blocks)) => {
                blocks.get(number).cloned().ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
            }
            Some(Err(failed)) => Err(failed.again()),
            None => Err(GivenUp.into()),
        }
    }

    fn wait_for(&self, flight: &Flight) -> io::Result<()> {
        let mut table = self.shared.table.lock();
        while flight.landed.get().is_none() {
            self.shared.landed.wait_for(&mut table, LOOK);
            if flight.landed.get().is_none()
                && let Some(error) = self.inner.given_up()
            {
                return Err(error);
            }
        }
        Ok(())
    }

    /// What lies from `start` to `end` has changed, or may have.
    fn changed(&self, start: u64, end: u64) {
        let (first, behind) = (start / self.block, end.div_ceil(self.block));
        let mut table = self.shared.table.lock();
        if behind.saturating_sub(first) <= table.blocks.len() as u64 {
            (first..behind).for_each(|index| table.remove(index));
        } else {
            let inside: Vec<u64> =
                table.blocks.keys().copied().filter(|index| (first..behind).contains(index)).collect();
            inside.into_iter().for_each(|index| table.remove(index));
        }
    }

    /// Does what changes a range, which is forgotten, whatever became of it.
    fn change<T>(&self, start: u64, length: u64, change: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        let (before, end) = (self.inner.len()?, start.saturating_add(length));
        let done = change();
        // A file that grows has another last block than before.
        self.changed(if end > before { start.min(before) } else { start }, end);
        done
    }
}

impl Shared {
    fn land(&self, flight: &Arc<Flight>, block: u64, result: io::Result<Mem<'_>>) {
        let landed = result.map(|mut rest| {
            let mut blocks = Vec::new();
            while !rest.is_empty() {
                let (front, behind) = rest.split_at(usize::try_from(block).unwrap_or(usize::MAX));
                let mut bytes = vec![0; front.len()];
                front.copy_to(&mut bytes);
                blocks.push(Arc::from(bytes));
                rest = behind;
            }
            blocks
        });
        let mut table = self.table.lock();
        match &landed {
            Ok(blocks) => {
                for (index, bytes) in flight.blocks().zip(blocks) {
                    // What was written meanwhile is not what came.
                    if table.comes_by(index, flight) {
                        table.keep(index, Arc::clone(bytes));
                    }
                }
            }
            Err(_) => table.lose(flight),
        }
        // Set once: a fetch ends once.
        let _ = flight.landed.set(landed.map_err(|error| Failed(Arc::new(error))));
        drop(table);
        self.landed.notify_all();
    }
}

impl<S> fmt::Debug for BlockCache<S>
where
    S: fmt::Debug,
{
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BlockCache").field("inner", &self.inner).field("block", &self.block).finish()
    }
}

#[deny(clippy::missing_trait_methods, reason = "passed on: a new method must be, too")]
impl<S: Fetch> ReadStorage for BlockCache<S> {
    fn read_at(&self, buf: MemMut<'_>, offset: u64) -> io::Result<usize> {
        let parts = self.ask(buf.len(), offset)?;
        self.collect(parts, buf, offset)
    }

    fn read_batch(&self, batch: &mut [ReadTransfer<'_>]) {
        for some in batch.chunks_mut(AT_ONCE) {
            let asked: Vec<_> = some.iter().map(|read| self.ask(read.buf.len(), read.offset)).collect();
            for (read, asked) in some.iter_mut().zip(asked) {
                let collect = |parts| self.collect(parts, read.buf.reborrow(), read.offset);
                read.done = asked.and_then(collect);
            }
        }
    }

    forward_storage!(inner: len is_empty run_in allocated_bytes identity traits io_limits path operation is_transient
        lock forget no_arriving no_fd);
}

#[deny(clippy::missing_trait_methods, reason = "passed on: a new method must be, too")]
impl<S: Fetch> Storage for BlockCache<S> {
    fn write_at(&self, buf: Mem<'_>, offset: u64) -> io::Result<usize> {
        self.change(offset, buf.len() as u64, || self.inner.write_at(buf, offset))
    }

    fn write_vectored_at(&self, bufs: &[Mem<'_>], offset: u64) -> io::Result<usize> {
        let length = bufs.iter().map(|buf| buf.len() as u64).sum();
        self.change(offset, length, || self.inner.write_vectored_at(bufs, offset))
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let before = self.inner.len()?;
        self.change(before.min(len), u64::MAX, || self.inner.set_len(len))
    }

    fn write_zeroes(&self, offset: u64, length: u64, unmap: bool) -> io::Result<()> {
        self.change(offset, length, || self.inner.write_zeroes(offset, length, unmap))
    }

    fn discard(&self, offset: u64, length: u64) -> io::Result<()> {
        self.change(offset, length, || self.inner.discard(offset, length))
    }

    fn allocate(&self, offset: u64, length: u64) -> io::Result<()> {
        self.change(self.inner.len()?, u64::MAX, || self.inner.allocate(offset, length))
    }

    fn allocate_ahead(&self, offset: u64, length: u64) -> io::Result<()> {
        self.change(self.inner.len()?, u64::MAX, || self.inner.allocate_ahead(offset, length))
    }

    forward_storage!(inner: sync_data begin_sync check_close write_each never_clone);
}

#[cfg(test)]
mod tests;
