//! How many bytes a compressed file holds, as far as it says so itself: xz has an index behind its blocks, frames of zstd can have it in
//! their headers. gzip keeps it modulo 4 GiB, of its last member alone, which says nothing.
//!
//! Nothing here is believed for long: who decodes the file compares.

use std::io::BufRead;
use std::sync::Arc;

use qcow2_core::{Error, ErrorKind, Job, MemMut, Result, Storage, StorageExt};

use crate::codec::Codec;
use crate::input::Input;

/// What the file says: bytes of data; `None` where it says nothing.
///
/// # Errors
/// `Corrupt` with the place; `Aborted`; `Io`.
pub(crate) fn stated(codec: Codec, storage: &Arc<dyn Storage>, job: &Job) -> Result<Option<u64>> {
    match codec {
        Codec::Gzip => Ok(None),
        Codec::Xz => xz(storage, job).map(Some),
        Codec::Zstd => zstd(storage, job),
    }
}

fn corrupt(storage: &Arc<dyn Storage>, offset: u64, message: impl Into<String>) -> Error {
    storage.located(Error::new(ErrorKind::Corrupt, message).with_offset(offset))
}

fn cut(storage: &Arc<dyn Storage>, name: &str, at: u64) -> Error {
    corrupt(storage, at, format!("the {name} data is cut short: the file ends at {at}"))
}

/// Stream header and footer.
const XZ_ENDS: u64 = 12;
/// Bytes of padding that are looked at in one read.
const PADDING: u64 = 64 << 10;

/// Streams from the last one to the first: each footer says how long the index in front of it is.
fn xz(storage: &Arc<dyn Storage>, job: &Job) -> Result<u64> {
    let mut end = storage.size()?;
    let mut total = 0u64;
    let mut streams = 0u64;
    loop {
        job.checkpoint()?;
        let stop = without_padding(storage, end, job)?;
        if stop == 0 && streams > 0 {
            return Ok(total);
        }
        let damaged = || cut(storage, "xz", end);
        let footer_at = stop.checked_sub(XZ_ENDS).ok_or_else(damaged)?;
        let mut footer = [0; XZ_ENDS as usize];
        storage.read_exact_at(MemMut::from(&mut footer[..]), footer_at)?;
        let [_, _, _, _, a, b, c, d, _, _, b'Y', b'Z'] = footer else { return Err(damaged()) };
        let index = (u64::from(u32::from_le_bytes([a, b, c, d])) + 1) * 4;
        let index_at = footer_at.checked_sub(index);
        let outside =
            || corrupt(storage, footer_at, format!("an xz index of {index} bytes lies outside the file"));
        let index_at = index_at.filter(|at| *at >= XZ_ENDS).ok_or_else(outside)?;
        let too_large = || corrupt(storage, index_at, "the xz index does not add up");
        let (data, blocks) = xz_index(storage, index_at, job)?;
        total = total.checked_add(data).ok_or_else(too_large)?;
        end = index_at.checked_sub(blocks).and_then(|at| at.checked_sub(XZ_ENDS)).ok_or_else(too_large)?;
        let mut magic = [0; 6];
        storage.read_exact_at(MemMut::from(&mut magic[..]), end)?;
        if magic != Codec::Xz.magic() {
            return Err(too_large());
        }
        streams += 1;
        if end == 0 {
            return Ok(total);
        }
    }
}

/// Where the stream in front of `end` ends: padding is zeroes in groups of four.
fn without_padding(storage: &Arc<dyn Storage>, end: u64, job: &Job) -> Result<u64> {
    let mut end = end;
    let mut buffer = vec![0; PADDING as usize];
    while end > 0 {
        job.checkpoint()?;
        let length = end.min(PADDING);
        let part = buffer.get_mut(..length as usize).unwrap_or_default();
        storage.read_exact_at(MemMut::from(&mut *part), end - length)?;
        let zeroes = part.iter().rev().take_while(|byte| **byte == 0).count() as u64;
        end -= zeroes;
        if zeroes < length {
            break;
        }
    }
    Ok(end)
}

/// The sums of an index: bytes of data, and bytes of the blocks that hold them.
fn xz_index(storage: &Arc<dyn Storage>, at: u64, job: &Job) -> Result<(u64, u64)> {
    let mut input = Input::new(Arc::clone(storage), at);
    let seen = input.seen();
    let broken = || seen.take_error().unwrap_or_else(|| corrupt(storage, at, "the xz index does not add up"));
    if byte(&mut input) != Some(0) {
        return Err(broken());
    }
    let records = integer(&mut input).ok_or_else(broken)?;
    let (mut data, mut blocks) = (0u64, 0u64);
    for number in 0..records {
        if number % 4096 == 0 {
            job.checkpoint()?;
        }
        let (stored, held) = integer(&mut input).zip(integer(&mut input)).ok_or_else(broken)?;
        let padded = stored.checked_next_multiple_of(4);
        blocks = padded.and_then(|length| blocks.checked_add(length)).ok_or_else(broken)?;
        data = data.checked_add(held).ok_or_else(broken)?;
        // A file that ends, or a table that grows beyond the file, is not read on.
        if blocks > at {
            return Err(broken());
        }
    }
    Ok((data, blocks))
}

fn byte(input: &mut Input) -> Option<u8> {
    let byte = input.fill_buf().ok()?.first().copied();
    input.consume(1);
    byte
}

/// Seven bits a byte, the lowest ones first; nine bytes at most.
fn integer(input: &mut Input) -> Option<u64> {
    let mut value = 0;
    for shift in (0..63).step_by(7) {
        let next = byte(input)?;
        value |= u64::from(next & 0x7f) << shift;
        if next & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

/// Longest header of a frame, with its magic.
const ZSTD_HEADER: usize = 18;

/// Frames from the first to the last: blocks say how long they are.
fn zstd(storage: &Arc<dyn Storage>, job: &Job) -> Result<Option<u64>> {
    let size = storage.size()?;
    let (mut at, mut total) = (0u64, 0u64);
    while at < size {
        job.checkpoint()?;
        let mut header = [0; ZSTD_HEADER];
        let got = storage.read_up_to_at(MemMut::from(&mut header[..]), at)?;
        let frame = Frame::parse(header.get(..got).unwrap_or_default());
        let frame = frame.ok_or_else(|| corrupt(storage, at, format!("no zstd frame begins at {at}")))?;
        match frame {
            Frame::Skipped(length) => at = at.saturating_add(length),
            Frame::Data { size: None, .. } => return Ok(None),
            Frame::Data { header, size: Some(held), checksum } => {
                at = blocks_end(storage, at + header, job)?.saturating_add(if checksum { 4 } else { 0 });
                let sum = total.checked_add(held);
                total = sum.ok_or_else(|| corrupt(storage, at, "the sizes of zstd frames do not add up"))?;
            }
        }
    }
    if at > size { Err(cut(storage, "zstd", size)) } else { Ok(Some(total)) }
}

/// A frame's header.
enum Frame {
    /// With all of its bytes.
    Skipped(u64),
    Data {
        header: u64,
        size: Option<u64>,
        checksum: bool,
    },
}

impl Frame {
    fn parse(bytes: &[u8]) -> Option<Self> {
        let magic = u32::from_le_bytes(*bytes.first_chunk()?);
        let rest = bytes.get(4..)?;
        if magic & 0xffff_fff0 == 0x184d_2a50 {
            return Some(Self::Skipped(8 + u64::from(u32::from_le_bytes(*rest.first_chunk()?))));
        }
        if !bytes.starts_with(Codec::Zstd.magic()) {
            return None;
        }
        let descriptor = *rest.first()?;
        let single = descriptor & 0x20 != 0;
        let dictionary = [0, 1, 2, 4].get(usize::from(descriptor & 3)).copied()?;
        let from = 1 + usize::from(!single) + dictionary;
        let field = rest.get(from..)?;
        let (length, size) = match (descriptor >> 6, single) {
            (0, false) => (0, None),
            (0, true) => (1, Some(u64::from(*field.first()?))),
            (1, _) => (2, Some(u64::from(u16::from_le_bytes(*field.first_chunk()?)) + 256)),
            (2, _) => (4, Some(u64::from(u32::from_le_bytes(*field.first_chunk()?)))),
            _ => (8, Some(u64::from_le_bytes(*field.first_chunk()?))),
        };
        Some(Self::Data { header: (4 + from + length) as u64, size, checksum: descriptor & 4 != 0 })
    }
}

/// Where the blocks end that begin at `at`.
fn blocks_end(storage: &Arc<dyn Storage>, at: u64, job: &Job) -> Result<u64> {
    let mut at = at;
    for number in 0u64.. {
        if number % 1024 == 0 {
            job.checkpoint()?;
        }
        let mut header = [0; 4];
        let (field, _) = header.split_at_mut(3);
        if storage.read_up_to_at(MemMut::from(field), at)? < 3 {
            return Err(cut(storage, "zstd", storage.size()?));
        }
        let header = u32::from_le_bytes(header);
        let length = match header >> 1 & 3 {
            1 => 1,
            3 => return Err(corrupt(storage, at, "a zstd block has a type that is reserved")),
            _ => header >> 3,
        };
        at = at.saturating_add(3 + u64::from(length));
        if header & 1 == 1 {
            break;
        }
    }
    Ok(at)
}

/// Counts what the file holds by decoding all of it: the job's progress is that of the file.
///
/// # Errors
/// `Limit` for more than `limit`; what the decoder meets; `Aborted`.
pub(crate) fn counted(
    codec: Codec,
    storage: &Arc<dyn Storage>,
    max_window: u64,
    limit: u64,
    job: &Job,
) -> Result<u64> {
    job.set_total(storage.size()?);
    let mut decoder = codec.decoder(storage, max_window)?;
    let mut buffer = vec![0; 256 << 10];
    let (mut total, mut told) = (0u64, 0);
    loop {
        job.checkpoint()?;
        let got = decoder.fill(&mut buffer)?;
        total += got as u64;
        qcow2_core::check_limit("size", total, limit).map_err(|error| storage.located(error))?;
        job.advance(decoder.position() - told);
        told = decoder.position();
        if got < buffer.len() {
            return Ok(total);
        }
    }
}

/// The first bytes of what the file holds, as many as there are.
///
/// # Errors
/// What the decoder meets.
pub(crate) fn head(
    codec: Codec,
    storage: &Arc<dyn Storage>,
    max_window: u64,
    length: usize,
) -> Result<Vec<u8>> {
    let mut bytes = vec![0; length];
    let got = codec.decoder(storage, max_window)?.fill(&mut bytes)?;
    bytes.truncate(got);
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use qcow2_core::storage::MemoryStorage;

    use super::*;

    proptest! {
        #[test]
        fn any_bytes_give_a_size_or_an_error(
            codec in prop::sample::select(Codec::ALL.to_vec()),
            bytes in prop::collection::vec(any::<u8>(), 0..200),
            magic in any::<bool>(),
        ) {
            let start = if magic { codec.magic() } else { &[] };
            let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::from_bytes(&[start, &bytes].concat()));
            let job = Job::new();
            let _ = stated(codec, &storage, &job);
            let _ = counted(codec, &storage, 1 << 20, 1 << 20, &job);
        }
    }
}
