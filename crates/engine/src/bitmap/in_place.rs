//! Removing and clearing bitmaps where there is no space for a directory or a table beside those in use.

use std::sync::Arc;

use qcow2_format::HostOffset;
use qcow2_format::bitmap::BitmapDirectoryEntry;
use qcow2_format::header::extension::BitmapsExtension;

use crate::maintenance::{SECTOR, Session};
use crate::tracker::{Bits, Tracked};
use crate::{Error, Result};

impl Session<'_> {
    /// Takes a bitmap out of the directory, for whose successor there is no space: `full` says so.
    pub(super) fn remove_bitmap_in_place(&self, name: &[u8], full: Error) -> Result<()> {
        let Some(directory) = self.image.bitmap_directory() else { return Err(full) };
        let former = self.image.bitmaps()?;
        let mut start = 0;
        let mut found: Option<&BitmapDirectoryEntry> = None;
        for record in &former {
            if record.entry.name == name {
                found = Some(&record.entry);
                break;
            }
            start += record.entry.encoded_length() as u64;
        }
        let Some(entry) = found else { return Err(full) };
        let gone = start..start + entry.encoded_length() as u64;
        let (table, length) = (directory.directory_offset.0, directory.directory_size);
        let Some(place) = self.table_without(table, length, &gone)? else {
            let why = "nor has the file any for a bitmap directory; the last bitmap of the list can be removed without";
            return Err(full.because(why));
        };
        let now = length - (gone.end - gone.start);
        self.switch_directory(Some(BitmapsExtension {
            count: directory.count.saturating_sub(1),
            directory_size: now,
            directory_offset: HostOffset(place),
            ..directory
        }))?;
        self.free_stored(entry)?;
        self.free_rest_of_table(table, length, place, now);
        self.barrier()
    }

    /// Clears the stored bits of a bitmap. `clean` are those in memory from then on, where they are kept there.
    pub(super) fn clear_in_place(
        &self,
        name: &[u8],
        clean: &Arc<Bits>,
        enabled: bool,
        full: Error,
    ) -> Result<()> {
        let former = self.image.bitmaps()?;
        let Some(record) = former.iter().find(|record| record.entry.name == name) else {
            return Err(full);
        };
        let bytes = record.entry.table_size as usize * 8;
        if bytes as u64 > SECTOR {
            return Err(
                full.because("the bitmap's table is too long to be cleared where it is: remove the bitmap")
            );
        }
        let table = self.image.bitmap_table(&record.entry)?;
        let place = record.entry.table_offset.0;
        let mut old = vec![0u8; bytes];
        self.read(place, &mut old)?;
        // Nothing but zeroes, as the format has it.
        self.write_changed(place, &old, &vec![0; bytes])?;
        self.barrier()?;
        self.free_bits(&table)?;
        self.barrier()?;
        clean.note_stored();
        if self.writer.bitmaps.tracks(name) {
            let bits = Arc::clone(clean);
            self.writer.bitmaps.put(Tracked { name: name.to_vec(), bits, enabled });
        }
        Ok(())
    }
}
