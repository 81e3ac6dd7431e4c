//! Answers to requests.

use std::io;
use std::ops::Range;

use qcow2_core::Result;

use super::connection::Connection;
use super::requests::Refused;
use crate::protocol::command_flags as flag;
use crate::protocol::transmission::{
    Command, Descriptor, Request, data_chunk, error_chunk, extended, extended_status_chunk, hole_chunk,
    nothing_chunk, simple_reply, status_chunk,
};
use crate::transport::write_all;

/// A part of what was read: from the start of the request, in bytes.
pub(super) struct Part {
    pub(super) range: Range<usize>,
    /// Reads as zeroes; was not read.
    pub(super) zero: bool,
}

/// What one context says.
pub(super) struct Status {
    context: u32,
    ranges: Vec<Descriptor>,
}

impl Connection<'_> {
    /// What each context says of the range.
    pub(super) fn block_status(&self, request: &Request) -> Result<Vec<Status>> {
        let start = self.agreed.export.offset + request.offset;
        let range = start..start + request.length;
        let one = request.has(flag::REQ_ONE);
        let status = |context: &super::contexts::Context| {
            let ranges = context.status(self.agreed.export, range.clone(), one)?;
            Ok(Status { context: context.id(), ranges })
        };
        self.agreed.contexts.iter().map(status).collect()
    }

    pub(super) fn send_status(&self, request: &Request, lists: &[Status]) -> io::Result<()> {
        let last = lists.len().saturating_sub(1);
        let chunks: Vec<Vec<u8>> = lists
            .iter()
            .enumerate()
            .map(|(index, list)| {
                let chunk = if self.agreed.extended { extended_status_chunk } else { status_chunk };
                self.head(request, chunk(request.cookie, index == last, list.context, &list.ranges))
            })
            .collect();
        let parts: Vec<&[u8]> = chunks.iter().map(Vec::as_slice).collect();
        self.send(&parts)
    }

    /// Sends what was read: all of it, or without what is zero where the client takes chunks.
    pub(super) fn send_data(&self, request: &Request, parts: &[Part], buffer: &[u8]) -> io::Result<()> {
        let length = request.length as usize;
        let cookie = request.cookie;
        let bytes = |range: &Range<usize>| buffer.get(range.clone()).unwrap_or_default();
        if !self.agreed.structured {
            return self.send(&[&simple_reply(cookie, None), bytes(&(0..length))]);
        }
        if length == 0 {
            return self.send(&[&self.head(request, nothing_chunk(cookie))]);
        }
        let last = parts.len().saturating_sub(1);
        let heads: Vec<Vec<u8>> = parts
            .iter()
            .enumerate()
            .map(|(index, Part { range, zero })| {
                let (done, offset) = (index == last, request.offset + range.start as u64);
                let chunk = match zero {
                    true => hole_chunk(cookie, done, offset, range.len() as u32),
                    false => data_chunk(cookie, done, offset, range.len()),
                };
                self.head(request, chunk)
            })
            .collect();
        let pieces: Vec<&[u8]> = heads
            .iter()
            .zip(parts)
            .flat_map(|(head, part)| [head.as_slice(), if part.zero { &[] } else { bytes(&part.range) }])
            .collect();
        self.send(&pieces)
    }

    pub(super) fn succeed(&self, request: &Request) -> io::Result<()> {
        if self.agreed.extended {
            return self.send(&[&self.head(request, nothing_chunk(request.cookie))]);
        }
        self.send(&[&simple_reply(request.cookie, None)])
    }

    pub(super) fn fail(&self, request: &Request, refused: &Refused) -> io::Result<()> {
        let chunks =
            matches!(request.command, Command::Read | Command::BlockStatus) || !refused.why.is_empty();
        if self.agreed.structured && (chunks || self.agreed.extended) {
            let chunk = error_chunk(request.cookie, refused.error, &refused.why);
            return self.send(&[&self.head(request, chunk)]);
        }
        self.send(&[&simple_reply(request.cookie, Some(refused.error))])
    }

    /// A chunk with the head that was agreed on.
    fn head(&self, request: &Request, chunk: Vec<u8>) -> Vec<u8> {
        if self.agreed.extended { extended(&chunk, request.offset) } else { chunk }
    }

    fn send(&self, parts: &[&[u8]]) -> io::Result<()> {
        self.soon_free();
        let _turn = self.sending.lock();
        write_all(self.transport, parts, None)
    }
}
