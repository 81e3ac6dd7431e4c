//! What a server says, read by a client: its answers to options, and its replies to requests.

use super::fields::{Fields, Malformed};
use super::handshake::{OPTION_REPLY_MAGIC, OptionKind};
use super::transmission::{
    CHUNK_MAGIC, Descriptor, EXTENDED_CHUNK_HEAD, EXTENDED_CHUNK_MAGIC, SIMPLE_REPLY_MAGIC,
};
use super::{MAX_NAME, MAX_PAYLOAD};

/// Length of the head of an answer to an option.
pub const ANSWER_HEAD: usize = 20;

/// Longest data of an answer to an option: a name, a description, and what stands before them.
pub const MAX_ANSWER: u32 = 64 << 10;

/// Longest data of a chunk that carries no bytes of the disk.
pub const MAX_STATEMENT: u32 = 64 << 10;

/// The head of an answer to an option.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AnswerHead {
    /// What it says.
    pub answer: Answer,
    /// Bytes of data behind the head.
    pub length: u32,
}

/// How an option was answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// Done.
    Ack,
    /// An export.
    Server,
    /// Something of an export.
    Info,
    /// A context.
    MetaContext,
    /// Refused.
    Refused(Refusal),
}

/// Why an option was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// No such option there.
    Unsupported,
    /// Not allowed.
    Policy,
    /// The data makes no sense to the server.
    Invalid,
    /// Not on its platform.
    Platform,
    /// Only over TLS.
    TlsRequired,
    /// No such export.
    Unknown,
    /// The server is ending.
    Shutdown,
    /// Only with sizes of requests.
    BlockSizeRequired,
    /// Something was too long.
    TooBig,
    /// Only with extended headers.
    ExtendedHeadersRequired,
    /// Any other.
    Other(u32),
}

impl Refusal {
    fn from_code(code: u32) -> Self {
        match code {
            1 => Self::Unsupported,
            2 => Self::Policy,
            3 => Self::Invalid,
            4 => Self::Platform,
            5 => Self::TlsRequired,
            6 => Self::Unknown,
            7 => Self::Shutdown,
            8 => Self::BlockSizeRequired,
            9 => Self::TooBig,
            10 => Self::ExtendedHeadersRequired,
            other => Self::Other(other),
        }
    }

    /// What it means, for a person.
    pub fn describe(self) -> &'static str {
        match self {
            Self::Unsupported => "the server does not know the option",
            Self::Policy => "the server does not allow it",
            Self::Invalid => "the server finds the option wrong",
            Self::Platform => "the server's system does not support it",
            Self::TlsRequired => "the server wants TLS",
            Self::Unknown => "the server has no such export",
            Self::Shutdown => "the server is ending",
            Self::BlockSizeRequired => "the server wants block sizes to be asked for",
            Self::TooBig => "the server finds the option too long",
            Self::ExtendedHeadersRequired => "the server wants extended headers",
            Self::Other(_) => "the server refuses, and gives a reason that is not known",
        }
    }
}

/// The bit that errors have.
const REFUSED: u32 = 1 << 31;

impl AnswerHead {
    /// Reads the head of an answer to `to`.
    ///
    /// # Errors
    /// Another magic, an answer to something else, one that is not known, and more data than any has.
    pub fn parse(bytes: &[u8; ANSWER_HEAD], to: OptionKind) -> Result<Self, Malformed> {
        let mut fields = Fields(bytes);
        if fields.u64()? != OPTION_REPLY_MAGIC {
            return Err(Malformed("an answer to an option begins with another magic number"));
        }
        if fields.u32()? != to.code() {
            return Err(Malformed("it answers an option that was not asked"));
        }
        let answer = match fields.u32()? {
            1 => Answer::Ack,
            2 => Answer::Server,
            3 => Answer::Info,
            4 => Answer::MetaContext,
            code if code & REFUSED != 0 => Answer::Refused(Refusal::from_code(code & !REFUSED)),
            _ => return Err(Malformed("it answers an option in a way that is not known")),
        };
        let length = fields.u32()?;
        if length > MAX_ANSWER {
            return Err(Malformed("an answer to an option is longer than 64 KiB"));
        }
        Ok(Self { answer, length })
    }
}

/// Sizes of requests that an export wants, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockSizes {
    /// Offsets and lengths are multiples of this: a power of two.
    pub minimum: u32,
    /// What is best: a power of two.
    pub preferred: u32,
    /// The largest payload: a multiple of the least, or as much as there is.
    pub maximum: u32,
}

impl BlockSizes {
    /// Of a server that says nothing of them.
    pub const DEFAULT: Self = Self { minimum: 1, preferred: 4096, maximum: MAX_PAYLOAD };

    fn check(self) -> Result<Self, Malformed> {
        let Self { minimum, preferred, maximum } = self;
        let powers = minimum.is_power_of_two() && preferred.is_power_of_two();
        if !powers || minimum > 64 << 10 || preferred < minimum || preferred < 512 {
            return Err(Malformed("its block sizes are not those of the protocol"));
        }
        if maximum < minimum || (maximum != u32::MAX && maximum % minimum != 0) {
            return Err(Malformed("its largest block size does not go with its least one"));
        }
        Ok(self)
    }
}

/// Something that a server says of an export.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExportInfo<'a> {
    /// Size in bytes, and transmission flags.
    Export(u64, u16),
    /// Its name.
    Name(&'a [u8]),
    /// What it is.
    Description(&'a [u8]),
    /// Sizes of requests.
    BlockSizes(BlockSizes),
    /// What is not known here.
    Other,
}

impl<'a> ExportInfo<'a> {
    /// Reads the data of an answer.
    ///
    /// # Errors
    /// Lengths that do not fit, sizes that no disk has, and block sizes that contradict each other.
    pub fn parse(data: &'a [u8]) -> Result<Self, Malformed> {
        let mut fields = Fields(data);
        let read = match fields.u16()? {
            0 => Self::Export(size(fields.u64()?)?, fields.u16()?),
            1 => return Ok(Self::Name(name(fields.0)?)),
            2 => return Ok(Self::Description(name(fields.0)?)),
            3 => {
                let (minimum, preferred, maximum) = (fields.u32()?, fields.u32()?, fields.u32()?);
                Self::BlockSizes(BlockSizes { minimum, preferred, maximum }.check()?)
            }
            _ => return Ok(Self::Other),
        };
        fields.end()?;
        Ok(read)
    }
}

fn size(size: u64) -> Result<u64, Malformed> {
    if size > i64::MAX as u64 { Err(Malformed("its export is larger than any disk")) } else { Ok(size) }
}

fn name(name: &[u8]) -> Result<&[u8], Malformed> {
    if name.len() > MAX_NAME { Err(Malformed("a name is longer than 4096 bytes")) } else { Ok(name) }
}

/// Reads size and flags that answer `EXPORT_NAME`.
///
/// # Errors
/// A size that no disk has.
pub fn parse_export(bytes: &[u8; 10]) -> Result<(u64, u16), Malformed> {
    let mut fields = Fields(bytes);
    Ok((size(fields.u64()?)?, fields.u16()?))
}

/// Reads the data of an answer that names an export: its name, and what it is.
///
/// # Errors
/// Lengths that do not fit.
pub fn parse_server(data: &[u8]) -> Result<(&[u8], &[u8]), Malformed> {
    let mut fields = Fields(data);
    let found = fields.string(MAX_NAME)?;
    Ok((found, name(fields.0)?))
}

/// Reads the data of an answer that names a context: its number, and its name.
///
/// # Errors
/// Lengths that do not fit.
pub fn parse_context(data: &[u8]) -> Result<(u32, &[u8]), Malformed> {
    let mut fields = Fields(data);
    Ok((fields.u32()?, name(fields.0)?))
}

/// The kind of a chunk with a status in 64 bits.
pub const EXTENDED_STATUS: u16 = 6;

/// Length of what every reply begins with, and which all that is known of it fits in: the head of a simple one.
pub const REPLY_HEAD: usize = 16;

/// The beginning of a reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReplyHead {
    /// A simple one: the error, or 0, and the request's cookie.
    Simple(u32, u64),
    /// A chunk. Its length follows, in four more bytes.
    Chunk {
        /// The last one.
        done: bool,
        /// What it is.
        kind: u16,
        /// The request's.
        cookie: u64,
    },
}

impl ReplyHead {
    /// Reads the first bytes of a reply.
    ///
    /// # Errors
    /// Another magic: nobody knows then where the next reply begins.
    pub fn parse(bytes: &[u8; REPLY_HEAD]) -> Result<Self, Malformed> {
        let mut fields = Fields(bytes);
        match fields.u32()? {
            SIMPLE_REPLY_MAGIC => Ok(Self::Simple(fields.u32()?, fields.u64()?)),
            CHUNK_MAGIC => {
                let done = fields.u16()? & 1 != 0;
                Ok(Self::Chunk { done, kind: fields.u16()?, cookie: fields.u64()? })
            }
            _ => Err(Malformed("a reply begins with another magic number")),
        }
    }
}

/// The head of a chunk where headers are extended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExtendedHead {
    /// The last one.
    pub done: bool,
    /// What it is.
    pub kind: u16,
    /// The request's.
    pub cookie: u64,
    /// The request's, too.
    pub offset: u64,
    /// Bytes behind the head.
    pub length: u64,
}

impl ExtendedHead {
    /// Reads a head.
    ///
    /// # Errors
    /// Another magic: nobody knows then where the next reply begins.
    pub fn parse(bytes: &[u8; EXTENDED_CHUNK_HEAD]) -> Result<Self, Malformed> {
        let mut fields = Fields(bytes);
        if fields.u32()? != EXTENDED_CHUNK_MAGIC {
            return Err(Malformed("a reply begins with another magic number"));
        }
        let done = fields.u16()? & 1 != 0;
        let (kind, cookie) = (fields.u16()?, fields.u64()?);
        Ok(Self { done, kind, cookie, offset: fields.u64()?, length: fields.u64()? })
    }
}

/// What a chunk without bytes of the disk says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Statement {
    /// Nothing.
    Nothing,
    /// So many bytes from an offset on are zeroes.
    Hole(u64, u32),
    /// What the first bytes of the range are, for the context of that number.
    Status(u32, Descriptor),
    /// An error, by its number.
    Error(u32),
}

impl Statement {
    /// Reads the data of a chunk, whose kind is that of one without bytes of the disk.
    ///
    /// # Errors
    /// A kind that is not known, and lengths that do not fit.
    pub fn parse(kind: u16, data: &[u8]) -> Result<Self, Malformed> {
        let mut fields = Fields(data);
        match kind {
            0 => {
                fields.end()?;
                Ok(Self::Nothing)
            }
            2 => {
                let hole = Self::Hole(fields.u64()?, fields.u32()?);
                fields.end()?;
                Ok(hole)
            }
            5 => {
                let context = fields.u32()?;
                let first = Descriptor { length: fields.u32()?.into(), status: fields.u32()?.into() };
                if first.length == 0 || fields.0.len() % 8 != 0 {
                    return Err(Malformed("a block status has no extent"));
                }
                Ok(Self::Status(context, first))
            }
            EXTENDED_STATUS => {
                let (context, count) = (fields.u32()?, fields.u32()?);
                let first = Descriptor { length: fields.u64()?, status: fields.u64()? };
                let (more, odd) = (fields.0.len() / 16, fields.0.len() % 16);
                if first.length == 0 || odd != 0 || count != 0 && count as usize != more + 1 {
                    return Err(Malformed("a block status has no extent"));
                }
                Ok(Self::Status(context, first))
            }
            kind if kind & (1 << 15) != 0 => {
                let error = fields.u32()?;
                let message = fields.u16()?;
                fields.bytes(message.into())?;
                Ok(Self::Error(error))
            }
            _ => Err(Malformed("a chunk of a reply is of a kind that is not known")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::handshake::{Info, Reply, block_size_data, export_data, reply, server_data, text_data};
    use super::super::transmission::{error_chunk, hole_chunk, nothing_chunk, simple_reply, status_chunk};
    use super::super::{NbdError, handshake};
    use super::*;

    #[test]
    fn what_a_server_says_is_read_as_it_was_said() {
        let head = |bytes: &[u8]| AnswerHead::parse(bytes[..ANSWER_HEAD].try_into().unwrap(), OptionKind::Go);
        let ack = head(&reply(OptionKind::Go, Reply::Ack, b"xy")).unwrap();
        assert_eq!(ack, AnswerHead { answer: Answer::Ack, length: 2 });
        let refused = head(&reply(OptionKind::Go, Reply::ErrUnknown, b"")).unwrap();
        assert_eq!(refused.answer, Answer::Refused(Refusal::Unknown));
        assert!(head(&reply(OptionKind::List, Reply::Ack, b"")).is_err(), "of another option");
        let mut long = reply(OptionKind::Go, Reply::Ack, b"");
        long[16..20].copy_from_slice(&(MAX_ANSWER + 1).to_be_bytes());
        assert!(head(&long).is_err());
        let mut unknown = reply(OptionKind::Go, Reply::Ack, b"");
        unknown[15] = 9;
        assert!(head(&unknown).is_err());

        assert_eq!(ExportInfo::parse(&export_data(1 << 40, 7)), Ok(ExportInfo::Export(1 << 40, 7)));
        assert!(ExportInfo::parse(&export_data(1 << 63, 7)).is_err());
        assert_eq!(ExportInfo::parse(&text_data(Info::Name, b"x")), Ok(ExportInfo::Name(b"x")));
        let sizes = BlockSizes { minimum: 1, preferred: 4096, maximum: MAX_PAYLOAD };
        assert_eq!(ExportInfo::parse(&block_size_data(4096)), Ok(ExportInfo::BlockSizes(sizes)));
        for cut in 0..14 {
            assert!(ExportInfo::parse(&block_size_data(4096)[..cut]).is_err(), "{cut}");
        }
        assert_eq!(parse_server(&server_data(b"a", b"bc")), Ok((&b"a"[..], &b"bc"[..])));
        assert!(parse_server(&[0xff; 8]).is_err());
        assert_eq!(parse_context(&handshake::context_data(3, b"x")), Ok((3, &b"x"[..])));
    }

    #[test]
    fn block_sizes_that_contradict_each_other_are_none() {
        let check = |minimum, preferred, maximum| BlockSizes { minimum, preferred, maximum }.check().is_ok();
        assert!(check(1, 512, 1) && check(512, 4096, u32::MAX) && check(65536, 65536, 65536));
        assert!(
            !check(0, 4096, 4096) && !check(3, 4096, 4095) && !check(1, 0, 4096) && !check(1, 4097, 4096)
        );
        assert!(!check(4096, 512, 4096) && !check(512, 4096, 256) && !check(512, 4096, 1000));
        assert!(!check(1 << 17, 1 << 17, 1 << 17));
    }

    #[test]
    fn replies_are_read_as_they_were_made() {
        let head = |bytes: &[u8]| ReplyHead::parse(bytes[..REPLY_HEAD].try_into().unwrap());
        assert_eq!(head(&simple_reply(7, Some(NbdError::Io))), Ok(ReplyHead::Simple(5, 7)));
        let chunk = ReplyHead::Chunk { done: false, kind: 2, cookie: 7 };
        assert_eq!(head(&hole_chunk(7, false, 1, 2)), Ok(chunk));
        assert!(head(&[0; 16]).is_err());
        let said = |kind, bytes: &[u8]| Statement::parse(kind, &bytes[20..]);
        assert_eq!(said(0, &nothing_chunk(1)), Ok(Statement::Nothing));
        assert_eq!(said(2, &hole_chunk(1, true, 5, 6)), Ok(Statement::Hole(5, 6)));
        assert_eq!(said(0x8001, &error_chunk(1, NbdError::NoSpc, "full")), Ok(Statement::Error(28)));
        let first = Descriptor { length: 4, status: 3 };
        let second = Descriptor { length: 0, status: 0 };
        assert_eq!(said(5, &status_chunk(1, true, 9, &[first, second])), Ok(Statement::Status(9, first)));
        assert!(said(5, &status_chunk(1, true, 9, &[second])).is_err());
        assert!(said(5, &status_chunk(1, true, 9, &[])).is_err());
        assert!(said(0, &hole_chunk(1, true, 5, 6)).is_err(), "more than nothing");
        assert!(said(7, &nothing_chunk(1)).is_err());
        assert!(Statement::parse(0x8001, &[0, 0, 0, 5, 0xff, 0xff]).is_err(), "a message that is not there");
    }
}
