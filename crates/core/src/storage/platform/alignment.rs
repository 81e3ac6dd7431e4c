//! What direct I/O demands of a request on one open file.

use std::fs::File;
use std::io;

/// Multiples that offsets and lengths, and memory addresses, must be of; powers of two.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Alignment {
    pub(crate) request: u32,
    pub(crate) memory: u32,
}

impl Alignment {
    /// Anything goes.
    pub(crate) const NONE: Self = Self { request: 1, memory: 1 };
    /// What every disk and file system takes: the fallback where nothing can be found out.
    #[cfg(any(target_os = "linux", windows))]
    const SAFE: Self = Self { request: 4096, memory: 4096 };
}

/// Asks the kernel, then the device; where neither answers, tries reads.
///
/// # Errors
/// `Unsupported` if the file has no direct I/O at all.
#[cfg(target_os = "linux")]
pub(crate) fn of_direct(file: &File, block_device: bool) -> io::Result<Alignment> {
    if let Some(told) = told_by_kernel(file)? {
        return Ok(told);
    }
    let request = if block_device { Some(sector_size(file)?) } else { None };
    probe(file, request)
}

/// Offsets and lengths go by the sector that the volume counts in, addresses by that of the drive.
#[cfg(windows)]
pub(crate) fn of_direct(file: &File, _: bool) -> io::Result<Alignment> {
    use windows_sys::Win32::Storage::FileSystem::{FILE_STORAGE_INFO, FileStorageInfo};
    let sector = |size: u32| (size.is_power_of_two() && (512..=1 << 16).contains(&size)).then_some(size);
    let Ok(told) = super::windows::information::<FILE_STORAGE_INFO>(file, FileStorageInfo) else {
        return Ok(Alignment::SAFE);
    };
    let request = sector(told.LogicalBytesPerSector).unwrap_or(Alignment::SAFE.request);
    let memory = sector(told.PhysicalBytesPerSectorForPerformance).unwrap_or(Alignment::SAFE.memory);
    Ok(Alignment { request, memory: memory.max(request) })
}

/// Elsewhere direct I/O has no rule (macOS) or is not offered.
#[cfg(not(any(target_os = "linux", windows)))]
pub(crate) fn of_direct(_: &File, _: bool) -> io::Result<Alignment> {
    Ok(Alignment::NONE)
}

/// `statx` since Linux 6.1, on the file systems that fill it in.
#[cfg(target_os = "linux")]
fn told_by_kernel(file: &File) -> io::Result<Option<Alignment>> {
    use rustix::fs::{AtFlags, StatxFlags, statx};
    let Ok(told) = statx(file, c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN) else {
        return Ok(None);
    };
    if told.stx_mask & StatxFlags::DIOALIGN.bits() == 0 {
        return Ok(None);
    }
    let alignment = Alignment { request: told.stx_dio_offset_align, memory: told.stx_dio_mem_align };
    match alignment {
        Alignment { request: 0, .. } | Alignment { memory: 0, .. } => Err(io::ErrorKind::Unsupported.into()),
        a if a.request.is_power_of_two() && a.memory.is_power_of_two() => Ok(Some(a)),
        _ => Ok(None),
    }
}

#[cfg(target_os = "linux")]
fn sector_size(file: &File) -> io::Result<u32> {
    use std::os::fd::AsRawFd;
    let mut size: libc::c_int = 0;
    // SAFETY: BLKSSZGET writes one int behind the pointer and keeps nothing.
    if unsafe { libc::ioctl(file.as_raw_fd(), libc::BLKSSZGET, &raw mut size) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let size = u32::try_from(size).ok().filter(|size| size.is_power_of_two());
    Ok(size.unwrap_or(Alignment::SAFE.request))
}

/// The smallest request, then the smallest memory alignment, that a read at the start accepts. A file where one
/// byte already reads is either empty or without rules: both get the safe values.
#[cfg(target_os = "linux")]
fn probe(file: &File, request: Option<u32>) -> io::Result<Alignment> {
    use super::super::direct::AlignedBuffer;
    const SIZES: [u32; 4] = [512, 1024, 2048, 4096];
    let safe = Alignment::SAFE;
    let mut buffer = AlignedBuffer::new(2 * safe.request as usize, safe.memory as usize);
    let mut accepts = |address: u32, length: u32| -> io::Result<bool> {
        let (from, to) = (address as usize, (address + length) as usize);
        let part = buffer.bytes().get_mut(from..to).unwrap_or_default();
        match super::read_at(file, part.into(), 0) {
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => Ok(false),
            Err(e) => Err(e),
            Ok(_) => Ok(true),
        }
    };
    if accepts(1, 1)? {
        return Ok(Alignment { request: request.unwrap_or(safe.request), ..safe });
    }
    let first = |accepted: &mut dyn FnMut(u32) -> io::Result<bool>| -> io::Result<u32> {
        for size in SIZES {
            if accepted(size)? {
                return Ok(size);
            }
        }
        Err(io::ErrorKind::Unsupported.into())
    };
    let request = match request {
        Some(known) => known,
        None => first(&mut |size| accepts(0, size))?,
    };
    let memory = first(&mut |size| accepts(size, safe.request))?;
    Ok(Alignment { request, memory })
}

#[cfg(all(test, target_os = "linux"))]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn direct(content: &[u8]) -> Option<(tempfile::NamedTempFile, File)> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), content).unwrap();
        // In a hole, or before it has a place on the disk, any read may be fine.
        file.as_file().sync_all().unwrap();
        // A file system without direct I/O has nothing to find out.
        let open = super::super::open(file.path(), true, true).ok()?;
        Some((file, open))
    }

    #[test]
    fn what_reads_find_out_is_what_the_kernel_says() {
        let Some((_name, file)) = direct(&[1; 1 << 20]) else { return };
        let probed = probe(&file, None).unwrap();
        assert!(probed.request.is_power_of_two() && probed.request <= 4096, "{probed:?}");
        if let Some(told) = told_by_kernel(&file).unwrap() {
            assert_eq!(probed.request, told.request.max(512));
            assert!(probed.memory >= told.memory, "{probed:?} {told:?}");
        }
        assert_eq!(probe(&file, Some(4096)).unwrap().request, 4096);
    }

    #[test]
    fn an_empty_file_gets_values_that_are_always_safe() {
        let Some((_name, file)) = direct(&[]) else { return };
        assert_eq!(probe(&file, None).unwrap(), Alignment::SAFE);
    }

    #[test]
    fn only_devices_have_sectors() {
        let file = tempfile::tempfile().unwrap();
        assert_eq!(sector_size(&file).unwrap_err().raw_os_error(), Some(libc::ENOTTY));
    }
}
