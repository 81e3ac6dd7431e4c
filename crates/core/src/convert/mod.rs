//! Copying the disk of a [`GuestSource`] into a target of any format.
//!
//! A scanner cuts the source's extents into chunks; holes and zeroes are never read. Workers take chunks, read them, and give them to
//! a [`Sink`], all side by side. Where the file system can share blocks between files, data that needs no change is shared instead of
//! copied.

mod blocks;
mod copy;
mod disk;
mod raw;
mod scan;
mod space;
mod turns;

use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::Mutex;
pub use qcow2_transform::Window;

pub use self::blocks::{BlockSink, BlockTarget};
pub use self::copy::{Ahead, Copier, SHARED_BLOCK, shares_blocks};
pub use self::disk::DiskSink;
pub use self::raw::RawSink;
pub use self::scan::{Chunk, Content, Piece, Rules, Scanner, Zeroes};
pub use self::space::data_bytes;
pub use self::turns::Turns;
use crate::raw::SECTOR;
use crate::workers::{self, run_all};
use crate::{Error, ErrorKind, GuestSource, Job, Result};

/// Smallest run of zeroes, in bytes, that is left out of the target by default: QEMU's.
pub const DEFAULT_SPARSE_SIZE: u64 = 4096;

/// How clusters are compressed. The algorithm is the target's compression type.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Compression {
    /// Level, or the algorithm's default.
    pub level: Option<u32>,
    /// Window of a zlib stream.
    pub window: Window,
}

/// Only what the source has on top of a base is copied; the target names the base as its backing file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Delta {
    /// Layers of the source above the base: extents of this depth and deeper are left out.
    pub layers: u32,
    /// Virtual size of the base in bytes.
    pub base_size: u64,
}

/// How to convert.
#[derive(Debug, Clone)]
pub struct ConvertOptions {
    /// Worker threads; by default the cores, at most 8.
    pub concurrency: Option<NonZeroUsize>,
    /// Smallest run of zeroes in bytes that is left out of the target, in aligned blocks of the largest power of two in it; a multiple
    /// of 512. 0 writes everything. What is compressed is left out by clusters.
    pub sparse_size: u64,
    /// Compress, where the target's format does.
    pub compression: Option<Compression>,
    /// The target is known to read as zeroes: a device is then not zeroed.
    pub target_is_zero: bool,
    /// Copy onto a base.
    pub delta: Option<Delta>,
    /// Return only when the target is on stable storage.
    pub durable: bool,
    /// Count what is copied as the job's progress, instead of the whole disk: the extents are listed once more, at the beginning, to
    /// know how much that is. What a worker has begun counts as done.
    pub count_data: bool,
}

impl Default for ConvertOptions {
    fn default() -> Self {
        Self {
            concurrency: None,
            sparse_size: DEFAULT_SPARSE_SIZE,
            compression: None,
            target_is_zero: false,
            delta: None,
            durable: false,
            count_data: false,
        }
    }
}

/// What a convert did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ConvertResult {
    /// Size of the disk in bytes.
    pub virtual_size: u64,
    /// Guest bytes read from the source, or shared with it.
    pub bytes_read: u64,
    /// Bytes of guest data written to the target, or shared; compressed data counts as compressed.
    pub bytes_written: u64,
}

/// What one worker does with a chunk; it may keep something between its chunks.
pub type Worker<'a> = Box<dyn FnMut(&mut Copier<'_>, Chunk) -> Result<()> + 'a>;

/// How an image is made from chunks, which come in guest order and are worked on side by side. What it writes must not depend on the
/// number of workers.
pub trait Sink: Sync {
    /// How the source is cut.
    fn rules(&self) -> Rules;

    /// Another worker.
    ///
    /// # Errors
    /// `InvalidArgument` for options that only show now.
    fn worker(&self) -> Result<Worker<'_>>;

    /// Waits until another chunk may be begun: what is read and not written takes memory.
    fn admit(&self) {}

    /// Nothing more comes: who waits for a chunk gives up.
    fn stop(&self) {}

    /// All chunks are written: completes the target, durably where the options ask for it.
    ///
    /// # Errors
    /// `Io`, `Aborted`.
    fn finish(self: Box<Self>, options: &ConvertOptions, job: &Job) -> Result<()>;
}

/// Copies the disk of `source` into the sink that `make` gives, whose target the caller removes on an error. `make` gets the number of
/// workers, too.
///
/// # Errors
/// `InvalidArgument` for the options; those of `make`; `Aborted`; `Io` (with `ENOSPC` on a full disk); what reading the source meets.
pub fn copy_disk<'s>(
    source: &dyn GuestSource,
    options: &ConvertOptions,
    job: &Job,
    make: impl FnOnce(&Context<'_>, usize) -> Result<Box<dyn Sink + 's>>,
) -> Result<ConvertResult> {
    if !options.sparse_size.is_multiple_of(SECTOR) {
        let message = "the sparse size must be a multiple of 512 bytes";
        return Err(Error::new(ErrorKind::InvalidArgument, message).with_field("sparse_size"));
    }
    let virtual_size = source.virtual_size();
    if !options.count_data {
        job.set_total(virtual_size);
    }
    let workers = workers::count(options.concurrency);
    let counters = Counters::default();
    let context = Context { source, options, job, counters: &counters };
    let sink = make(&context, workers)?;
    let mut scanner = Scanner::new(source, sink.rules(), job);
    if options.count_data {
        job.set_total(Scanner::new(source, sink.rules(), job).data()?);
        scanner = scanner.counting();
    }
    let scanner = Mutex::new(scanner);
    let run = Run {
        context,
        sink: &*sink,
        scanner: &scanner,
        stop: AtomicBool::new(false),
        error: Mutex::default(),
    };
    run.all(workers)?;
    if !options.count_data {
        job.advance(virtual_size.saturating_sub(scanner.lock().done()));
    }
    source.settle()?;
    sink.finish(options, job)?;
    Ok(ConvertResult {
        virtual_size,
        bytes_read: counters.read.into_inner(),
        bytes_written: counters.written.into_inner(),
    })
}

/// What a convert counts.
#[derive(Debug, Default)]
struct Counters {
    read: AtomicU64,
    written: AtomicU64,
}

/// What every part of a convert shares.
#[derive(Clone, Copy)]
pub struct Context<'a> {
    /// The disk.
    pub source: &'a dyn GuestSource,
    /// How it is copied.
    pub options: &'a ConvertOptions,
    /// Whose progress it is.
    pub job: &'a Job,
    counters: &'a Counters,
}

impl Context<'_> {
    /// Guest bytes were read, or shared with the source.
    pub fn count_read(&self, bytes: u64) {
        self.counters.read.fetch_add(bytes, Ordering::Relaxed);
    }
    /// Bytes of guest data were written, or shared.
    pub fn count_written(&self, bytes: u64) {
        self.counters.written.fetch_add(bytes, Ordering::Relaxed);
    }
}

/// The workers' shared state.
struct Run<'a> {
    context: Context<'a>,
    sink: &'a dyn Sink,
    scanner: &'a Mutex<Scanner<'a>>,
    stop: AtomicBool,
    error: Mutex<Option<Error>>,
}

impl Run<'_> {
    fn all(&self, workers: usize) -> Result<()> {
        if run_all(workers, "qcow2-convert", || self.worker()) {
            self.fail(Error::new(ErrorKind::Internal, "a convert worker panicked"));
        }
        match self.error.lock().take() {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }

    /// Works until the chunks or the luck run out.
    fn worker(&self) {
        // A panic must not leave the others waiting for this worker's chunk.
        let _guard = StopOnPanic(self);
        if let Err(error) = self.chunks() {
            self.fail(error);
        }
    }

    /// The first error is the one to report; everyone stops.
    fn fail(&self, error: Error) {
        self.error.lock().get_or_insert(error);
        self.halt();
    }

    fn halt(&self) {
        self.stop.store(true, Ordering::Release);
        self.sink.stop();
    }

    fn chunks(&self) -> Result<()> {
        let mut copier = Copier::new(self.context);
        let mut write = self.sink.worker()?;
        while let Some(chunk) = self.next(&copier)? {
            let advance = chunk.advance;
            self.context.job.pace(chunk.bytes())?;
            write(&mut copier, chunk)?;
            self.context.job.advance(advance);
        }
        Ok(())
    }

    fn next(&self, copier: &Copier<'_>) -> Result<Option<Chunk>> {
        self.sink.admit();
        if self.stop.load(Ordering::Acquire) {
            return Ok(None);
        }
        let mut scanner = self.scanner.lock();
        let mut chunk = scanner.next_chunk()?;
        if let Some(chunk) = chunk.as_mut().filter(|_| self.context.source.is_sequential()) {
            // In the order in which chunks are cut: no worker reads what another one has passed.
            copier.hold(chunk)?;
        }
        Ok(chunk)
    }
}

struct StopOnPanic<'a, 'b>(&'a Run<'b>);

impl Drop for StopOnPanic<'_, '_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.halt();
        }
    }
}
