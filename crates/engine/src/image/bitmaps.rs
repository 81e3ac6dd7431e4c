//! Reading the bitmap directory.

use qcow2_format::bitmap::BitmapDirectoryEntry;

use super::qcow2::Qcow2;
use crate::invalid::invalid;
use crate::{Error, ErrorKind, MemMut, Result, StorageExt};

/// One persistent bitmap of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BitmapRecord {
    /// Its directory entry, validated.
    pub entry: BitmapDirectoryEntry,
}

impl Qcow2 {
    /// Whether a bitmap is in memory and follows the writes of this handle. In the file it is then marked in use, and is
    /// consistent all the same.
    pub fn tracks_bitmap(&self, name: &[u8]) -> bool {
        self.writer.as_ref().is_some_and(|writer| writer.bitmaps.tracks(name))
    }

    /// Refuses a disk of no bytes where there are bitmaps: theirs would be tables of no entries, which the format does not have.
    ///
    /// # Errors
    /// `UnsupportedFeature`; else as [`Qcow2::bitmaps`].
    pub(crate) fn refuse_empty_disk(&self, size: u64) -> Result<()> {
        if size > 0 {
            return Ok(());
        }
        match self.bitmaps()?.first() {
            Some(record) => Err(self.no_bitmap_of_no_bytes(&record.entry.name)),
            None => Ok(()),
        }
    }

    pub(crate) fn no_bitmap_of_no_bytes(&self, name: &[u8]) -> Error {
        let name = String::from_utf8_lossy(name);
        let message = format!("a disk of 0 bytes cannot have bitmaps, such as '{name}'");
        self.error(ErrorKind::UnsupportedFeature, message).with_field("size")
    }

    /// The persistent bitmaps in the directory's order; none when the image has no consistent bitmaps extension.
    ///
    /// # Errors
    /// `Corrupt` or `Limit` for a directory that breaks the format.
    pub fn bitmaps(&self) -> Result<Vec<BitmapRecord>> {
        let header = self.header();
        let Some(extension) = self.bitmap_directory() else { return Ok(Vec::new()) };
        // A viewed snapshot may have another size than the disk that the bitmaps are about.
        let size = if self.viewed_snapshot().is_some() { header.size } else { self.virtual_size() };
        let corrupt = |e| {
            super::open::on_file(&**self.storage(), invalid(e, ErrorKind::Corrupt))
                .with_offset(extension.directory_offset.0)
        };
        extension.validate(self.geometry().cluster_size()).map_err(corrupt)?;
        let limit = |field: &'static str, value: u64, limit: u64| {
            let message = format!("{field} of {value} exceeds the limit of {limit}");
            Err(self.error(ErrorKind::Limit, message).with_field(field))
        };
        if extension.count > self.limits().max_bitmaps {
            return limit("nb_bitmaps", extension.count.into(), self.limits().max_bitmaps.into());
        }
        if extension.directory_size > self.limits().max_metadata_bytes {
            return limit(
                "bitmap_directory_size",
                extension.directory_size,
                self.limits().max_metadata_bytes,
            );
        }
        // A file that is shorter than the claimed directory is refused before its size is allocated.
        let file_size = self.storage().size()?;
        let end = extension.directory_offset.0.saturating_add(extension.directory_size);
        if end > file_size {
            let message =
                format!("the bitmap directory ends at {end}, behind the end of the file ({file_size})");
            return Err(self
                .error(ErrorKind::Corrupt, message)
                .with_field("bitmap_directory_offset")
                .with_offset(extension.directory_offset.0));
        }
        let mut bytes = vec![0u8; extension.directory_size as usize];
        self.storage().read_exact_at(MemMut::from(&mut bytes[..]), extension.directory_offset.0)?;
        let mut records = Vec::new();
        let mut rest = bytes.as_slice();
        for _ in 0..extension.count {
            let (entry, length) = BitmapDirectoryEntry::parse(rest).map_err(corrupt)?;
            entry.validate(size, self.geometry()).map_err(corrupt)?;
            rest = rest.get(length..).unwrap_or_default();
            records.push(BitmapRecord { entry });
        }
        if !rest.is_empty() {
            let message = format!("the bitmap directory has {} bytes behind its last entry", rest.len());
            return Err(self.error(ErrorKind::Corrupt, message).with_field("bitmap_directory_size"));
        }
        Ok(records)
    }
}
