//! What every user of a [`Storage`] wants of it: whole transfers, and errors that name file and offset.

use std::io;
use std::ops::Range;

use super::{Operation, ReadStorage, ReadTransfer, Run, Storage, WriteTransfer};
use crate::{Error, ErrorKind, Mem, MemMut, Result};

/// Whole transfers with the engine's errors, for every storage.
pub trait StorageExt: ReadStorage {
    /// `error`, met in `operation`, with this file's path.
    fn failure(&self, error: io::Error, operation: Operation) -> Error {
        let transient = self.is_transient(&error);
        self.located(Error::io(error, self.operation(operation)).transient(transient))
    }

    /// `error` with this file's path.
    fn located(&self, error: Error) -> Error {
        match self.path() {
            Some(path) => error.with_path(path),
            None => error,
        }
    }

    /// Fills `buf`; the file's end inside it is an error (`Corrupt`: the metadata pointed there).
    fn read_exact_at(&self, buf: MemMut<'_>, offset: u64) -> Result<()> {
        let wanted = buf.len();
        let got = read_all(self, buf, offset)?;
        if got == wanted {
            return Ok(());
        }
        let message = format!("the file ends after {got} of {wanted} bytes");
        Err(self.located(Error::new(ErrorKind::Corrupt, message).with_offset(offset)))
    }

    /// Fills `buf`; what lies behind the end of the file reads as zeroes.
    fn read_padded_at(&self, mut buf: MemMut<'_>, offset: u64) -> Result<()> {
        let got = read_all(self, buf.reborrow(), offset)?;
        buf.split_at(got).1.fill_zero();
        Ok(())
    }

    /// As [`StorageExt::read_padded_at`], for several ranges at once.
    fn read_padded_batch(&self, batch: &mut [ReadTransfer<'_>]) -> Result<()> {
        self.read_batch(batch);
        for ReadTransfer { buf, offset, done } in batch {
            let done = std::mem::replace(done, Ok(0));
            match done.map_err(|e| self.failure(e, Operation::Read).with_offset(*offset))? {
                // The end of the file.
                0 => buf.fill_zero(),
                n => {
                    let rest = buf.reborrow().split_at(n).1;
                    if !rest.is_empty() {
                        self.read_padded_at(rest, *offset + n as u64)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Fills `buf` as far as the file reaches; returns how many bytes.
    fn read_up_to_at(&self, buf: MemMut<'_>, offset: u64) -> Result<usize> {
        read_all(self, buf, offset)
    }

    /// Writes all of `buf`.
    fn write_all_at(&self, buf: Mem<'_>, offset: u64) -> Result<()>
    where
        Self: Storage,
    {
        let (mut rest, mut at) = (buf, offset);
        while !rest.is_empty() {
            let n = self.write_at(rest, at).and_then(progressed);
            let n = n.map_err(|e| self.failure(e, Operation::Write).with_offset(at))?;
            rest = rest.split_at(n).1;
            at += n as u64;
        }
        Ok(())
    }

    /// Writes all of `bufs`, one behind the other. The list is consumed: its content afterwards is unspecified.
    fn write_all_vectored_at(&self, bufs: &mut [Mem<'_>], offset: u64) -> Result<()>
    where
        Self: Storage,
    {
        let (mut rest, mut at) = (bufs, offset);
        loop {
            let empty = rest.iter().take_while(|b| b.is_empty()).count();
            rest = rest.get_mut(empty..).unwrap_or_default();
            if rest.is_empty() {
                return Ok(());
            }
            let n = self.write_vectored_at(rest, at).and_then(progressed);
            let mut n = n.map_err(|e| self.failure(e, Operation::WriteVectored).with_offset(at))?;
            at += n as u64;
            for buf in rest.iter_mut() {
                let done = n.min(buf.len());
                *buf = buf.split_at(done).1;
                n -= done;
                if n == 0 {
                    break;
                }
            }
        }
    }

    /// The run at the start of `range`, which is not empty.
    fn run(&self, range: Range<u64>) -> Result<Run> {
        let start = range.start;
        self.run_in(range).map_err(|e| self.failure(e, Operation::Run).with_offset(start))
    }

    /// Bytes of space in use.
    fn space_in_use(&self) -> Result<u64> {
        self.allocated_bytes().map_err(|e| self.failure(e, Operation::Length))
    }

    /// Frees the range's space where the system can; its bytes are unspecified afterwards.
    fn free(&self, offset: u64, length: u64) -> Result<()>
    where
        Self: Storage,
    {
        self.discard(offset, length).map_err(|e| self.failure(e, Operation::Space).with_offset(offset))
    }

    /// Writes all of several ranges at once. After an error, any of them may have been written.
    fn write_all_batch(&self, batch: &mut [WriteTransfer<'_>]) -> Result<()>
    where
        Self: Storage,
    {
        self.write_batch(batch);
        for WriteTransfer { bufs, offset, done } in batch {
            let done = std::mem::replace(done, Ok(0));
            let mut done =
                done.map_err(|e| self.failure(e, Operation::WriteVectored).with_offset(*offset))?;
            let mut at = *offset;
            for buf in bufs.iter() {
                let (written, rest) = buf.split_at(done);
                done -= written.len();
                self.write_all_at(rest, at + written.len() as u64)?;
                at += buf.len() as u64;
            }
        }
        Ok(())
    }

    /// Length in bytes.
    fn size(&self) -> Result<u64> {
        self.len().map_err(|e| self.failure(e, Operation::Length))
    }

    /// Cuts or extends (with a hole) to `len` bytes.
    fn resize(&self, len: u64) -> Result<()>
    where
        Self: Storage,
    {
        self.set_len(len).map_err(|e| self.failure(e, Operation::SetLength).with_offset(len))
    }

    /// Makes what was written durable.
    fn flush(&self) -> Result<()>
    where
        Self: Storage,
    {
        self.sync_data().map_err(|e| self.failure(e, Operation::Sync))
    }

    /// Reports what closing the file does.
    fn report_close(&self) -> Result<()>
    where
        Self: Storage,
    {
        self.check_close().map_err(|e| self.failure(e, Operation::Close))
    }

    /// Makes the range read as zeroes; `unmap` frees its space where the system can.
    fn zero(&self, offset: u64, length: u64, unmap: bool) -> Result<()>
    where
        Self: Storage,
    {
        self.write_zeroes(offset, length, unmap)
            .map_err(|e| self.failure(e, Operation::Space).with_offset(offset))
    }

    /// Reserves space for the range; extends the file.
    fn reserve(&self, offset: u64, length: u64) -> Result<()>
    where
        Self: Storage,
    {
        self.allocate(offset, length).map_err(|e| self.failure(e, Operation::Space).with_offset(offset))
    }
}

impl<S: ReadStorage + ?Sized> StorageExt for S {}

/// A write that moves nothing would loop for ever.
fn progressed(n: usize) -> io::Result<usize> {
    if n == 0 { Err(io::ErrorKind::WriteZero.into()) } else { Ok(n) }
}

/// Reads until `buf` is full or the file ends; returns how many bytes.
fn read_all<S: ReadStorage + ?Sized>(storage: &S, mut buf: MemMut<'_>, offset: u64) -> Result<usize> {
    let mut got = 0;
    while !buf.is_empty() {
        let at = offset.saturating_add(got as u64);
        let n = storage
            .read_at(buf.reborrow(), at)
            .map_err(|e| storage.failure(e, Operation::Read).with_offset(at))?;
        if n == 0 {
            break;
        }
        buf.take_front(n);
        got += n;
    }
    Ok(got)
}
