//! The shapes that calls of Windows have in common.
#![cfg(windows)]

use std::fs::File;
use std::io;
use std::os::windows::io::AsRawHandle;
use std::ptr::null_mut;

use windows_sys::Win32::Foundation::{
    ERROR_CALL_NOT_IMPLEMENTED, ERROR_INVALID_FUNCTION, ERROR_INVALID_LEVEL, ERROR_INVALID_PARAMETER,
    ERROR_IO_INCOMPLETE, ERROR_IO_PENDING, ERROR_MORE_DATA, ERROR_NOT_SUPPORTED, HANDLE,
};
use windows_sys::Win32::Storage::FileSystem::{
    BY_HANDLE_FILE_INFORMATION, FILE_INFO_BY_HANDLE_CLASS, GetFileInformationByHandle,
    GetFileInformationByHandleEx,
};
use windows_sys::Win32::System::IO::{
    DeviceIoControl, GetOverlappedResult, OVERLAPPED, OVERLAPPED_0, OVERLAPPED_0_0,
};
use windows_sys::core::BOOL;

pub(super) fn handle(file: &File) -> HANDLE {
    file.as_raw_handle()
}

/// Whether the error has this number of the system.
pub(super) fn is(error: &io::Error, code: u32) -> bool {
    error.raw_os_error().map(i32::cast_unsigned) == Some(code)
}

/// Whether the error says that the call or the file system does not offer this, so that a fallback applies.
pub(super) fn is_unsupported(error: &io::Error) -> bool {
    const CODES: [u32; 5] = [
        ERROR_INVALID_FUNCTION,
        ERROR_NOT_SUPPORTED,
        ERROR_INVALID_PARAMETER,
        ERROR_CALL_NOT_IMPLEMENTED,
        ERROR_INVALID_LEVEL,
    ];
    error.kind() == io::ErrorKind::Unsupported || CODES.into_iter().any(|code| is(error, code))
}

/// Where a request is. An offset with its highest bit set is none: Windows takes two of them for "where the cursor is" and "behind
/// the end".
pub(super) fn place(offset: u64) -> io::Result<OVERLAPPED> {
    i64::try_from(offset).map_err(|_| io::ErrorKind::FileTooLarge)?;
    let place = OVERLAPPED_0_0 { Offset: offset as u32, OffsetHigh: (offset >> 32) as u32 };
    Ok(OVERLAPPED { Anonymous: OVERLAPPED_0 { Anonymous: place }, ..OVERLAPPED::default() })
}

/// The bytes of a request that has been made with a place, once it is complete: that of a file which was opened to be overlapped
/// may still be under way, and writes to the place, and to what it reads into, until it is.
pub(super) fn finish(file: &File, answer: BOOL, place: &mut OVERLAPPED, done: &mut u32) -> io::Result<()> {
    let mut answer = answer;
    loop {
        if answer != 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if !is(&error, ERROR_IO_PENDING) && !is(&error, ERROR_IO_INCOMPLETE) {
            return Err(error);
        }
        // SAFETY: the handle is open, and both are of the request that is under way.
        answer = unsafe { GetOverlappedResult(handle(file), place, done, 1) };
    }
}

/// A control request that takes one `I` and fills up to one `O`; how many bytes of it. More that would be there is no error.
pub(super) fn control<I: Copy, O: Copy>(
    file: &File,
    code: u32,
    input: &I,
    output: &mut O,
) -> io::Result<u32> {
    let (mut place, mut done) = (place(0)?, 0);
    let (taken, given) = (size_of::<I>() as u32, size_of::<O>() as u32);
    // SAFETY: both structures are valid for their sizes until the request is complete, the second also for writes, and every
    // caller names those of `code`, which are plain integers.
    let answer = unsafe {
        DeviceIoControl(
            handle(file),
            code,
            (&raw const *input).cast(),
            taken,
            if given == 0 { null_mut() } else { (&raw mut *output).cast() },
            given,
            &raw mut done,
            &raw mut place,
        )
    };
    match finish(file, answer, &mut place, &mut done) {
        Err(e) if !is(&e, ERROR_MORE_DATA) => Err(e),
        _ => Ok(done),
    }
}

/// One of the structures that describe a file.
pub(super) fn information<T: Default>(file: &File, class: FILE_INFO_BY_HANDLE_CLASS) -> io::Result<T> {
    let mut information = T::default();
    // SAFETY: writes at most the size of one structure behind the pointer; every caller names that of `class`, which is plain
    // integers and booleans.
    let answer = unsafe {
        let into = (&raw mut information).cast();
        GetFileInformationByHandleEx(handle(file), class, into, size_of::<T>() as u32)
    };
    if answer == 0 { Err(io::Error::last_os_error()) } else { Ok(information) }
}

/// What every file system tells.
pub(super) fn by_handle(file: &File) -> io::Result<BY_HANDLE_FILE_INFORMATION> {
    let mut information = BY_HANDLE_FILE_INFORMATION::default();
    // SAFETY: writes one structure of plain integers behind the pointer.
    let answer = unsafe { GetFileInformationByHandle(handle(file), &raw mut information) };
    if answer == 0 { Err(io::Error::last_os_error()) } else { Ok(information) }
}
