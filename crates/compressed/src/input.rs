//! The bytes of a file from an offset on, as decoders take them.

use std::io::{self, BufRead, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;
use qcow2_core::{Error, MemMut, Storage, StorageExt};

/// Bytes that are read at once.
const BUFFER: usize = 256 << 10;

/// What a decoder's input came to, for whoever has the decoder.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    /// First byte of the file that the decoder did not take.
    position: AtomicU64,
    /// What reading the file met: a decoder only hands on that there was something.
    error: Mutex<Option<Error>>,
}

impl Seen {
    pub(crate) fn position(&self) -> u64 {
        self.position.load(Ordering::Relaxed)
    }

    pub(crate) fn take_error(&self) -> Option<Error> {
        self.error.lock().take()
    }
}

/// A file that is read front to back.
pub(crate) struct Input {
    storage: Arc<dyn Storage>,
    seen: Arc<Seen>,
    buffer: Vec<u8>,
    /// The part of the buffer that was not taken.
    start: usize,
    end: usize,
}

impl Input {
    /// From `offset` on.
    pub(crate) fn new(storage: Arc<dyn Storage>, offset: u64) -> Self {
        let seen = Arc::new(Seen { position: AtomicU64::new(offset), error: Mutex::default() });
        Self { storage, seen, buffer: Vec::new(), start: 0, end: 0 }
    }

    pub(crate) fn seen(&self) -> Arc<Seen> {
        Arc::clone(&self.seen)
    }
}

impl BufRead for Input {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.start == self.end {
            self.buffer.resize(BUFFER, 0);
            let (buf, at) = (MemMut::from(&mut self.buffer[..]), self.seen.position());
            self.start = 0;
            self.end = self.storage.read_up_to_at(buf, at).map_err(|error| {
                *self.seen.error.lock() = Some(error);
                io::Error::other("the file cannot be read")
            })?;
        }
        Ok(self.buffer.get(self.start..self.end).unwrap_or_default())
    }

    fn consume(&mut self, amount: usize) {
        let amount = amount.min(self.end - self.start);
        self.start += amount;
        self.seen.position.fetch_add(amount as u64, Ordering::Relaxed);
    }
}

impl Read for Input {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let got = self.fill_buf()?.read(buf)?;
        self.consume(got);
        Ok(got)
    }
}
