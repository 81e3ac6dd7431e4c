//! What differs between operating systems, in one place: positioned I/O on raw memory, sparse-file calls,
//! the kernel's copies, and files without a name.
//!
//! Each call has a portable fallback, or answers `Unsupported` where its caller has one.

use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::path::Path;

use super::Run;
use crate::{Mem, MemMut};

pub(super) use system::{
    allocate, allocate_ahead, allocated_bytes, clone_range, copy_range, discard, gains_by_allocating_ahead,
    identity, link_unnamed, open_unnamed, replace_by_link, run_at, write_zeroes,
};

/// What a path or descriptor turned out to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FileKind {
    Regular,
    BlockDevice,
    Directory,
    /// Anything that is not a disk, by its name in the manual.
    Other(&'static str),
}

/// Opens without ever waiting: a FIFO or a device without medium answers at once, and is refused later by its
/// kind. The descriptor is closed on exec (std's default). `direct` bypasses the page cache; `Unsupported` where
/// the system or the file system cannot.
pub(super) fn open(path: &Path, writable: bool, direct: bool) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(writable);
    #[cfg(unix)]
    {
        let direct = if direct { DIRECT } else { 0 };
        let flags = libc::O_NONBLOCK | libc::O_NOCTTY | direct;
        std::os::unix::fs::OpenOptionsExt::custom_flags(&mut options, flags);
    }
    let file = options.open(path).map_err(|e| {
        // The open of a file system that has no direct I/O fails like this, and no other open does.
        #[cfg(unix)]
        if direct && e.raw_os_error() == Some(libc::EINVAL) {
            return io::ErrorKind::Unsupported.into();
        }
        e
    })?;
    #[cfg(unix)]
    blocking(&file)?;
    if direct {
        bypass_cache(&file)?;
    }
    Ok(file)
}

#[cfg(target_os = "linux")]
const DIRECT: libc::c_int = libc::O_DIRECT;
#[cfg(all(unix, not(target_os = "linux")))]
const DIRECT: libc::c_int = 0;

/// What is left to do after the open, where the flag is not one of the open.
#[cfg(target_os = "linux")]
fn bypass_cache(_: &File) -> io::Result<()> {
    Ok(())
}

#[cfg(target_os = "macos")]
fn bypass_cache(file: &File) -> io::Result<()> {
    use std::os::fd::AsRawFd;
    // SAFETY: F_NOCACHE takes an int and touches no memory of ours.
    positioned::retry(|| unsafe { libc::fcntl(file.as_raw_fd(), libc::F_NOCACHE, 1) as isize }).map(drop)
}

#[cfg(not(any(target_os = "linux", target_os = "macos")))]
fn bypass_cache(_: &File) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

/// Clears `O_NONBLOCK`, which was for the open alone.
#[cfg(unix)]
fn blocking(file: &File) -> io::Result<()> {
    use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
    let flags = fcntl_getfl(file)?;
    Ok(fcntl_setfl(file, flags - OFlags::NONBLOCK)?)
}

/// The kind of file behind `metadata`.
pub(super) fn kind(metadata: &Metadata) -> FileKind {
    let kind = metadata.file_type();
    if kind.is_file() {
        return FileKind::Regular;
    }
    if kind.is_dir() {
        return FileKind::Directory;
    }
    #[cfg(unix)]
    {
        use std::os::unix::fs::FileTypeExt;
        if kind.is_block_device() {
            return FileKind::BlockDevice;
        }
        if kind.is_fifo() {
            return FileKind::Other("a FIFO");
        }
        if kind.is_socket() {
            return FileKind::Other("a socket");
        }
        if kind.is_char_device() {
            return FileKind::Other("a character device");
        }
    }
    FileKind::Other("not a regular file")
}

/// The system's "is a directory" error.
pub(super) fn is_a_directory() -> io::Error {
    #[cfg(unix)]
    return io::Error::from_raw_os_error(libc::EISDIR);
    #[cfg(not(unix))]
    io::ErrorKind::IsADirectory.into()
}

/// Whether the error says that the call or the file system does not offer this, so that a fallback applies.
pub(super) fn is_unsupported(error: &io::Error) -> bool {
    #[cfg(unix)]
    if let Some(errno) = error.raw_os_error() {
        return matches!(
            errno,
            libc::EOPNOTSUPP
                | libc::ENOSYS
                | libc::EINVAL
                | libc::ENOTTY
                | libc::EXDEV
                | libc::EPERM
                | libc::ENODEV
                | libc::ETXTBSY
                | libc::EISDIR
        );
    }
    error.kind() == io::ErrorKind::Unsupported
}

#[cfg(unix)]
mod positioned {
    use std::os::fd::AsRawFd;

    use super::*;

    /// The most buffers that one `pwritev` takes on every system we know.
    const IOV_MAX: usize = 1024;

    fn off(offset: u64) -> io::Result<libc::off_t> {
        libc::off_t::try_from(offset).map_err(|_| io::Error::from_raw_os_error(libc::EFBIG))
    }

    /// Repeats a call that a signal interrupted.
    pub(super) fn retry(mut call: impl FnMut() -> isize) -> io::Result<usize> {
        loop {
            if let Ok(n) = usize::try_from(call()) {
                return Ok(n);
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
    }

    pub(crate) fn read_at(file: &File, mut buf: MemMut<'_>, offset: u64) -> io::Result<usize> {
        let (fd, offset) = (file.as_raw_fd(), off(offset)?);
        // SAFETY: the view is valid for writes of its length for the whole call.
        retry(|| unsafe { libc::pread(fd, buf.as_mut_ptr().cast(), buf.len(), offset) })
    }

    pub(crate) fn write_at(file: &File, buf: Mem<'_>, offset: u64) -> io::Result<usize> {
        let (fd, offset) = (file.as_raw_fd(), off(offset)?);
        // SAFETY: the view is valid for reads of its length for the whole call.
        retry(|| unsafe { libc::pwrite(fd, buf.as_ptr().cast(), buf.len(), offset) })
    }

    #[cfg(target_os = "linux")]
    pub(crate) fn write_vectored_at(file: &File, bufs: &[Mem<'_>], offset: u64) -> io::Result<usize> {
        let (fd, offset) = (file.as_raw_fd(), off(offset)?);
        let iov: Vec<libc::iovec> = bufs
            .iter()
            .filter(|b| !b.is_empty())
            .take(IOV_MAX)
            .map(|b| libc::iovec { iov_base: b.as_ptr().cast_mut().cast(), iov_len: b.len() })
            .collect();
        // At most IOV_MAX elements: the count fits.
        let count = libc::c_int::try_from(iov.len()).unwrap_or(libc::c_int::MAX);
        // SAFETY: every element describes a view that is valid for reads for the whole call; pwritev never
        // writes through iov_base.
        retry(|| unsafe { libc::pwritev(fd, iov.as_ptr(), count, offset) })
    }

    /// `pwritev` is missing on older systems of this family: one buffer at a time.
    #[cfg(not(target_os = "linux"))]
    pub(crate) fn write_vectored_at(file: &File, bufs: &[Mem<'_>], offset: u64) -> io::Result<usize> {
        match bufs.iter().find(|b| !b.is_empty()).filter(|_| IOV_MAX > 0) {
            Some(first) => write_at(file, *first, offset),
            None => Ok(0),
        }
    }
}

#[cfg(windows)]
mod positioned {
    use std::os::windows::fs::FileExt;

    use super::*;

    /// Memory that JavaScript can reach is never lent as a slice: it goes through this much of our own.
    const BOUNCE: usize = 256 << 10;

    pub(crate) fn read_at(file: &File, mut buf: MemMut<'_>, offset: u64) -> io::Result<usize> {
        if let Some(slice) = buf.exclusive() {
            return file.seek_read(slice, offset);
        }
        let mut bounce = vec![0; buf.len().min(BOUNCE)];
        let n = file.seek_read(&mut bounce, offset)?;
        Ok(buf.copy_from(bounce.get(..n).unwrap_or_default()))
    }

    pub(crate) fn write_at(file: &File, buf: Mem<'_>, offset: u64) -> io::Result<usize> {
        let mut bounce = vec![0; buf.len().min(BOUNCE)];
        let n = buf.copy_to(&mut bounce);
        file.seek_write(bounce.get(..n).unwrap_or_default(), offset)
    }

    pub(crate) fn write_vectored_at(file: &File, bufs: &[Mem<'_>], offset: u64) -> io::Result<usize> {
        match bufs.iter().find(|b| !b.is_empty()) {
            Some(first) => write_at(file, *first, offset),
            None => Ok(0),
        }
    }
}

pub(super) use positioned::{read_at, write_at, write_vectored_at};

/// Zeroes by writing them: the last resort of every platform.
pub(super) fn write_zero_bytes(file: &File, mut offset: u64, mut length: u64) -> io::Result<()> {
    /// Aligned as direct I/O wants it.
    #[repr(align(4096))]
    struct Zeroes([u8; 256 << 10]);
    static ZEROES: Zeroes = Zeroes([0; 256 << 10]);
    while length > 0 {
        let n = usize::try_from(length).unwrap_or(usize::MAX).min(ZEROES.0.len());
        let done = write_at(file, Mem::from(ZEROES.0.get(..n).unwrap_or(&ZEROES.0)), offset)?;
        if done == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        offset += done as u64;
        length -= done as u64;
    }
    Ok(())
}

/// End of `offset..offset + length`, where it can exist.
fn end_of(offset: u64, length: u64) -> io::Result<u64> {
    offset.checked_add(length).ok_or_else(|| io::ErrorKind::InvalidInput.into())
}

/// Extends the file with a hole up to `end`, never cuts it.
fn extend_to(file: &File, end: u64) -> io::Result<()> {
    if file.metadata()?.len() < end { file.set_len(end) } else { Ok(()) }
}

/// Everything from `offset` on is data, or behind the end.
fn all_data(offset: u64, len: u64) -> Run {
    if offset < len { Run { end: len, data: true } } else { Run { end: u64::MAX, data: false } }
}

/// Space for a range without changing its bytes, where the system has no call for it: zeroes over the holes
/// and behind the end.
fn allocate_by_writing(file: &File, offset: u64, length: u64) -> io::Result<()> {
    let end = end_of(offset, length)?;
    let len = file.metadata()?.len();
    let mut at = offset;
    while at < end {
        let run = run_at(file, at, len)?;
        let stop = run.end.min(end);
        if !run.data {
            write_zero_bytes(file, at, stop - at)?;
        }
        at = stop;
    }
    Ok(())
}

#[cfg(target_os = "linux")]
mod system {
    use std::os::fd::{AsRawFd, BorrowedFd};
    use std::os::unix::ffi::OsStrExt;
    use std::os::unix::fs::{MetadataExt, OpenOptionsExt};

    use rustix::fs::{AtFlags, CWD, FallocateFlags, SeekFrom};
    use rustix::io::Errno;

    use super::positioned::retry;
    use super::*;

    /// `_IO(0x12, 119)` of linux/fs.h: discard a range of a block device.
    const BLKDISCARD: libc::Ioctl = 0x1277;
    /// `_IO(0x12, 127)` of linux/fs.h: zero a range of a block device.
    const BLKZEROOUT: libc::Ioctl = 0x127f;
    /// `EXT4_SUPER_MAGIC` of linux/magic.h.
    const EXT4_MAGIC: rustix::fs::FsWord = 0xef53;
    /// Block devices take zeroing and discarding in whole blocks; this is a multiple of every common size.
    const DEVICE_BLOCK: u64 = 4096;

    pub(crate) fn identity(metadata: &Metadata) -> Option<(u64, u64)> {
        Some((metadata.dev(), metadata.ino()))
    }

    pub(crate) fn allocated_bytes(metadata: &Metadata) -> u64 {
        metadata.blocks().saturating_mul(512)
    }

    fn fallocate(file: &File, flags: FallocateFlags, offset: u64, length: u64) -> io::Result<()> {
        loop {
            match rustix::fs::fallocate(file, flags, offset, length) {
                Err(Errno::INTR) => {}
                result => return Ok(result?),
            }
        }
    }

    fn device_ioctl(file: &File, request: libc::Ioctl, offset: u64, length: u64) -> io::Result<()> {
        let range = [offset, length];
        // SAFETY: both requests read two u64 (start and length) from the pointer and keep nothing.
        retry(|| unsafe { libc::ioctl(file.as_raw_fd(), request, range.as_ptr()) as isize }).map(drop)
    }

    /// The whole blocks inside a range of a block device: `(start, length)`.
    fn whole_blocks(offset: u64, end: u64) -> Option<(u64, u64)> {
        let start = offset.checked_next_multiple_of(DEVICE_BLOCK)?;
        let stop = end - end % DEVICE_BLOCK;
        (start < stop).then(|| (start, stop - start))
    }

    pub(crate) fn write_zeroes(
        file: &File,
        offset: u64,
        length: u64,
        unmap: bool,
        block_device: bool,
    ) -> io::Result<()> {
        let end = end_of(offset, length)?;
        if length == 0 {
            return Ok(());
        }
        if block_device {
            return zero_device(file, offset, end, unmap);
        }
        let done = if unmap {
            punch(file, offset, length).and_then(|()| extend_to(file, end))
        } else {
            fallocate(file, FallocateFlags::ZERO_RANGE, offset, length)
        };
        match done {
            Err(e) if is_unsupported(&e) => write_zero_bytes(file, offset, length),
            result => result,
        }
    }

    fn punch(file: &File, offset: u64, length: u64) -> io::Result<()> {
        fallocate(file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, length)
    }

    fn zero_device(file: &File, offset: u64, end: u64, unmap: bool) -> io::Result<()> {
        let Some((start, length)) = whole_blocks(offset, end) else {
            return write_zero_bytes(file, offset, end - offset);
        };
        write_zero_bytes(file, offset, start - offset)?;
        write_zero_bytes(file, start + length, end - start - length)?;
        let flags = if unmap { FallocateFlags::PUNCH_HOLE } else { FallocateFlags::ZERO_RANGE };
        let done = fallocate(file, flags | FallocateFlags::KEEP_SIZE, start, length)
            .or_else(|_| device_ioctl(file, BLKZEROOUT, start, length));
        match done {
            Err(e) if is_unsupported(&e) => write_zero_bytes(file, start, length),
            result => result,
        }
    }

    pub(crate) fn discard(file: &File, offset: u64, length: u64, block_device: bool) -> io::Result<()> {
        let done = match (block_device, length) {
            (_, 0) => Ok(()),
            (false, _) => punch(file, offset, length),
            (true, _) => match whole_blocks(offset, end_of(offset, length)?) {
                Some((start, length)) => device_ioctl(file, BLKDISCARD, start, length),
                None => Ok(()),
            },
        };
        match done {
            Err(e) if is_unsupported(&e) => Ok(()),
            result => result,
        }
    }

    pub(crate) fn allocate(file: &File, offset: u64, length: u64, block_device: bool) -> io::Result<()> {
        if block_device || length == 0 {
            return Ok(());
        }
        match fallocate(file, FallocateFlags::empty(), offset, length) {
            Err(e) if is_unsupported(&e) => allocate_by_writing(file, offset, length),
            result => result,
        }
    }

    /// Of ext4 this is known by measurement: its delayed allocation looks at every block of a write on its own,
    /// while the inode is locked.
    pub(crate) fn gains_by_allocating_ahead(file: &File) -> bool {
        rustix::fs::fstatfs(file).is_ok_and(|fs| fs.f_type == EXT4_MAGIC)
    }

    pub(crate) fn allocate_ahead(file: &File, offset: u64, length: u64) -> io::Result<()> {
        fallocate(file, FallocateFlags::empty(), offset, length)
    }

    pub(crate) fn run_at(file: &File, offset: u64, len: u64) -> io::Result<Run> {
        if offset >= len {
            return Ok(Run { end: u64::MAX, data: false });
        }
        match rustix::fs::seek(file, SeekFrom::Data(offset)) {
            Ok(data) if data > offset => Ok(Run { end: data, data: false }),
            Ok(_) => match rustix::fs::seek(file, SeekFrom::Hole(offset)) {
                Ok(hole) if hole > offset => Ok(Run { end: hole, data: true }),
                _ => Ok(all_data(offset, len)),
            },
            Err(Errno::NXIO) => Ok(Run { end: len, data: false }),
            Err(Errno::INVAL | Errno::OPNOTSUPP | Errno::NOSYS | Errno::SPIPE) => Ok(all_data(offset, len)),
            Err(e) => Err(e.into()),
        }
    }

    pub(crate) fn clone_range(
        file: &File,
        from: BorrowedFd<'_>,
        from_offset: u64,
        offset: u64,
        length: u64,
    ) -> io::Result<()> {
        let range = libc::file_clone_range {
            src_fd: from.as_raw_fd().into(),
            src_offset: from_offset,
            src_length: length,
            dest_offset: offset,
        };
        // SAFETY: FICLONERANGE reads one file_clone_range from the pointer and keeps nothing; both
        // descriptors are open for the whole call.
        let done = retry(|| unsafe { libc::ioctl(file.as_raw_fd(), libc::FICLONERANGE, &range) as isize });
        unsupported_if_so(done.map(drop))
    }

    pub(crate) fn copy_range(
        file: &File,
        from: BorrowedFd<'_>,
        mut from_offset: u64,
        mut offset: u64,
        length: u64,
    ) -> io::Result<u64> {
        // One call moves at most 2 GiB; the caller loops over short copies anyway.
        let n = usize::try_from(length.min(1 << 30)).unwrap_or(1 << 30);
        loop {
            match rustix::fs::copy_file_range(from, Some(&mut from_offset), file, Some(&mut offset), n) {
                Err(Errno::INTR) => {}
                Ok(n) => return Ok(n as u64),
                Err(e) => return unsupported_if_so(Err(e.into())),
            }
        }
    }

    /// One kind for "not here": the caller falls back on it.
    fn unsupported_if_so<T>(result: io::Result<T>) -> io::Result<T> {
        result.map_err(|e| if is_unsupported(&e) { io::ErrorKind::Unsupported.into() } else { e })
    }

    /// A file without a name in `directory`: it vanishes with its last descriptor, however the process ends.
    /// `Unsupported` where the file system has none, or where it could not be named later.
    pub(crate) fn open_unnamed(directory: &Path) -> io::Result<File> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).custom_flags(libc::O_TMPFILE);
        let file = unsupported_if_so(options.open(directory))?;
        std::fs::symlink_metadata(proc_path(&file)).map_err(|_| io::ErrorKind::Unsupported)?;
        Ok(file)
    }

    fn proc_path(file: &File) -> String {
        format!("/proc/self/fd/{}", file.as_raw_fd())
    }

    /// Gives an unnamed file its name; `AlreadyExists` if something has it.
    pub(crate) fn link_unnamed(file: &File, path: &Path) -> io::Result<()> {
        Ok(rustix::fs::linkat(
            CWD,
            proc_path(file).as_str(),
            CWD,
            path.as_os_str().as_bytes(),
            AtFlags::SYMLINK_FOLLOW,
        )?)
    }

    /// Gives an unnamed file the name of an existing one, in one step for every observer.
    pub(crate) fn replace_by_link(file: &File, sibling: &Path, path: &Path) -> io::Result<()> {
        link_unnamed(file, sibling)?;
        std::fs::rename(sibling, path).inspect_err(|_| {
            // The first error is the one to report; the sibling is ours to take away.
            let _removed = std::fs::remove_file(sibling);
        })
    }
}

#[cfg(not(target_os = "linux"))]
mod system {
    use super::*;

    fn unsupported<T>() -> io::Result<T> {
        Err(io::ErrorKind::Unsupported.into())
    }

    #[cfg(unix)]
    pub(crate) fn identity(metadata: &Metadata) -> Option<(u64, u64)> {
        use std::os::unix::fs::MetadataExt;
        Some((metadata.dev(), metadata.ino()))
    }

    #[cfg(not(unix))]
    pub(crate) fn identity(_: &Metadata) -> Option<(u64, u64)> {
        None
    }

    #[cfg(unix)]
    pub(crate) fn allocated_bytes(metadata: &Metadata) -> u64 {
        std::os::unix::fs::MetadataExt::blocks(metadata).saturating_mul(512)
    }

    #[cfg(not(unix))]
    pub(crate) fn allocated_bytes(metadata: &Metadata) -> u64 {
        metadata.len()
    }

    pub(crate) fn write_zeroes(
        file: &File,
        offset: u64,
        length: u64,
        unmap: bool,
        _: bool,
    ) -> io::Result<()> {
        let end = end_of(offset, length)?;
        let len = file.metadata()?.len();
        if unmap && offset >= len {
            return extend_to(file, end);
        }
        write_zero_bytes(file, offset, length)
    }

    pub(crate) fn discard(_: &File, _: u64, _: u64, _: bool) -> io::Result<()> {
        Ok(())
    }

    pub(crate) fn allocate(file: &File, offset: u64, length: u64, block_device: bool) -> io::Result<()> {
        if block_device { Ok(()) } else { allocate_by_writing(file, offset, length) }
    }

    pub(crate) fn gains_by_allocating_ahead(_: &File) -> bool {
        false
    }

    pub(crate) fn allocate_ahead(_: &File, _: u64, _: u64) -> io::Result<()> {
        unsupported()
    }

    pub(crate) fn run_at(_: &File, offset: u64, len: u64) -> io::Result<Run> {
        Ok(all_data(offset, len))
    }

    #[cfg(unix)]
    pub(crate) fn clone_range(
        _: &File,
        _: std::os::fd::BorrowedFd<'_>,
        _: u64,
        _: u64,
        _: u64,
    ) -> io::Result<()> {
        unsupported()
    }

    #[cfg(unix)]
    pub(crate) fn copy_range(
        _: &File,
        _: std::os::fd::BorrowedFd<'_>,
        _: u64,
        _: u64,
        _: u64,
    ) -> io::Result<u64> {
        unsupported()
    }

    #[cfg(not(unix))]
    pub(crate) fn clone_range() {}

    #[cfg(not(unix))]
    pub(crate) fn copy_range() {}

    pub(crate) fn open_unnamed(_: &Path) -> io::Result<File> {
        unsupported()
    }

    pub(crate) fn link_unnamed(_: &File, _: &Path) -> io::Result<()> {
        unsupported()
    }

    pub(crate) fn replace_by_link(_: &File, _: &Path, _: &Path) -> io::Result<()> {
        unsupported()
    }
}
