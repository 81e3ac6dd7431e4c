//! What a disk must contain: the reference that every reader is compared with.

use crate::Sparse;

/// The guest's view of a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    bytes: Sparse,
}

impl Disk {
    /// A disk of `size` zero bytes.
    pub fn new(size: u64) -> Self {
        Self { bytes: Sparse::new(size) }
    }

    /// A disk of `size` bytes over `backing`, seen as if nothing was written yet: shorter backing is
    /// continued with zeroes, longer backing is cut.
    pub fn over(size: u64, backing: &Disk) -> Self {
        let mut bytes = backing.bytes.clone();
        bytes.set_len(size);
        Self { bytes }
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.bytes.len()
    }

    /// Extends the disk to `size` bytes with zeroes.
    pub fn grow(&mut self, size: u64) {
        assert!(size >= self.size(), "{size} is less than {}", self.size());
        self.bytes.set_len(size);
    }

    /// The guest writes `bytes` at `offset`.
    pub fn write(&mut self, offset: u64, bytes: &[u8]) {
        assert!(offset + bytes.len() as u64 <= self.size(), "write beyond the disk");
        self.bytes.write(offset, bytes);
    }

    /// The guest writes `pattern`, repeated to `len` bytes, at `offset`.
    pub fn write_repeated(&mut self, offset: u64, pattern: &[u8], len: u64) {
        let mut bytes = Vec::with_capacity(len as usize + pattern.len());
        while (bytes.len() as u64) < len {
            bytes.extend_from_slice(pattern);
        }
        bytes.truncate(len as usize);
        self.write(offset, &bytes);
    }

    /// The range reads as zeroes from now on.
    pub fn zero(&mut self, offset: u64, len: u64) {
        self.bytes.zero(offset, len);
    }

    /// `len` bytes from `offset`.
    pub fn read(&self, offset: u64, len: usize) -> Vec<u8> {
        assert!(offset + len as u64 <= self.size(), "read beyond the disk");
        self.bytes.get(offset, len)
    }

    /// Fails with the first differing offset unless `bytes` are the disk's bytes from `offset`.
    pub fn assert_eq_at(&self, offset: u64, bytes: &[u8], what: &str) {
        assert_same(&self.read(offset, bytes.len()), bytes, offset, what);
    }
}

/// Fails with the first differing guest offset and both bytes.
pub fn assert_same(expected: &[u8], actual: &[u8], offset: u64, what: &str) {
    assert_eq!(expected.len(), actual.len(), "{what}: lengths differ");
    if expected == actual {
        return;
    }
    let at = expected.iter().zip(actual).position(|(a, b)| a != b).unwrap();
    let wrong = expected.iter().zip(actual).filter(|(a, b)| a != b).count();
    panic!(
        "{what}: first difference at guest offset {:#x}: expected {:#04x}, read {:#04x} ({wrong} bytes differ)",
        offset + at as u64,
        expected[at],
        actual[at]
    );
}
