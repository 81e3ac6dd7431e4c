//! The seam between a chain and its formats: one image file (with the files that it is made of), without its backing file.
//!
//! A layer turns a guest range into segments without I/O on guest data ([`Layer::plan`]); whoever asked then reads them
//! ([`Layer::read_segment`]), or looks where they are. Everything that walks a chain is written against this trait alone.

use std::any::Any;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use crate::check::CheckLayer;
use crate::disk::{DiskOptions, WriteLayer};
use crate::{Error, ErrorKind, Job, MemMut, Result, Storage, StorageExt};

/// A run of guest bytes that one layer stores in one way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// First guest byte.
    pub start: u64,
    /// Length in bytes, never 0.
    pub length: u64,
    /// How it is stored.
    pub kind: SegmentKind,
}

impl Segment {
    /// Guest bytes that lie in a layer's own file where they lie on the disk.
    pub fn in_place(range: Range<u64>) -> Self {
        let kind = SegmentKind::Data(Place { file: 0, host: range.start });
        Self { start: range.start, length: range.end - range.start, kind }
    }
}

/// A byte of one of a layer's files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Number of the file, see [`Layer::file`].
    pub file: u32,
    /// Offset in it.
    pub host: u64,
}

impl Place {
    /// The byte `length` bytes further on.
    #[must_use]
    pub fn after(self, length: u64) -> Self {
        Self { host: self.host + length, ..self }
    }
}

/// How one layer stores a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SegmentKind {
    /// In a file; the place is that of the segment's first byte. Its bytes are the guest's as they are where
    /// [`Layer::file`] gives the file.
    Data(Place),
    /// Not at all: reads as zeroes. The place is a preallocation.
    Zero(Option<Place>),
    /// In a way that only the layer can read (compressed, say), as part of one unit.
    Opaque(Token),
    /// Not in this layer: the one below decides. The place is where the range would be, if there is room for it already.
    Unallocated(Option<Place>),
}

/// What a layer wrote into its own plan: means something to that layer alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Token(pub u64);

impl SegmentKind {
    /// Whether `next`, which starts `length` bytes behind the start of `self`, continues it. What only the layer can read stays one
    /// segment for each unit: two units can be the same stored bytes.
    pub fn continues(&self, length: u64, next: &Self) -> bool {
        match (self, next) {
            (Self::Data(a), Self::Data(b))
            | (Self::Zero(Some(a)), Self::Zero(Some(b)))
            | (Self::Unallocated(Some(a)), Self::Unallocated(Some(b))) => a.after(length) == *b,
            (Self::Zero(None), Self::Zero(None)) | (Self::Unallocated(None), Self::Unallocated(None)) => true,
            _ => false,
        }
    }
}

/// Collects segments in guest order, merging neighbours.
#[derive(Debug)]
pub struct PlanBuilder<'a> {
    segments: &'a mut Vec<Segment>,
    /// Segments before this one belong to earlier plans in the same list.
    first: usize,
}

impl<'a> PlanBuilder<'a> {
    /// Appends to `segments`, whose present ones stay as they are.
    pub fn new(segments: &'a mut Vec<Segment>) -> Self {
        let first = segments.len();
        Self { segments, first }
    }

    /// Appends a segment; one of 0 bytes is left out.
    pub fn push(&mut self, start: u64, length: u64, kind: SegmentKind) {
        if length == 0 {
            return;
        }
        let own = self.segments.len() > self.first;
        if let Some(last) = self.segments.last_mut().filter(|_| own)
            && last.kind.continues(last.length, &kind)
        {
            last.length += length;
            return;
        }
        self.segments.push(Segment { start, length, kind });
    }
}

/// What the holes of a layer's files say about its data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Holes {
    /// Nothing that is worth asking for: data is data.
    Ignored,
    /// What lies in a hole is zero, and no data: the file is the disk.
    Zero,
    /// What lies in a hole reads as zeroes, and is allocated all the same: a preallocation.
    Preallocated,
}

/// Files that an image names. Nothing here was opened.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct References {
    /// The backing file, if there is one.
    pub backing: Option<BackingReference>,
    /// The external data file, if there is one.
    pub data_file: Option<DataFileReference>,
    /// The files that the disk is made of beside the image's own, by the number that [`Layer::attach_extent`] takes.
    pub extents: Vec<ExtentReference>,
}

/// A file with a part of the disk, as the image names it: never more than the plain name of a file beside the image is followed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExtentReference {
    /// File name, as bytes.
    pub filename: Vec<u8>,
    /// Whether the image allows that it is written to.
    pub writable: bool,
}

/// A backing file as the image names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackingReference {
    /// File name, as bytes: relative to the directory of the image.
    pub filename: Vec<u8>,
    /// Format as QEMU names it, where the image says.
    pub format: Option<Vec<u8>>,
}

/// An external data file as the image names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DataFileReference {
    /// File name, as bytes, where the image says.
    pub filename: Option<Vec<u8>>,
    /// Whether it is a consistent raw image on its own.
    pub raw: bool,
}

/// What a read of one layer leaves to those below.
#[derive(Debug)]
pub struct Below<'a> {
    pub(crate) depth: usize,
    pub(crate) pending: Vec<(usize, u64, MemMut<'a>)>,
}

impl<'a> Below<'a> {
    /// The layer does not have the guest bytes at `start`.
    pub fn leave(&mut self, start: u64, buf: MemMut<'a>) {
        self.pending.push((self.depth + 1, start, buf));
    }
}

/// What a layer says at once about guest bytes that somebody wants who cannot wait: [`Layer::at_hand`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AtHand {
    /// It has them in memory.
    Filled,
    /// What lies below shows through.
    Below,
    /// Only a read tells.
    Unknown,
}

/// Kept by a request while it may still use places that it planned; they are not used for anything else meanwhile.
pub type Pin = Arc<()>;

/// One image of a chain. All methods can be called from many threads at once.
pub trait Layer: Any + Send + Sync + fmt::Debug {
    /// QEMU's name of the format.
    fn format(&self) -> &'static str;

    /// Size of the layer's disk in bytes.
    fn virtual_size(&self) -> u64;

    /// Granularity in bytes at which the layer allocates, a power of two; `None` where it does not.
    fn unit(&self) -> Option<u64>;

    /// Whether another image can lie below.
    fn takes_backing(&self) -> bool;

    /// The files that it names.
    fn references(&self) -> References {
        References::default()
    }

    /// Refuses `below` as what lies below the layer in a chain; nothing where that ends. What a layer without a parent of its own does
    /// not have is zero.
    ///
    /// # Errors
    /// `Chain` for another image than the one that the layer was made on; `UnsupportedFeature` where it cannot be read without one.
    fn judge_below(&self, below: Option<&dyn Layer>) -> Result<()> {
        let _ = below;
        Ok(())
    }

    /// The layer's own file, which names it in messages and tells it apart.
    fn storage(&self) -> &Arc<dyn Storage>;

    /// All files that the layer is made of, its own first.
    fn files(&self) -> Vec<&Arc<dyn Storage>> {
        vec![self.storage()]
    }

    /// File number `index` of those that segments refer to, where its bytes are the guest's as they are: not where they are
    /// encrypted or the file is not open. Such bytes are read through the layer.
    fn file(&self, index: u32) -> Option<&Arc<dyn Storage>>;

    /// Appends the segments of `range`, which must lie inside the disk, to `segments`; neighbours that continue each
    /// other are merged.
    ///
    /// # Errors
    /// `Corrupt` for metadata that breaks the format, naming the guest offset; `Io` from reading tables.
    fn plan(&self, range: Range<u64>, segments: &mut Vec<Segment>) -> Result<()>;

    /// Fills `buf`, as long as the segment, from a segment of [`Layer::plan`] that is data or opaque.
    ///
    /// # Errors
    /// `Corrupt`, `Io`; `UnsupportedFeature` for encryption; `ReferenceDenied` where a file is not open.
    fn read_segment(&self, segment: &Segment, buf: MemMut<'_>) -> Result<()>;

    /// As [`Layer::read_segment`], for several segments of a plan at once: a storage can do better than one behind the other.
    ///
    /// # Errors
    /// As [`Layer::read_segment`].
    fn read_segments(&self, parts: Vec<(Segment, MemMut<'_>)>) -> Result<()> {
        parts.into_iter().try_for_each(|(segment, buf)| self.read_segment(&segment, buf))
    }

    /// Fills `buf`, which lies inside the disk, from `offset`, and leaves to `below` what the layer does not have. `scratch`
    /// is an empty list to plan in.
    ///
    /// # Errors
    /// As [`Layer::plan`] and [`Layer::read_segment`].
    fn read<'a>(
        &self,
        mut buf: MemMut<'a>,
        offset: u64,
        scratch: &mut Vec<Segment>,
        below: &mut Below<'a>,
    ) -> Result<()> {
        self.plan(offset..offset + buf.len() as u64, scratch)?;
        let several = scratch.iter().filter(|s| matches!(s.kind, SegmentKind::Data(_))).nth(1).is_some();
        let mut together = Vec::new();
        for segment in scratch.iter() {
            let mut part = buf.take_front(segment.length as usize);
            match segment.kind {
                SegmentKind::Zero(_) => part.fill_zero(),
                SegmentKind::Data(_) if several => together.push((*segment, part)),
                SegmentKind::Data(_) | SegmentKind::Opaque(_) => self.read_segment(segment, part)?,
                SegmentKind::Unallocated(_) => {
                    // A layer that shrank meanwhile does not show what is below it either.
                    let end = self.virtual_size().max(segment.start);
                    let inside = (end - segment.start).min(segment.length) as usize;
                    below.leave(segment.start, part.take_front(inside));
                    part.fill_zero();
                }
            }
        }
        if several { self.read_segments(together) } else { Ok(()) }
    }

    /// Whether there is anything that [`Layer::at_hand`] could fill a buffer with: otherwise nobody need ask.
    fn keeps_bytes(&self) -> bool {
        false
    }

    /// Fills `buf` from `offset` on if all of these bytes, which lie inside the disk, are in memory; waits for nothing, neither a file
    /// nor a lock.
    fn at_hand(&self, buf: &mut MemMut<'_>, offset: u64) -> AtHand {
        let _ = (buf, offset);
        AtHand::Unknown
    }

    /// What images that are made on this one store to know it again, as the format writes it for itself.
    fn content_id(&self) -> Option<String> {
        None
    }

    /// Takes one of the files of [`References::extents`], by its number there, which was opened.
    ///
    /// # Errors
    /// What is wrong with the file: `Corrupt`, `InvalidHeader`, `UnsupportedFeature`, `Limit`; `Chain` for one that the image is made
    /// of already; `Io`.
    fn attach_extent(&mut self, index: usize, file: Arc<dyn Storage>) -> Result<()> {
        let _ = file;
        let message = format!("a {} image has no extent {index}", self.format());
        Err(self.storage().located(Error::new(ErrorKind::Internal, message)))
    }

    /// How the guest data is encrypted, by QEMU's name (`luks`, `aes`); `None` where it is not.
    fn encryption(&self) -> Option<&'static str> {
        None
    }

    /// Opens the guest data with a secret, before anything of it is read; one that is not encrypted stays what it is. Takes as long as
    /// the image wants a guess to take, and is cancelled by `job`.
    ///
    /// # Errors
    /// `BadSecret`; `Corrupt`, `Limit` or `UnsupportedFeature` for an encryption header; `Aborted`; `Io`.
    fn unlock(&mut self, secret: &[u8], job: &Job) -> Result<()> {
        let _ = (secret, job);
        Ok(())
    }

    /// The layer as one that takes requests; `None` for a format that is only read, or that writes in ways of its own.
    fn as_writable(&self) -> Option<&dyn WriteLayer> {
        None
    }

    /// The layer as one that is checked in the way of all formats; `None` for one with nothing to check, or with a way of its own.
    fn as_checkable(&self) -> Option<&dyn CheckLayer> {
        None
    }

    /// Makes the layer take requests, as the top of a chain.
    ///
    /// # Errors
    /// `ReadOnly` for a file that is open for reading only; `UnsupportedFeature` for a format that is only read.
    fn make_writable(&mut self, options: DiskOptions) -> Result<()> {
        let _ = options;
        let message = format!("writing {} images is not supported", self.format());
        Err(self.storage().located(Error::new(ErrorKind::UnsupportedFeature, message)))
    }

    /// The same image anew, for reading, as it was opened.
    ///
    /// # Errors
    /// As opening it.
    fn reopen(&self) -> Result<Box<dyn Layer>>;

    /// Guest bytes from `at` on of which the layer is known to have none, without I/O: lets a walk skip them at once.
    fn absent_from(&self, at: u64) -> u64 {
        let _ = at;
        0
    }

    /// What holes of the files say.
    ///
    /// # Errors
    /// `Io` from finding out.
    fn holes(&self) -> Result<Holes> {
        Ok(Holes::Ignored)
    }

    /// Whether it is read front to back: reading anything in front of what was read last begins at the start of the file.
    fn is_sequential(&self) -> bool {
        false
    }

    /// Of a layer whose file was read while it came: all of its disk was, and what is left may say that it is none.
    ///
    /// # Errors
    /// What is wrong with the image; `Io`.
    fn complete(&self) -> Result<()> {
        Ok(())
    }

    /// To be kept from before a plan until its places are not used any more; `None` where places do not change.
    fn pin(&self) -> Option<Pin> {
        None
    }
}
