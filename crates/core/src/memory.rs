//! Views of memory that someone else may change or watch while a request runs.
//!
//! A caller's buffer belongs to JavaScript: its threads may touch it during the request in spite of the
//! contract. So data moves through raw pointers and system calls, and a `&[u8]` over such memory is never
//! formed. Memory that the engine owns exclusively can still be lent as a slice ([`MemMut::exclusive`]).

use std::marker::PhantomData;
use std::ptr::NonNull;

/// Source bytes of a write.
#[derive(Debug, Clone, Copy)]
pub struct Mem<'a> {
    ptr: NonNull<u8>,
    len: usize,
    _owner: PhantomData<&'a [u8]>,
}

/// Destination bytes of a read.
#[derive(Debug)]
pub struct MemMut<'a> {
    ptr: NonNull<u8>,
    len: usize,
    exclusive: bool,
    _owner: PhantomData<&'a mut [u8]>,
}

// SAFETY: a view is a pointer and a length; all access goes through raw copies or system calls, which
// tolerate concurrent change by the owner (the bytes are then unspecified, never the program).
unsafe impl Send for Mem<'_> {}
// SAFETY: as above.
unsafe impl Sync for Mem<'_> {}
// SAFETY: as above.
unsafe impl Send for MemMut<'_> {}
// SAFETY: as above; no method writes through `&self`.
unsafe impl Sync for MemMut<'_> {}

impl<'a> Mem<'a> {
    /// # Safety
    /// `ptr` must be valid for reads of `len` bytes for all of `'a`. Others may change the bytes meanwhile.
    pub unsafe fn from_raw(ptr: NonNull<u8>, len: usize) -> Self {
        Self { ptr, len, _owner: PhantomData }
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }
    /// Whether there is nothing to write.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
    /// Start of the bytes, for system calls.
    pub fn as_ptr(&self) -> *const u8 {
        self.ptr.as_ptr()
    }

    /// Splits at `mid`, which is clamped to the length.
    pub fn split_at(self, mid: usize) -> (Mem<'a>, Mem<'a>) {
        let mid = mid.min(self.len);
        // SAFETY: mid <= len, so the sum stays inside (or one past) the same allocation.
        let tail = unsafe { self.ptr.add(mid) };
        (
            Self { ptr: self.ptr, len: mid, _owner: PhantomData },
            Self { ptr: tail, len: self.len - mid, _owner: PhantomData },
        )
    }

    /// Whether all bytes are zero, as they are found: the owner may change them meanwhile.
    pub fn is_zero(&self) -> bool {
        let mut piece = [0u8; 4096];
        let mut rest = *self;
        while !rest.is_empty() {
            let n = rest.copy_to(&mut piece);
            if piece.get(..n).is_some_and(|bytes| bytes.iter().any(|&b| b != 0)) {
                return false;
            }
            rest = rest.split_at(n).1;
        }
        true
    }

    /// Copies the first `min(len, out.len())` bytes out; returns how many.
    pub fn copy_to(&self, out: &mut [u8]) -> usize {
        let n = self.len.min(out.len());
        // SAFETY: both sides are valid for n bytes; `out` is exclusive, so they cannot overlap.
        unsafe { self.ptr.as_ptr().copy_to_nonoverlapping(out.as_mut_ptr(), n) };
        n
    }
}

impl<'a> From<&'a [u8]> for Mem<'a> {
    fn from(s: &'a [u8]) -> Self {
        Self { ptr: NonNull::from(s).cast(), len: s.len(), _owner: PhantomData }
    }
}

impl<'a> MemMut<'a> {
    /// # Safety
    /// `ptr` must be valid for writes of `len` bytes for all of `'a`, and no Rust reference to the bytes may
    /// exist meanwhile. Others may read or change them through pointers of their own.
    pub unsafe fn from_raw(ptr: NonNull<u8>, len: usize) -> Self {
        Self { ptr, len, exclusive: false, _owner: PhantomData }
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }
    /// Whether there is nothing to fill.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
    /// Start of the bytes, for system calls.
    pub fn as_mut_ptr(&mut self) -> *mut u8 {
        self.ptr.as_ptr()
    }

    /// A shorter-lived view of the same bytes.
    pub fn reborrow(&mut self) -> MemMut<'_> {
        MemMut { ptr: self.ptr, len: self.len, exclusive: self.exclusive, _owner: PhantomData }
    }

    /// Splits at `mid`, which is clamped to the length.
    pub fn split_at(self, mid: usize) -> (MemMut<'a>, MemMut<'a>) {
        let mid = mid.min(self.len);
        // SAFETY: mid <= len, so the sum stays inside (or one past) the same allocation.
        let tail = unsafe { self.ptr.add(mid) };
        (
            Self { ptr: self.ptr, len: mid, exclusive: self.exclusive, _owner: PhantomData },
            Self { ptr: tail, len: self.len - mid, exclusive: self.exclusive, _owner: PhantomData },
        )
    }

    /// Cuts the first `n` bytes (clamped) off the front of `self` and returns them.
    pub fn take_front(&mut self, n: usize) -> MemMut<'a> {
        let whole = MemMut { ptr: self.ptr, len: self.len, exclusive: self.exclusive, _owner: PhantomData };
        let (front, rest) = whole.split_at(n);
        *self = rest;
        front
    }

    /// Fills the view with zeroes.
    pub fn fill_zero(&mut self) {
        // SAFETY: valid for writes of len bytes (constructor's contract).
        unsafe { self.ptr.as_ptr().write_bytes(0, self.len) };
    }

    /// Copies the first `min(len, from.len())` bytes in; returns how many.
    pub fn copy_from(&mut self, from: &[u8]) -> usize {
        let n = self.len.min(from.len());
        // SAFETY: both sides are valid for n bytes. `copy_to` tolerates overlap, although a shared slice
        // over these bytes would already break the constructor's contract.
        unsafe { from.as_ptr().copy_to(self.ptr.as_ptr(), n) };
        n
    }

    /// The bytes as a slice, where the engine owns them; `None` over memory that JavaScript can reach.
    pub fn exclusive(&mut self) -> Option<&mut [u8]> {
        // SAFETY: `exclusive` is set only by the conversion from `&'a mut [u8]`.
        self.exclusive.then(|| unsafe { std::slice::from_raw_parts_mut(self.ptr.as_ptr(), self.len) })
    }
}

impl<'a> From<&'a mut [u8]> for MemMut<'a> {
    fn from(s: &'a mut [u8]) -> Self {
        let len = s.len();
        Self { ptr: NonNull::from(s).cast(), len, exclusive: true, _owner: PhantomData }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn split_and_take_cover_all_bytes_once() {
        let mut bytes = [0u8; 10];
        let mut view = MemMut::from(&mut bytes[..]);
        view.take_front(3).copy_from(b"abc");
        let (mut middle, mut rest) = view.split_at(4);
        middle.copy_from(b"defg");
        rest.fill_zero();
        assert_eq!(rest.take_front(99).len(), 3);
        assert_eq!(&bytes, b"abcdefg\0\0\0");
    }

    #[test]
    fn copies_are_clamped() {
        let mut bytes = [1u8; 2];
        assert_eq!(MemMut::from(&mut bytes[..]).copy_from(b"wxyz"), 2);
        let mut out = [0u8; 8];
        assert_eq!(Mem::from(&bytes[..]).copy_to(&mut out), 2);
        assert_eq!(&out[..2], b"wx");
    }
}
