//! The disk in a compressed file, as a layer.

use std::ops::Range;
use std::sync::Arc;

use parking_lot::Mutex;
use qcow2_core::layer::{Layer, Segment, SegmentKind, Token};
use qcow2_core::{Error, ErrorKind, Job, MemMut, Result, Storage, StorageExt, check_limit};

use crate::codec::{Codec, Decoder};
use crate::size;

/// A disk is whole sectors: what its last one lacks reads as zeroes.
const SECTOR: u64 = 512;
/// Bytes that are decoded at once.
const STEP: usize = 256 << 10;
/// First bytes of the disk that tell what it holds.
const HEAD: usize = 1024;

/// How to open a file. Sizes are bytes.
#[derive(Debug, Clone)]
pub struct OpenOptions {
    /// Largest disk.
    pub max_virtual_size: u64,
    /// Largest window, or dictionary, that the file may want the decoder to keep.
    pub max_window: u64,
    /// Bytes that the file holds, where that is known: it is not looked for then. Another number is an error where the data ends.
    pub size: Option<u64>,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self { max_virtual_size: i64::MAX as u64, max_window: 128 << 20, size: None }
    }
}

/// A raw disk in a compressed file.
#[derive(Debug)]
pub struct Compressed {
    storage: Arc<dyn Storage>,
    codec: Codec,
    options: OpenOptions,
    /// Bytes that the file holds.
    length: u64,
    head: Vec<u8>,
    reader: Mutex<Option<Reader>>,
}

#[derive(Debug)]
struct Reader {
    decoder: Decoder,
    /// What is decoded before it goes where it is wanted.
    step: Vec<u8>,
    /// Bytes that it has decoded.
    position: u64,
    /// Bytes of the file that are not asked for again, in whole sectors.
    passed: u64,
}

impl Compressed {
    /// Opens the disk in `storage`. Where the file does not say how much it holds (gzip never does), all of it is decoded once, to count:
    /// with the job's progress, and its cancellation. What is damaged is found then.
    ///
    /// # Errors
    /// `InvalidHeader` for a file of another kind; `Corrupt`, `UnsupportedFeature`; `Limit` for the disk and for the decoder's window;
    /// `Aborted`; `Io`.
    pub fn open(storage: Arc<dyn Storage>, codec: Codec, options: &OpenOptions, job: &Job) -> Result<Self> {
        let mut magic = [0; 6];
        let got = storage.read_up_to_at(MemMut::from(&mut magic[..]), 0)?;
        if !magic.get(..got).unwrap_or_default().starts_with(codec.magic()) {
            let message = format!("not compressed with {}: the file does not begin as one", codec.name());
            let error = Error::new(ErrorKind::InvalidHeader, message).with_field("magic").with_offset(0);
            return Err(storage.located(error));
        }
        let OpenOptions { max_virtual_size, max_window, size } = *options;
        let length = match size.map_or_else(|| size::stated(codec, &storage, job), |size| Ok(Some(size)))? {
            Some(length) => length,
            None => size::counted(codec, &storage, max_window, max_virtual_size, job)?,
        };
        check_limit("size", length, max_virtual_size).map_err(|error| storage.located(error))?;
        let head = size::head(codec, &storage, max_window, HEAD)?;
        Ok(Self { storage, codec, options: options.clone(), length, head, reader: Mutex::new(None) })
    }

    /// The first bytes of the disk, 1024 at most.
    #[must_use]
    pub fn head(&self) -> &[u8] {
        &self.head
    }

    /// Fills `buf` from `offset`. The reader is gone after an error: nothing more can be had of it.
    fn read_at(&self, mut buf: MemMut<'_>, offset: u64) -> Result<()> {
        let wanted = self.length.saturating_sub(offset).min(buf.len() as u64);
        let mut slot = self.reader.lock();
        let mut reader = match slot.take() {
            Some(reader) if reader.position <= offset => reader,
            _ => Reader {
                decoder: self.codec.decoder(&self.storage, self.options.max_window)?,
                step: vec![0; STEP],
                position: 0,
                passed: 0,
            },
        };
        while reader.position < offset {
            let skipped = offset - reader.position;
            self.decode(&mut reader, skipped)?;
        }
        let mut left = wanted;
        while left > 0 {
            let part = self.decode(&mut reader, left)?;
            buf.take_front(part.len()).copy_from(part);
            left -= part.len() as u64;
        }
        buf.fill_zero();
        *slot = Some(reader);
        Ok(())
    }

    /// Decodes the next bytes, `most` or as many as a step has, and looks for the end where that is due: behind it are the last checksums.
    fn decode<'a>(&self, reader: &'a mut Reader, most: u64) -> Result<&'a [u8]> {
        let bytes = reader.step.get_mut(..most.min(STEP as u64) as usize).unwrap_or_default();
        let got = reader.decoder.fill(bytes)?;
        reader.position += got as u64;
        if let Some(arriving) = self.storage.arriving() {
            let passed = reader.decoder.position() / SECTOR * SECTOR;
            arriving.taken(reader.passed, passed - reader.passed)?;
            reader.passed = passed;
        }
        if got < bytes.len() {
            return Err(self.other_length("ends", reader.position));
        }
        if reader.position == self.length && reader.decoder.fill(&mut [0])? > 0 {
            return Err(self.other_length("goes on", reader.position));
        }
        Ok(bytes)
    }

    fn other_length(&self, what: &str, at: u64) -> Error {
        let (name, length) = (self.codec.name(), self.length);
        let message = format!("the {name} data {what} at {at}, and not at {length} as was said");
        self.storage.located(Error::new(ErrorKind::Corrupt, message).with_field("size"))
    }
}

impl Layer for Compressed {
    fn format(&self) -> &'static str {
        self.codec.name()
    }

    fn virtual_size(&self) -> u64 {
        self.length.checked_next_multiple_of(SECTOR).unwrap_or(self.length)
    }

    fn unit(&self) -> Option<u64> {
        None
    }

    fn takes_backing(&self) -> bool {
        false
    }

    fn storage(&self) -> &Arc<dyn Storage> {
        &self.storage
    }

    fn file(&self, _: u32) -> Option<&Arc<dyn Storage>> {
        None
    }

    fn plan(&self, range: Range<u64>, segments: &mut Vec<Segment>) -> Result<()> {
        if !range.is_empty() {
            let (start, length) = (range.start, range.end - range.start);
            segments.push(Segment { start, length, kind: SegmentKind::Opaque(Token(start)) });
        }
        Ok(())
    }

    fn read_segment(&self, segment: &Segment, buf: MemMut<'_>) -> Result<()> {
        self.read_at(buf, segment.start)
    }

    fn is_sequential(&self) -> bool {
        true
    }

    fn reopen(&self) -> Result<Box<dyn Layer>> {
        Ok(Box::new(Self {
            storage: Arc::clone(&self.storage),
            codec: self.codec,
            options: self.options.clone(),
            length: self.length,
            head: self.head.clone(),
            reader: Mutex::new(None),
        }))
    }
}
