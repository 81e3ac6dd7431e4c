//! Who may do what with a file, on Windows.
#![cfg(windows)]

use std::fs::File;
use std::io;
use std::ptr::null_mut;

use windows_sys::Win32::Foundation::ERROR_INSUFFICIENT_BUFFER;
use windows_sys::Win32::Security::{
    DACL_SECURITY_INFORMATION, GROUP_SECURITY_INFORMATION, GetKernelObjectSecurity,
    OBJECT_SECURITY_INFORMATION, OWNER_SECURITY_INFORMATION, SetKernelObjectSecurity,
};

use super::windows::{handle, is, is_unsupported};

/// Owner, group and access list.
const ALL: OBJECT_SECURITY_INFORMATION =
    OWNER_SECURITY_INFORMATION | GROUP_SECURITY_INFORMATION | DACL_SECURITY_INFORMATION;

/// Gives `to` the access list of `from`, where it has another one. An error says that it cannot have that, or has another owner.
pub(super) fn copy(from: &File, to: &File) -> io::Result<()> {
    let wanted = match read(from) {
        // A file system on which everybody may do everything (FAT).
        Err(e) if is_unsupported(&e) => return Ok(()),
        wanted => wanted?,
    };
    let there = read(to)?;
    if wanted == there {
        return Ok(());
    }
    // SAFETY: the descriptor is one that the system made, in one piece, and is valid for reads for the whole call.
    let answer = unsafe {
        SetKernelObjectSecurity(handle(to), DACL_SECURITY_INFORMATION, wanted.as_ptr().cast_mut().cast())
    };
    if answer == 0 {
        return Err(io::Error::last_os_error());
    }
    if read(to)? == wanted { Ok(()) } else { Err(io::ErrorKind::Unsupported.into()) }
}

/// The security descriptor of a file, in one piece; in words, for its alignment.
fn read(file: &File) -> io::Result<Vec<u64>> {
    let mut found: Vec<u64> = Vec::new();
    let mut needed = 0;
    loop {
        let size = found.len() * size_of::<u64>();
        let into = if size == 0 { null_mut() } else { found.as_mut_ptr().cast() };
        // SAFETY: the call writes at most `size` bytes behind the pointer.
        let answer =
            unsafe { GetKernelObjectSecurity(handle(file), ALL, into, size as u32, &raw mut needed) };
        if answer != 0 {
            return Ok(found);
        }
        let error = io::Error::last_os_error();
        let words = (needed as usize).div_ceil(size_of::<u64>());
        if !is(&error, ERROR_INSUFFICIENT_BUFFER) || words <= found.len() {
            return Err(error);
        }
        found.resize(words, 0);
    }
}
