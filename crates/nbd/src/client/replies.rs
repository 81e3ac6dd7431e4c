//! What a server answers to requests: read by one thread, which fills in the request that each reply is for.

use std::io;

use super::handshake::Agreed;
use crate::incoming::Incoming;
use crate::protocol::answers::{
    EXTENDED_STATUS, ExtendedHead, MAX_STATEMENT, REPLY_HEAD, ReplyHead, Statement,
};
use crate::protocol::transmission::{Command, Descriptor, EXTENDED_CHUNK_HEAD};
use crate::protocol::{Malformed, NbdError};
use crate::transport::Transport;

/// Bytes that are read at once: after each of them the server has been heard.
const PIECE: usize = 64 << 10;

/// The chunk that carries bytes of the disk.
const DATA: u16 = 1;

/// Chunks of one reply that say nothing of the disk: more are no answer.
const MAX_WORDS: u32 = 16;

/// What a request asked for, and what is known of its answer.
#[derive(Debug)]
pub(super) struct Question {
    pub(super) command: Command,
    pub(super) offset: u64,
    pub(super) length: u64,
    /// What was read so far: as long as the request is, from the first bytes of it on.
    data: Vec<u8>,
    /// Bytes of `data` that came.
    came: u64,
    status: Option<Descriptor>,
    error: Option<u32>,
    words: u32,
}

/// How a request was answered.
#[derive(Debug, Default)]
pub(super) struct Answer {
    /// What was read.
    pub(super) data: Vec<u8>,
    /// What the first bytes of the range are.
    pub(super) status: Option<Descriptor>,
}

/// What is wrong with a connection.
#[derive(Debug)]
pub(super) enum Wrong {
    /// It failed.
    Failed(io::Error),
    /// The server does not keep to the protocol.
    Broken(Malformed),
}

impl From<io::Error> for Wrong {
    fn from(error: io::Error) -> Self {
        Self::Failed(error)
    }
}

impl From<Malformed> for Wrong {
    fn from(why: Malformed) -> Self {
        Self::Broken(why)
    }
}

/// Where the reader finds questions, and brings answers.
pub(super) trait Asked {
    /// The question of that cookie, which is nobody else's meanwhile.
    fn take(&self, cookie: u64) -> Option<Question>;
    /// It is not answered yet.
    fn give_back(&self, cookie: u64, question: Question);
    /// It is answered.
    fn answer(&self, cookie: u64, answer: io::Result<Answer>);
    /// The server said something.
    fn heard(&self);
}

impl Question {
    pub(super) fn new(command: Command, offset: u64, length: u64) -> Self {
        Self { command, offset, length, data: Vec::new(), came: 0, status: None, error: None, words: 0 }
    }

    /// The part of the answer for `length` bytes of the disk from `offset` on.
    fn part(&mut self, offset: u64, length: u64) -> Result<&mut [u8], Malformed> {
        const OUTSIDE: Malformed = Malformed("a reply has bytes that were not asked for");
        if self.command != Command::Read || length == 0 {
            return Err(OUTSIDE);
        }
        // What is read at once fits.
        let wanted = usize::try_from(self.length).map_err(|_| OUTSIDE)?;
        let start =
            offset.checked_sub(self.offset).and_then(|start| usize::try_from(start).ok()).ok_or(OUTSIDE)?;
        let long = usize::try_from(length).map_err(|_| OUTSIDE)?;
        let end = start.checked_add(long).filter(|end| *end <= wanted).ok_or(OUTSIDE)?;
        self.came = self.came.checked_add(length).filter(|came| *came <= self.length).ok_or(OUTSIDE)?;
        self.data.resize(wanted, 0);
        self.data.get_mut(start..end).ok_or(OUTSIDE)
    }

    fn say(&mut self, said: Statement, agreed: &Agreed) -> Result<(), Malformed> {
        match said {
            Statement::Hole(offset, length) => self.part(offset, length.into())?.fill(0),
            Statement::Status(context, first) => {
                if self.command != Command::BlockStatus
                    || Some(context) != agreed.allocation
                    || self.status.is_some()
                {
                    return Err(Malformed("a block status was not asked for"));
                }
                self.status = Some(first);
            }
            Statement::Error(error) => {
                self.words += 1;
                self.error.get_or_insert(error);
            }
            Statement::Nothing => self.words += 1,
        }
        if self.words > MAX_WORDS { Err(Malformed("a reply has no end")) } else { Ok(()) }
    }

    fn end(self) -> Result<io::Result<Answer>, Malformed> {
        if let Some(error) = self.error {
            return Ok(Err(error_of(error)));
        }
        match self.command {
            Command::Read if self.came != self.length => Err(Malformed("a reply ends before all was read")),
            Command::BlockStatus if self.status.is_none() => Err(Malformed("a reply has no block status")),
            _ => Ok(Ok(Answer { data: self.data, status: self.status })),
        }
    }
}

/// The system's error for one of NBD's.
fn error_of(error: u32) -> io::Error {
    #[cfg(unix)]
    {
        use rustix::io::Errno;
        let of = |wanted: NbdError| wanted as u32 == error;
        let system = match error {
            _ if of(NbdError::Perm) => Errno::PERM,
            _ if of(NbdError::NoMem) => Errno::NOMEM,
            _ if of(NbdError::Inval) => Errno::INVAL,
            _ if of(NbdError::NoSpc) => Errno::NOSPC,
            _ if of(NbdError::Overflow) => Errno::OVERFLOW,
            _ if of(NbdError::NotSup) => Errno::NOTSUP,
            _ if of(NbdError::Shutdown) => Errno::SHUTDOWN,
            _ => Errno::IO,
        };
        system.into()
    }
    #[cfg(not(unix))]
    {
        use io::ErrorKind::{InvalidInput, OutOfMemory, PermissionDenied, StorageFull, Unsupported};
        let of = |wanted: NbdError| wanted as u32 == error;
        let kind = match error {
            _ if of(NbdError::Perm) => PermissionDenied,
            _ if of(NbdError::NoMem) => OutOfMemory,
            _ if of(NbdError::Inval) | of(NbdError::Overflow) => InvalidInput,
            _ if of(NbdError::NoSpc) => StorageFull,
            _ if of(NbdError::NotSup) => Unsupported,
            _ => io::ErrorKind::Other,
        };
        io::Error::new(kind, format!("the server reports error {error}"))
    }
}

/// Reads one reply, or one chunk of one.
pub(super) fn read_reply(
    incoming: &mut Incoming,
    transport: &dyn Transport,
    agreed: &Agreed,
    asked: &dyn Asked,
) -> Result<(), Wrong> {
    const UNKNOWN: Malformed = Malformed("it answers a request that was not made");
    if agreed.extended {
        let mut head = [0; EXTENDED_CHUNK_HEAD];
        incoming.read_exact(transport, &mut head, None)?;
        asked.heard();
        let ExtendedHead { done, kind, cookie, offset, length } = ExtendedHead::parse(&head)?;
        let mut question = asked.take(cookie).ok_or(UNKNOWN)?;
        let read = if offset == question.offset {
            chunk(&mut question, kind, length, incoming, transport, agreed, asked)
        } else {
            Err(Malformed("a reply names another offset than the request").into())
        };
        return finish(cookie, question, done, read, asked);
    }
    let mut head = [0; REPLY_HEAD];
    incoming.read_exact(transport, &mut head, None)?;
    asked.heard();
    match ReplyHead::parse(&head)? {
        ReplyHead::Simple(error, cookie) => {
            let mut question = asked.take(cookie).ok_or(UNKNOWN)?;
            let read = simple(&mut question, error, incoming, transport, agreed, asked);
            finish(cookie, question, true, read, asked)
        }
        ReplyHead::Chunk { .. } if !agreed.structured => {
            Err(Malformed("a reply comes in chunks, which was not agreed on").into())
        }
        ReplyHead::Chunk { done, kind, cookie } => {
            let mut question = asked.take(cookie).ok_or(UNKNOWN)?;
            let read = chunk_length(incoming, transport)
                .and_then(|length| chunk(&mut question, kind, length, incoming, transport, agreed, asked));
            finish(cookie, question, done, read, asked)
        }
    }
}

/// Whatever became of a part of the answer, the question is somebody's again.
fn finish(
    cookie: u64,
    question: Question,
    done: bool,
    read: Result<(), Wrong>,
    asked: &dyn Asked,
) -> Result<(), Wrong> {
    if read.is_err() || !done {
        asked.give_back(cookie, question);
        return read;
    }
    // What is answered in part only is answered by the end of the connection.
    let again = Question::new(question.command, question.offset, question.length);
    match question.end() {
        Ok(answer) => asked.answer(cookie, answer),
        Err(why) => {
            asked.give_back(cookie, again);
            return Err(why.into());
        }
    }
    Ok(())
}

fn simple(
    question: &mut Question,
    error: u32,
    incoming: &mut Incoming,
    transport: &dyn Transport,
    agreed: &Agreed,
    asked: &dyn Asked,
) -> Result<(), Wrong> {
    if error != 0 {
        question.error = Some(error);
        return Ok(());
    }
    if question.command != Command::Read {
        return Ok(());
    }
    if agreed.structured {
        return Err(Malformed("what was read does not come in chunks, as was agreed on").into());
    }
    let (offset, length) = (question.offset, question.length);
    fill(question.part(offset, length)?, incoming, transport, asked)
}

fn chunk_length(incoming: &mut Incoming, transport: &dyn Transport) -> Result<u64, Wrong> {
    let mut length = [0; 4];
    incoming.read_exact(transport, &mut length, None)?;
    Ok(u32::from_be_bytes(length).into())
}

fn chunk(
    question: &mut Question,
    kind: u16,
    length: u64,
    incoming: &mut Incoming,
    transport: &dyn Transport,
    agreed: &Agreed,
    asked: &dyn Asked,
) -> Result<(), Wrong> {
    if kind == DATA {
        let mut offset = [0; 8];
        let data = length.checked_sub(8).ok_or(Malformed("a chunk of data is too short"))?;
        incoming.read_exact(transport, &mut offset, None)?;
        return fill(question.part(u64::from_be_bytes(offset), data)?, incoming, transport, asked);
    }
    if kind == EXTENDED_STATUS && !agreed.extended {
        return Err(Malformed("a block status is extended, which was not agreed on").into());
    }
    if length > MAX_STATEMENT.into() {
        return Err(Malformed("a chunk of a reply is too long").into());
    }
    let mut data = vec![0; length as usize];
    incoming.read_exact(transport, &mut data, None)?;
    Ok(question.say(Statement::parse(kind, &data)?, agreed)?)
}

/// Reads what was asked for, a piece at a time.
fn fill(
    to: &mut [u8],
    incoming: &mut Incoming,
    transport: &dyn Transport,
    asked: &dyn Asked,
) -> Result<(), Wrong> {
    for piece in to.chunks_mut(PIECE) {
        incoming.read_exact(transport, piece, None)?;
        asked.heard();
    }
    Ok(())
}
