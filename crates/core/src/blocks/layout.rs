//! What a format says of itself.

use super::bitmaps::SectorBitmaps;
use super::layer::BlockLayer;
use crate::check::{CheckReport, Repair};
use crate::layer::{Holes, References, SegmentKind};
use crate::{Error, ErrorKind, Job, Layer, Result, Storage};
use std::fmt;
use std::ops::Range;

/// Most bytes that a block can have, and that its place can have in front of it.
const MAX_BLOCK: u64 = 1 << 32;
/// Most bytes that one step of an entry can stand for.
const MAX_GRAIN: u64 = 1 << 31;

/// Where things are in an image. Offsets and lengths are bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    /// Size of the disk.
    pub size: u64,
    /// Guest bytes of a block, a multiple of 512.
    pub block: u64,
    /// What a place has in front of them.
    pub lead: u64,
    /// Where the table begins. Its entries have 4 bytes.
    pub table: u64,
    /// Number of its entries: enough for the disk.
    pub entries: u32,
    /// Byte order of its entries.
    pub big_endian: bool,
    /// The place of the entry 0.
    pub origin: u64,
    /// What the place of an entry is further on than that of the one before.
    pub grain: u64,
    /// The entry of a block that is not there.
    pub absent: u32,
    /// The entry of a block of zeroes, where there is one.
    pub zero: Option<u32>,
    /// Where the first place can be; the table can grow up to here.
    pub data: u64,
    /// The format's own structures, in which no place can be.
    pub metadata: Vec<Range<u64>>,
}

/// How to open an image. Sizes are bytes.
#[derive(Debug, Clone)]
pub struct OpenOptions {
    /// Largest virtual size.
    pub max_virtual_size: u64,
    /// Largest table.
    pub max_metadata_bytes: u64,
    /// Most bytes of the table to keep.
    pub cache_bytes: Option<u64>,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self { max_virtual_size: i64::MAX as u64, max_metadata_bytes: 4 << 30, cache_bytes: None }
    }
}

/// What an entry of the table says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// The block is not there.
    Absent,
    /// The block is zero.
    Zero,
    /// The block's place in the file.
    At(u64),
}

impl Layout {
    /// Refuses what could not be computed with.
    ///
    /// # Errors
    /// `InvalidHeader`, naming what is absurd.
    pub fn check(&self) -> Result<()> {
        let refuse = |field: &'static str, value: u64| {
            let message = format!("invalid {field} {value:#x}");
            Err(Error::new(ErrorKind::InvalidHeader, message).with_field(field))
        };
        if self.block == 0 || !self.block.is_multiple_of(512) || self.block > MAX_BLOCK {
            return refuse("block size", self.block);
        }
        if self.lead > MAX_BLOCK || self.grain == 0 || self.grain > MAX_GRAIN {
            return refuse("place size", self.lead.max(self.grain));
        }
        if self.size > i64::MAX as u64 || self.size > self.capacity() {
            let message =
                format!("a disk of {} bytes: the table has blocks for {}", self.size, self.capacity());
            return Err(Error::new(ErrorKind::InvalidHeader, message).with_field("size"));
        }
        if self.table > i64::MAX as u64 || self.origin > i64::MAX as u64 / 2 || self.data > i64::MAX as u64 {
            return refuse("table offset", self.table.max(self.origin));
        }
        Ok(())
    }

    /// Guest bytes that the table has entries for.
    #[must_use]
    pub fn capacity(&self) -> u64 {
        u64::from(self.entries).saturating_mul(self.block)
    }

    /// Bytes of a place.
    #[must_use]
    pub fn stride(&self) -> u64 {
        self.lead + self.block
    }

    /// Bytes of the table.
    #[must_use]
    pub fn table_bytes(&self) -> u64 {
        u64::from(self.entries) * 4
    }

    /// What the bytes of an entry are as a number.
    #[must_use]
    pub fn decode(&self, bytes: [u8; 4]) -> u32 {
        if self.big_endian { u32::from_be_bytes(bytes) } else { u32::from_le_bytes(bytes) }
    }

    /// The bytes of an entry.
    #[must_use]
    pub fn encode(&self, entry: u32) -> [u8; 4] {
        if self.big_endian { entry.to_be_bytes() } else { entry.to_le_bytes() }
    }

    /// What an entry says.
    #[must_use]
    pub fn entry(&self, entry: u32) -> Entry {
        if entry == self.absent {
            Entry::Absent
        } else if Some(entry) == self.zero {
            Entry::Zero
        } else {
            Entry::At(self.origin + u64::from(entry) * self.grain)
        }
    }

    /// The entry of a block with this place, where there is one.
    #[must_use]
    pub fn entry_of(&self, place: u64) -> Option<u32> {
        let from = place.checked_sub(self.origin)?;
        let entry = u32::try_from(from / self.grain).ok()?;
        (from.is_multiple_of(self.grain) && self.entry(entry) == Entry::At(place)).then_some(entry)
    }

    /// The first place at or behind `at` that an entry can name.
    #[must_use]
    pub fn next_place(&self, at: u64) -> u64 {
        let from = at.saturating_sub(self.origin);
        self.origin + from.next_multiple_of(self.grain)
    }
}

/// What is special about a format. Of the methods that write, one is called at a time, but for [`Scheme::touch`] and [`Scheme::change`].
pub trait Scheme: fmt::Debug + Send + Sync + 'static {
    /// QEMU's name of the format.
    fn format(&self) -> &'static str;

    /// What an entry of the table is called.
    fn entry_name(&self) -> &'static str;

    /// Where things are in the image as it was opened.
    fn layout(&self) -> &Layout;

    /// How a block that is not there reads.
    fn absent(&self) -> SegmentKind {
        SegmentKind::Zero(None)
    }

    /// What holes of the file say.
    fn holes(&self) -> Holes {
        Holes::Ignored
    }

    /// The files that the image names.
    fn references(&self) -> References {
        References::default()
    }

    /// Whether what is not there is read from the layer below.
    fn is_differencing(&self) -> bool {
        false
    }

    /// Refuses a layer below that is not the one that the image was made on, or that there is none.
    ///
    /// # Errors
    /// `Chain`, `UnsupportedFeature`.
    fn judge_below(&self, below: Option<&dyn Layer>) -> Result<()> {
        let _ = below;
        Ok(())
    }

    /// As [`Layer::content_id`].
    fn content_id(&self) -> Option<String> {
        None
    }

    /// Of an image that is differencing, which sectors of its blocks are there. `None` where blocks are there as a whole.
    fn bitmaps(&self) -> Option<&SectorBitmaps> {
        None
    }

    /// Holds the image's metadata against itself, as [`CheckLayer::check`](crate::check::CheckLayer::check) and, with `repair`,
    /// [`CheckLayer::repair`](crate::check::CheckLayer::repair).
    ///
    /// # Errors
    /// As those.
    fn check(
        layer: &BlockLayer<Self>,
        repair: Option<Repair>,
        max_findings: usize,
        job: &Job,
    ) -> Result<CheckReport>
    where
        Self: Sized;

    /// Called when the image is opened for writing, before anything is written.
    ///
    /// # Errors
    /// `Io`; `Corrupt`; `UnsupportedFeature` for an image that is only read.
    fn begin(layer: &BlockLayer<Self>) -> Result<()>
    where
        Self: Sized,
    {
        let _ = layer;
        Ok(())
    }

    /// Called before the disk is changed, again and again, from any thread.
    ///
    /// # Errors
    /// `Io`; `UnsupportedFeature`.
    fn change(&self, storage: &dyn Storage) -> Result<()> {
        let _ = storage;
        Ok(())
    }

    /// Writes what a new place has in front of its block. `last`: no place is behind it. `whole`: all of the block will be written to it,
    /// also of an image that is differencing.
    ///
    /// # Errors
    /// `Io`.
    fn fresh(&self, storage: &dyn Storage, place: u64, last: bool, whole: bool) -> Result<()> {
        let _ = (storage, place, last, whole);
        Ok(())
    }

    /// Called before data is written to a block that has a place, from any thread. Not of an image that is differencing.
    ///
    /// # Errors
    /// `Io`.
    fn touch(&self, storage: &dyn Storage, index: u32, place: u64) -> Result<()> {
        let _ = (storage, index, place);
        Ok(())
    }

    /// Writes what has to be durable before entries for new places are written: all of them end at `end` or before. The file is as long.
    ///
    /// # Errors
    /// `Io`.
    fn settle(&self, storage: &dyn Storage, end: u64) -> Result<()> {
        let _ = (storage, end);
        Ok(())
    }

    /// The layout that the image has with a disk of `size` bytes; nothing is written.
    ///
    /// # Errors
    /// `InvalidArgument` for a size that the format does not have.
    fn resized(&self, size: u64) -> Result<()> {
        let _ = size;
        Ok(())
    }

    /// Refuses a smaller disk that would not be a sound image: `kept` of its blocks have places, all of them in front of `end`.
    ///
    /// # Errors
    /// `UnsupportedFeature`.
    fn judge_shrunk(&self, kept: u64, end: u64) -> Result<()> {
        let _ = (kept, end);
        Ok(())
    }

    /// Writes another size, and number of entries, into the image: when it returns, each power cut leaves the old or the new ones.
    /// `end` is behind the last place that is left. The table has its new entries, durably.
    ///
    /// # Errors
    /// `Io`.
    fn resize(&self, storage: &dyn Storage, size: u64, entries: u32, end: u64) -> Result<()>;

    /// Called when the image is closed after writing, when all is durable. `end` is behind the last place, where that is known.
    ///
    /// # Errors
    /// `Io`.
    fn finish(&self, storage: &dyn Storage, end: Option<u64>) -> Result<()> {
        let _ = (storage, end);
        Ok(())
    }
}
