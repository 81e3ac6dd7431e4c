//! The source's extents, cut into chunks for the workers.
//!
//! A chunk is the unit of work: an aligned range of the disk of which something has to be copied. Chunks come
//! in guest order and depend on the source alone, never on the number of workers, and so does the target.

use std::collections::VecDeque;
use std::sync::Arc;

use super::Delta;
use crate::source::{Extent, GuestSource};
use crate::walk::{Step, Steps, Walk};
use crate::{Job, Result, Storage};

/// How much is asked for at once: more over holes, less where extents are many.
const STEPS: Steps = Steps::growing(4 << 20, 64 << 30, 16 << 10);

/// The same of a disk that is still coming: the tables that are needed next, and none that lie far behind.
const NEXT: Steps = Steps::of(4 << 20, 16 << 10);

/// Bytes of an extent that are one step of a progress over data, at most: as much as QEMU copies at once.
const COUNTED: u64 = 2 << 20;

/// Where the bytes of a piece come from.
#[derive(Debug, Clone)]
pub enum Content {
    /// Stored as they are, in this file at this offset.
    Stored(Arc<dyn Storage>, u64),
    /// To be read through the source.
    Read,
    /// Read already, from this byte on: of a source that is read front to back.
    Held(Arc<[u8]>, usize),
    /// Zeroes that the target must hold explicitly.
    Zero,
}

/// A part of a chunk; between pieces there is nothing to copy.
#[derive(Debug, Clone)]
pub struct Piece {
    /// First guest byte.
    pub start: u64,
    /// Length in bytes, never 0.
    pub length: u64,
    /// Where its bytes come from.
    pub content: Content,
}

impl Piece {
    /// First guest byte behind it.
    pub fn end(&self) -> u64 {
        self.start + self.length
    }

    /// `length` bytes of it from `skip` on.
    pub fn part(&self, skip: u64, length: u64) -> Self {
        let content = match &self.content {
            Content::Stored(storage, offset) => Content::Stored(Arc::clone(storage), offset + skip),
            Content::Held(bytes, from) => Content::Held(Arc::clone(bytes), from + skip as usize),
            other => other.clone(),
        };
        Self { start: self.start + skip, length, content }
    }
}

/// An aligned range of the disk with something to copy.
#[derive(Debug)]
pub struct Chunk {
    /// Number in guest order, from 0.
    pub ticket: u64,
    /// First guest byte, aligned.
    pub start: u64,
    /// Aligned, or the end of the disk.
    pub end: u64,
    /// In guest order, never empty.
    pub pieces: Vec<Piece>,
    /// Guest bytes that are done with this chunk: its own, and what was skipped before it; 0 where the scanner counts.
    pub advance: u64,
}

impl Chunk {
    /// Length in bytes.
    pub fn length(&self) -> u64 {
        self.end - self.start
    }
    /// The chunk with all of its bytes to read: for what is there as a whole, also with what a parent has of it.
    #[must_use]
    pub fn whole(self) -> Self {
        let piece = Piece { start: self.start, length: self.length(), content: Content::Read };
        Self { pieces: vec![piece], ..self }
    }
    /// Bytes to copy.
    pub fn bytes(&self) -> u64 {
        let data = self.pieces.iter().filter(|piece| !matches!(piece.content, Content::Zero));
        data.map(|piece| piece.length).sum()
    }
    /// Whether the whole chunk is explicit zeroes; it can then be longer than usual.
    pub fn is_zero(&self) -> bool {
        matches!(self.pieces.as_slice(), [Piece { content: Content::Zero, start, length }]
            if *start == self.start && *length == self.length())
    }
}

/// What happens to ranges that read as zeroes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Zeroes {
    /// The target reads as zeroes anyway.
    Skip,
    /// The target has a cheap way to say so: one chunk can be this long.
    Explicit(u64),
    /// They are written out like data.
    Written,
}

/// How to cut.
#[derive(Debug, Clone, Copy)]
pub struct Rules {
    /// Alignment and length of chunks in bytes.
    pub chunk: u64,
    /// What becomes of ranges that read as zeroes.
    pub zeroes: Zeroes,
    /// What the target's base has already.
    pub delta: Option<Delta>,
}

/// Cuts the extents of a source into chunks.
pub struct Scanner<'a> {
    source: &'a dyn GuestSource,
    rules: Rules,
    size: u64,
    job: &'a Job,
    walk: Walk<1>,
    queue: VecDeque<Extent>,
    tickets: u64,
    /// End of the last chunk.
    done: u64,
    /// Counts what it hands out as the job's progress: the bytes of the front extent that it did not tell yet.
    counted: Option<u64>,
}

impl<'a> Scanner<'a> {
    /// Over the whole disk.
    pub fn new(source: &'a dyn GuestSource, rules: Rules, job: &'a Job) -> Self {
        let size = source.virtual_size();
        let walk = Walk::new(0..size, if source.is_arriving() { NEXT } else { STEPS });
        Self { source, rules, size, job, walk, queue: VecDeque::new(), tickets: 0, done: 0, counted: None }
    }

    /// One that counts the data that it hands out as the job's progress: in steps that depend on the extents alone.
    pub fn counting(self) -> Self {
        Self { counted: Some(0), ..self }
    }

    /// Bytes that are copied in all.
    ///
    /// # Errors
    /// As [`Scanner::next_chunk`].
    pub fn data(mut self) -> Result<u64> {
        let mut bytes = 0;
        while let Some(extent) = self.front()? {
            if self.content(&extent).is_some_and(|content| self.is_data(&content)) {
                bytes += extent.length;
            }
            self.queue.pop_front();
        }
        Ok(bytes)
    }

    /// Zeroes are, where they are written out.
    fn is_data(&self, content: &Content) -> bool {
        !matches!(content, Content::Zero) || self.rules.zeroes == Zeroes::Written
    }

    /// End of the last chunk that was handed out.
    pub fn done(&self) -> u64 {
        self.done
    }

    /// The next chunk in guest order, `None` at the end of the disk.
    ///
    /// # Errors
    /// `Aborted`; what listing extents meets.
    pub fn next_chunk(&mut self) -> Result<Option<Chunk>> {
        self.job.checkpoint()?;
        let mut pieces: Vec<Piece> = Vec::new();
        let (mut start, mut end) = (0, 0);
        while let Some(extent) = self.front()? {
            let Some(content) = self.content(&extent) else {
                self.queue.pop_front();
                continue;
            };
            if pieces.is_empty() {
                start = extent.start - extent.start % self.rules.chunk;
                end = self.chunk_end(start, &extent, &content);
            } else if extent.start >= end {
                break;
            }
            let length = extent.length.min(end - extent.start);
            self.count(&content, length, length == extent.length);
            pieces.push(Piece { start: extent.start, length, content });
            self.consume(length);
        }
        if pieces.is_empty() {
            return Ok(None);
        }
        let advance = if self.counted.is_some() { 0 } else { end - self.done };
        let chunk = Chunk { ticket: self.tickets, start, end, pieces, advance };
        self.tickets += 1;
        self.done = end;
        Ok(Some(chunk))
    }

    fn chunk_end(&self, start: u64, extent: &Extent, content: &Content) -> u64 {
        let usual = start.saturating_add(self.rules.chunk);
        let end = match (self.rules.zeroes, content) {
            (Zeroes::Explicit(long), Content::Zero) if extent.start == start => {
                let end = (start + extent.length).min(start.saturating_add(long));
                if end == self.size { end } else { (end - end % self.rules.chunk).max(usual) }
            }
            _ => usual,
        };
        end.min(self.size)
    }

    /// What to do about an extent: `None` to skip it.
    fn content(&self, extent: &Extent) -> Option<Content> {
        if let Some(delta) = self.rules.delta {
            // The base has the rest already. Behind its end, zeroes need not be said.
            if extent.depth >= delta.layers || (extent.zero && extent.start >= delta.base_size) {
                return None;
            }
        }
        match (extent.zero, self.rules.zeroes, &extent.host) {
            (true, Zeroes::Skip, _) => None,
            (true, _, _) => Some(Content::Zero),
            (false, _, Some((storage, offset))) => Some(Content::Stored(Arc::clone(storage), *offset)),
            (false, _, None) => Some(Content::Read),
        }
    }

    fn front(&mut self) -> Result<Option<Extent>> {
        while self.queue.is_empty() {
            let step = self.walk.next([Some(self.source)], self.job)?;
            let Some(Step { extents: [extents], .. }) = step else { break };
            self.queue.extend(extents.drain(..));
        }
        Ok(self.queue.front().cloned())
    }

    /// Counts `length` bytes of the front extent, which it may `end`.
    fn count(&mut self, content: &Content, length: u64, ends: bool) {
        let data = self.is_data(content);
        let Some(counted) = self.counted.as_mut().filter(|_| data) else { return };
        *counted += length;
        if ends || *counted >= COUNTED {
            self.job.advance(std::mem::take(counted));
        }
    }

    /// Takes `length` bytes off the front extent.
    fn consume(&mut self, length: u64) {
        let Some(extent) = self.queue.front_mut() else { return };
        if extent.length <= length {
            self.queue.pop_front();
            return;
        }
        extent.start += length;
        extent.length -= length;
        if let Some((_, offset)) = &mut extent.host {
            *offset += length;
        }
    }
}
