//! A [`Storage`] in memory, sparse by page: prefixes of files that are still on their way, and tests.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;

use parking_lot::RwLock;

use super::{ReadStorage, Run, Storage, Traits};
use crate::{Mem, MemMut};

/// Bytes per page; a page that was never written is a hole.
const PAGE: u64 = 16 << 10;

/// A sparse file in memory.
#[derive(Debug, Default)]
pub struct MemoryStorage {
    inner: RwLock<Pages>,
}

#[derive(Debug, Default)]
struct Pages {
    len: u64,
    pages: BTreeMap<u64, Box<[u8]>>,
}

/// The part of page `page` that `start..end` covers, as a range inside the page.
fn within(page: u64, start: u64, end: u64) -> Range<usize> {
    let base = page * PAGE;
    // Both differences are clamped to one page, so the casts are exact.
    let from = start.saturating_sub(base).min(PAGE) as usize;
    let to = end.saturating_sub(base).min(PAGE) as usize;
    from..to.max(from)
}

impl Pages {
    fn page_mut(&mut self, page: u64) -> &mut [u8] {
        self.pages.entry(page).or_insert_with(|| vec![0; PAGE as usize].into_boxed_slice())
    }

    fn read(&self, mut buf: MemMut<'_>, offset: u64) -> usize {
        let end = self.len.min(offset.saturating_add(buf.len() as u64));
        let mut at = offset;
        while at < end {
            let range = within(at / PAGE, at, end);
            let mut part = buf.take_front(range.len());
            at += range.len() as u64;
            match self.pages.get(&((at - 1) / PAGE)).and_then(|p| p.get(range)) {
                Some(bytes) => {
                    part.copy_from(bytes);
                }
                None => part.fill_zero(),
            }
        }
        end.saturating_sub(offset) as usize
    }

    fn write(&mut self, buf: Mem<'_>, offset: u64) -> io::Result<usize> {
        if buf.is_empty() {
            return Ok(0);
        }
        let end = end_of(offset, buf.len() as u64)?;
        let (mut at, mut rest) = (offset, buf);
        while at < end {
            let range = within(at / PAGE, at, end);
            let (part, tail) = rest.split_at(range.len());
            if let Some(slot) = self.page_mut(at / PAGE).get_mut(range) {
                part.copy_to(slot);
            }
            at += part.len() as u64;
            rest = tail;
        }
        self.len = self.len.max(end);
        Ok(buf.len())
    }

    /// Zeroes `start..end`: whole pages become holes.
    fn zero(&mut self, start: u64, end: u64) {
        let touched: Vec<u64> = self.pages.range(start / PAGE..end.div_ceil(PAGE)).map(|(p, _)| *p).collect();
        for page in touched {
            let range = within(page, start, end);
            if range.len() as u64 == PAGE {
                self.pages.remove(&page);
            } else if let Some(slot) = self.page_mut(page).get_mut(range) {
                slot.fill(0);
            }
        }
    }
}

fn end_of(offset: u64, length: u64) -> io::Result<u64> {
    offset.checked_add(length).ok_or_else(|| io::ErrorKind::InvalidInput.into())
}

impl MemoryStorage {
    /// An empty file.
    pub fn new() -> Self {
        Self::default()
    }

    /// A file of these bytes.
    pub fn from_bytes(bytes: &[u8]) -> Self {
        let mut pages = Pages { len: bytes.len() as u64, ..Pages::default() };
        for (page, chunk) in (0u64..).zip(bytes.chunks(PAGE as usize)) {
            let mut whole = vec![0; PAGE as usize];
            Mem::from(chunk).copy_to(&mut whole);
            pages.pages.insert(page, whole.into_boxed_slice());
        }
        Self { inner: RwLock::new(pages) }
    }

    /// The whole file as bytes.
    pub fn to_vec(&self) -> Vec<u8> {
        let inner = self.inner.read();
        let mut bytes = vec![0; usize::try_from(inner.len).unwrap_or(usize::MAX)];
        inner.read(MemMut::from(&mut bytes[..]), 0);
        bytes
    }
}

impl ReadStorage for MemoryStorage {
    fn read_at(&self, buf: MemMut<'_>, offset: u64) -> io::Result<usize> {
        Ok(self.inner.read().read(buf, offset))
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.inner.read().len)
    }

    fn run_in(&self, range: Range<u64>) -> io::Result<Run> {
        let (offset, inner) = (range.start, self.inner.read());
        if offset >= inner.len {
            return Ok(Run::new(u64::MAX, false));
        }
        let first = offset / PAGE;
        if !inner.pages.contains_key(&first) {
            let next = inner.pages.range(first..).next().map_or(inner.len, |(p, _)| p * PAGE);
            return Ok(Run::new(next.min(inner.len), false));
        }
        let run =
            inner.pages.range(first..).zip(first..).take_while(|((page, _), want)| *page == want).count();
        Ok(Run::new(((first + run as u64) * PAGE).min(inner.len), true))
    }

    fn allocated_bytes(&self) -> io::Result<u64> {
        Ok(self.inner.read().pages.len() as u64 * PAGE)
    }

    fn traits(&self) -> Traits {
        Traits { writable: true, ..Traits::default() }
    }
}

impl Storage for MemoryStorage {
    fn write_at(&self, buf: Mem<'_>, offset: u64) -> io::Result<usize> {
        self.inner.write().write(buf, offset)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut inner = self.inner.write();
        inner.zero(len, u64::MAX);
        inner.len = len;
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        Ok(())
    }

    fn write_zeroes(&self, offset: u64, length: u64, _unmap: bool) -> io::Result<()> {
        let end = end_of(offset, length)?;
        if length == 0 {
            return Ok(());
        }
        let mut inner = self.inner.write();
        inner.zero(offset, end);
        inner.len = inner.len.max(end);
        Ok(())
    }

    fn discard(&self, offset: u64, length: u64) -> io::Result<()> {
        self.inner.write().zero(offset, end_of(offset, length)?);
        Ok(())
    }

    fn allocate(&self, offset: u64, length: u64) -> io::Result<()> {
        let end = end_of(offset, length)?;
        if length == 0 {
            return Ok(());
        }
        let mut inner = self.inner.write();
        inner.len = inner.len.max(end);
        Ok(())
    }
}
