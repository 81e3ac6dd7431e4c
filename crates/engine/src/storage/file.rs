//! A [`Storage`] on a file or block device.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use super::platform::{self, FileKind};
use super::{Run, Storage, Traits};
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
    /// Whether the descriptor's cursor is ours to move: only then may holes be looked for by seeking.
    own_cursor: bool,
    /// Length of a block device, which cannot change while it is open.
    device_len: Option<u64>,
}

impl FileStorage {
    /// Opens an existing file. Directories, FIFOs, sockets and character devices are refused without
    /// blocking.
    ///
    /// # Errors
    /// `Io` with the system's error; `InvalidArgument` for something that is not a disk.
    pub fn open(path: impl AsRef<Path>, access: Access) -> Result<Self> {
        let path = path.as_ref();
        let file = platform::open(path, access == Access::ReadWrite).map_err(|e| refused(e, path))?;
        Self::new(file, Some(path.to_owned()), access == Access::ReadWrite, true)
    }

    /// Takes over an open file; `writable` says how it was opened.
    ///
    /// # Errors
    /// As `open`.
    pub fn from_file(file: File, path: Option<PathBuf>, writable: bool) -> Result<Self> {
        Self::new(file, path, writable, true)
    }

    /// A storage on a descriptor that stays its owner's (a Node `FileHandle`): it can be closed at any time,
    /// so this holds one of its own. Where the system allows, that is a new open of the same file; else a
    /// duplicate, which shares the owner's cursor, so holes are then not looked for.
    ///
    /// # Errors
    /// As `open`.
    #[cfg(unix)]
    pub fn from_borrowed(fd: std::os::fd::BorrowedFd<'_>) -> Result<Self> {
        use std::os::fd::AsRawFd;
        let flags = rustix::fs::fcntl_getfl(fd).map_err(|e| Error::io(e.into(), "fcntl"))?;
        let writable = flags & rustix::fs::OFlags::RWMODE == rustix::fs::OFlags::RDWR;
        let again = PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()));
        let path = std::fs::read_link(&again).ok().filter(|p| p.is_absolute());
        if let Ok(file) = platform::open(&again, writable) {
            return Self::new(file, path, writable, true);
        }
        let own = fd.try_clone_to_owned().map_err(|e| Error::io(e, "dup"))?;
        Self::new(own.into(), path, writable, false)
    }

    fn new(file: File, path: Option<PathBuf>, writable: bool, own_cursor: bool) -> Result<Self> {
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
        let device_len = match block_device {
            true => Some(device_len(&file).map_err(|e| in_file(Error::io(e, "lseek")))?),
            false => None,
        };
        let traits = Traits { alignment: 1, block_device, writable, identity: platform::identity(&metadata) };
        Ok(Self { file, path, traits, own_cursor, device_len })
    }

    /// The file itself, for giving it a name.
    pub(super) fn file(&self) -> &File {
        &self.file
    }
}

/// Where a device ends: `stat` says 0. The cursor is put back, others may share it.
fn device_len(mut file: &File) -> io::Result<u64> {
    use std::io::{Seek, SeekFrom};
    let cursor = file.stream_position()?;
    let end = file.seek(SeekFrom::End(0))?;
    file.seek(SeekFrom::Start(cursor))?;
    Ok(end)
}

/// The open error, with its path. A socket and a FIFO without reader have an error of their own.
fn refused(error: io::Error, path: &Path) -> Error {
    Error::io(error, "open").with_path(path)
}

impl Storage for FileStorage {
    fn read_at(&self, buf: MemMut<'_>, offset: u64) -> io::Result<usize> {
        platform::read_at(&self.file, buf, offset)
    }

    fn write_at(&self, buf: Mem<'_>, offset: u64) -> io::Result<usize> {
        platform::write_at(&self.file, buf, offset)
    }

    fn write_vectored_at(&self, bufs: &[Mem<'_>], offset: u64) -> io::Result<usize> {
        platform::write_vectored_at(&self.file, bufs, offset)
    }

    fn len(&self) -> io::Result<u64> {
        match self.device_len {
            Some(len) => Ok(len),
            None => Ok(self.file.metadata()?.len()),
        }
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        match self.device_len {
            Some(end) if len > end => Err(io::ErrorKind::StorageFull.into()),
            Some(_) => Ok(()),
            None => self.file.set_len(len),
        }
    }

    fn sync_data(&self) -> io::Result<()> {
        self.file.sync_data()
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

    fn run_at(&self, offset: u64) -> io::Result<Run> {
        let len = self.len()?;
        if self.traits.block_device || !self.own_cursor {
            let data = offset < len;
            return Ok(Run { end: if data { len } else { u64::MAX }, data });
        }
        platform::run_at(&self.file, offset, len)
    }

    fn allocated_bytes(&self) -> io::Result<u64> {
        Ok(platform::allocated_bytes(&self.file.metadata()?))
    }

    #[cfg(unix)]
    fn clone_range(&self, from: &dyn Storage, from_offset: u64, offset: u64, length: u64) -> io::Result<()> {
        let fd = from.as_fd().ok_or(io::ErrorKind::Unsupported)?;
        platform::clone_range(&self.file, fd, from_offset, offset, length)
    }

    #[cfg(unix)]
    fn copy_range(&self, from: &dyn Storage, from_offset: u64, offset: u64, length: u64) -> io::Result<u64> {
        let fd = from.as_fd().ok_or(io::ErrorKind::Unsupported)?;
        platform::copy_range(&self.file, fd, from_offset, offset, length)
    }

    fn traits(&self) -> Traits {
        self.traits
    }

    fn path(&self) -> Option<&Path> {
        self.path.as_deref()
    }

    #[cfg(unix)]
    fn as_fd(&self) -> Option<std::os::fd::BorrowedFd<'_>> {
        Some(std::os::fd::AsFd::as_fd(&self.file))
    }
}
