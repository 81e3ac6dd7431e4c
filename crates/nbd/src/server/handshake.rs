//! What a client and the server agree on before requests.

use std::io;
use std::time::Instant;

use super::contexts::Context;
use super::export::Export;
use crate::incoming::Incoming;
use crate::protocol::Malformed;
use crate::protocol::handshake::{
    ContextRequest, ExportRequest, FIXED_NEWSTYLE, Info, NO_ZEROES, OPTION_HEAD, OptionHead, OptionKind,
    Reply, block_size_data, context_data, export_data, export_name_reply, greeting, reply, server_data,
    text_data,
};
use crate::transport::{Transport, write_all};

/// What requests are about, and how they are answered.
pub(super) struct Agreed<'a> {
    pub(super) export: &'a Export,
    /// Size that the client was told.
    pub(super) size: u64,
    /// Replies in chunks.
    pub(super) structured: bool,
    /// And headers extended.
    pub(super) extended: bool,
    /// What `BLOCK_STATUS` tells of.
    pub(super) contexts: Vec<Context>,
}

/// The handshake of one client.
pub(super) struct Handshake<'a, 'i> {
    pub(super) transport: &'i dyn Transport,
    pub(super) incoming: &'i mut Incoming,
    pub(super) exports: &'a [Export],
    /// There can be more than one client.
    pub(super) several: bool,
    pub(super) deadline: Option<Instant>,
    /// TLS has begun.
    pub(super) encrypted: bool,
    pub(super) structured: bool,
    pub(super) extended: bool,
    /// Number of the export that contexts were chosen for, and which.
    pub(super) contexts: Option<(usize, Vec<Context>)>,
}

/// What a client says of itself before its options.
#[derive(Clone, Copy)]
pub(super) struct Greeted {
    /// It knows of answers to options.
    fixed: bool,
    /// It waits for zeroes behind the answer to `EXPORT_NAME`.
    zeroes: bool,
}

/// How an option ends the handshake.
enum Turn<'a> {
    GoesOn,
    Begins(Agreed<'a>),
    Ends,
}

impl<'a> Handshake<'a, '_> {
    /// Greets. Nothing where the client says what no client says.
    pub(super) fn greet(&mut self) -> io::Result<Option<Greeted>> {
        self.send(&greeting())?;
        let mut flags = [0; 4];
        self.receive(&mut flags)?;
        let flags = u32::from_be_bytes(flags);
        let known = u32::from(FIXED_NEWSTYLE | NO_ZEROES);
        if flags & !known != 0 {
            return Ok(None);
        }
        let fixed = flags & u32::from(FIXED_NEWSTYLE) != 0;
        let zeroes = flags & u32::from(NO_ZEROES) == 0;
        Ok(Some(Greeted { fixed, zeroes }))
    }

    /// The next option and its data. Nothing where the client says what no client says.
    fn next(&mut self, greeted: Greeted) -> io::Result<Option<(OptionKind, Vec<u8>)>> {
        let mut head = [0; OPTION_HEAD];
        self.receive(&mut head)?;
        let Ok(OptionHead { kind, length }) = OptionHead::parse(&head) else { return Ok(None) };
        // Who does not know the fixed handshake knows of no answers to options.
        if !greeted.fixed && kind != OptionKind::ExportName {
            return Ok(None);
        }
        let mut data = vec![0; length as usize];
        self.receive(&mut data)?;
        Ok(Some((kind, data)))
    }

    /// Refuses every option until the client asks for TLS. False where it goes without.
    pub(super) fn until_tls(&mut self, greeted: Greeted) -> io::Result<bool> {
        while let Some((kind, data)) = self.next(greeted)? {
            match kind {
                OptionKind::StartTls if data.is_empty() => {
                    // The client says nothing before the answer: what is there already, somebody else has put there.
                    let alone = !self.incoming.has_more();
                    if alone {
                        self.answer(kind, Reply::Ack, b"")?;
                    }
                    return Ok(alone);
                }
                OptionKind::StartTls => {
                    self.answer(kind, Reply::ErrInvalid, b"the option takes no data")?;
                }
                OptionKind::Abort => {
                    self.answer(kind, Reply::Ack, b"")?;
                    return Ok(false);
                }
                // There is no answer that could refuse.
                OptionKind::ExportName => return Ok(false),
                _ => self.answer(kind, Reply::ErrTlsReqd, b"the server wants TLS before anything else")?,
            }
        }
        Ok(false)
    }

    /// Answers options. Nothing where the client does not want to begin, or says what no client says.
    pub(super) fn run(mut self, greeted: Greeted) -> io::Result<Option<Agreed<'a>>> {
        while let Some((kind, data)) = self.next(greeted)? {
            match self.option(kind, &data, greeted.zeroes)? {
                Turn::GoesOn => {}
                Turn::Begins(agreed) => return Ok(Some(agreed)),
                Turn::Ends => return Ok(None),
            }
        }
        Ok(None)
    }

    fn option(&mut self, kind: OptionKind, data: &[u8], zeroes: bool) -> io::Result<Turn<'a>> {
        let empty = data.is_empty();
        match kind {
            OptionKind::ExportName => return self.export_name(data, zeroes),
            OptionKind::Go | OptionKind::Info => return self.export(kind, data),
            OptionKind::Abort => {
                self.answer(kind, Reply::Ack, b"")?;
                return Ok(Turn::Ends);
            }
            OptionKind::List | OptionKind::StructuredReply | OptionKind::ExtendedHeaders if !empty => {
                self.answer(kind, Reply::ErrInvalid, b"the option takes no data")?;
            }
            OptionKind::List => self.list()?,
            OptionKind::ExtendedHeaders if self.extended => {
                self.answer(kind, Reply::ErrInvalid, b"headers are extended already")?;
            }
            OptionKind::ExtendedHeaders => {
                (self.structured, self.extended) = (true, true);
                self.answer(kind, Reply::Ack, b"")?;
            }
            OptionKind::StructuredReply if self.extended => {
                self.answer(kind, Reply::ErrExtHeaderReqd, b"headers are extended already")?;
            }
            OptionKind::StructuredReply => {
                self.structured = true;
                self.answer(kind, Reply::Ack, b"")?;
            }
            OptionKind::ListMetaContext | OptionKind::SetMetaContext => self.meta_context(kind, data)?,
            OptionKind::StartTls if self.encrypted => {
                self.answer(kind, Reply::ErrInvalid, b"TLS has begun already")?;
            }
            OptionKind::StartTls | OptionKind::Unknown(_) => {
                self.answer(kind, Reply::ErrUnsup, b"the option is not supported")?;
            }
        }
        Ok(Turn::GoesOn)
    }

    fn find(&self, name: &[u8]) -> Option<(usize, &'a Export)> {
        self.exports.iter().enumerate().find(|(_, export)| export.name == name)
    }

    /// Begins, or ends: there is no answer that could refuse.
    fn export_name(&mut self, name: &[u8], zeroes: bool) -> io::Result<Turn<'a>> {
        let Some((index, export)) = self.find(name) else { return Ok(Turn::Ends) };
        let size = export.size();
        self.send(&export_name_reply(size, export.flags(self.structured, self.several), zeroes))?;
        Ok(Turn::Begins(self.agreed(index, export, size)))
    }

    fn agreed(&mut self, index: usize, export: &'a Export, size: u64) -> Agreed<'a> {
        // Those of another export mean nothing here.
        let contexts = self.contexts.take().filter(|(of, _)| *of == index && self.structured);
        let contexts = contexts.map(|(_, contexts)| contexts).unwrap_or_default();
        Agreed { export, size, structured: self.structured, extended: self.extended, contexts }
    }

    fn list(&mut self) -> io::Result<()> {
        for export in self.exports {
            self.answer(OptionKind::List, Reply::Server, &server_data(&export.name, &export.description))?;
        }
        self.answer(OptionKind::List, Reply::Ack, b"")
    }

    fn export(&mut self, kind: OptionKind, data: &[u8]) -> io::Result<Turn<'a>> {
        let request = match ExportRequest::parse(data) {
            Ok(request) => request,
            Err(Malformed(what)) => return self.refuse(kind, Reply::ErrInvalid, what),
        };
        let Some((index, export)) = self.find(request.name) else {
            return self.refuse(kind, Reply::ErrUnknown, "there is no export of this name");
        };
        if request.wants_name {
            self.answer(kind, Reply::Info, &text_data(Info::Name, &export.name))?;
        }
        if !export.description.is_empty() {
            self.answer(kind, Reply::Info, &text_data(Info::Description, &export.description))?;
        }
        self.answer(kind, Reply::Info, &block_size_data(export.preferred_size()))?;
        let size = export.size();
        let flags = export.flags(self.structured, self.several);
        self.answer(kind, Reply::Info, &export_data(size, flags))?;
        self.answer(kind, Reply::Ack, b"")?;
        if kind == OptionKind::Info {
            return Ok(Turn::GoesOn);
        }
        Ok(Turn::Begins(self.agreed(index, export, size)))
    }

    fn meta_context(&mut self, kind: OptionKind, data: &[u8]) -> io::Result<()> {
        let listing = kind == OptionKind::ListMetaContext;
        if !listing {
            self.contexts = None;
        }
        if !listing && !self.structured {
            let why = "contexts need structured replies, which were not asked for";
            return self.refuse(kind, Reply::ErrInvalid, why).map(drop);
        }
        let request = match ContextRequest::parse(data) {
            Ok(request) => request,
            Err(Malformed(what)) => return self.refuse(kind, Reply::ErrInvalid, what).map(drop),
        };
        let Some((index, export)) = self.find(request.name) else {
            return self.refuse(kind, Reply::ErrUnknown, "there is no export of this name").map(drop);
        };
        let all = listing && request.queries.is_empty();
        let meant = |context: &Context| {
            all || request.queries.iter().any(|query| context.is_meant_by(query, listing, export))
        };
        let chosen: Vec<Context> = Context::of(export).filter(meant).collect();
        for context in &chosen {
            let id = if listing { 0 } else { context.id() };
            self.answer(kind, Reply::MetaContext, &context_data(id, &context.name(export)))?;
        }
        self.answer(kind, Reply::Ack, b"")?;
        if !listing {
            self.contexts = Some((index, chosen));
        }
        Ok(())
    }

    fn refuse(&self, kind: OptionKind, with: Reply, why: &str) -> io::Result<Turn<'a>> {
        self.answer(kind, with, why.as_bytes())?;
        Ok(Turn::GoesOn)
    }

    fn answer(&self, kind: OptionKind, with: Reply, data: &[u8]) -> io::Result<()> {
        self.send(&reply(kind, with, data))
    }

    fn send(&self, bytes: &[u8]) -> io::Result<()> {
        write_all(self.transport, &[bytes], self.deadline)
    }

    fn receive(&mut self, to: &mut [u8]) -> io::Result<()> {
        self.incoming.read_exact(self.transport, to, self.deadline)
    }
}
