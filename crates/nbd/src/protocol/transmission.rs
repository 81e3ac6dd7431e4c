//! Requests and their replies, simple and in chunks.

use std::ops::Range;

use super::fields::{Fields, Malformed};
use super::{MAX_NAME, NbdError};

/// What a request begins with.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// What a simple reply begins with.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// What a chunk of a structured reply begins with.
pub const CHUNK_MAGIC: u32 = 0x668e_33ef;

/// What a request begins with where headers are extended.
pub const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
/// What a chunk of a reply begins with where headers are extended.
pub const EXTENDED_CHUNK_MAGIC: u32 = 0x6e8a_278c;

/// Length of a request, without what is to be written.
pub const REQUEST_HEAD: usize = 28;
/// The same where headers are extended.
pub const EXTENDED_REQUEST_HEAD: usize = 32;
/// Length of a simple reply, without what was read.
pub const SIMPLE_REPLY: usize = 16;
/// Length of a chunk's head.
pub const CHUNK_HEAD: usize = 20;
/// The same where headers are extended.
pub const EXTENDED_CHUNK_HEAD: usize = 32;

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
    /// Bytes: fewer than 2^32 where headers are not extended.
    pub length: u64,
}

impl Command {
    fn from_code(code: u16) -> Self {
        match code {
            0 => Self::Read,
            1 => Self::Write,
            2 => Self::Disc,
            3 => Self::Flush,
            4 => Self::Trim,
            5 => Self::Cache,
            6 => Self::WriteZeroes,
            7 => Self::BlockStatus,
            other => Self::Unknown(other),
        }
    }

    fn code(self) -> u16 {
        match self {
            Self::Read => 0,
            Self::Write => 1,
            Self::Disc => 2,
            Self::Flush => 3,
            Self::Trim => 4,
            Self::Cache => 5,
            Self::WriteZeroes => 6,
            Self::BlockStatus => 7,
            Self::Unknown(other) => other,
        }
    }
}

impl Request {
    /// Reads a request.
    ///
    /// # Errors
    /// Another magic: nobody knows then where the next request begins.
    pub fn parse(bytes: &[u8; REQUEST_HEAD]) -> Result<Self, Malformed> {
        let mut fields = Fields(bytes);
        let begun = Self::begin(&mut fields, REQUEST_MAGIC)?;
        Ok(Self { length: fields.u32()?.into(), ..begun })
    }

    /// Reads a request where headers are extended.
    ///
    /// # Errors
    /// As [`Self::parse`].
    pub fn parse_extended(bytes: &[u8; EXTENDED_REQUEST_HEAD]) -> Result<Self, Malformed> {
        let mut fields = Fields(bytes);
        let begun = Self::begin(&mut fields, EXTENDED_REQUEST_MAGIC)?;
        Ok(Self { length: fields.u64()?, ..begun })
    }

    /// All before the length.
    fn begin(fields: &mut Fields<'_>, magic: u32) -> Result<Self, Malformed> {
        if fields.u32()? != magic {
            return Err(Malformed("not a request"));
        }
        let flags = fields.u16()?;
        let command = Command::from_code(fields.u16()?);
        Ok(Self { flags, command, cookie: fields.u64()?, offset: fields.u64()?, length: 0 })
    }

    /// The request as bytes; what is to be written follows it.
    pub fn to_bytes(self, extended: bool) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(EXTENDED_REQUEST_HEAD);
        let magic = if extended { EXTENDED_REQUEST_MAGIC } else { REQUEST_MAGIC };
        bytes.extend(magic.to_be_bytes());
        bytes.extend(self.flags.to_be_bytes());
        bytes.extend(self.command.code().to_be_bytes());
        bytes.extend(self.cookie.to_be_bytes());
        bytes.extend(self.offset.to_be_bytes());
        if extended {
            bytes.extend(self.length.to_be_bytes());
        } else {
            bytes.extend((self.length as u32).to_be_bytes());
        }
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
    pub length: u64,
    /// What they are, in the terms of the context.
    pub status: u64,
}

/// A chunk as it is where headers are extended: it names the offset of the request. Data that follows is not in it.
pub fn extended(chunk: &[u8], offset: u64) -> Vec<u8> {
    let (head, data) = chunk.split_at_checked(CHUNK_HEAD).unwrap_or((chunk, &[]));
    let part = |range: Range<usize>| head.get(range).unwrap_or_default().iter().copied();
    let mut bytes = Vec::with_capacity(EXTENDED_CHUNK_HEAD + data.len());
    bytes.extend(EXTENDED_CHUNK_MAGIC.to_be_bytes());
    // Flags, kind, cookie.
    bytes.extend(part(4..16));
    bytes.extend(offset.to_be_bytes());
    bytes.extend([0; 4]);
    bytes.extend(part(16..20));
    bytes.extend(data);
    bytes
}

/// A chunk with the status of ranges in 64 bits, one behind the other, to be [`extended`].
pub fn extended_status_chunk(cookie: u64, done: bool, context: u32, ranges: &[Descriptor]) -> Vec<u8> {
    let mut bytes = chunk(cookie, done, 6, 8 + 16 * ranges.len());
    bytes.extend(context.to_be_bytes());
    bytes.extend((ranges.len() as u32).to_be_bytes());
    for Descriptor { length, status } in ranges {
        bytes.extend(length.to_be_bytes());
        bytes.extend(status.to_be_bytes());
    }
    bytes
}

/// A chunk with the status of ranges, one behind the other. Lengths are those of requests that are not extended.
pub fn status_chunk(cookie: u64, done: bool, context: u32, ranges: &[Descriptor]) -> Vec<u8> {
    let mut bytes = chunk(cookie, done, 5, 4 + 8 * ranges.len());
    bytes.extend(context.to_be_bytes());
    for Descriptor { length, status } in ranges {
        bytes.extend((*length as u32).to_be_bytes());
        bytes.extend((*status as u32).to_be_bytes());
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
            Request {
                flags: 5,
                command: Command::BlockStatus,
                cookie: 9,
                offset: 0x10,
                length: u32::MAX.into()
            }
        );
        assert!(request.has(1) && !request.has(2));
        assert_eq!(request.to_bytes(false), bytes);
        let long = Request { length: u64::MAX, ..request };
        let mut wide = long.to_bytes(true);
        assert_eq!(Request::parse_extended(&wide[..].try_into().unwrap()), Ok(long));
        wide[3] ^= 1;
        assert!(Request::parse_extended(&wide[..].try_into().unwrap()).is_err());
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
            extended_status_chunk(1, true, 1, &[Descriptor { length: 1, status: 2 }; 3]),
            error_chunk(1, NbdError::Io, "x"),
            error_chunk(1, NbdError::Io, &"ä".repeat(5000)),
        ];
        for bytes in chunks {
            assert_eq!(bytes.len(), CHUNK_HEAD + length(&bytes));
            let wide = extended(&bytes, 0xabcd);
            assert_eq!(u64::from_be_bytes(wide[16..24].try_into().unwrap()), 0xabcd);
            assert_eq!(u64::from_be_bytes(wide[24..32].try_into().unwrap()), length(&bytes) as u64);
            assert_eq!((&wide[4..16], &wide[32..]), (&bytes[4..16], &bytes[20..]));
        }
        assert_eq!(length(&data_chunk(1, true, 0, 512)), 520);
        assert_eq!(simple_reply(1, Some(NbdError::Perm)).len(), SIMPLE_REPLY);
    }
}
