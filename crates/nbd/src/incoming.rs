//! What comes from the other side, a whole message at a time.

use std::io;
use std::time::Instant;

use crate::transport::Transport;

/// Bytes that are taken from the socket at once where so many are there: small requests, one behind the other.
const BUFFER: usize = 16 << 10;

/// Reads a connection.
pub(crate) struct Incoming {
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Incoming {
    pub(crate) fn new() -> Self {
        Self { buffer: vec![0; BUFFER].into_boxed_slice(), start: 0, end: 0 }
    }

    /// Fills `to`. `UnexpectedEof` where the other side has gone, before the first byte or behind it.
    pub(crate) fn read_exact(
        &mut self,
        transport: &dyn Transport,
        mut to: &mut [u8],
        deadline: Option<Instant>,
    ) -> io::Result<()> {
        while !to.is_empty() {
            let ready = self.buffer.get(self.start..self.end).unwrap_or_default();
            let length = if ready.is_empty() && to.len() >= self.buffer.len() {
                receive(transport, to, deadline)?
            } else if ready.is_empty() {
                self.start = 0;
                self.end = receive(transport, &mut self.buffer, deadline)?;
                continue;
            } else {
                let length = ready.len().min(to.len());
                to.iter_mut().zip(ready).for_each(|(to, from)| *to = *from);
                self.start += length;
                length
            };
            to = to.get_mut(length..).unwrap_or_default();
        }
        Ok(())
    }

    /// Bytes were taken from the socket that nobody has read yet.
    pub(crate) fn has_more(&self) -> bool {
        self.start < self.end
    }

    /// Reads `length` bytes that nobody wants.
    pub(crate) fn skip(&mut self, transport: &dyn Transport, length: u64) -> io::Result<()> {
        let mut left = length;
        let mut waste = [0; 4096];
        while left > 0 {
            let piece = waste.len().min(usize::try_from(left).unwrap_or(usize::MAX));
            self.read_exact(transport, waste.get_mut(..piece).unwrap_or_default(), None)?;
            left -= piece as u64;
        }
        Ok(())
    }
}

fn receive(transport: &dyn Transport, to: &mut [u8], deadline: Option<Instant>) -> io::Result<usize> {
    loop {
        match transport.read(to, deadline) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(length) => return Ok(length.min(to.len())),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}
