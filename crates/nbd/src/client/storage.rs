//! An export as a file: a device of the size that it has.

use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use qcow2_core::storage::{Identity, Operation, ReadTransfer, Run, Traits, WriteTransfer, no_space};
use qcow2_core::{Error, ErrorKind, Job, Mem, MemMut, ReadStorage, Result, Storage};

use super::connection::{Connection, Ticket, Times, Way};
use super::link::{Again, Link};
use super::uri::{Location, Place};
use crate::protocol::answers::BlockSizes;
use crate::protocol::transmission::Command;
use crate::protocol::{MAX_PAYLOAD, allocation, command_flags, export_flags};
use crate::transport::Transport;

/// The kind of an export's identity, and QEMU's name of the protocol.
pub const PROTOCOL: &str = "nbd";

/// Bytes of one request that reads or writes, at most: several of them are under way at once.
const PIECE: u32 = 2 << 20;

/// Bytes that are asked about at once, or trimmed, where lengths have 32 bits: as many as 31 bits have.
const SPAN: u64 = 1 << 30;

/// The same where lengths have 64 bits.
const LONG_SPAN: u64 = 1 << 62;

/// Bytes that become zero at once where lengths have 64 bits: a server that writes them is silent meanwhile.
const LONG_ZEROES: u64 = 8 << 30;

/// An export of a server. Nobody changes its size from here, so it is a device; what it demands of the alignment of requests is in its
/// traits ([`qcow2_core::storage::DirectStorage`] takes any).
pub struct NbdStorage {
    link: Link,
    /// What it can do: transmission flags. These and what follows are the same on every connection.
    flags: u16,
    blocks: BlockSizes,
    /// Its URI, for messages.
    name: PathBuf,
    /// None behind a transport of the caller's.
    identity: Option<Identity>,
    writable: bool,
    size: u64,
}

impl std::fmt::Debug for NbdStorage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NbdStorage").field("name", &self.name).field("size", &self.size).finish()
    }
}

impl NbdStorage {
    /// Connects to an export, for reading, or for writing too. Cancelling the job ends the attempt, and what waits for an answer later. A
    /// connection that is lost is made again where the way says so: requests that were not answered are made once more on the new one. What
    /// the server had answered to and not made durable is the server's to keep.
    ///
    /// # Errors
    /// Those of [`Connection::open`]; `ReadOnly` to write to an export that takes no writes.
    pub fn open(location: &Location, writable: bool, way: impl Into<Way>, job: &Arc<Job>) -> Result<Self> {
        let way = way.into();
        let connection = Connection::open(location, &way, job)?;
        let name = PathBuf::from(location.to_string());
        if writable && connection.flags() & export_flags::READ_ONLY != 0 {
            return Err(
                Error::new(ErrorKind::ReadOnly, "the server exports it for reading only").with_path(name)
            );
        }
        let (reconnects, identity) = (!way.reconnect.is_zero(), identity(location));
        let (location, job) = (location.clone(), Arc::clone(job));
        let again = reconnects.then(|| Again { location, way, job, gone: AtomicBool::new(false) });
        Ok(Self::new(connection, again, name, Some(identity), writable))
    }

    /// The default export of a server behind a transport of the caller's, whose calls end by themselves; for writing, too, where it takes
    /// writes.
    ///
    /// # Errors
    /// Those of [`Connection::begin`].
    pub fn begin(transport: Box<dyn Transport>, times: Times) -> Result<Self> {
        let connection = Connection::begin(transport, times)?;
        let writable = connection.flags() & export_flags::READ_ONLY == 0;
        Ok(Self::new(connection, None, PathBuf::new(), None, writable))
    }

    fn new(
        connection: Connection,
        again: Option<Again>,
        name: PathBuf,
        identity: Option<Identity>,
        writable: bool,
    ) -> Self {
        let (flags, blocks) = (connection.flags(), connection.block_sizes());
        // What lies behind the last whole block cannot be reached.
        let size = down(connection.size(), blocks.minimum);
        Self { link: Link::new(connection, again), flags, blocks, name, identity, writable, size }
    }

    /// The connection that there is, to end it.
    pub fn connection(&self) -> Arc<Connection> {
        self.link.current()
    }

    fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }

    /// Bytes of one request with as many bytes of payload, at most.
    fn piece(&self) -> u64 {
        let sizes = self.blocks;
        let most = sizes.maximum.min(MAX_PAYLOAD).min(PIECE);
        down(most.into(), sizes.minimum).max(sizes.minimum.into())
    }

    /// Bytes of one request without payload, at most.
    fn span(&self, connection: &Connection) -> u64 {
        down(if connection.takes_long() { LONG_SPAN } else { SPAN }, self.blocks.minimum)
    }

    /// Where a server cannot flush, each write is durable by itself, if it can do that.
    fn durable(&self) -> u16 {
        let each = !self.has(export_flags::SEND_FLUSH) && self.has(export_flags::SEND_FUA);
        if each { command_flags::FUA } else { 0 }
    }

    /// How much of `length` bytes at `offset` is there.
    fn inside(&self, offset: u64, length: u64) -> u64 {
        length.min(self.size.saturating_sub(offset))
    }

    fn refuse_writes(&self) -> io::Result<()> {
        if self.writable { Ok(()) } else { Err(io::ErrorKind::ReadOnlyFilesystem.into()) }
    }

    /// The end of a range to write to, which is there.
    fn end_of(&self, offset: u64, length: u64) -> io::Result<u64> {
        self.refuse_writes()?;
        let end = offset.checked_add(length).ok_or(io::ErrorKind::InvalidInput)?;
        if end > self.size { Err(no_space()) } else { Ok(end) }
    }

    /// Asks for a range, a piece after the other; for the beginning of one that has more than `most` pieces, since the connection
    /// holds what came until it is collected.
    fn ask(
        &self,
        connection: &Connection,
        offset: u64,
        length: usize,
        most: usize,
    ) -> Vec<io::Result<Ticket>> {
        let length = (length as u64).min(self.piece() * most as u64);
        let end = offset.saturating_add(self.inside(offset, length));
        let read = |at: u64, length: u64| connection.send(0, Command::Read, at, length, &[]);
        pieces(offset, end, self.piece()).map(|(at, length)| read(at, length)).collect()
    }

    /// Sends what is written at `offset`, a piece after the other.
    fn put(&self, connection: &Connection, bufs: &[Mem<'_>], offset: u64) -> Vec<(u64, io::Result<Ticket>)> {
        let length: u64 = bufs.iter().map(|buf| buf.len() as u64).sum();
        let end = offset.saturating_add(self.inside(offset, length));
        let write = |(at, length): (u64, u64)| {
            let payload = part(bufs, at - offset, length as usize);
            (length, connection.send(self.durable(), Command::Write, at, length, &payload))
        };
        pieces(offset, end, self.piece()).map(write).collect()
    }

    /// What a range that begins inside is.
    fn run_on(&self, connection: &Connection, range: Range<u64>) -> io::Result<Run> {
        if !connection.tells_status() {
            return Ok(Run::new(self.size, true));
        }
        let minimum = self.blocks.minimum;
        let start = down(range.start, minimum);
        let behind = range.end.min(self.size).checked_next_multiple_of(minimum.into()).unwrap_or(self.size);
        let length = behind.min(self.size).saturating_sub(start).min(self.span(connection));
        let flags = command_flags::REQ_ONE;
        let asked = connection.send(flags, Command::BlockStatus, start, length, &[])?;
        let Some(found) = connection.wait(asked)?.status else {
            return Ok(Run::new(self.size, true));
        };
        // It may end behind what was asked for, and the disk; before where it was asked from it says nothing.
        let end = start.saturating_add(found.length).clamp(range.start + 1, self.size);
        // What is a hole and not zero could be anything: it is read.
        let data = found.status & allocation::ZERO == 0;
        Ok(Run { end, data, space: data || found.status & allocation::HOLE == 0 })
    }

    /// A write that can begin.
    fn check_write(&self, bufs: &[Mem<'_>], offset: u64) -> io::Result<bool> {
        self.refuse_writes()?;
        let length: usize = bufs.iter().map(Mem::len).sum();
        if length > 0 && offset >= self.size {
            return Err(no_space());
        }
        Ok(length > 0)
    }

    /// Does a command without payload on a range.
    fn each(
        &self,
        flags: u16,
        command: Command,
        range: Range<u64>,
        most: impl Fn(&Connection) -> u64,
    ) -> io::Result<()> {
        self.link.run(|connection| each(connection, flags, command, range.clone(), most(connection)))
    }
}

/// Fills `buf` with what was asked for; how many bytes came before the first failure, or that.
fn collect(
    connection: &Connection,
    asked: Vec<io::Result<Ticket>>,
    mut buf: MemMut<'_>,
) -> io::Result<usize> {
    let (mut got, mut failure) = (0, None);
    for ticket in asked {
        // All are waited for: their answers come in any case.
        match ticket.and_then(|ticket| connection.wait(ticket)) {
            Ok(answer) if failure.is_none() => {
                got += buf.take_front(answer.data.len()).copy_from(&answer.data);
            }
            Ok(_) => {}
            Err(error) => failure = failure.or(Some(error)),
        }
    }
    match failure {
        Some(error) if got == 0 => Err(error),
        _ => Ok(got),
    }
}

/// Waits for what was sent; how many bytes were written before the first failure, or that.
fn written(connection: &Connection, sent: Vec<(u64, io::Result<Ticket>)>) -> io::Result<usize> {
    let (mut done, mut failure) = (0, None);
    for (length, ticket) in sent {
        match ticket.and_then(|ticket| connection.wait(ticket)) {
            Ok(_) if failure.is_none() => done += length as usize,
            Ok(_) => {}
            Err(error) => failure = failure.or(Some(error)),
        }
    }
    match failure {
        Some(error) if done == 0 => Err(error),
        _ => Ok(done),
    }
}

/// Does a command without payload on a range.
fn each(
    connection: &Connection,
    flags: u16,
    command: Command,
    range: Range<u64>,
    most: u64,
) -> io::Result<()> {
    let send = |(at, length): (u64, u64)| connection.send(flags, command, at, length, &[]);
    // So many at once: all of a large disk would be a long list.
    let mut rest = pieces(range.start, range.end, most).peekable();
    while rest.peek().is_some() {
        let sent: Vec<_> = rest.by_ref().take(super::MAX_IN_FLIGHT).map(send).collect();
        let waited: Vec<_> =
            sent.into_iter().map(|ticket| ticket.and_then(|ticket| connection.wait(ticket))).collect();
        waited.into_iter().try_for_each(|done| done.map(drop))?;
    }
    Ok(())
}

/// Equal ones are the same export. A socket is told apart by its path from the root.
fn identity(location: &Location) -> Identity {
    let place = match &location.place {
        Place::Unix(path) => Place::Unix(std::path::absolute(path).unwrap_or_else(|_| path.clone())),
        tcp @ Place::Tcp { .. } => tcp.clone(),
    };
    Identity::new(PROTOCOL, &Location { place, export: location.export.clone() }.to_string())
}

fn down(value: u64, multiple: u32) -> u64 {
    value - value % u64::from(multiple.max(1))
}

/// Offsets and lengths of pieces of a range, which are multiples of `most` apart.
fn pieces(start: u64, end: u64, most: u64) -> impl Iterator<Item = (u64, u64)> {
    let mut at = start;
    std::iter::from_fn(move || {
        let length = end.saturating_sub(at).min(most);
        let piece = (at, length);
        at += length;
        (length > 0).then_some(piece)
    })
}

/// `length` bytes of what is in `bufs` behind the first `skip`.
fn part<'a>(bufs: &[Mem<'a>], skip: u64, length: usize) -> Vec<Mem<'a>> {
    let (mut skip, mut left) = (usize::try_from(skip).unwrap_or(usize::MAX), length);
    let mut taken = Vec::new();
    for buf in bufs {
        let (skipped, rest) = buf.split_at(skip);
        skip -= skipped.len();
        let (own, _) = rest.split_at(left);
        left -= own.len();
        if !own.is_empty() {
            taken.push(own);
        }
    }
    taken
}

impl ReadStorage for NbdStorage {
    fn read_at(&self, buf: MemMut<'_>, offset: u64) -> io::Result<usize> {
        let mut buf = buf;
        let (length, buf) = (buf.len(), std::cell::RefCell::new(buf.reborrow()));
        self.link.run(|connection| {
            let asked = self.ask(connection, offset, length, super::MAX_IN_FLIGHT);
            collect(connection, asked, buf.borrow_mut().reborrow())
        })
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.size)
    }

    fn read_batch(&self, batch: &mut [ReadTransfer<'_>]) {
        for some in batch.chunks_mut(super::MAX_IN_FLIGHT) {
            let connection = self.link.current();
            let ask = |read: &ReadTransfer<'_>| self.ask(&connection, read.offset, read.buf.len(), 1);
            let asked: Vec<_> = some.iter().map(ask).collect();
            for (read, asked) in some.iter_mut().zip(asked) {
                read.done = collect(&connection, asked, read.buf.reborrow());
            }
            let failed =
                |read: &&mut ReadTransfer<'_>| read.done.is_err() && self.link.comes_back(&connection);
            for read in some.iter_mut().filter(failed) {
                read.done = self.read_at(read.buf.reborrow(), read.offset);
            }
        }
    }

    fn run_in(&self, range: Range<u64>) -> io::Result<Run> {
        if range.start >= self.size {
            return Ok(Run::new(u64::MAX, false));
        }
        self.link.run(|connection| self.run_on(connection, range.clone()))
    }

    fn identity(&self) -> Option<Identity> {
        self.identity.clone()
    }

    fn traits(&self) -> Traits {
        let alignment = self.blocks.minimum;
        let writable = self.writable;
        Traits { alignment, memory_alignment: 1, block_device: true, writable, waits: true }
    }

    fn path(&self) -> Option<&Path> {
        Some(&*self.name).filter(|name| !name.as_os_str().is_empty())
    }

    fn operation(&self, operation: Operation) -> &'static str {
        match operation {
            Operation::Read => "NBD_CMD_READ",
            Operation::Write | Operation::WriteVectored => "NBD_CMD_WRITE",
            Operation::Sync => "NBD_CMD_FLUSH",
            Operation::Space => "NBD_CMD_WRITE_ZEROES",
            Operation::Run => "NBD_CMD_BLOCK_STATUS",
            Operation::Length | Operation::SetLength | Operation::Close => "NBD",
        }
    }

    fn is_transient(&self, _: &io::Error) -> bool {
        // A connection that has ended, and was made again in vain if it was to be, does not come back.
        false
    }
}

impl Storage for NbdStorage {
    fn write_at(&self, buf: Mem<'_>, offset: u64) -> io::Result<usize> {
        self.write_vectored_at(&[buf], offset)
    }

    fn write_vectored_at(&self, bufs: &[Mem<'_>], offset: u64) -> io::Result<usize> {
        if !self.check_write(bufs, offset)? {
            return Ok(0);
        }
        self.link.run(|connection| written(connection, self.put(connection, bufs, offset)))
    }

    fn write_batch(&self, batch: &mut [WriteTransfer<'_>]) {
        let connection = self.link.current();
        let put = |write: &WriteTransfer<'_>| {
            let begins = self.check_write(write.bufs, write.offset);
            begins.map(|_| self.put(&connection, write.bufs, write.offset))
        };
        let sent: Vec<_> = batch.iter().map(put).collect();
        for (write, sent) in batch.iter_mut().zip(sent) {
            write.done = sent.and_then(|sent| written(&connection, sent));
        }
        let failed =
            |write: &&mut WriteTransfer<'_>| write.done.is_err() && self.link.comes_back(&connection);
        for write in batch.iter_mut().filter(failed) {
            write.done = self.write_vectored_at(write.bufs, write.offset);
        }
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.refuse_writes()?;
        if len > self.size { Err(no_space()) } else { Ok(()) }
    }

    fn sync_data(&self) -> io::Result<()> {
        if !self.writable || !self.has(export_flags::SEND_FLUSH) {
            return Ok(());
        }
        self.link.run(|connection| {
            let sent = connection.send(0, Command::Flush, 0, 0, &[])?;
            connection.wait(sent).map(drop)
        })
    }

    fn write_zeroes(&self, offset: u64, length: u64, unmap: bool) -> io::Result<()> {
        let end = self.end_of(offset, length)?;
        if !self.has(export_flags::SEND_WRITE_ZEROES) {
            let zeroes = vec![0; usize::try_from(self.piece().min(length)).unwrap_or(0)];
            let mut at = offset;
            while at < end {
                let (piece, _) =
                    Mem::from(&zeroes[..]).split_at(usize::try_from(end - at).unwrap_or(usize::MAX));
                at += self.write_at(piece, at)? as u64;
            }
            return Ok(());
        }
        let space = if unmap { 0 } else { command_flags::NO_HOLE };
        // Servers write zeroes where they know no better: as many at once as they would take bytes. Those that take long requests know.
        let sizes = self.blocks;
        let short: u64 = sizes.maximum.min(MAX_PAYLOAD).into();
        let most = |connection: &Connection| {
            down(if connection.takes_long() { LONG_ZEROES } else { short }, sizes.minimum)
        };
        self.each(space | self.durable(), Command::WriteZeroes, offset..end, most)
    }

    fn discard(&self, offset: u64, length: u64) -> io::Result<()> {
        self.refuse_writes()?;
        if !self.has(export_flags::SEND_TRIM) {
            return Ok(());
        }
        let end = offset.saturating_add(self.inside(offset, length));
        self.each(self.durable(), Command::Trim, offset..end, |connection| self.span(connection))
    }

    fn allocate(&self, offset: u64, length: u64) -> io::Result<()> {
        self.end_of(offset, length).map(drop)
    }
}
