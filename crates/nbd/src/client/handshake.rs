//! What a client and a server agree on before requests, from the client's side.

use std::io;

use qcow2_core::{Error, ErrorKind, Result};

use super::connect::{Watched, is_late};
use crate::incoming::Incoming;
use crate::protocol::Malformed;
use crate::protocol::answers::{
    ANSWER_HEAD, Answer, AnswerHead, BlockSizes, ExportInfo, Refusal, parse_context, parse_export,
    parse_server,
};
use crate::protocol::handshake::{
    FIXED_NEWSTYLE, GREETING_MAGIC, Info, NO_ZEROES, OPTION_MAGIC, OptionKind, context_request,
    export_request, option,
};
use crate::transport::write_all;

/// What a server of the oldest kind says where a server of today says which options it takes.
const OLDSTYLE_MAGIC: u64 = 0x0000_4202_8186_1253;

/// The context that tells of holes and zeroes.
const ALLOCATION: &[u8] = b"base:allocation";

/// Answers to one option, beside exports: no server has so much to say.
const MAX_ANSWERS: usize = 256;

/// Exports of a server that are listed.
pub const MAX_EXPORTS: usize = 10_000;

/// Characters of a server's own words in a message.
const MOST_WORDS: usize = 200;

/// What requests are about, and how they are made and answered.
#[derive(Debug, Clone, Copy)]
pub(super) struct Agreed {
    /// Size of the export in bytes.
    pub(super) size: u64,
    /// Transmission flags.
    pub(super) flags: u16,
    pub(super) blocks: BlockSizes,
    /// Replies in chunks.
    pub(super) structured: bool,
    /// And headers extended.
    pub(super) extended: bool,
    /// The number of `base:allocation`.
    pub(super) allocation: Option<u32>,
}

/// An export, as a server describes it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Listed {
    /// Its name.
    pub name: Vec<u8>,
    /// What it is, for a person.
    pub description: Vec<u8>,
    /// Size in bytes, and transmission flags, where the server tells.
    pub export: Option<(u64, u16)>,
    /// Sizes of requests, where it tells.
    pub blocks: Option<BlockSizes>,
    /// Names of its contexts.
    pub contexts: Vec<Vec<u8>>,
    /// Lengths of requests can have 64 bits: extended headers.
    pub extended: bool,
}

/// The handshake with one server.
pub(super) struct Handshake<'a> {
    transport: &'a Watched<'a>,
    incoming: &'a mut Incoming,
    no_zeroes: bool,
}

/// One answer, and its data.
struct Answered {
    answer: Answer,
    data: Vec<u8>,
}

/// The error of a server that does not keep to the protocol.
fn broken(why: Malformed) -> Error {
    let message = format!("the server broke the NBD protocol: {}", why.0);
    Error::io(io::Error::new(io::ErrorKind::InvalidData, message), "NBD handshake")
}

impl<'a> Handshake<'a> {
    /// Greets the server.
    pub(super) fn begin(transport: &'a Watched<'a>, incoming: &'a mut Incoming) -> Result<Self> {
        let mut this = Self { transport, incoming, no_zeroes: false };
        if this.u64()? != GREETING_MAGIC {
            return Err(broken(Malformed("it does not greet as an NBD server does")));
        }
        match this.u64()? {
            OPTION_MAGIC => {}
            OLDSTYLE_MAGIC => return Err(too_old("it speaks the oldstyle protocol")),
            _ => return Err(broken(Malformed("it does not greet as an NBD server does"))),
        }
        let mut flags = [0; 2];
        this.receive(&mut flags)?;
        let offered = u16::from_be_bytes(flags);
        if offered & FIXED_NEWSTYLE == 0 {
            return Err(too_old("its newstyle protocol is not the fixed one"));
        }
        this.no_zeroes = offered & NO_ZEROES != 0;
        this.send(&u32::from(offered & (FIXED_NEWSTYLE | NO_ZEROES)).to_be_bytes())?;
        Ok(this)
    }

    /// Goes on over another transport behind which the same server is.
    pub(super) fn go_on(transport: &'a Watched<'a>, incoming: &'a mut Incoming, no_zeroes: bool) -> Self {
        Self { transport, incoming, no_zeroes }
    }

    /// Asks for TLS, with which the server goes on then. Tells how [`Handshake::go_on`].
    pub(super) fn start_tls(mut self) -> Result<bool> {
        if let Err((refusal, words)) = self.ask(OptionKind::StartTls, b"", |_| Ok(()))? {
            self.leave();
            return Err(refused(OptionKind::StartTls, b"", refusal, &words));
        }
        // It says nothing more in clear: what is there already, somebody else has put there.
        if self.incoming.has_more() {
            return Err(broken(Malformed("it goes on in clear where TLS begins")));
        }
        Ok(self.no_zeroes)
    }

    /// Begins with an export.
    pub(super) fn go(mut self, name: &[u8]) -> Result<Agreed> {
        let (extended, structured) = self.headers()?;
        let allocation = if structured { self.choose_allocation(name)? } else { None };
        let mut listed = Listed::default();
        let asked = export_request(name, &[Info::BlockSize]);
        let gone = self.ask(OptionKind::Go, &asked, |answered| listed.take(answered))?;
        let blocks = listed.blocks.unwrap_or(BlockSizes::DEFAULT);
        let (size, flags) = match gone {
            Ok(()) => listed
                .export
                .ok_or_else(|| broken(Malformed("it begins without telling the export's size")))?,
            Err((Refusal::Unsupported, _)) => self.export_name(name)?,
            Err((refusal, words)) => {
                self.leave();
                return Err(refused(OptionKind::Go, name, refusal, &words));
            }
        };
        Ok(Agreed { size, flags, blocks, structured, extended, allocation })
    }

    /// Asks for extended headers, else for replies in chunks, which come with them.
    fn headers(&mut self) -> Result<(bool, bool)> {
        let extended = self.ask(OptionKind::ExtendedHeaders, b"", |_| Ok(()))?.is_ok();
        let structured = extended || self.ask(OptionKind::StructuredReply, b"", |_| Ok(()))?.is_ok();
        Ok((extended, structured))
    }

    fn choose_allocation(&mut self, name: &[u8]) -> Result<Option<u32>> {
        let asked = context_request(name, &[ALLOCATION]);
        let mut found = None;
        let chosen = self.ask(OptionKind::SetMetaContext, &asked, |answered| {
            if answered.answer == Answer::MetaContext {
                let (number, name) = parse_context(&answered.data)?;
                if name != ALLOCATION || found.replace(number).is_some() {
                    return Err(Malformed("it chose a context that was not asked for"));
                }
            }
            Ok(())
        })?;
        Ok(found.filter(|_| chosen.is_ok()))
    }

    /// Begins as with servers that know no better: one that refuses can only close.
    fn export_name(&mut self, name: &[u8]) -> Result<(u64, u16)> {
        self.send(&option(OptionKind::ExportName, name))?;
        let mut bytes = [0; 10];
        self.receive(&mut bytes).map_err(|error| match error.kind() {
            ErrorKind::Io if !is_timeout(&error) => {
                refused(OptionKind::ExportName, name, Refusal::Unknown, "")
            }
            _ => error,
        })?;
        if !self.no_zeroes {
            self.receive(&mut [0; 124])?;
        }
        parse_export(&bytes).map_err(broken)
    }

    /// All exports, and what the server tells of them.
    pub(super) fn list(mut self) -> Result<Vec<Listed>> {
        let mut exports: Vec<Listed> = Vec::new();
        let answered = self.ask_for(OptionKind::List, b"", MAX_EXPORTS, |answered| {
            if answered.answer == Answer::Server {
                let (name, description) = parse_server(&answered.data)?;
                let (name, description) = (name.to_vec(), description.to_vec());
                exports.push(Listed { name, description, ..Listed::default() });
            }
            Ok(())
        })?;
        answered.map_err(|(refusal, words)| refused(OptionKind::List, b"", refusal, &words))?;
        // Contexts are told of only where replies come in chunks.
        let (extended, structured) = self.headers()?;
        for export in &mut exports {
            export.extended = extended;
            let asked = export_request(&export.name, &[Info::BlockSize, Info::Description]);
            // One that is gone meanwhile, or that the server does not describe, has a name all the same.
            let _told = self.ask(OptionKind::Info, &asked, |answered| export.take(answered))?;
            if structured {
                let asked = context_request(&export.name, &[]);
                let _told = self.ask(OptionKind::ListMetaContext, &asked, |answered| {
                    if answered.answer == Answer::MetaContext {
                        export.contexts.push(parse_context(&answered.data)?.1.to_vec());
                    }
                    Ok(())
                })?;
            }
        }
        self.leave();
        Ok(exports)
    }

    /// Says farewell. The server may close before it answers: all is said.
    fn leave(&self) {
        let _gone = self.send(&option(OptionKind::Abort, b""));
    }

    fn ask(
        &mut self,
        kind: OptionKind,
        data: &[u8],
        take: impl FnMut(&Answered) -> Result<(), Malformed>,
    ) -> Result<Result<(), (Refusal, String)>> {
        self.ask_for(kind, data, MAX_ANSWERS, take)
    }

    /// Asks, and hands each answer on until the last. A refusal comes with the server's words.
    fn ask_for(
        &mut self,
        kind: OptionKind,
        data: &[u8],
        most: usize,
        mut take: impl FnMut(&Answered) -> Result<(), Malformed>,
    ) -> Result<Result<(), (Refusal, String)>> {
        self.send(&option(kind, data))?;
        for _ in 0..=most {
            let mut head = [0; ANSWER_HEAD];
            self.receive(&mut head)?;
            let AnswerHead { answer, length } = AnswerHead::parse(&head, kind).map_err(broken)?;
            let mut data = vec![0; length as usize];
            self.receive(&mut data)?;
            match answer {
                Answer::Ack => return Ok(Ok(())),
                Answer::Refused(refusal) => return Ok(Err((refusal, words(&data)))),
                answer => take(&Answered { answer, data }).map_err(broken)?,
            }
        }
        Err(broken(Malformed("its answers to an option have no end")))
    }

    fn u64(&mut self) -> Result<u64> {
        let mut bytes = [0; 8];
        self.receive(&mut bytes)?;
        Ok(u64::from_be_bytes(bytes))
    }

    fn send(&self, bytes: &[u8]) -> Result<()> {
        write_all(self.transport, &[bytes], None).map_err(|error| self.failed(error, "send"))
    }

    fn receive(&mut self, to: &mut [u8]) -> Result<()> {
        self.incoming.read_exact(self.transport, to, None).map_err(|error| self.failed(error, "recv"))
    }

    fn failed(&self, error: io::Error, call: &'static str) -> Error {
        if self.transport.patience.job.is_cancelled() {
            return Error::aborted();
        }
        if error.kind() == io::ErrorKind::UnexpectedEof {
            let message = "the server closed the connection before it began";
            return Error::io(io::Error::new(io::ErrorKind::UnexpectedEof, message), "NBD handshake");
        }
        let late = is_late(&error);
        let error = Error::io(error, call);
        if late { error.because("the server does not answer") } else { error }
    }
}

fn is_timeout(error: &Error) -> bool {
    let source = std::error::Error::source(error).and_then(|error| error.downcast_ref::<io::Error>());
    source.is_some_and(is_late)
}

impl Listed {
    fn take(&mut self, answered: &Answered) -> Result<(), Malformed> {
        if answered.answer != Answer::Info {
            return Ok(());
        }
        match ExportInfo::parse(&answered.data)? {
            ExportInfo::Export(size, flags) => self.export = Some((size, flags)),
            ExportInfo::BlockSizes(sizes) => self.blocks = Some(sizes),
            ExportInfo::Description(text) => self.description = text.to_vec(),
            ExportInfo::Name(_) | ExportInfo::Other => {}
        }
        Ok(())
    }
}

fn too_old(what: &str) -> Error {
    Error::new(ErrorKind::UnsupportedFeature, format!("the server is too old: {what}"))
}

/// The server's words, as a message can show them.
fn words(data: &[u8]) -> String {
    let text = String::from_utf8_lossy(data);
    text.chars().filter(|character| !character.is_control()).take(MOST_WORDS).collect()
}

fn refused(option: OptionKind, name: &[u8], refusal: Refusal, words: &str) -> Error {
    let name = String::from_utf8_lossy(name);
    let said = if words.is_empty() { String::new() } else { format!(" (it says: {words})") };
    let what = match refusal {
        Refusal::Unknown => format!("the server has no export '{name}'"),
        _ if option == OptionKind::StartTls => {
            format!("the server does not begin with TLS: {}", refusal.describe())
        }
        other => other.describe().to_owned(),
    };
    let call = match option {
        OptionKind::List => "NBD_OPT_LIST",
        OptionKind::StartTls => "NBD_OPT_STARTTLS",
        OptionKind::ExportName => "NBD_OPT_EXPORT_NAME",
        _ => "NBD_OPT_GO",
    };
    let kind = match refusal {
        Refusal::Unknown => io::ErrorKind::NotFound,
        Refusal::Policy | Refusal::TlsRequired => io::ErrorKind::PermissionDenied,
        _ => io::ErrorKind::Other,
    };
    Error::io(io::Error::new(kind, format!("{what}{said}")), call)
}
