//! The fixed newstyle handshake: greeting, options and their replies.

use super::fields::{Fields, Malformed};
use super::{MAX_NAME, MAX_PAYLOAD};

/// `NBDMAGIC`.
pub const GREETING_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// `IHAVEOPT`.
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// What a reply to an option begins with.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;

/// Options are answered, and unknown ones refused. Of the server and, where it understood, of the client.
pub const FIXED_NEWSTYLE: u16 = 1 << 0;
/// No zeroes behind the answer to `EXPORT_NAME`.
pub const NO_ZEROES: u16 = 1 << 1;

/// Length of an option's head.
pub const OPTION_HEAD: usize = 16;

/// Longest data of an option. The longest that means something are those of `SET_META_CONTEXT`.
pub const MAX_OPTION: u32 = 64 << 10;

/// What a client can ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OptionKind {
    /// Begin, without an answer that could refuse.
    ExportName,
    /// Do not begin.
    Abort,
    /// The names of the exports.
    List,
    /// Go on over TLS.
    StartTls,
    /// What an export is.
    Info,
    /// What an export is, and begin.
    Go,
    /// Replies in chunks.
    StructuredReply,
    /// Which contexts there are.
    ListMetaContext,
    /// Which contexts `BLOCK_STATUS` is to tell of.
    SetMetaContext,
    /// Replies in chunks, and lengths of 64 bits.
    ExtendedHeaders,
    /// Anything else.
    Unknown(u32),
}

/// The head of an option.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OptionHead {
    /// What is asked for.
    pub kind: OptionKind,
    /// Bytes of data behind the head.
    pub length: u32,
}

impl OptionKind {
    fn from_code(code: u32) -> Self {
        match code {
            1 => Self::ExportName,
            2 => Self::Abort,
            3 => Self::List,
            5 => Self::StartTls,
            6 => Self::Info,
            7 => Self::Go,
            8 => Self::StructuredReply,
            9 => Self::ListMetaContext,
            10 => Self::SetMetaContext,
            11 => Self::ExtendedHeaders,
            other => Self::Unknown(other),
        }
    }

    /// Its number.
    pub fn code(self) -> u32 {
        match self {
            Self::ExportName => 1,
            Self::Abort => 2,
            Self::List => 3,
            Self::StartTls => 5,
            Self::Info => 6,
            Self::Go => 7,
            Self::StructuredReply => 8,
            Self::ListMetaContext => 9,
            Self::SetMetaContext => 10,
            Self::ExtendedHeaders => 11,
            Self::Unknown(code) => code,
        }
    }
}

impl OptionHead {
    /// Reads a head.
    ///
    /// # Errors
    /// Another magic, and more data than any option has: who said so cannot be followed any further.
    pub fn parse(bytes: &[u8; OPTION_HEAD]) -> Result<Self, Malformed> {
        let mut fields = Fields(bytes);
        if fields.u64()? != OPTION_MAGIC {
            return Err(Malformed("not an option"));
        }
        let kind = OptionKind::from_code(fields.u32()?);
        let length = fields.u32()?;
        if length > MAX_OPTION {
            return Err(Malformed("an option is longer than 64 KiB"));
        }
        Ok(Self { kind, length })
    }
}

/// What a client wants to know of an export.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum Info {
    /// Size and flags: told in any case.
    Export = 0,
    /// Its name, as the server has it.
    Name = 1,
    /// What it is, for a person.
    Description = 2,
    /// Sizes of requests.
    BlockSize = 3,
}

/// The data of `INFO` and `GO`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportRequest<'a> {
    /// The export's name.
    pub name: &'a [u8],
    /// Whether its name is asked for.
    pub wants_name: bool,
}

impl<'a> ExportRequest<'a> {
    /// Reads the data of the option.
    ///
    /// # Errors
    /// Lengths that do not fit, and names that are too long.
    pub fn parse(data: &'a [u8]) -> Result<Self, Malformed> {
        let mut fields = Fields(data);
        let name = fields.string(MAX_NAME)?;
        let mut wants_name = false;
        for _ in 0..fields.u16()? {
            wants_name |= fields.u16()? == Info::Name as u16;
        }
        fields.end()?;
        Ok(Self { name, wants_name })
    }
}

/// The data of `LIST_META_CONTEXT` and `SET_META_CONTEXT`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContextRequest<'a> {
    /// The export's name.
    pub name: &'a [u8],
    /// What is asked for.
    pub queries: Vec<&'a [u8]>,
}

impl<'a> ContextRequest<'a> {
    /// Reads the data of the option.
    ///
    /// # Errors
    /// Lengths that do not fit, and names that are too long.
    pub fn parse(data: &'a [u8]) -> Result<Self, Malformed> {
        let mut fields = Fields(data);
        let name = fields.string(MAX_NAME)?;
        let count = fields.u32()?;
        // Not allocated ahead: the number is the client's, and the data has room for few.
        let mut queries = Vec::new();
        for _ in 0..count {
            queries.push(fields.string(MAX_NAME)?);
        }
        fields.end()?;
        Ok(Self { name, queries })
    }
}

/// How an option is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Reply {
    /// Done.
    Ack = 1,
    /// An export.
    Server = 2,
    /// Something of an export.
    Info = 3,
    /// A context.
    MetaContext = 4,
    /// No such option here.
    ErrUnsup = (1 << 31) + 1,
    /// The data makes no sense.
    ErrInvalid = (1 << 31) + 3,
    /// Only over TLS.
    ErrTlsReqd = (1 << 31) + 5,
    /// No such export.
    ErrUnknown = (1 << 31) + 6,
    /// Something that goes with extended headers no more.
    ErrExtHeaderReqd = (1 << 31) + 10,
}

/// What the server says first.
pub fn greeting() -> [u8; 18] {
    let mut bytes = [0; 18];
    let flags = FIXED_NEWSTYLE | NO_ZEROES;
    let fields = GREETING_MAGIC.to_be_bytes().into_iter().chain(OPTION_MAGIC.to_be_bytes());
    bytes.iter_mut().zip(fields.chain(flags.to_be_bytes())).for_each(|(to, from)| *to = from);
    bytes
}

/// A reply to an option.
pub fn reply(to: OptionKind, reply: Reply, data: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(20 + data.len());
    bytes.extend(OPTION_REPLY_MAGIC.to_be_bytes());
    bytes.extend(to.code().to_be_bytes());
    bytes.extend((reply as u32).to_be_bytes());
    bytes.extend((data.len() as u32).to_be_bytes());
    bytes.extend(data);
    bytes
}

/// The answer to `EXPORT_NAME`.
pub fn export_name_reply(size: u64, flags: u16, zeroes: bool) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(134);
    bytes.extend(size.to_be_bytes());
    bytes.extend(flags.to_be_bytes());
    if zeroes {
        bytes.extend([0; 124]);
    }
    bytes
}

/// The data of a reply that names an export.
pub fn server_data(name: &[u8], description: &[u8]) -> Vec<u8> {
    let mut bytes = (name.len() as u32).to_be_bytes().to_vec();
    bytes.extend(name);
    bytes.extend(description);
    bytes
}

/// The data of a reply with an export's size and flags.
pub fn export_data(size: u64, flags: u16) -> Vec<u8> {
    let mut bytes = (Info::Export as u16).to_be_bytes().to_vec();
    bytes.extend(size.to_be_bytes());
    bytes.extend(flags.to_be_bytes());
    bytes
}

/// The data of a reply with an export's name or description.
pub fn text_data(info: Info, text: &[u8]) -> Vec<u8> {
    let mut bytes = (info as u16).to_be_bytes().to_vec();
    bytes.extend(text);
    bytes
}

/// The data of a reply with the sizes of requests: any, what is best, and the largest.
pub fn block_size_data(preferred: u32) -> Vec<u8> {
    let mut bytes = (Info::BlockSize as u16).to_be_bytes().to_vec();
    [1, preferred, MAX_PAYLOAD].into_iter().for_each(|size| bytes.extend(size.to_be_bytes()));
    bytes
}

/// The data of a reply that names a context.
pub fn context_data(id: u32, name: &[u8]) -> Vec<u8> {
    let mut bytes = id.to_be_bytes().to_vec();
    bytes.extend(name);
    bytes
}

/// An option, as a client sends it.
pub fn option(kind: OptionKind, data: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(OPTION_HEAD + data.len());
    bytes.extend(OPTION_MAGIC.to_be_bytes());
    bytes.extend(kind.code().to_be_bytes());
    bytes.extend((data.len() as u32).to_be_bytes());
    bytes.extend(data);
    bytes
}

/// The data of `INFO` and `GO`, which ask for `infos`.
pub fn export_request(name: &[u8], infos: &[Info]) -> Vec<u8> {
    let mut bytes = server_data(name, b"");
    bytes.extend((infos.len() as u16).to_be_bytes());
    infos.iter().for_each(|info| bytes.extend((*info as u16).to_be_bytes()));
    bytes
}

/// The data of `LIST_META_CONTEXT` and `SET_META_CONTEXT`.
pub fn context_request(name: &[u8], queries: &[&[u8]]) -> Vec<u8> {
    let mut bytes = server_data(name, b"");
    bytes.extend((queries.len() as u32).to_be_bytes());
    queries.iter().for_each(|query| bytes.extend(server_data(query, b"")));
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(magic: u64, code: u32, length: u32) -> [u8; OPTION_HEAD] {
        let mut bytes = magic.to_be_bytes().to_vec();
        bytes.extend(code.to_be_bytes());
        bytes.extend(length.to_be_bytes());
        bytes.try_into().unwrap()
    }

    #[test]
    fn heads_of_options() {
        for code in 0..20 {
            let parsed = OptionHead::parse(&head(OPTION_MAGIC, code, 7)).unwrap();
            assert_eq!((parsed.kind.code(), parsed.length), (code, 7));
        }
        assert!(OptionHead::parse(&head(OPTION_MAGIC ^ 1, 1, 0)).is_err());
        assert!(OptionHead::parse(&head(OPTION_MAGIC, 1, MAX_OPTION)).is_ok());
        assert!(OptionHead::parse(&head(OPTION_MAGIC, 1, MAX_OPTION + 1)).is_err());
        assert!(OptionHead::parse(&head(OPTION_MAGIC, 1, u32::MAX)).is_err());
    }

    #[test]
    fn requests_for_an_export() {
        let good = [&[0, 0, 0, 2][..], b"ab", &[0, 2, 0, 3, 0, 1]].concat();
        assert_eq!(ExportRequest::parse(&good), Ok(ExportRequest { name: b"ab", wants_name: true }));
        assert_eq!(
            ExportRequest::parse(&[0; 6]),
            Ok(ExportRequest { name: b"", wants_name: false }),
            "the default export"
        );
        for cut in 0..good.len() {
            assert!(ExportRequest::parse(&good[..cut]).is_err(), "{cut}");
        }
        assert!(ExportRequest::parse(&[&good[..], &[0]].concat()).is_err(), "more than it says");
        assert!(ExportRequest::parse(&[0xff, 0xff, 0xff, 0xff, 1, 2]).is_err(), "an absurd name");
        let long = |length: u32| [&length.to_be_bytes()[..], &vec![b'n'; length as usize], &[0, 0]].concat();
        assert!(ExportRequest::parse(&long(4096)).is_ok());
        assert!(ExportRequest::parse(&long(4097)).is_err());
    }

    #[test]
    fn what_a_client_sends_is_read_as_it_was_meant() {
        let go = export_request(b"ab", &[Info::Name, Info::BlockSize]);
        assert_eq!(ExportRequest::parse(&go), Ok(ExportRequest { name: b"ab", wants_name: true }));
        let contexts = context_request(b"x", &[b"base:", b""]);
        let read = ContextRequest { name: b"x", queries: vec![b"base:", b""] };
        assert_eq!(ContextRequest::parse(&contexts), Ok(read));
        let sent = option(OptionKind::Go, &go);
        let head = OptionHead::parse(sent[..OPTION_HEAD].try_into().unwrap()).unwrap();
        assert_eq!((head.kind, head.length as usize), (OptionKind::Go, go.len()));
        assert_eq!(sent[OPTION_HEAD..], go);
    }

    #[test]
    fn requests_for_contexts() {
        let good = [&[0, 0, 0, 1][..], b"x", &[0, 0, 0, 2], &[0, 0, 0, 0], &[0, 0, 0, 5], b"base:"].concat();
        assert_eq!(
            ContextRequest::parse(&good),
            Ok(ContextRequest { name: b"x", queries: vec![b"", b"base:"] })
        );
        for cut in 0..good.len() {
            assert!(ContextRequest::parse(&good[..cut]).is_err(), "{cut}");
        }
        let absurd = [&[0, 0, 0, 0][..], &[0xff, 0xff, 0xff, 0xff]].concat();
        assert!(ContextRequest::parse(&absurd).is_err(), "4 thousand million queries");
    }

    #[test]
    fn a_greeting_has_its_magics_and_flags() {
        assert_eq!(&greeting(), b"NBDMAGICIHAVEOPT\0\x03");
        assert_eq!(export_name_reply(1, 2, true).len(), 134);
        assert_eq!(export_name_reply(1, 2, false), [0, 0, 0, 0, 0, 0, 0, 1, 0, 2]);
        assert_eq!(reply(OptionKind::Go, Reply::Ack, b"")[..8], [0, 3, 0xe8, 0x89, 4, 0x55, 0x65, 0xa9]);
    }
}
