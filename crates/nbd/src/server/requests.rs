//! What is done with a request.

use std::io;
use std::ops::Range;
use std::sync::atomic::Ordering;

use qcow2_core::{Durability, Error, ErrorKind, Job, Mem, MemMut, Result};

use super::connection::{Connection, Order};
use super::handshake::Agreed;
use super::replies::Part;
use crate::protocol::command_flags as flag;
use crate::protocol::transmission::{Command, Request};
use crate::protocol::{MAX_PAYLOAD, NbdError};

/// Zeroes and discards are done in pieces of the disk, so that the end of the server does not wait for all of them.
const PIECE: u64 = 256 << 20;

/// Holes are looked for where a read is as long.
const SPARSE: u64 = 32 << 10;

/// Parts of one read: what is behind the last is data.
const MOST_PARTS: usize = 512;

/// Why a request is not done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Refused {
    pub(super) error: NbdError,
    pub(super) why: String,
}

impl Refused {
    fn new(error: NbdError, why: &str) -> Self {
        Self { error, why: why.to_owned() }
    }
}

impl From<&Error> for Refused {
    /// The message alone: where the image lies is nothing for clients.
    fn from(error: &Error) -> Self {
        let code = match error.kind() {
            ErrorKind::ReadOnly => NbdError::Perm,
            ErrorKind::InvalidArgument => NbdError::Inval,
            ErrorKind::UnsupportedFeature => NbdError::NotSup,
            ErrorKind::Closed | ErrorKind::Aborted => NbdError::Shutdown,
            _ if error.is_no_room() => NbdError::NoSpc,
            _ => NbdError::Io,
        };
        Self { error: code, why: error.message().to_owned() }
    }
}

/// What is wrong with a request, before anything is done or allocated for it.
pub(super) fn check(request: &Request, agreed: &Agreed<'_>) -> Option<Refused> {
    let invalid = |why| Some(Refused::new(NbdError::Inval, why));
    let own_flags = match request.command {
        Command::Read if agreed.structured => flag::DF,
        Command::Write if agreed.extended => flag::PAYLOAD_LEN,
        Command::BlockStatus => flag::REQ_ONE,
        Command::WriteZeroes if agreed.export.fast_zeroes => flag::NO_HOLE | flag::FAST_ZERO,
        Command::WriteZeroes => flag::NO_HOLE,
        _ => 0,
    };
    if request.flags & !(own_flags | flag::FUA) != 0 {
        return invalid("the command does not take these flags");
    }
    let changes = matches!(request.command, Command::Write | Command::WriteZeroes | Command::Trim);
    if changes && agreed.export.read_only {
        return Some(Refused::new(NbdError::Perm, "the export is read-only"));
    }
    match request.command {
        Command::Unknown(_) => return invalid("the command is not known"),
        Command::Flush if request.offset != 0 || request.length != 0 => {
            return invalid("a flush has no range");
        }
        Command::Read if request.length > MAX_PAYLOAD.into() => {
            return invalid("a read is longer than 32 MiB");
        }
        Command::BlockStatus if agreed.contexts.is_empty() => return invalid("no context was chosen"),
        Command::BlockStatus if request.length == 0 => return invalid("the range is empty"),
        _ => {}
    }
    let end = request.offset.checked_add(request.length);
    if end.is_some_and(|end| end <= agreed.size) {
        return None;
    }
    let beyond = if changes && request.command != Command::Trim { NbdError::NoSpc } else { NbdError::Inval };
    Some(Refused::new(beyond, "the range reaches beyond the end of the export"))
}

impl Connection<'_> {
    /// Does a request and answers it.
    pub(super) fn execute(&self, order: &Order<'_>, buffer: &mut Vec<u8>) -> io::Result<()> {
        let request = &order.request;
        if let Some(refused) = &order.refused {
            return self.fail(request, refused);
        }
        match request.command {
            Command::Read => match self.read(request, buffer) {
                Ok(parts) => self.send_data(request, &parts, buffer),
                Err(error) => self.fail(request, &Refused::from(&error)),
            },
            Command::BlockStatus => match self.block_status(request) {
                Ok(lists) => self.send_status(request, &lists),
                Err(error) => self.fail(request, &Refused::from(&error)),
            },
            _ => match self.change(request, buffer) {
                Ok(None) => self.succeed(request),
                Ok(Some(refused)) => self.fail(request, &refused),
                Err(error) => self.fail(request, &Refused::from(&error)),
            },
        }
    }

    /// The bytes of the disk.
    fn range(&self, request: &Request) -> Range<u64> {
        let start = self.agreed.export.offset + request.offset;
        start..start + request.length
    }

    fn change(&self, request: &Request, buffer: &[u8]) -> Result<Option<Refused>> {
        let disk = &*self.agreed.export.disk;
        let range = self.range(request);
        let durability = if request.has(flag::FUA) { Durability::Now } else { Durability::AtFlush };
        match request.command {
            Command::Write | Command::WriteZeroes | Command::Trim if range.is_empty() => {}
            Command::Write => {
                let bytes = buffer.get(..request.length as usize).unwrap_or_default();
                disk.write_at(Mem::from(bytes), range.start, durability)?;
            }
            Command::WriteZeroes => {
                if request.has(flag::FAST_ZERO) && !self.has_whole_cluster(&range) {
                    let why = "less than a cluster becomes zero only by writing it";
                    return Ok(Some(Refused::new(NbdError::NotSup, why)));
                }
                let unmap = !request.has(flag::NO_HOLE);
                return self.in_pieces(range, durability, |start, length, durability| {
                    disk.write_zeroes(start, length, unmap, durability)
                });
            }
            Command::Trim => {
                return self.in_pieces(range, durability, |start, length, durability| {
                    disk.discard(start, length, durability)
                });
            }
            Command::Flush if !self.agreed.export.read_only => disk.flush()?,
            _ => {}
        }
        Ok(None)
    }

    fn has_whole_cluster(&self, range: &Range<u64>) -> bool {
        let cluster = self.agreed.export.disk.cluster_size();
        let disk = self.agreed.export.disk.virtual_size();
        let first = range.start.next_multiple_of(cluster);
        first + cluster <= range.end || (range.end == disk && first < range.end)
    }

    /// Does a long change piece by piece; the last one as durable as all are to be.
    fn in_pieces(
        &self,
        range: Range<u64>,
        durability: Durability,
        change: impl Fn(u64, u64, Durability) -> Result<()>,
    ) -> Result<Option<Refused>> {
        let mut at = range.start;
        loop {
            let end = (at / PIECE + 1).saturating_mul(PIECE).min(range.end);
            let last = end >= range.end;
            change(at, end - at, if last { durability } else { Durability::AtFlush })?;
            if last {
                return Ok(None);
            }
            if self.ending.load(Ordering::Acquire) {
                return Ok(Some(Refused::new(NbdError::Shutdown, "the server is ending")));
            }
            at = end;
        }
    }

    /// Reads into `buffer`, which has the bytes of the request then; holes are left out where the answer can do without them.
    fn read(&self, request: &Request, buffer: &mut Vec<u8>) -> Result<Vec<Part>> {
        let length = request.length as usize;
        buffer.resize(buffer.len().max(length), 0);
        let sparse = self.agreed.structured && !request.has(flag::DF) && request.length >= SPARSE;
        let parts = if sparse { self.parts(request)? } else { vec![Part { range: 0..length, zero: false }] };
        for Part { range, zero } in &parts {
            let start = self.agreed.export.offset + request.offset + range.start as u64;
            if let Some(bytes) = buffer.get_mut(range.clone()).filter(|bytes| !zero && !bytes.is_empty()) {
                self.agreed.export.disk.read_at(MemMut::from(bytes), start)?;
            }
        }
        Ok(parts)
    }

    /// What of a read is known to be zero, without gaps.
    fn parts(&self, request: &Request) -> Result<Vec<Part>> {
        let range = self.range(request);
        let length = request.length as usize;
        let (mut parts, mut extents) = (Vec::<Part>::new(), Vec::new());
        let disk = &self.agreed.export.disk;
        disk.extents_up_to(range.start, request.length, MOST_PARTS, &Job::new(), &mut extents)?;
        let mut at = 0;
        for extent in extents.iter().take(MOST_PARTS) {
            let end = extent.start.saturating_add(extent.length).saturating_sub(range.start);
            let end = usize::try_from(end).unwrap_or(usize::MAX).min(length);
            match parts.last_mut() {
                Some(last) if last.zero == extent.zero => last.range.end = end,
                _ => parts.push(Part { range: at..end, zero: extent.zero }),
            }
            at = end;
        }
        if at < length {
            parts.push(Part { range: at..length, zero: false });
        }
        Ok(parts)
    }
}
