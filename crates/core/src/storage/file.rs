//! A [`Storage`] on a file or block device.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use super::lock::ImageLock;
use super::platform::alignment::{self, Alignment};
use super::platform::{self, FileKind, device};
use super::{
    CacheMode, Claim, DeviceLimits, DirectStorage, Identity, IoLimits, Locking, ReadStorage, Run, Storage,
    Traits,
};
use crate::{Error, ErrorKind, Mem, MemMut, Result};

/// How to open a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Reads only; writes fail with `EBADF` as the system reports it.
    ReadOnly,
    /// Reads and writes.
    ReadWrite,
}

/// A regular file or block device. Closed on drop; never seeks the cursor of a descriptor that others share.
#[derive(Debug)]
pub struct FileStorage {
    file: File,
    path: Option<PathBuf>,
    traits: Traits,
    identity: Option<Identity>,
    /// Whether the descriptor's cursor is ours to move: only then may holes be looked for by seeking.
    own_cursor: bool,
    /// Whether taking space ahead of writes pays on this file system.
    allocates_ahead: OnceLock<bool>,
    cache: CacheMode,
    lock: ImageLock,
}

impl FileStorage {
    /// Opens an existing file. Directories, FIFOs, sockets and character devices are refused without
    /// blocking.
    ///
    /// # Errors
    /// `Io` with the system's error, `EACCES` also for a read-only device that is to be written to; `InvalidArgument` for
    /// something that is not a disk.
    pub fn open(path: impl AsRef<Path>, access: Access) -> Result<Self> {
        Self::open_cached(path, access, CacheMode::default())
    }

    /// As `open`, in a cache mode. One that is direct can make the storage demand alignment:
    /// [`FileStorage::into_storage`] gives one that takes any request.
    ///
    /// # Errors
    /// As `open`; `UnsupportedFeature` where a direct mode is not possible.
    pub fn open_cached(path: impl AsRef<Path>, access: Access, cache: CacheMode) -> Result<Self> {
        let path = path.as_ref();
        let writable = access == Access::ReadWrite;
        let file = platform::open(path, writable, cache.is_direct()).map_err(|e| refused(e, path, cache))?;
        Self::new(file, Some(path.to_owned()), writable, true, cache)
    }

    /// This file as a storage that takes any request, whatever its cache mode.
    pub fn into_storage(self) -> Arc<dyn Storage> {
        DirectStorage::over(Arc::new(self))
    }

    /// Takes over an open file; `writable` says how it was opened.
    ///
    /// # Errors
    /// As `open`.
    pub fn from_file(file: File, path: Option<PathBuf>, writable: bool) -> Result<Self> {
        Self::new(file, path, writable, true, CacheMode::default())
    }

    /// A storage on a descriptor that stays its owner's (a Node `FileHandle`): it can be closed at any time,
    /// so this holds one of its own. Where the system allows, that is a new open of the same file; else a
    /// duplicate, which shares the owner's cursor, so holes are then not looked for, and the owner's flags.
    ///
    /// # Errors
    /// As `open`.
    #[cfg(unix)]
    pub fn from_borrowed(fd: std::os::fd::BorrowedFd<'_>) -> Result<Self> {
        Self::from_borrowed_cached(fd, None, CacheMode::default())
    }

    /// As `from_borrowed`, in a cache mode, and for `access` instead of all that the owner opened it for.
    ///
    /// # Errors
    /// As `open_cached`; a direct mode needs the new open. `ReadOnly` to write what the owner may only read;
    /// `InvalidArgument` to write what the owner may only write, or, without the new open, only append to.
    #[cfg(unix)]
    pub fn from_borrowed_cached(
        fd: std::os::fd::BorrowedFd<'_>,
        access: Option<Access>,
        cache: CacheMode,
    ) -> Result<Self> {
        use rustix::fs::OFlags;
        use std::os::fd::AsRawFd;
        let flags = rustix::fs::fcntl_getfl(fd).map_err(|e| Error::io(e.into(), "fcntl"))?;
        let mode = flags & OFlags::RWMODE;
        let writable = access.map_or(mode == OFlags::RDWR, |access| access == Access::ReadWrite);
        let again = PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()));
        let path = std::fs::read_link(&again).ok().filter(|p| p.is_absolute());
        let refuse = |kind, message: &str| Err(path.iter().fold(Error::new(kind, message), Error::with_path));
        if writable && mode == OFlags::WRONLY {
            let message = "the file was opened for writing only: open it for reading and writing ('r+')";
            return refuse(ErrorKind::InvalidArgument, message);
        }
        if writable && mode != OFlags::RDWR {
            return refuse(ErrorKind::ReadOnly, "the file was opened for reading only");
        }
        let own = fd.try_clone_to_owned().map_err(|e| Error::io(e, "dup"))?;
        let own = File::from(own);
        match platform::open(&again, writable, cache.is_direct()) {
            Ok(file) if same_file(&file, &own) => return Self::new(file, path, writable, true, cache),
            other if cache.is_direct() => {
                let error = other.err().unwrap_or_else(|| io::ErrorKind::Unsupported.into());
                return Err(refused(error, path.as_deref().unwrap_or(&again), cache));
            }
            _ => {}
        }
        if writable && flags.contains(OFlags::APPEND) {
            let message = "the file was opened for appending, and cannot be opened anew: \
                           what is written would go to its end; open it for reading and writing ('r+')";
            return refuse(ErrorKind::InvalidArgument, message);
        }
        Self::new(own, path, writable, false, cache)
    }

    fn new(
        file: File,
        path: Option<PathBuf>,
        writable: bool,
        own_cursor: bool,
        cache: CacheMode,
    ) -> Result<Self> {
        let in_file = |e: Error| match &path {
            Some(path) => e.with_path(path),
            None => e,
        };
        let metadata = file.metadata().map_err(|e| in_file(Error::io(e, "fstat")))?;
        let block_device = match platform::kind(&metadata) {
            FileKind::Regular => false,
            FileKind::BlockDevice => true,
            FileKind::Directory => return Err(in_file(Error::io(platform::is_a_directory(), "open"))),
            FileKind::Other(what) => {
                let message = format!("{what}: a disk image must be a regular file or a block device");
                return Err(in_file(Error::new(ErrorKind::InvalidArgument, message)));
            }
        };
        if block_device && writable && device::is_read_only(&file) {
            return Err(in_file(
                Error::io(platform::not_permitted(), "open").because("the device is read-only"),
            ));
        }
        // A descriptor of others can be direct, whatever mode was asked for.
        #[cfg(unix)]
        let direct = cache.is_direct()
            || !own_cursor && platform::is_direct(&file).map_err(|e| in_file(Error::io(e, "fcntl")))?;
        #[cfg(not(unix))]
        let direct = cache.is_direct();
        let alignment = match direct {
            true => alignment::of_direct(&file, block_device)
                .map_err(|e| in_file(no_direct(e, cache, "statx")))?,
            false => Alignment::NONE,
        };
        let traits = Traits {
            alignment: alignment.request,
            memory_alignment: alignment.memory,
            block_device,
            writable,
            waits: direct,
        };
        Ok(Self {
            identity: platform::identity(&file, &metadata)
                .map(|(device, inode)| Identity::of_file(device, inode)),
            file,
            path,
            traits,
            own_cursor,
            allocates_ahead: OnceLock::new(),
            cache,
            lock: ImageLock::default(),
        })
    }

    /// The file itself, for giving it a name.
    pub(super) fn file(&self) -> &File {
        &self.file
    }
}

/// Whether two descriptors are of one file: what `/proc` says can be of another process, or nobody's.
#[cfg(unix)]
fn same_file(a: &File, b: &File) -> bool {
    let identity =
        |file: &File| file.metadata().ok().and_then(|metadata| platform::identity(file, &metadata));
    identity(a).is_some() && identity(a) == identity(b)
}

/// The open error, with its path; on Windows an opener that shares nothing is its own kind of lock (QEMU's). A socket and a FIFO without reader have an error of their own.
fn refused(error: io::Error, path: &Path, cache: CacheMode) -> Error {
    if platform::is_in_use(&error) {
        let message = "another process has the file open and does not share it";
        return Error::new(ErrorKind::Locked, message).with_source(error).with_path(path);
    }
    no_direct(error, cache, "open").with_path(path)
}

/// `Unsupported` on the way to direct I/O says that there is none.
fn no_direct(error: io::Error, cache: CacheMode, syscall: &'static str) -> Error {
    if cache.is_direct() && error.kind() == io::ErrorKind::Unsupported && error.raw_os_error().is_none() {
        let message = format!("cache mode '{cache}': the file system or system has no direct I/O");
        return Error::new(ErrorKind::UnsupportedFeature, message);
    }
    Error::io(error, syscall)
}

impl Drop for FileStorage {
    fn drop(&mut self) {
        self.lock.release(&self.file);
    }
}

impl ReadStorage for FileStorage {
    fn read_at(&self, buf: MemMut<'_>, offset: u64) -> io::Result<usize> {
        platform::read_at(&self.file, buf, offset)
    }

    fn len(&self) -> io::Result<u64> {
        match self.traits.block_device {
            // Anew each time: a device can be extended while it is open.
            true => device::length(&self.file),
            false => Ok(self.file.metadata()?.len()),
        }
    }

    fn run_in(&self, range: Range<u64>) -> io::Result<Run> {
        let (offset, len) = (range.start, self.len()?);
        if self.traits.block_device || !self.own_cursor {
            let data = offset < len;
            return Ok(Run::new(if data { len } else { u64::MAX }, data));
        }
        platform::run_in(&self.file, range, len)
    }

    fn allocated_bytes(&self) -> io::Result<u64> {
        platform::allocated_bytes(&self.file)
    }

    fn identity(&self) -> Option<Identity> {
        self.identity.clone()
    }

    fn traits(&self) -> Traits {
        self.traits
    }

    fn io_limits(&self) -> IoLimits {
        let Traits { alignment, memory_alignment, block_device, .. } = self.traits;
        let mut device =
            if block_device { platform::device_limits(&self.file) } else { DeviceLimits::default() };
        if self.cache.is_direct() {
            // Every request is as aligned as the device wants it.
            device.zeroes_alignment = None;
        }
        IoLimits { request_alignment: alignment, memory_alignment, page_size: platform::page_size(), device }
    }

    fn path(&self) -> Option<&Path> {
        self.path.as_deref()
    }

    fn lock(&self, claim: Claim, locking: Locking) -> Result<()> {
        self.lock.change(&self.file, claim, locking).map_err(|e| match &self.path {
            Some(path) => e.with_path(path),
            None => e,
        })
    }

    fn forget(&self, range: Range<u64>) {
        platform::forget(&self.file, range);
    }

    #[cfg(unix)]
    fn as_fd(&self) -> Option<std::os::fd::BorrowedFd<'_>> {
        Some(std::os::fd::AsFd::as_fd(&self.file))
    }
}

impl Storage for FileStorage {
    fn write_at(&self, buf: Mem<'_>, offset: u64) -> io::Result<usize> {
        platform::write_at(&self.file, buf, offset)
    }

    fn write_vectored_at(&self, bufs: &[Mem<'_>], offset: u64) -> io::Result<usize> {
        platform::write_vectored_at(&self.file, bufs, offset)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        match self.traits.block_device {
            true if len > self.len()? => Err(platform::no_space()),
            true => Ok(()),
            false => platform::set_len(&self.file, len),
        }
    }

    fn sync_data(&self) -> io::Result<()> {
        if self.cache.ignores_flush() {
            return Ok(());
        }
        platform::sync_data(&self.file)
    }

    fn begin_sync(&self) {
        // Past the page cache, nothing is held back.
        if !self.cache.ignores_flush() && !self.cache.is_direct() {
            platform::begin_sync(&self.file);
        }
    }

    fn check_close(&self) -> io::Result<()> {
        match self.traits.writable {
            true => platform::close_duplicate(&self.file),
            false => Ok(()),
        }
    }

    fn write_zeroes(&self, offset: u64, length: u64, unmap: bool) -> io::Result<()> {
        platform::write_zeroes(&self.file, offset, length, unmap, self.traits.block_device)
    }

    fn discard(&self, offset: u64, length: u64) -> io::Result<()> {
        platform::discard(&self.file, offset, length, self.traits.block_device)
    }

    fn allocate(&self, offset: u64, length: u64) -> io::Result<()> {
        platform::allocate(&self.file, offset, length, self.traits.block_device)
    }

    fn allocate_ahead(&self, offset: u64, length: u64) -> io::Result<()> {
        if !*self.allocates_ahead.get_or_init(|| platform::gains_by_allocating_ahead(&self.file)) {
            return Err(io::ErrorKind::Unsupported.into());
        }
        platform::allocate_ahead(&self.file, offset, length)
    }

    #[cfg(unix)]
    fn clone_range(
        &self,
        from: &dyn ReadStorage,
        from_offset: u64,
        offset: u64,
        length: u64,
    ) -> io::Result<()> {
        let fd = from.as_fd().ok_or(io::ErrorKind::Unsupported)?;
        platform::clone_range(&self.file, fd, from_offset, offset, length)
    }
}
