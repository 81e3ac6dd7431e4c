//! Inflating compressed grains, each once for small reads that follow each other.

use std::cell::RefCell;
use std::sync::Arc;

use qcow2_core::{Error, ErrorKind, MemMut, Result, Storage, StorageExt};
use qcow2_transform::StreamInflater;
use quick_cache::Weighter;
use quick_cache::sync::{Cache, GuardResult};

use crate::sparse::GRAIN_MARKER_BYTES;

/// Most bytes of inflated grains that are kept.
const KEPT_BYTES: u64 = 16 << 20;

/// Per thread: a context costs more to make than a grain to inflate, and the input buffer is used again.
#[derive(Default)]
struct Scratch {
    inflater: StreamInflater,
    input: Vec<u8>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// A stream in a file.
#[derive(Debug, Clone, Copy)]
pub(super) struct Stream<'a> {
    pub(super) storage: &'a dyn Storage,
    /// First byte of the stream, or of its marker.
    pub(super) host: u64,
    /// Whether a marker with its length stands in front.
    pub(super) marker: bool,
    /// Bytes of a grain.
    pub(super) grain: usize,
}

#[derive(Debug, Clone)]
struct ByBytes;

impl Weighter<(usize, u64), Arc<[u8]>> for ByBytes {
    fn weight(&self, _: &(usize, u64), grain: &Arc<[u8]>) -> u64 {
        grain.len().max(1) as u64
    }
}

/// Inflated grains, by the number of their extent and their place.
#[derive(Debug)]
pub(super) struct Inflated(Cache<(usize, u64), Arc<[u8]>, ByBytes>);

impl Inflated {
    pub(super) fn new() -> Self {
        Self(Cache::with_weighter((KEPT_BYTES >> 16) as usize, KEPT_BYTES, ByBytes))
    }

    /// The inflated grain, from the cache or inflated now, by one thread only.
    pub(super) fn get(&self, extent: usize, stream: Stream<'_>) -> Result<Arc<[u8]>> {
        match self.0.get_value_or_guard(&(extent, stream.host), None) {
            GuardResult::Value(grain) => Ok(grain),
            GuardResult::Guard(guard) => {
                let grain = run_to_new(stream)?;
                let _ = guard.insert(Arc::clone(&grain));
                Ok(grain)
            }
            GuardResult::Timeout => run_to_new(stream),
        }
    }
}

fn run_to_new(stream: Stream<'_>) -> Result<Arc<[u8]>> {
    let mut grain = vec![0; stream.grain];
    let length = run(stream, &mut grain)?;
    grain.truncate(length);
    Ok(grain.into())
}

/// Inflates into the front of `grain`, which holds a whole one; returns how many bytes: the last grain of an extent may have fewer.
pub(super) fn run(stream: Stream<'_>, grain: &mut [u8]) -> Result<usize> {
    SCRATCH.with_borrow_mut(|Scratch { inflater, input }| {
        read(stream, input)?;
        let from = if stream.marker { GRAIN_MARKER_BYTES as usize } else { 0 };
        inflater.inflate(input.get(from..).unwrap_or_default(), grain).map_err(|e| {
            let message = format!("a compressed grain cannot be decompressed: {e}");
            damaged(stream, Error::new(ErrorKind::Corrupt, message).with_source(e))
        })
    })
}

fn damaged(stream: Stream<'_>, error: Error) -> Error {
    stream.storage.located(error.with_field("grain")).with_offset(stream.host)
}

/// Reads a stream with its marker; without one, as much as it can have.
fn read(stream: Stream<'_>, input: &mut Vec<u8>) -> Result<()> {
    let most = 2 * stream.grain;
    let first = match stream.marker {
        // Nothing of the grains behind it: they may have been given back.
        true if stream.storage.arriving().is_some() => GRAIN_MARKER_BYTES as usize,
        // Most grains shrink to less than that.
        true => stream.grain / 2 + 512,
        false => most,
    };
    fill(stream, input, 0, first)?;
    if !stream.marker {
        return Ok(());
    }
    let size = input.get(8..12).and_then(|bytes| bytes.try_into().ok()).map_or(0, u32::from_le_bytes);
    if size == 0 || size as usize > most {
        let message = format!("invalid size {size} of a compressed grain: not 1 to {most}");
        return Err(damaged(stream, Error::new(ErrorKind::Corrupt, message)));
    }
    let length = GRAIN_MARKER_BYTES as usize + size as usize;
    if length > input.len() && input.len() == first {
        fill(stream, input, first, length)?;
    }
    input.truncate(length);
    Ok(())
}

/// Makes `input` hold the bytes up to `to`, of which it has `from`, as far as the file reaches.
fn fill(stream: Stream<'_>, input: &mut Vec<u8>, from: usize, to: usize) -> Result<()> {
    input.resize(to, 0);
    let part = input.get_mut(from..).unwrap_or_default();
    let got = stream.storage.read_up_to_at(MemMut::from(part), stream.host.saturating_add(from as u64))?;
    input.truncate(from + got);
    Ok(())
}
