//! A disk with direct I/O: what is not aligned is refused.

use std::io;
use std::sync::Arc;

use qcow2_core::forward_storage;
use qcow2_engine::storage::{ReadStorage, Traits};
use qcow2_engine::{Mem, MemMut, Storage};

/// Answers `EINVAL` to every transfer whose offset, length or address is not a multiple.
#[derive(Debug)]
pub struct AlignedOnly {
    inner: Arc<dyn Storage>,
    alignment: u32,
    memory_alignment: u32,
}

impl AlignedOnly {
    /// Wraps `inner`. `alignment` is for offsets and lengths, `memory_alignment` for addresses.
    pub fn new(inner: Arc<dyn Storage>, alignment: u32, memory_alignment: u32) -> Self {
        Self { inner, alignment, memory_alignment }
    }

    fn range(&self, offset: u64, length: u64) -> io::Result<()> {
        let alignment = u64::from(self.alignment);
        demand(offset.is_multiple_of(alignment) && length.is_multiple_of(alignment))
    }

    fn transfer(&self, address: *const u8, length: usize, offset: u64) -> io::Result<()> {
        self.range(offset, length as u64)?;
        demand(address.addr().is_multiple_of(self.memory_alignment as usize))
    }
}

/// `EINVAL`, as the kernel answers.
fn demand(aligned: bool) -> io::Result<()> {
    if aligned { Ok(()) } else { Err(io::Error::from_raw_os_error(22)) }
}

#[deny(clippy::missing_trait_methods, reason = "in front of another storage: a new method must be passed on")]
impl ReadStorage for AlignedOnly {
    fn read_at(&self, mut buf: MemMut<'_>, offset: u64) -> io::Result<usize> {
        self.transfer(buf.as_mut_ptr(), buf.len(), offset)?;
        self.inner.read_at(buf, offset)
    }
    fn traits(&self) -> Traits {
        Traits { alignment: self.alignment, memory_alignment: self.memory_alignment, ..self.inner.traits() }
    }
    forward_storage!(inner: len is_empty run_in allocated_bytes identity io_limits path operation is_transient lock forget arriving no_fd read_each);
}

#[deny(clippy::missing_trait_methods, reason = "in front of another storage: a new method must be passed on")]
impl Storage for AlignedOnly {
    fn write_at(&self, buf: Mem<'_>, offset: u64) -> io::Result<usize> {
        self.transfer(buf.as_ptr(), buf.len(), offset)?;
        self.inner.write_at(buf, offset)
    }
    fn write_vectored_at(&self, bufs: &[Mem<'_>], offset: u64) -> io::Result<usize> {
        for buf in bufs.iter().filter(|b| !b.is_empty()) {
            self.transfer(buf.as_ptr(), buf.len(), offset)?;
        }
        self.inner.write_vectored_at(bufs, offset)
    }
    fn write_zeroes(&self, offset: u64, length: u64, unmap: bool) -> io::Result<()> {
        self.range(offset, length)?;
        self.inner.write_zeroes(offset, length, unmap)
    }
    fn discard(&self, offset: u64, length: u64) -> io::Result<()> {
        self.range(offset, length)?;
        self.inner.discard(offset, length)
    }
    forward_storage!(inner: set_len sync_data begin_sync check_close allocate never_ahead never_clone write_each);
}
