//! Bytes with holes: files and disks of many terabytes in a few kilobytes of memory.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;
use std::sync::Arc;

const PAGE: u64 = 4096;

/// A sparse array of bytes; what was never written reads as zero. Clones share their pages until one is written.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Sparse {
    pages: BTreeMap<u64, Arc<[u8; PAGE as usize]>>,
    len: u64,
}

impl std::fmt::Debug for Sparse {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Sparse {{ len: {:#x}, pages: {} }}", self.len, self.pages.len())
    }
}

impl Sparse {
    /// `len` zero bytes.
    pub fn new(len: u64) -> Self {
        Self { pages: BTreeMap::new(), len }
    }

    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether the length is 0.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Cuts or extends with zeroes.
    pub fn set_len(&mut self, len: u64) {
        if len < self.len {
            let last = len / PAGE;
            self.pages.split_off(&len.div_ceil(PAGE));
            if let Some(page) = self.pages.get_mut(&last) {
                Arc::make_mut(page)[(len % PAGE) as usize..].fill(0);
            }
        }
        self.len = len;
    }

    /// Writes `bytes` at `offset`, growing the array where needed.
    pub fn write(&mut self, offset: u64, bytes: &[u8]) {
        let mut at = offset;
        let mut rest = bytes;
        while !rest.is_empty() {
            let skip = (at % PAGE) as usize;
            let n = rest.len().min(PAGE as usize - skip);
            let page = self.pages.entry(at / PAGE).or_insert_with(|| Arc::new([0; PAGE as usize]));
            Arc::make_mut(page)[skip..skip + n].copy_from_slice(&rest[..n]);
            rest = &rest[n..];
            at += n as u64;
        }
        if at > offset {
            self.len = self.len.max(at);
        }
    }

    /// Fills `out` from `offset`; zero where nothing was written, and past the end.
    pub fn read(&self, offset: u64, out: &mut [u8]) {
        let mut at = offset;
        let mut rest = out;
        while !rest.is_empty() {
            let skip = (at % PAGE) as usize;
            let n = rest.len().min(PAGE as usize - skip);
            let (head, tail) = rest.split_at_mut(n);
            match self.pages.get(&(at / PAGE)) {
                Some(page) => head.copy_from_slice(&page[skip..skip + n]),
                None => head.fill(0),
            }
            rest = tail;
            at += n as u64;
        }
    }

    /// `len` bytes from `offset`.
    pub fn get(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut out = vec![0; len];
        self.read(offset, &mut out);
        out
    }

    /// Makes a range read as zeroes; does not grow the array.
    pub fn zero(&mut self, offset: u64, len: u64) {
        let end = (offset + len).min(self.len);
        let touched: Vec<u64> =
            self.pages.range(offset / PAGE..end.div_ceil(PAGE).max(offset / PAGE)).map(|(&p, _)| p).collect();
        for page in touched {
            let start = page * PAGE;
            let from = offset.saturating_sub(start).min(PAGE);
            let to = (end - start).min(PAGE);
            if from == 0 && to == PAGE {
                self.pages.remove(&page);
            } else if let Some(bytes) = self.pages.get_mut(&page) {
                Arc::make_mut(bytes)[from as usize..to as usize].fill(0);
            }
        }
    }

    /// Writes a big-endian 16-bit number.
    pub fn put_u16(&mut self, offset: u64, value: u16) {
        self.write(offset, &value.to_be_bytes());
    }
    /// Writes a big-endian 32-bit number.
    pub fn put_u32(&mut self, offset: u64, value: u32) {
        self.write(offset, &value.to_be_bytes());
    }
    /// Writes a big-endian 64-bit number.
    pub fn put_u64(&mut self, offset: u64, value: u64) {
        self.write(offset, &value.to_be_bytes());
    }
    /// Reads a big-endian 32-bit number.
    pub fn u32(&self, offset: u64) -> u32 {
        u32::from_be_bytes(self.get(offset, 4).try_into().unwrap())
    }
    /// Reads a big-endian 64-bit number.
    pub fn u64(&self, offset: u64) -> u64 {
        u64::from_be_bytes(self.get(offset, 8).try_into().unwrap())
    }

    /// All bytes; for small arrays only.
    pub fn to_vec(&self) -> Vec<u8> {
        assert!(self.len < 1 << 28, "{} bytes are too many for one vector", self.len);
        self.get(0, self.len as usize)
    }

    /// Writes the bytes to a new sparse file.
    pub fn write_to(&self, path: &Path) {
        let file = File::create(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        file.set_len(self.len).unwrap_or_else(|e| panic!("{}: {} bytes: {e}", path.display(), self.len));
        for (&page, bytes) in &self.pages {
            let at = page * PAGE;
            let n = (self.len - at).min(PAGE) as usize;
            crate::at::write_all_at(&file, &bytes[..n], at).unwrap();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holes_read_as_zero_and_ranges_can_be_zeroed() {
        let mut s = Sparse::new(1 << 44);
        s.write((1 << 43) + 4090, &[7; 20]);
        assert_eq!(s.get((1 << 43) + 4088, 24), [[0; 2].as_slice(), &[7; 20], &[0; 2]].concat());
        s.zero((1 << 43) + 4095, 3);
        assert_eq!(s.get((1 << 43) + 4090, 9), [7, 7, 7, 7, 7, 0, 0, 0, 7]);
        s.set_len((1 << 43) + 4092);
        s.set_len(1 << 44);
        assert_eq!(s.get((1 << 43) + 4090, 4), [7, 7, 0, 0]);
    }
}
