//! A raw target: every chunk has its place already.

use std::sync::Arc;

use qcow2_transform::zero;

use super::copy::{Ahead, Copier, shares_blocks};
use super::scan::{Chunk, Rules, Zeroes};
use super::{Context, ConvertOptions, Sink, Worker};
use crate::space::{Preallocation, empty, size_raw};
use crate::{Error, ErrorKind, Job, Mem, Result, Storage, StorageExt};

/// Bytes of a chunk: small enough to stay in the core's cache between its read and its write.
const CHUNK: u64 = 256 << 10;
/// Bytes of a write from which on taking its space first costs less than it gains.
const WORTH_ALLOCATING: usize = 64 << 10;
/// Bytes of a chunk whose blocks are shared.
const SHARED_CHUNK: u64 = 1 << 30;
/// Bytes that are zeroed in one call.
const ZERO_CHUNK: u64 = 1 << 30;

/// Into a raw file or device.
pub struct RawSink {
    storage: Arc<dyn Storage>,
    /// Granularity in bytes at which zeroes are left out; 0 writes them.
    sparse_size: usize,
    /// Zeroes have to be put there: the target holds something else.
    stale: bool,
    shared: bool,
    ahead: Ahead,
}

impl RawSink {
    /// Makes the target ready. `keep`: the file stays as long as it is, and holds anything.
    ///
    /// # Errors
    /// `InvalidArgument` for a target that is too small; `Io`; `Aborted`.
    pub fn new(
        context: &Context<'_>,
        storage: Arc<dyn Storage>,
        preallocation: Preallocation,
        keep: bool,
    ) -> Result<Self> {
        let size = context.source.virtual_size();
        let fixed = keep || storage.traits().block_device;
        if fixed {
            let room = storage.size()?;
            if room < size {
                let message = format!("the target holds {room} bytes, the disk has {size}");
                return Err(storage.located(Error::new(ErrorKind::InvalidArgument, message)));
            }
        }
        // A file that is written in full needs no zeroes before that.
        let written = preallocation == Preallocation::Full || context.options.sparse_size == 0;
        let mut shared = false;
        if !fixed {
            empty(&*storage)?;
            shared = !written && shares_blocks(context.source, &*storage, context.job)?;
            let space = if written { Preallocation::Off } else { preallocation };
            size_raw(&*storage, size, space, context.job)?;
            if written && preallocation == Preallocation::Falloc {
                storage.reserve(0, size)?;
            }
        }
        let ahead = Ahead::new(!fixed && !shared && preallocation == Preallocation::Off);
        let sparse_size = if written { 0 } else { context.options.sparse_size };
        let sparse_size = usize::try_from(sparse_size).unwrap_or(usize::MAX);
        Ok(Self { storage, sparse_size, stale: fixed && !context.options.target_is_zero, shared, ahead })
    }

    /// The same, where the target reads as noise unless something was written: what is zero is written, too.
    #[must_use]
    pub fn over_noise(self) -> Self {
        Self { stale: true, ..self }
    }

    fn write(&self, copier: &mut Copier<'_>, chunk: &Chunk) -> Result<()> {
        if self.sparse_size != 0 && chunk.is_zero() {
            return self.storage.zero(chunk.start, chunk.length(), true);
        }
        if self.shared {
            for piece in &chunk.pieces {
                copier.share(piece, &*self.storage, piece.start)?;
            }
            return Ok(());
        }
        copier.with_chunk(chunk, |copier, bytes| match self.sparse_size {
            0 => self.put(copier, bytes, chunk.start),
            _ => self.put_sparse(copier, chunk, bytes),
        })
    }

    fn put(&self, copier: &Copier<'_>, bytes: &[u8], offset: u64) -> Result<()> {
        copier.context.count_written(bytes.len() as u64);
        if bytes.len() >= WORTH_ALLOCATING {
            self.ahead.take(&*self.storage, offset, bytes.len() as u64);
        }
        self.storage.write_all_at(Mem::from(bytes), offset)
    }

    /// Writes the data of a chunk; what is zero is left out, or zeroed on a target that is not.
    fn put_sparse(&self, copier: &Copier<'_>, chunk: &Chunk, bytes: &[u8]) -> Result<()> {
        for run in zero::runs(bytes, self.sparse_size) {
            let offset = chunk.start + run.start as u64;
            if !run.zero {
                let data = bytes.get(run.start..run.start + run.length).unwrap_or_default();
                self.put(copier, data, offset)?;
            } else if self.stale {
                self.storage.zero(offset, run.length as u64, true)?;
            }
        }
        Ok(())
    }
}

impl Sink for RawSink {
    fn rules(&self) -> Rules {
        let zeroes = match (self.sparse_size, self.stale) {
            (0, _) => Zeroes::Written,
            (_, true) => Zeroes::Explicit(ZERO_CHUNK),
            (_, false) => Zeroes::Skip,
        };
        Rules { chunk: if self.shared { SHARED_CHUNK } else { CHUNK }, zeroes, delta: None }
    }

    fn worker(&self) -> Result<Worker<'_>> {
        Ok(Box::new(|copier, chunk| self.write(copier, &chunk)))
    }

    fn finish(self: Box<Self>, options: &ConvertOptions, _: &Job) -> Result<()> {
        if options.durable { self.storage.flush() } else { Ok(()) }
    }
}
