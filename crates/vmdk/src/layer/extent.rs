//! A part of the disk, and the file that it is in.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use qcow2_core::{Error, ErrorKind, Result, Storage, StorageExt};

use super::OpenOptions;
use super::grains::Grains;
use crate::descriptor::{ExtentLine, ExtentType};
use crate::fields::SECTOR;

/// What an extent's bytes are in.
#[derive(Debug)]
pub(super) enum Data {
    /// A file that was not opened.
    Missing,
    /// Nothing: it is all zeroes.
    Zero,
    /// A file that has them as they are.
    Plain(Arc<dyn Storage>),
    /// Grains of a file.
    Grains(Box<Grains>),
}

/// A part of the disk.
#[derive(Debug)]
pub(super) struct Extent {
    /// First guest byte.
    pub(super) start: u64,
    pub(super) line: ExtentLine,
    /// Its sectors now: the line's, until the disk grows.
    pub(super) sectors: AtomicU64,
    pub(super) data: Data,
}

/// Extents one behind the other.
pub(super) fn placed(extents: impl IntoIterator<Item = (ExtentLine, Data)>) -> Vec<Extent> {
    let mut start = 0;
    let place = |(line, data): (ExtentLine, Data)| {
        let extent = Extent { start, sectors: AtomicU64::new(line.sectors), line, data };
        start = extent.end();
        extent
    };
    extents.into_iter().map(place).collect()
}

impl Extent {
    /// Bytes of the disk.
    pub(super) fn size(&self) -> u64 {
        self.sectors.load(Ordering::Acquire) * SECTOR
    }

    /// The guest byte behind it.
    pub(super) fn end(&self) -> u64 {
        self.start + self.size()
    }

    pub(super) fn storage(&self) -> Option<&Arc<dyn Storage>> {
        match &self.data {
            Data::Missing | Data::Zero => None,
            Data::Plain(storage) => Some(storage),
            Data::Grains(grains) => Some(&grains.storage),
        }
    }

    pub(super) fn grains(&self) -> Option<&Grains> {
        match &self.data {
            Data::Grains(grains) => Some(grains),
            _ => None,
        }
    }

    /// Takes the file that its line names.
    pub(super) fn attach(
        &mut self,
        file: Arc<dyn Storage>,
        is_last: bool,
        options: &OpenOptions,
    ) -> Result<()> {
        self.data = if self.line.kind.is_plain() {
            let (end, length) = (self.line.offset * SECTOR + self.size(), file.size()?);
            if end > length {
                let message = format!("the file ends at {length}, inside the extent, which ends at {end}");
                let error = Error::new(ErrorKind::Corrupt, message).with_field("extent").with_offset(length);
                return Err(file.located(error));
            }
            Data::Plain(file)
        } else {
            let grains = Grains::open(file, self.line.kind == ExtentType::SeSparse, options)?;
            let (sectors, capacity) = (self.line.sectors, grains.geometry().capacity);
            // The last one may have grown already when its line did not, after a power cut.
            if sectors > capacity || (sectors < capacity && !is_last) {
                let message = format!(
                    "the extent has {capacity} sectors, and its line in the descriptor says {sectors}"
                );
                let error = Error::new(ErrorKind::Corrupt, message).with_field("capacity");
                return Err(grains.storage.located(error));
            }
            Data::Grains(Box::new(grains))
        };
        Ok(())
    }
}
