//! Convert: copies the disk of a [`GuestSource`] into a new raw or qcow2 target.
//!
//! A scanner cuts the source's extents into chunks; holes and zeroes are never read. Workers take chunks, read
//! them, look for zeroes and compress, all side by side. For a qcow2 target, host clusters are then allocated
//! strictly in the order of the chunks, and written by whichever worker is there: the target's bytes do not
//! depend on the number of workers. Where the file system can share blocks between files, data that needs no
//! change is shared instead of copied. The header comes last: a target that was not finished is no image.

mod copy;
mod onto;
mod prepare;
mod qcow2;
mod raw;
mod scan;
mod space;

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::Mutex;
pub use qcow2_transform::Window;

use self::copy::Copier;
use self::onto::ImageSink;
use self::qcow2::Qcow2Sink;
use self::raw::RawSink;
use self::scan::{Chunk, Rules, Scanner};
pub use self::space::data_bytes;
use crate::create::{CreateOptions, Preallocation, SECTOR_SIZE, check_data_file};
use crate::workers::{self, run_all};
use crate::{Error, ErrorKind, GuestSource, Image, Job, Qcow2, Result, Storage};

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
    /// Smallest run of zeroes in bytes that is left out of the target, a multiple of 512; 0 writes everything.
    pub sparse_size: u64,
    /// Compress, for a qcow2 target.
    pub compression: Option<Compression>,
    /// The target is known to read as zeroes: a device is then not zeroed.
    pub target_is_zero: bool,
    /// Copy onto a base.
    pub delta: Option<Delta>,
    /// Return only when the target is on stable storage.
    pub durable: bool,
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
        }
    }
}

/// Where to convert to. What the target held is lost.
#[derive(Debug, Clone)]
pub enum ConvertTarget<'a> {
    /// A raw disk.
    Raw {
        /// File or device.
        storage: Arc<dyn Storage>,
        /// Space to take for a file.
        preallocation: Preallocation,
        /// Keep the file's length and zero it explicitly, as a device: it must be large enough.
        keep: bool,
    },
    /// A new qcow2 image.
    Qcow2 {
        /// File or device.
        storage: Arc<dyn Storage>,
        /// The external data file that `create` names.
        data_file: Option<Arc<dyn Storage>>,
        /// Options of the image; its size is the source's.
        create: Box<CreateOptions>,
    },
    /// An image that is open for writing, at least as large as the source. What its disk has behind the source's end stays; closing it
    /// is the caller's. An error leaves part of the source there.
    Existing(&'a Image),
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

/// Converts `source` into `target`. The caller removes the target on an error.
///
/// # Errors
/// `InvalidArgument` or `Limit` for options that contradict each other (nothing is written then), `Aborted`,
/// `Io` (with `ENOSPC` on a full disk), and whatever reading the source meets.
pub fn convert(
    source: &dyn GuestSource,
    target: ConvertTarget<'_>,
    options: &ConvertOptions,
    job: &Job,
) -> Result<ConvertResult> {
    check(&target, options)?;
    let virtual_size = source.virtual_size();
    job.set_total(virtual_size);
    let workers = workers::count(options.concurrency);
    let counters = Counters::default();
    let context = Context { source, options, job, counters: &counters };
    let sink = match target {
        ConvertTarget::Raw { storage, preallocation, keep } => {
            Sink::Raw(RawSink::new(&context, storage, preallocation, keep)?)
        }
        ConvertTarget::Qcow2 { storage, data_file, mut create } => {
            create.size = virtual_size;
            Sink::Qcow2(Box::new(Qcow2Sink::new(&context, storage, data_file, *create, workers)?))
        }
        ConvertTarget::Existing(image) => Sink::Existing(ImageSink::new(&context, image)?),
    };
    let scanner = Mutex::new(Scanner::new(source, sink.rules(), job));
    let run = Run {
        context,
        sink: &sink,
        scanner: &scanner,
        stop: AtomicBool::new(false),
        error: Mutex::default(),
    };
    run.all(workers)?;
    job.advance(virtual_size.saturating_sub(scanner.lock().done()));
    sink.finish(options, job)?;
    Ok(ConvertResult {
        virtual_size,
        bytes_read: counters.read.into_inner(),
        bytes_written: counters.written.into_inner(),
    })
}

fn check(target: &ConvertTarget<'_>, options: &ConvertOptions) -> Result<()> {
    let refuse =
        |field, message: &str| Err(Error::new(ErrorKind::InvalidArgument, message).with_field(field));
    if !options.sparse_size.is_multiple_of(SECTOR_SIZE) {
        return refuse("sparse_size", "the sparse size must be a multiple of 512 bytes");
    }
    match target {
        ConvertTarget::Raw { .. } if options.compression.is_some() => {
            refuse("compress", "a raw target cannot be compressed")
        }
        ConvertTarget::Raw { .. } if options.delta.is_some() => {
            refuse("base", "a raw target cannot have a backing file")
        }
        ConvertTarget::Raw { preallocation: Preallocation::Metadata, .. } => {
            refuse("preallocation", "a raw target has no metadata to preallocate")
        }
        ConvertTarget::Raw { .. } => Ok(()),
        ConvertTarget::Existing(_) if options.delta.is_some() && options.target_is_zero => {
            refuse("target_is_zero", "a target that is zero everywhere lacks what the base has")
        }
        ConvertTarget::Existing(_) if options.delta.is_some() && options.compression.is_some() => refuse(
            "compress",
            "a part of a target that exists cannot be compressed: its clusters are not whole",
        ),
        ConvertTarget::Existing(image) => {
            let top = image.top_qcow2();
            let compresses = |top: &Qcow2| !top.header().has_data_file() && top.host_is_guest();
            if options.compression.is_some() && !top.is_some_and(compresses) {
                return refuse("compress", "the target cannot hold compressed clusters");
            }
            Ok(())
        }
        ConvertTarget::Qcow2 { create, data_file, .. } => {
            if options.compression.is_some() && create.data_file.is_some() {
                return refuse("compress", "an external data file cannot hold compressed clusters");
            }
            if options.compression.is_some() && create.data_door.is_some() {
                return refuse("compress", "an encrypted target cannot hold compressed clusters");
            }
            if options.compression.is_some() && create.preallocation != Preallocation::Off {
                return refuse("preallocation", "compressed clusters cannot be preallocated");
            }
            if options.delta.is_none() && create.backing.is_some() {
                return refuse("backing_file", "a convert onto a backing file needs its base");
            }
            if options.delta.is_some() && create.backing.is_none() {
                return refuse("base", "a convert onto a base needs the name of the backing file");
            }
            check_data_file(create, data_file.is_some())?;
            create.validate()
        }
    }
}

#[derive(Debug, Default)]
struct Counters {
    read: AtomicU64,
    written: AtomicU64,
}

/// What every part of a convert shares.
#[derive(Clone, Copy)]
struct Context<'a> {
    source: &'a dyn GuestSource,
    options: &'a ConvertOptions,
    job: &'a Job,
    counters: &'a Counters,
}

impl Context<'_> {
    fn count_read(&self, bytes: u64) {
        self.counters.read.fetch_add(bytes, Ordering::Relaxed);
    }
    fn count_written(&self, bytes: u64) {
        self.counters.written.fetch_add(bytes, Ordering::Relaxed);
    }
}

enum Sink<'a> {
    Raw(RawSink),
    Qcow2(Box<Qcow2Sink>),
    Existing(ImageSink<'a>),
}

impl Sink<'_> {
    fn rules(&self) -> Rules {
        match self {
            Self::Raw(raw) => raw.rules(),
            Self::Qcow2(qcow2) => qcow2.rules(),
            Self::Existing(image) => image.rules(),
        }
    }

    fn finish(self, options: &ConvertOptions, job: &Job) -> Result<()> {
        match self {
            Self::Raw(raw) => raw.finish(options),
            Self::Qcow2(qcow2) => qcow2.finish(options, job),
            Self::Existing(image) => image.finish(options),
        }
    }
}

/// The workers' shared state.
struct Run<'a> {
    context: Context<'a>,
    sink: &'a Sink<'a>,
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
        match self.sink {
            Sink::Raw(_) => {}
            Sink::Qcow2(qcow2) => qcow2.stop(),
            Sink::Existing(image) => image.stop(),
        }
    }

    fn chunks(&self) -> Result<()> {
        let mut copier = Copier::new(self.context);
        let mut compressor = match self.sink {
            Sink::Raw(_) | Sink::Existing(_) => None,
            Sink::Qcow2(qcow2) => qcow2.compressor()?,
        };
        while let Some(chunk) = self.next()? {
            let advance = chunk.advance;
            self.context.job.pace(chunk.bytes())?;
            match self.sink {
                Sink::Raw(raw) => raw.write(&mut copier, &chunk)?,
                Sink::Qcow2(qcow2) => qcow2.write(&mut copier, compressor.as_mut(), chunk)?,
                Sink::Existing(image) => image.write(&mut copier, &chunk)?,
            }
            self.context.job.advance(advance);
        }
        Ok(())
    }

    fn next(&self) -> Result<Option<Chunk>> {
        if let Sink::Qcow2(qcow2) = self.sink {
            qcow2.admit();
        }
        if self.stop.load(Ordering::Acquire) {
            return Ok(None);
        }
        self.scanner.lock().next()
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
