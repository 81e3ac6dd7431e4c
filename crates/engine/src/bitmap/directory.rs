//! Replacing the bitmap directory, and the header extension that names it.

use std::sync::Arc;

use qcow2_format::HostOffset;
use qcow2_format::bitmap::BitmapDirectoryEntry;
use qcow2_format::header::extension::BitmapsExtension;
use qcow2_format::header::feature::Autoclear;
use qcow2_format::limits::{MAX_BITMAP_DIRECTORY_BYTES, MAX_BITMAPS};

use crate::image::read_header;
use crate::maintenance::{SECTOR, Session};
use crate::tracker::Bits;
use crate::{ErrorKind, Result};

/// One entry of a directory to write.
#[derive(Debug, Clone)]
pub(super) struct NewEntry {
    pub(super) entry: BitmapDirectoryEntry,
    /// Bits to store; without them the entry keeps its stored ones.
    pub(super) bits: Option<Arc<Bits>>,
    /// Index in the directory before, whose stored bits are freed where new ones are stored.
    pub(super) former: Option<usize>,
}

impl Session<'_> {
    /// Writes the directory that `change` makes of the current one, switches to it, then frees what it no longer
    /// refers to. A crash leaves the old bitmaps or the new ones, and so does a disk that is full.
    pub(super) fn replace_bitmaps(
        &self,
        change: impl FnOnce(Vec<NewEntry>) -> Result<Vec<NewEntry>>,
    ) -> Result<()> {
        let former = self.image.bitmaps()?;
        let entries = former.iter().enumerate().map(|(index, record)| NewEntry {
            entry: record.entry.clone(),
            bits: None,
            former: Some(index),
        });
        let mut entries = change(entries.collect())?;
        let former_directory = self.image.bitmap_directory();
        let mut fresh = Vec::new();
        let directory = self
            .write_bitmaps(&mut entries, &mut fresh)
            .inspect_err(|_| fresh.iter().for_each(|&(offset, bytes)| self.abandon(offset, bytes)))?;
        self.barrier()?;
        self.switch_directory(directory)?;
        for (index, record) in former.iter().enumerate() {
            if !entries.iter().any(|new| new.bits.is_none() && new.former == Some(index)) {
                self.free_stored(&record.entry)?;
            }
        }
        if let Some(former) = former_directory {
            self.unlink(former.directory_offset.0, former.directory_size);
        }
        self.barrier()
    }

    /// Writes the bits of the entries that have new ones, and a directory of all, where nothing refers to. The bits'
    /// places go to `fresh`.
    fn write_bitmaps(
        &self,
        entries: &mut [NewEntry],
        fresh: &mut Vec<(u64, u64)>,
    ) -> Result<Option<BitmapsExtension>> {
        let mut bytes = Vec::new();
        for new in &mut *entries {
            if let Some(bits) = &new.bits {
                let (offset, table_size) = self.store_bits(bits, fresh)?;
                new.entry.table_offset = HostOffset(offset);
                new.entry.table_size = table_size;
            }
            let encoded = new.entry.encode(&mut bytes);
            encoded.map_err(|e| self.image.error(ErrorKind::Limit, e.to_string()).with_source(e))?;
        }
        let directory_size = bytes.len() as u64;
        if entries.len() as u64 > MAX_BITMAPS.into() || directory_size > MAX_BITMAP_DIRECTORY_BYTES {
            let message = format!("{} bitmaps exceed the limit of the format", entries.len());
            return Err(self.image.error(ErrorKind::Limit, message).with_field("nb_bitmaps"));
        }
        if entries.is_empty() {
            return Ok(None);
        }
        let offset = self.allocate(directory_size)?;
        self.write_table(offset, bytes)?;
        Ok(Some(BitmapsExtension {
            count: entries.len() as u32,
            reserved: 0,
            directory_size,
            directory_offset: HostOffset(offset),
        }))
    }

    /// Makes `directory` the image's, durably.
    pub(super) fn switch_directory(&self, directory: Option<BitmapsExtension>) -> Result<()> {
        let header = read_header(&**self.image.storage())?;
        let mut autoclear = header.autoclear & Autoclear::SUPPORTED;
        autoclear.set(Autoclear::BITMAPS, directory.is_some());
        match (directory, self.find_extension()?) {
            (Some(new), Some(at)) => {
                // The extension's three fields in one sector change at once; else they are not believed meanwhile.
                let last = at + BitmapsExtension::LENGTH as u64 - 1;
                let split = at / SECTOR != last / SECTOR;
                if split && header.autoclear.contains(Autoclear::BITMAPS) {
                    self.writer.write_autoclear(self.image, autoclear - Autoclear::BITMAPS)?;
                    self.barrier()?;
                }
                self.write(at, &new.encode())?;
            }
            (Some(new), None) => self.append_extension(&new)?,
            (None, _) => {}
        }
        if header.autoclear != autoclear {
            // A set bit must not be durable before what it vouches for.
            self.barrier()?;
            self.writer.write_autoclear(self.image, autoclear)?;
        }
        self.barrier()?;
        if directory.is_none() {
            self.remove_extension()?;
        }
        self.writer.note_bitmaps(self.image, directory.as_ref());
        self.image.set_bitmap_directory(directory);
        Ok(())
    }
}
