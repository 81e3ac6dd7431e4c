//! What a file has beside its bytes, and whether another one can take its place.

use std::fs::File;
use std::io;
use std::path::Path;

#[cfg(unix)]
pub(crate) use unix::{copy_attributes, free_bytes, is_replaceable};
#[cfg(windows)]
pub(crate) use windows::{copy_attributes, free_bytes, is_replaceable};

#[cfg(unix)]
mod unix {
    use std::os::unix::fs::{MetadataExt, fchown};

    use super::*;

    /// The sticky bit of a folder: who owns neither it nor the file may not take the file's name.
    const STICKY: u32 = 0o1000;

    /// Whether a rename over `path`, which is open as `file` and lies in `folder`, is the same to everybody who knows it. It is
    /// not for a file with several names, and not possible for a mount point, or where the folder keeps what it has.
    pub(crate) fn is_replaceable(file: &File, folder: &Path) -> io::Result<bool> {
        let (own, around) = (file.metadata()?, std::fs::metadata(folder)?);
        // SAFETY: the call takes nothing, touches no memory and cannot fail.
        let user = unsafe { libc::geteuid() };
        let kept = around.mode() & STICKY != 0 && user != 0 && user != own.uid() && user != around.uid();
        if own.nlink() > 1 || kept {
            return Ok(false);
        }
        let other_device = own.dev() != around.dev();
        #[cfg(target_os = "linux")]
        return super::linux::can_lose_its_name(file, folder, other_device);
        #[cfg(not(target_os = "linux"))]
        Ok(!other_device)
    }

    /// Gives `to` the owner, group, permissions and all else that `from` has beside its bytes and times, before anything is
    /// written to it. An error says that it cannot have all of that.
    pub(crate) fn copy_attributes(from: &File, to: &File) -> io::Result<()> {
        let (old, new) = (from.metadata()?, to.metadata()?);
        let owner = (old.uid() != new.uid()).then(|| old.uid());
        let group = (old.gid() != new.gid()).then(|| old.gid());
        if owner.is_some() || group.is_some() {
            fchown(to, owner, group)?;
        }
        #[cfg(target_os = "linux")]
        super::linux::copy_more(from, to)?;
        #[cfg(target_vendor = "apple")]
        super::apple::copy_more(from, to)?;
        // Last: another owner takes bits away, an access list changes those of the group.
        to.set_permissions(old.permissions())
    }

    /// Bytes that a user may still take on the file system of `file`; `None` where it has no such number.
    pub(crate) fn free_bytes(file: &File) -> Option<u64> {
        let all = rustix::fs::fstatvfs(file).ok().filter(|all| all.f_blocks > 0)?;
        Some(all.f_bavail.saturating_mul(all.f_frsize))
    }
}

#[cfg(target_os = "linux")]
mod linux {
    use std::collections::BTreeMap;
    use std::ffi::CString;
    use std::os::fd::AsRawFd;

    use rustix::fs::{AtFlags, IFlags, StatxAttributes, StatxFlags, XattrFlags};
    use rustix::io::Errno;

    use super::super::file::is_unsupported;
    use super::super::transfer::retry;
    use super::*;

    /// Flags of a file that its owner chose and that matter for a disk.
    const CHOSEN: IFlags = IFlags::NOCOW
        .union(IFlags::COMPRESSED)
        .union(IFlags::JOURNALING)
        .union(IFlags::SYNC)
        .union(IFlags::NOATIME)
        .union(IFlags::NODUMP);

    /// Attributes that speak of the bytes: the kernel changes or drops them when those change.
    const OF_THE_BYTES: [&[u8]; 3] = [b"security.capability", b"security.evm", b"security.ima"];

    /// No mount point, and in a folder that is not append-only. A kernel that knows no mount points knows devices.
    pub(crate) fn can_lose_its_name(file: &File, folder: &Path, other_device: bool) -> io::Result<bool> {
        let basic = StatxFlags::BASIC_STATS;
        let own = match rustix::fs::statx(file, "", AtFlags::EMPTY_PATH, basic) {
            Err(Errno::NOSYS) => return Ok(!other_device),
            own => own?,
        };
        let around = rustix::fs::statx(rustix::fs::CWD, folder, AtFlags::empty(), basic)?;
        let mount_point = match own.stx_attributes_mask.contains(StatxAttributes::MOUNT_ROOT) {
            true => own.stx_attributes.contains(StatxAttributes::MOUNT_ROOT),
            false => other_device,
        };
        Ok(!mount_point && !around.stx_attributes.contains(StatxAttributes::APPEND))
    }

    /// Extended attributes, with access lists and security labels, and the flags of the inode.
    pub(crate) fn copy_more(from: &File, to: &File) -> io::Result<()> {
        let (wanted, there) = (extended(from)?, extended(to)?);
        for (name, value) in &wanted {
            if there.get(name) != Some(value) {
                rustix::fs::fsetxattr(to, name, value, XattrFlags::empty())?;
            }
        }
        // What the new file has of its folder.
        for name in there.keys().filter(|name| !wanted.contains_key(*name)) {
            rustix::fs::fremovexattr(to, name)?;
        }
        let (wanted, there) = (flags(from)?, flags(to)?);
        if (wanted ^ there).intersects(CHOSEN) {
            rustix::fs::ioctl_setflags(to, (there - CHOSEN) | (wanted & CHOSEN))?;
        }
        match project(from)? == project(to)? {
            true => Ok(()),
            false => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    fn extended(file: &File) -> io::Result<BTreeMap<CString, Vec<u8>>> {
        let mut found = BTreeMap::new();
        let names =
            match sized(|| rustix::fs::flistxattr_query(file), |buf| rustix::fs::flistxattr(file, buf)) {
                Err(e) if is_unsupported(&e) => return Ok(found),
                names => names?,
            };
        for name in names.split(|&byte| byte == 0).filter(|name| !name.is_empty()) {
            if OF_THE_BYTES.contains(&name) {
                continue;
            }
            let name = CString::new(name)?;
            let value = sized(
                || rustix::fs::fgetxattr_query(file, &name),
                |buf| rustix::fs::fgetxattr(file, &name, buf),
            )?;
            found.insert(name, value);
        }
        Ok(found)
    }

    /// Asks for a size and then for that many bytes, until they fit.
    fn sized(
        size: impl Fn() -> rustix::io::Result<usize>,
        fill: impl Fn(&mut [u8]) -> rustix::io::Result<usize>,
    ) -> io::Result<Vec<u8>> {
        loop {
            let mut buf = vec![0; size()?];
            match fill(&mut buf) {
                Err(Errno::RANGE) => {}
                Err(e) => return Err(e.into()),
                Ok(length) => {
                    buf.truncate(length);
                    return Ok(buf);
                }
            }
        }
    }

    fn flags(file: &File) -> io::Result<IFlags> {
        match rustix::fs::ioctl_getflags(file).map_err(io::Error::from) {
            Err(e) if is_unsupported(&e) => Ok(IFlags::empty()),
            flags => flags,
        }
    }

    /// Project and extent sizes, where the file system has them. A new file has those of its folder.
    fn project(file: &File) -> io::Result<[u32; 3]> {
        /// `_IOR('X', 31, struct fsxattr)` of linux/fs.h.
        const FSGETXATTR: libc::Ioctl = 0x801c_581f_u32 as libc::Ioctl;
        /// `struct fsxattr`: flags, extsize, nextents, projid, cowextsize, padding.
        type Fsxattr = [u32; 7];
        let mut all: Fsxattr = [0; 7];
        // SAFETY: the request fills the 28 bytes of a `struct fsxattr` and keeps nothing.
        let done = retry(|| unsafe { libc::ioctl(file.as_raw_fd(), FSGETXATTR, all.as_mut_ptr()) as isize });
        match done {
            Err(e) if is_unsupported(&e) => Ok([0; 3]),
            Err(e) => Err(e),
            Ok(_) => {
                let [_, extent, _, project, cow_extent, ..] = all;
                Ok([extent, project, cow_extent])
            }
        }
    }
}

#[cfg(target_vendor = "apple")]
mod apple {
    use std::os::fd::AsRawFd;

    use super::*;

    /// Access list and extended attributes.
    pub(crate) fn copy_more(from: &File, to: &File) -> io::Result<()> {
        let what = libc::COPYFILE_ACL | libc::COPYFILE_XATTR;
        // SAFETY: two open descriptors and no state; the call keeps nothing.
        let done = unsafe { libc::fcopyfile(from.as_raw_fd(), to.as_raw_fd(), std::ptr::null_mut(), what) };
        if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

#[cfg(windows)]
mod windows {
    use std::os::windows::fs::MetadataExt;

    use windows_sys::Wdk::Storage::FileSystem::{FileFsFullSizeInformation, NtQueryVolumeInformationFile};
    use windows_sys::Wdk::System::SystemServices::FILE_FS_FULL_SIZE_INFORMATION;
    use windows_sys::Win32::Storage::FileSystem::{
        FILE_ATTRIBUTE_COMPRESSED, FILE_ATTRIBUTE_ENCRYPTED, FILE_ATTRIBUTE_INTEGRITY_STREAM,
    };
    use windows_sys::Win32::System::IO::IO_STATUS_BLOCK;

    use super::super::windows::{by_handle, handle};
    use super::*;

    /// How the file system stores a file. A new one is stored as its folder says.
    const STORED: u32 =
        FILE_ATTRIBUTE_COMPRESSED | FILE_ATTRIBUTE_ENCRYPTED | FILE_ATTRIBUTE_INTEGRITY_STREAM;

    /// Whether a rename over a file is the same to everybody who knows it: not for one with several names.
    pub(crate) fn is_replaceable(file: &File, _: &Path) -> io::Result<bool> {
        Ok(by_handle(file)?.nNumberOfLinks <= 1)
    }

    /// Makes `to` what `from` is beside its bytes, times and streams. An error says that it cannot be all of that.
    pub(crate) fn copy_attributes(from: &File, to: &File) -> io::Result<()> {
        let (old, new) = (from.metadata()?, to.metadata()?);
        if (old.file_attributes() ^ new.file_attributes()) & STORED != 0 {
            return Err(io::ErrorKind::Unsupported.into());
        }
        super::super::security::copy(from, to)
    }

    pub(crate) fn free_bytes(file: &File) -> Option<u64> {
        let mut status = IO_STATUS_BLOCK::default();
        let mut all = FILE_FS_FULL_SIZE_INFORMATION::default();
        // SAFETY: the handle is open; the call writes both structures, which are plain integers, and is complete when it
        // returns: questions to a volume are not overlapped.
        let answer = unsafe {
            let (into, size) = ((&raw mut all).cast(), size_of_val(&all) as u32);
            NtQueryVolumeInformationFile(handle(file), &raw mut status, into, size, FileFsFullSizeInformation)
        };
        let units = u64::try_from(all.CallerAvailableAllocationUnits).ok().filter(|_| answer == 0)?;
        let unit = u64::from(all.SectorsPerAllocationUnit).checked_mul(all.BytesPerSector.into())?;
        (unit > 0).then(|| units.saturating_mul(unit))
    }
}
