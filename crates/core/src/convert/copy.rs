//! Moving the bytes of pieces: through a buffer, or shared by the file system.

use std::sync::atomic::{AtomicBool, Ordering};

use super::Context;
use super::scan::{Chunk, Content, Piece, Rules, Scanner, Zeroes};
use crate::{GuestSource, Job, Mem, MemMut, Result, Storage, StorageExt};

/// Bytes moved through the buffer at once: stays in the core's cache between the read and the write.
const STEP: usize = 256 << 10;
/// File systems share blocks of this size; most have it, and a refusal falls back on copying.
pub const SHARED_BLOCK: u64 = 4096;

/// Space taken ahead of writes where that pays, until it is refused once: on a full disk, the write itself says so.
#[derive(Debug)]
pub struct Ahead {
    refused: AtomicBool,
}

impl Ahead {
    /// Not for a target whose space is taken already.
    pub fn new(useful: bool) -> Self {
        Self { refused: AtomicBool::new(!useful) }
    }

    /// Takes space for a write that comes.
    pub fn take(&self, target: &dyn Storage, offset: u64, length: u64) {
        if !self.refused.load(Ordering::Relaxed) && target.allocate_ahead(offset, length).is_err() {
            self.refused.store(true, Ordering::Relaxed);
        }
    }
}

/// One worker's way to move bytes.
pub struct Copier<'a> {
    /// Of the whole convert.
    pub context: Context<'a>,
    buffer: Vec<u8>,
}

impl<'a> Copier<'a> {
    /// With a buffer of its own.
    pub fn new(context: Context<'a>) -> Self {
        Self { context, buffer: Vec::new() }
    }

    /// Reads one piece.
    ///
    /// # Errors
    /// `Io`; what reading the source meets.
    pub fn read(&self, piece: &Piece, into: &mut [u8]) -> Result<()> {
        match &piece.content {
            Content::Stored(storage, offset) => {
                storage.read_padded_at(MemMut::from(&mut *into), *offset)?;
                if let Some(arriving) = storage.arriving() {
                    arriving.taken(*offset, into.len() as u64)?;
                }
                self.context.count_read(into.len() as u64);
            }
            Content::Read => {
                self.context.source.read_at(MemMut::from(&mut *into), piece.start)?;
                self.context.count_read(into.len() as u64);
            }
            Content::Held(bytes, from) => {
                let part = bytes.get(*from..).unwrap_or_default().get(..into.len()).unwrap_or_default();
                Mem::from(part).copy_to(into);
            }
            Content::Zero => into.fill(0),
        }
        Ok(())
    }

    /// Reads what of a chunk is to be read through the source, and keeps it there.
    ///
    /// # Errors
    /// What reading the source meets.
    pub(super) fn hold(&self, chunk: &mut Chunk) -> Result<()> {
        for piece in &mut chunk.pieces {
            if matches!(piece.content, Content::Read) {
                let mut bytes = vec![0; piece.length as usize];
                self.read(piece, &mut bytes)?;
                piece.content = Content::Held(bytes.into(), 0);
            }
        }
        Ok(())
    }

    /// Reads a chunk into `buffer`, which starts at the chunk's start; zeroes where there is no piece.
    ///
    /// # Errors
    /// `Io`; what reading the source meets.
    pub fn read_chunk(&self, chunk: &Chunk, buffer: &mut [u8]) -> Result<()> {
        let mut filled = 0;
        for piece in &chunk.pieces {
            let from = (piece.start - chunk.start) as usize;
            let to = from + piece.length as usize;
            buffer.get_mut(filled..from).unwrap_or_default().fill(0);
            self.read(piece, buffer.get_mut(from..to).unwrap_or_default())?;
            filled = to;
        }
        buffer.get_mut(filled..).unwrap_or_default().fill(0);
        Ok(())
    }

    /// Reads a chunk into this worker's buffer and lends it.
    ///
    /// # Errors
    /// `Io`; those of `then`; what reading the source meets.
    pub fn with_chunk(&mut self, chunk: &Chunk, then: impl FnOnce(&Self, &[u8]) -> Result<()>) -> Result<()> {
        let mut buffer = std::mem::take(&mut self.buffer);
        let length = chunk.length() as usize;
        if buffer.len() < length {
            buffer.resize(length, 0);
        }
        let bytes = buffer.get_mut(..length).unwrap_or_default();
        let result = self.read_chunk(chunk, bytes).and_then(|()| then(self, bytes));
        self.buffer = buffer;
        result
    }

    /// Makes `target` hold the bytes of `piece` at `offset`: whole blocks shared with the source where the
    /// file system does that, the rest copied.
    ///
    /// # Errors
    /// `Io`; what reading the source meets.
    pub fn share(&mut self, piece: &Piece, target: &dyn Storage, offset: u64) -> Result<()> {
        if let Content::Stored(from, at) = &piece.content {
            let head = (SHARED_BLOCK - offset % SHARED_BLOCK) % SHARED_BLOCK;
            let blocks = piece.length.saturating_sub(head) / SHARED_BLOCK * SHARED_BLOCK;
            let shared = blocks > 0 && target.clone_range(&**from, at + head, offset + head, blocks).is_ok();
            if shared {
                self.context.count_read(blocks);
                self.context.count_written(blocks);
                self.copy(&piece.part(0, head), target, offset)?;
                let done = head + blocks;
                return self.copy(&piece.part(done, piece.length - done), target, offset + done);
            }
        }
        self.copy(piece, target, offset)
    }

    fn copy(&mut self, piece: &Piece, target: &dyn Storage, offset: u64) -> Result<()> {
        let mut buffer = std::mem::take(&mut self.buffer);
        let mut done = 0;
        let mut result = Ok(());
        while done < piece.length && result.is_ok() {
            let length = (piece.length - done).min(STEP as u64);
            buffer.resize(STEP, 0);
            let bytes = buffer.get_mut(..length as usize).unwrap_or_default();
            result = self.context.job.checkpoint();
            result = result.and_then(|()| self.read(&piece.part(done, length), bytes));
            result = result.and_then(|()| target.write_all_at(Mem::from(&*bytes), offset + done));
            self.context.count_written(length);
            done += length;
        }
        self.buffer = buffer;
        result
    }
}

/// Whether the file system shares blocks between the source and `target`, an empty file: tried out with the
/// source's first stored data. Leaves `target` empty.
///
/// # Errors
/// `Io`; what reading the source meets.
pub fn shares_blocks(source: &dyn GuestSource, target: &dyn Storage, job: &Job) -> Result<bool> {
    if target.traits().block_device {
        return Ok(false);
    }
    let rules = Rules { chunk: 1 << 20, zeroes: Zeroes::Skip, delta: None };
    let Some(chunk) = Scanner::new(source, rules, job).next_chunk()? else { return Ok(false) };
    for piece in &chunk.pieces {
        let Content::Stored(from, offset) = &piece.content else { continue };
        let inside = (SHARED_BLOCK - offset % SHARED_BLOCK) % SHARED_BLOCK;
        if inside + SHARED_BLOCK <= piece.length {
            let shared = target.clone_range(&**from, offset + inside, 0, SHARED_BLOCK).is_ok();
            if shared {
                target.resize(0)?;
            }
            return Ok(shared);
        }
    }
    Ok(false)
}
