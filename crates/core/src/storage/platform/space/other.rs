//! Systems of which nothing is known: holes are data, and space is freed by nobody.

use super::*;

pub(crate) fn write_zeroes(file: &File, offset: u64, length: u64, unmap: bool, _: bool) -> io::Result<()> {
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

pub(crate) fn run_in(_: &File, range: Range<u64>, len: u64) -> io::Result<Run> {
    Ok(all_data(range.start, len))
}
