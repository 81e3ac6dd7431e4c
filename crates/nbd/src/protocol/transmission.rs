//! Requests and their replies, simple and in chunks.

use super::fields::{Fields, Malformed};
use super::{MAX_NAME, NbdError};

/// What a request begins with.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// What a simple reply begins with.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// What a chunk of a structured reply begins with.
pub const CHUNK_MAGIC: u32 = 0x668e_33ef;

/// Length of a request, without what is to be written.
pub const REQUEST_HEAD: usize = 28;
/// Length of a simple reply, without what was read.
pub const SIMPLE_REPLY: usize = 16;
/// Length of a chunk's head.
pub const CHUNK_HEAD: usize = 20;

/// The last chunk of a reply.
const DONE: u16 = 1 << 0;

/// What is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// Bytes, please.
    Read,
    /// Bytes follow the request.
    Write,
    /// The client goes; no answer.
    Disc,
    /// Make durable what is answered.
    Flush,
    /// Give up.
    Trim,
    /// Will be read soon.
    Cache,
    /// As a write of zeroes.
    WriteZeroes,
    /// What the range is, for each context.
    BlockStatus,
    /// Anything else.
    Unknown(u16),
}

/// A request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// Flags of the command.
    pub flags: u16,
    /// What is to be done.
    pub command: Command,
    /// Chosen by the client; comes back with the reply.
    pub cookie: u64,
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub length: u32,
}

impl Request {
    /// Reads a request.
    ///
    /// # Errors
    /// Another magic: nobody knows then where the next request begins.
    pub fn parse(bytes: &[u8; REQUEST_HEAD]) -> Result<Self, Malformed> {
        let mut fields = Fields(bytes);
        if fields.u32()? != REQUEST_MAGIC {
            return Err(Malformed("not a request"));
        }
        let flags = fields.u16()?;
        let command = match fields.u16()? {
            0 => Command::Read,
            1 => Command::Write,
            2 => Command::Disc,
            3 => Command::Flush,
            4 => Command::Trim,
            5 => Command::Cache,
            6 => Command::WriteZeroes,
            7 => Command::BlockStatus,
            other => Command::Unknown(other),
        };
        Ok(Self { flags, command, cookie: fields.u64()?, offset: fields.u64()?, length: fields.u32()? })
    }

    /// The request as bytes; what is to be written follows it.
    pub fn to_bytes(self) -> [u8; REQUEST_HEAD] {
        let command: u16 = match self.command {
            Command::Read => 0,
            Command::Write => 1,
            Command::Disc => 2,
            Command::Flush => 3,
            Command::Trim => 4,
            Command::Cache => 5,
            Command::WriteZeroes => 6,
            Command::BlockStatus => 7,
            Command::Unknown(other) => other,
        };
        let fields = REQUEST_MAGIC.to_be_bytes().into_iter();
        let fields = fields.chain(self.flags.to_be_bytes()).chain(command.to_be_bytes());
        let fields = fields.chain(self.cookie.to_be_bytes()).chain(self.offset.to_be_bytes());
        let mut bytes = [0; REQUEST_HEAD];
        bytes.iter_mut().zip(fields.chain(self.length.to_be_bytes())).for_each(|(to, from)| *to = from);
        bytes
    }

    /// Whether the flag is set.
    pub fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }
}

/// A simple reply; what was read follows.
pub fn simple_reply(cookie: u64, error: Option<NbdError>) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(SIMPLE_REPLY);
    bytes.extend(SIMPLE_REPLY_MAGIC.to_be_bytes());
    bytes.extend(error.map_or(0, |error| error as u32).to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes
}

fn chunk(cookie: u64, done: bool, kind: u16, length: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(CHUNK_HEAD + 12);
    bytes.extend(CHUNK_MAGIC.to_be_bytes());
    bytes.extend(if done { DONE } else { 0 }.to_be_bytes());
    bytes.extend(kind.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes.extend((length as u32).to_be_bytes());
    bytes
}

/// A chunk that says nothing, the last one.
pub fn nothing_chunk(cookie: u64) -> Vec<u8> {
    chunk(cookie, true, 0, 0)
}

/// The head of a chunk of data, `length` bytes of which follow.
pub fn data_chunk(cookie: u64, done: bool, offset: u64, length: usize) -> Vec<u8> {
    let mut bytes = chunk(cookie, done, 1, 8 + length);
    bytes.extend(offset.to_be_bytes());
    bytes
}

/// A chunk that reads as zeroes.
pub fn hole_chunk(cookie: u64, done: bool, offset: u64, length: u32) -> Vec<u8> {
    let mut bytes = chunk(cookie, done, 2, 12);
    bytes.extend(offset.to_be_bytes());
    bytes.extend(length.to_be_bytes());
    bytes
}

/// What a range is for one context.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Descriptor {
    /// Bytes, never 0.
    pub length: u32,
    /// What they are, in the terms of the context.
    pub status: u32,
}

/// A chunk with the status of ranges, one behind the other.
pub fn status_chunk(cookie: u64, done: bool, context: u32, ranges: &[Descriptor]) -> Vec<u8> {
    let mut bytes = chunk(cookie, done, 5, 4 + 8 * ranges.len());
    bytes.extend(context.to_be_bytes());
    for Descriptor { length, status } in ranges {
        bytes.extend(length.to_be_bytes());
        bytes.extend(status.to_be_bytes());
    }
    bytes
}

/// A chunk with an error, the last one. A message that is too long ends early.
pub fn error_chunk(cookie: u64, error: NbdError, message: &str) -> Vec<u8> {
    let end = (0..=message.len().min(MAX_NAME)).rev().find(|end| message.is_char_boundary(*end)).unwrap_or(0);
    let message = message.get(..end).unwrap_or_default();
    let mut bytes = chunk(cookie, true, (1 << 15) + 1, 6 + message.len());
    bytes.extend((error as u32).to_be_bytes());
    bytes.extend((message.len() as u16).to_be_bytes());
    bytes.extend(message.as_bytes());
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_read_as_they_are() {
        let mut bytes = [0; REQUEST_HEAD];
        bytes[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        bytes[5] = 5;
        bytes[7] = 7;
        bytes[15] = 9;
        bytes[23] = 0x10;
        bytes[24..].copy_from_slice(&[0xff; 4]);
        let request = Request::parse(&bytes).unwrap();
        assert_eq!(
            request,
            Request { flags: 5, command: Command::BlockStatus, cookie: 9, offset: 0x10, length: u32::MAX }
        );
        assert!(request.has(1) && !request.has(2));
        assert_eq!(request.to_bytes(), bytes);
        bytes[7] = 200;
        assert_eq!(Request::parse(&bytes).unwrap().command, Command::Unknown(200));
        bytes[0] ^= 1;
        assert!(Request::parse(&bytes).is_err());
    }

    #[test]
    fn chunks_have_the_lengths_that_they_say() {
        let length = |bytes: &[u8]| u32::from_be_bytes(bytes[16..20].try_into().unwrap()) as usize;
        let chunks = [
            nothing_chunk(1),
            hole_chunk(1, false, 2, 3),
            status_chunk(1, true, 1, &[Descriptor { length: 1, status: 2 }; 3]),
            error_chunk(1, NbdError::Io, "x"),
            error_chunk(1, NbdError::Io, &"ä".repeat(5000)),
        ];
        for bytes in chunks {
            assert_eq!(bytes.len(), CHUNK_HEAD + length(&bytes));
        }
        assert_eq!(length(&data_chunk(1, true, 0, 512)), 520);
        assert_eq!(simple_reply(1, Some(NbdError::Perm)).len(), SIMPLE_REPLY);
    }
}
