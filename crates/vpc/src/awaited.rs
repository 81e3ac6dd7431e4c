//! A fixed disk that is read while it comes: what says that it is one, the footer, comes last.

use std::ops::Range;
use std::sync::Arc;

use qcow2_core::layer::{Holes, Layer, Segment};
use qcow2_core::{Error, ErrorKind, MemMut, Result, Storage, StorageExt, check_limit};

use crate::structures::{DiskType, FOOTER_LENGTH, Footer, SECTOR};

/// A disk in front of a footer that has not come. When all else was read, the footer is held against what was taken for granted.
#[derive(Debug)]
pub(crate) struct Awaited {
    storage: Arc<dyn Storage>,
    /// All bytes but those of the footer.
    size: u64,
}

impl Awaited {
    /// The disk in `storage`, if its bytes are still coming, there are as many as one has, and they do not begin as another kind of disk.
    ///
    /// # Errors
    /// `Limit`; `Io`.
    pub(crate) fn new(storage: &Arc<dyn Storage>, max_virtual_size: u64) -> Result<Option<Self>> {
        if storage.arriving().is_none() {
            return Ok(None);
        }
        let Some(size) = storage.size()?.checked_sub(FOOTER_LENGTH as u64) else { return Ok(None) };
        let mut front = [0; FOOTER_LENGTH];
        let got = storage.read_up_to_at(MemMut::from(&mut front[..]), 0)?;
        if size % SECTOR != 0 || Footer::parse(front.get(..got).unwrap_or_default()).is_ok() {
            return Ok(None);
        }
        check_limit("size", size, max_virtual_size)?;
        Ok(Some(Self { storage: Arc::clone(storage), size }))
    }

    fn judge(&self, footer: &Footer) -> Result<()> {
        let fixed = footer.disk_type() == DiskType::Fixed;
        if fixed && footer.virtual_size() == self.size {
            return Ok(());
        }
        let what = if fixed { "fixed" } else { "dynamic" };
        let message = format!(
            "the footer is that of a {what} disk of {} bytes, and {} came in front of it: only from a file it is read all the same",
            footer.virtual_size(),
            self.size
        );
        Err(Error::new(ErrorKind::UnsupportedFeature, message).with_field("footer"))
    }
}

impl Layer for Awaited {
    fn format(&self) -> &'static str {
        "vpc"
    }

    fn virtual_size(&self) -> u64 {
        self.size
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

    fn file(&self, index: u32) -> Option<&Arc<dyn Storage>> {
        (index == 0).then_some(&self.storage)
    }

    fn plan(&self, range: Range<u64>, segments: &mut Vec<Segment>) -> Result<()> {
        segments.push(Segment::in_place(range));
        Ok(())
    }

    fn read_segment(&self, segment: &Segment, buf: MemMut<'_>) -> Result<()> {
        self.storage.read_exact_at(buf, segment.start)
    }

    fn reopen(&self) -> Result<Box<dyn Layer>> {
        Ok(Box::new(Self { storage: Arc::clone(&self.storage), size: self.size }))
    }

    fn holes(&self) -> Result<Holes> {
        Ok(Holes::Zero)
    }

    fn complete(&self) -> Result<()> {
        let mut bytes = [0; FOOTER_LENGTH];
        self.storage.read_exact_at(MemMut::from(&mut bytes[..]), self.size)?;
        let judged = Footer::parse(&bytes).and_then(|footer| self.judge(&footer));
        judged.map_err(|error| self.storage.located(error.with_offset(self.size)))
    }
}
