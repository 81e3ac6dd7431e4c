//! The seam to the operating system: a [`Storage`] is one random-access file.
//!
//! Everything the engine does to a disk image goes through this trait, so that crashes, faults and short
//! transfers can be simulated without kernel tricks. Implementations are thread-safe: requests carry their
//! own offset, there is no cursor. A read beyond the end returns 0 bytes, as `pread` does.

mod cache;
mod direct;
mod ext;
mod file;
mod lock;
mod lock_holders;
mod memory;
pub mod naming;
mod new_file;
mod platform;
mod range_lock;

use std::fmt;
use std::io;
use std::path::Path;

pub use cache::CacheMode;
pub use direct::DirectStorage;
pub use ext::StorageExt;
pub use file::{Access, FileStorage};
pub use lock::{Claim, Locking, Permission};
pub use memory::MemoryStorage;
pub use new_file::{NewFile, Overwrite, Room};
pub use platform::no_space;

use crate::{Mem, MemMut, Result};

/// A run of a storage object that is either data or a hole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// First byte behind the run.
    pub end: u64,
    /// False for a hole, which reads as zeroes.
    pub data: bool,
}

/// What a storage object is, and what it wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Traits {
    /// Offsets and lengths must be multiples of this (1 where there is no such rule). See [`DirectStorage`].
    pub alignment: u32,
    /// Addresses of buffers must be multiples of this (1 where there is no such rule).
    pub memory_alignment: u32,
    /// A block device: only its owner changes its length, and a new target on it is not zero.
    pub block_device: bool,
    /// Open for writing.
    pub writable: bool,
    /// Device and inode where there is one: equal values are the same file.
    pub identity: Option<(u64, u64)>,
}

/// What requests on a file should look like, in bytes; absent where there is no rule or nothing is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IoLimits {
    /// Multiple that offsets and lengths must be of.
    pub request_alignment: u32,
    /// Multiple that addresses of buffers must be of.
    pub memory_alignment: u32,
    /// Bytes of a page of memory.
    pub page_size: u32,
    /// What the device does with these.
    pub device: DeviceLimits,
}

/// What a block device says of its queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DeviceLimits {
    /// Most bytes of one transfer.
    pub max_transfer: Option<u32>,
    /// Most pieces of memory of one transfer.
    pub max_segments: Option<u32>,
    /// Multiple that frees space when it is discarded.
    pub discard_alignment: Option<u32>,
    /// Multiple that the device zeroes by itself.
    pub zeroes_alignment: Option<u32>,
}

/// One random-access file.
pub trait Storage: Send + Sync + fmt::Debug {
    /// Reads into `buf` from `offset`; returns how many bytes, which can be fewer than asked.
    fn read_at(&self, buf: MemMut<'_>, offset: u64) -> io::Result<usize>;
    /// Writes `buf` at `offset`; returns how many bytes, which can be fewer than asked.
    fn write_at(&self, buf: Mem<'_>, offset: u64) -> io::Result<usize>;
    /// Writes `bufs` one behind the other in one request where the system can; may write fewer bytes.
    fn write_vectored_at(&self, bufs: &[Mem<'_>], offset: u64) -> io::Result<usize> {
        match bufs.iter().find(|b| !b.is_empty()) {
            Some(first) => self.write_at(*first, offset),
            None => Ok(0),
        }
    }
    /// Length in bytes, now: others may extend what is open here.
    fn len(&self) -> io::Result<u64>;
    /// Whether the length is 0.
    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }
    /// Cuts or extends (with a hole) to `len` bytes. A device stays as long as it is: one that is shorter has no space.
    fn set_len(&self, len: u64) -> io::Result<()>;
    /// Makes everything written so far durable (fdatasync: data, and the metadata needed to read it).
    fn sync_data(&self) -> io::Result<()>;
    /// What the system reports when a descriptor of the file is closed: on some file systems (NFS, FUSE) a failed write is told
    /// only then. The storage stays open.
    fn check_close(&self) -> io::Result<()> {
        Ok(())
    }
    /// Makes the range read as zeroes; `unmap` frees its space where the system can. Extends the file.
    fn write_zeroes(&self, offset: u64, length: u64, unmap: bool) -> io::Result<()>;
    /// Frees the range's space where the system can; its bytes are unspecified afterwards.
    fn discard(&self, offset: u64, length: u64) -> io::Result<()>;
    /// Reserves space for the range without changing what it reads as; extends the file.
    fn allocate(&self, offset: u64, length: u64) -> io::Result<()>;
    /// As `allocate`, where that makes the writes that follow cheaper. `Unsupported` elsewhere: nothing is done.
    fn allocate_ahead(&self, offset: u64, length: u64) -> io::Result<()> {
        let _ = (offset, length);
        Err(io::ErrorKind::Unsupported.into())
    }
    /// The run at `offset` (which is below the length): all data where the system cannot tell.
    fn run_at(&self, offset: u64) -> io::Result<Run>;
    /// Bytes of space in use.
    fn allocated_bytes(&self) -> io::Result<u64>;
    /// Shares `length` bytes of `from` with this file, without copying (reflink). `Unsupported` where not possible.
    fn clone_range(&self, from: &dyn Storage, from_offset: u64, offset: u64, length: u64) -> io::Result<()> {
        let _ = (from, from_offset, offset, length);
        Err(io::ErrorKind::Unsupported.into())
    }
    /// Copies up to `length` bytes of `from` inside the kernel; returns how many. `Unsupported` where not possible.
    fn copy_range(&self, from: &dyn Storage, from_offset: u64, offset: u64, length: u64) -> io::Result<u64> {
        let _ = (from, from_offset, offset, length);
        Err(io::ErrorKind::Unsupported.into())
    }
    /// Claims the image against other processes, or changes the claim made before; it ends with the storage.
    /// Storages that no other process can reach need none.
    ///
    /// # Errors
    /// `Locked`, naming the permission that conflicts; then the claim made before still holds.
    fn lock(&self, claim: Claim, locking: Locking) -> Result<()> {
        let _ = (claim, locking);
        Ok(())
    }
    /// What it is and wants.
    fn traits(&self) -> Traits;
    /// What its requests should look like.
    fn io_limits(&self) -> IoLimits {
        let Traits { alignment, memory_alignment, .. } = self.traits();
        let device = DeviceLimits::default();
        IoLimits { request_alignment: alignment, memory_alignment, page_size: platform::page_size(), device }
    }
    /// Its path, for messages and for references relative to it.
    fn path(&self) -> Option<&Path> {
        None
    }
    /// The descriptor behind it, for the kernel's copies between two files.
    #[cfg(unix)]
    fn as_fd(&self) -> Option<std::os::fd::BorrowedFd<'_>> {
        None
    }
}
