//! Reading bitmaps: directory, tables and bits.

use qcow2_format::bitmap::{BitmapCluster, BitmapDirectoryEntry, BitmapTableEntry};

use super::qcow2::Qcow2;
use crate::invalid::invalid;
use crate::tracker::Bits;
use crate::{Error, ErrorKind, MemMut, Result, StorageExt, check_limit};

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
            let error = self.storage().located(invalid(e, ErrorKind::Corrupt));
            error.with_offset(extension.directory_offset.0)
        };
        extension.validate(self.geometry().cluster_size()).map_err(corrupt)?;
        let limits = self.limits();
        check_limit("nb_bitmaps", extension.count.into(), limits.max_bitmaps.into())
            .and_then(|()| {
                check_limit("bitmap_directory_size", extension.directory_size, limits.max_metadata_bytes)
            })
            .map_err(|e| self.storage().located(e))?;
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
    /// Reads the table of a bitmap whose directory entry is validated.
    pub(crate) fn bitmap_table(&self, entry: &BitmapDirectoryEntry) -> Result<Vec<BitmapCluster>> {
        let bytes = u64::from(entry.table_size) * 8;
        let end = entry.table_offset.0.saturating_add(bytes);
        if bytes > self.limits().max_metadata_bytes || end > self.storage().size()? {
            let message = format!(
                "the bitmap table at {} with {bytes} bytes is too large or outside the file",
                entry.table_offset
            );
            return Err(self.error(ErrorKind::Corrupt, message).with_field("bitmap_table_offset"));
        }
        let mut table = vec![0u8; bytes as usize];
        self.storage().read_exact_at(MemMut::from(&mut table[..]), entry.table_offset.0)?;
        let entries = BitmapTableEntry::entries(&table).map(|entry| entry.decode(self.geometry()));
        let table: std::result::Result<_, _> = entries.collect();
        table.map_err(|e| self.storage().located(invalid(e, ErrorKind::Corrupt)))
    }

    /// Loads the bits of a bitmap.
    pub(crate) fn stored_bits(&self, entry: &BitmapDirectoryEntry) -> Result<Bits> {
        let size = self.virtual_size();
        let bits = Bits::new(size, entry.granularity_bits, self.limits().max_memory)?;
        let cluster_size = self.geometry().cluster_size();
        let mut bytes = vec![0u8; self.geometry().cluster_len()];
        for (index, cluster) in self.bitmap_table(entry)?.into_iter().enumerate() {
            let start = index as u64 * cluster_size;
            match cluster {
                BitmapCluster::Zeroes => {}
                BitmapCluster::Ones => bits.set_bits(start * 8, (start + cluster_size) * 8),
                BitmapCluster::Data(host) => {
                    self.storage().read_exact_at(MemMut::from(&mut bytes[..]), host.0)?;
                    bits.take_stored(start, &bytes);
                }
            }
        }
        bits.trim();
        bits.note_stored();
        Ok(bits)
    }
}
