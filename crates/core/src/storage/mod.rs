//! The seam to whatever holds an image's bytes: a [`Storage`] is one random-access file.
//!
//! Everything the engine does to a disk image goes through these traits, so that crashes, faults and short
//! transfers can be simulated without kernel tricks. [`ReadStorage`] is what an image that is only read needs, and asks for two
//! methods; [`Storage`] adds writing, with three. All else has a default that is right and slow. Implementations are thread-safe:
//! requests carry their own offset, there is no cursor. A read beyond the end returns 0 bytes, as `pread` does.
//!
//! A storage in front of another one passes on what it does not change with [`forward_storage!`](crate::forward_storage), under
//! `#[deny(clippy::missing_trait_methods)]`: a method that is added here cannot be forgotten there.

mod batch;
mod block_cache;
mod cache;
mod direct;
mod ext;
mod file;
mod forward;
mod lock;
mod lock_holders;
mod memory;
pub mod naming;
mod new_file;
mod part;
mod platform;
mod range_lock;
mod read_ahead;
mod read_only;
mod sectors;
mod spool;
mod tail;
mod traits;

use std::fmt;
use std::io;
use std::ops::Range;
use std::path::Path;

pub use batch::{ReadTransfer, WriteTransfer, read_each, write_each};
pub use block_cache::{BlockCache, BlockCacheShape, Fetch, Fetched, carried};
pub use cache::CacheMode;
pub use direct::DirectStorage;
pub use ext::StorageExt;
pub use file::{Access, FileStorage};
pub use lock::{Claim, Locking, Permission};
pub use memory::MemoryStorage;
pub use new_file::{NewFile, Overwrite, Room};
pub use part::Part;
pub use platform::no_space;
pub(crate) use platform::number;
pub use range_lock::{HeldRange, RangeLock};
pub use read_only::ReadOnly;
pub use sectors::{SectorCodec, Sectors};
pub use spool::{Arriving, Expected, Progress, Spool};
pub use tail::Tail;
pub use traits::{DeviceLimits, Identity, IoLimits, Operation, Traits};

use crate::{Mem, MemMut, Result};

/// A run of a storage object that is either data or a hole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// First byte behind the run.
    pub end: u64,
    /// False where it reads as zeroes: a hole, or space that holds nothing else.
    pub data: bool,
    /// It takes space.
    pub space: bool,
}

impl Run {
    /// A run of data, which takes space, or a hole, which does not.
    pub fn new(end: u64, data: bool) -> Self {
        Self { end, data, space: data }
    }
}

/// Bytes of one write of the default way to write zeroes.
const ZEROES: usize = 64 << 10;

/// One random-access file, for reading.
pub trait ReadStorage: Send + Sync + fmt::Debug {
    /// Reads into `buf` from `offset`; returns how many bytes, which can be fewer than asked; 0 means the end.
    fn read_at(&self, buf: MemMut<'_>, offset: u64) -> io::Result<usize>;

    /// Length in bytes, now: others may extend what is open here.
    fn len(&self) -> io::Result<u64>;

    /// Whether the length is 0.
    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }

    /// Several reads in one call, in any order; each as [`ReadStorage::read_at`], with a result of its own. One behind the other
    /// unless the storage can do better.
    fn read_batch(&self, batch: &mut [ReadTransfer<'_>]) {
        read_each(self, batch);
    }

    /// The run at the start of `range`, which is not empty: a hole, or data. Nobody looks behind the range, and the run may end
    /// behind it. What lies behind the end of the file is a hole. All data where nothing is known.
    fn run_in(&self, range: Range<u64>) -> io::Result<Run> {
        let len = self.len()?;
        let data = range.start < len;
        Ok(Run::new(if data { len } else { u64::MAX }, data))
    }

    /// Bytes of space in use.
    fn allocated_bytes(&self) -> io::Result<u64> {
        self.len()
    }

    /// What tells it apart: equal values are the same bytes, whatever name they were opened by. `None` where nobody else can have
    /// it open.
    fn identity(&self) -> Option<Identity> {
        None
    }

    /// What it is and wants.
    fn traits(&self) -> Traits {
        Traits::default()
    }

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

    /// What an operation is called in errors: the system call, unless there is none.
    fn operation(&self, operation: Operation) -> &'static str {
        operation.system_call()
    }

    /// Whether the same request may succeed when it is made again after `error`.
    fn is_transient(&self, error: &io::Error) -> bool {
        use io::ErrorKind::{ConnectionAborted, ConnectionReset, Interrupted, TimedOut, WouldBlock};
        matches!(error.kind(), ConnectionAborted | ConnectionReset | Interrupted | TimedOut | WouldBlock)
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

    /// Where its bytes are still coming: what such a storage is told.
    fn arriving(&self) -> Option<&dyn Arriving> {
        None
    }

    /// Says that nobody reads the range again: the system need not keep it in memory. A hint; a later read gets what is there.
    fn forget(&self, range: Range<u64>) {
        let _ = range;
    }

    /// The descriptor behind it, for the kernel's copies between two files.
    #[cfg(unix)]
    fn as_fd(&self) -> Option<std::os::fd::BorrowedFd<'_>> {
        None
    }
}

/// One random-access file.
pub trait Storage: ReadStorage {
    /// Writes `buf` at `offset`; returns how many bytes, which can be fewer than asked. Extends the file.
    fn write_at(&self, buf: Mem<'_>, offset: u64) -> io::Result<usize>;

    /// Cuts or extends (with a hole) to `len` bytes. A device stays as long as it is: one that is shorter has no space.
    fn set_len(&self, len: u64) -> io::Result<()>;

    /// Makes everything written so far durable (fdatasync: data, and the metadata needed to read it).
    fn sync_data(&self) -> io::Result<()>;

    /// Has the system begin to write what it holds back, so that a sync to come has less to wait for. A hint: nothing is durable by it,
    /// and errors wait for the sync.
    fn begin_sync(&self) {}

    /// Writes `bufs` one behind the other in one request where the system can; may write fewer bytes.
    fn write_vectored_at(&self, bufs: &[Mem<'_>], offset: u64) -> io::Result<usize> {
        match bufs.iter().find(|b| !b.is_empty()) {
            Some(first) => self.write_at(*first, offset),
            None => Ok(0),
        }
    }

    /// Several writes in one call, of ranges that do not overlap, in any order; each as [`Storage::write_vectored_at`], with a
    /// result of its own. One behind the other unless the storage can do better.
    fn write_batch(&self, batch: &mut [WriteTransfer<'_>]) {
        write_each(self, batch);
    }

    /// What the system reports when a descriptor of the file is closed: on some file systems (NFS, FUSE) a failed write is told
    /// only then. The storage stays open.
    fn check_close(&self) -> io::Result<()> {
        Ok(())
    }

    /// Makes the range read as zeroes; `unmap` frees its space where the system can. Extends the file.
    fn write_zeroes(&self, offset: u64, length: u64, unmap: bool) -> io::Result<()> {
        let _ = unmap;
        let end = offset.checked_add(length).ok_or(io::ErrorKind::InvalidInput)?;
        let zeroes = vec![0; usize::try_from(length).unwrap_or(usize::MAX).min(ZEROES)];
        let mut at = offset;
        while at < end {
            let (piece, _) = Mem::from(&zeroes[..]).split_at(usize::try_from(end - at).unwrap_or(usize::MAX));
            match self.write_at(piece, at)? {
                0 => return Err(io::ErrorKind::WriteZero.into()),
                written => at += written as u64,
            }
        }
        Ok(())
    }

    /// Frees the range's space where the system can; its bytes are unspecified afterwards.
    fn discard(&self, offset: u64, length: u64) -> io::Result<()> {
        let _ = (offset, length);
        Ok(())
    }

    /// Reserves space for the range, where the system can, without changing what it reads as; extends the file.
    fn allocate(&self, offset: u64, length: u64) -> io::Result<()> {
        let end = offset.checked_add(length).ok_or(io::ErrorKind::InvalidInput)?;
        if length > 0 && end > self.len()? { self.set_len(end) } else { Ok(()) }
    }

    /// As `allocate`, where that makes the writes that follow cheaper. `Unsupported` elsewhere: nothing is done.
    fn allocate_ahead(&self, offset: u64, length: u64) -> io::Result<()> {
        let _ = (offset, length);
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Shares `length` bytes of `from` with this file, without copying (reflink). `Unsupported` where not possible.
    fn clone_range(
        &self,
        from: &dyn ReadStorage,
        from_offset: u64,
        offset: u64,
        length: u64,
    ) -> io::Result<()> {
        let _ = (from, from_offset, offset, length);
        Err(io::ErrorKind::Unsupported.into())
    }
}
