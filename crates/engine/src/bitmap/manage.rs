//! Adding, removing and changing bitmaps.

use std::ops::Range;
use std::sync::Arc;

use qcow2_format::HostOffset;
use qcow2_format::bitmap::{BitmapDirectoryEntry, BitmapFlags, DIRTY_TRACKING};
use qcow2_format::limits::{BITMAP_GRANULARITY_BITS, MAX_BITMAP_NAME};

use super::directory::NewEntry;
use crate::image::{Image, Qcow2};
use crate::maintenance::Session;
use crate::tracker::{Bits, Tracked};
use crate::{Error, ErrorKind, Job, Result};

impl Image {
    /// Adds a clean bitmap. `granularity_bits` is the log2 of the bytes per bit; without it QEMU's default: the cluster
    /// size, between 4 KiB and 64 KiB.
    ///
    /// # Errors
    /// `InvalidArgument` for a bad or taken name or a granularity outside 9..=31; `UnsupportedFeature` in version 2 and
    /// for a disk of no bytes;
    /// `Limit`; else as [`Image::write_at`].
    pub fn add_bitmap(
        &self,
        name: impl AsRef<[u8]>,
        granularity_bits: Option<u8>,
        enabled: bool,
    ) -> Result<()> {
        let name = name.as_ref();
        let session = begin(self)?;
        let image = session.image;
        if name.is_empty() || name.len() > MAX_BITMAP_NAME {
            let message =
                format!("a bitmap's name must have 1 to {MAX_BITMAP_NAME} bytes, not {}", name.len());
            return Err(image.error(ErrorKind::InvalidArgument, message));
        }
        let default = image.geometry().cluster_bits().clamp(12, 16) as u8;
        let granularity_bits = granularity_bits.unwrap_or(default);
        if !BITMAP_GRANULARITY_BITS.contains(&granularity_bits) {
            let message =
                format!("a granularity of 2^{granularity_bits} bytes is not between 512 bytes and 2 GiB");
            return Err(image.error(ErrorKind::InvalidArgument, message));
        }
        let bits = Bits::new(image.virtual_size(), granularity_bits, image.limits().max_memory)?;
        session.insert_bitmap(name, bits, enabled)
    }

    /// Adds a bitmap with these bits, of a disk of this size.
    ///
    /// # Errors
    /// As [`Image::add_bitmap`].
    pub(super) fn insert_bitmap(&self, name: &[u8], bits: Bits, enabled: bool) -> Result<()> {
        begin(self)?.insert_bitmap(name, bits, enabled)
    }

    /// Removes a bitmap, also an inconsistent one.
    ///
    /// # Errors
    /// `NoBitmap`; else as [`Image::write_at`].
    pub fn remove_bitmap(&self, name: impl AsRef<[u8]>) -> Result<()> {
        let name = name.as_ref();
        let session = begin(self)?;
        let image = session.image;
        let removed = session.replace_bitmaps(|mut entries| {
            let before = entries.len();
            entries.retain(|e| e.entry.name != name);
            if entries.len() == before { Err(missing(image, name)) } else { Ok(entries) }
        });
        match removed {
            Err(full) if full.is_no_space() => session.remove_bitmap_in_place(name, full)?,
            done => done?,
        }
        session.writer.bitmaps.remove(name);
        Ok(())
    }

    /// Removes all bitmaps at once, also inconsistent ones. A disk that can have none has none.
    ///
    /// # Errors
    /// As [`Image::write_at`].
    pub fn remove_all_bitmaps(&self) -> Result<()> {
        if self.top_qcow2().is_none_or(|top| top.header().version < 3) {
            return Ok(());
        }
        let session = begin(self)?;
        if !session.image.bitmaps()?.is_empty() {
            session.replace_bitmaps(|_| Ok(Vec::new()))?;
        }
        session.writer.bitmaps.clear();
        Ok(())
    }

    /// Clears all bits of a bitmap.
    ///
    /// # Errors
    /// `NoBitmap`; `Corrupt` for an inconsistent one; else as [`Image::write_at`].
    pub fn clear_bitmap(&self, name: impl AsRef<[u8]>) -> Result<()> {
        let name = name.as_ref();
        let session = begin(self)?;
        let (bits, enabled) = session.bits_of(name)?;
        // Others: an error leaves those in memory as they are.
        let clean = Bits::new(bits.size(), bits.granularity_bits(), session.image.limits().max_memory)?;
        let clean = Arc::new(clean);
        match session.keep(name, Arc::clone(&clean), enabled) {
            Err(full) if full.is_no_space() => session.clear_in_place(name, &clean, enabled, full),
            kept => kept,
        }
    }

    /// Starts or stops recording guest changes in a bitmap.
    ///
    /// # Errors
    /// As [`Image::clear_bitmap`].
    pub fn enable_bitmap(&self, name: impl AsRef<[u8]>, enabled: bool) -> Result<()> {
        let name = name.as_ref();
        let session = begin(self)?;
        let (bits, _) = session.bits_of(name)?;
        session.keep(name, bits, enabled)
    }

    /// Marks in bitmap `target` what is dirty in `sources`, bits of this or another image.
    ///
    /// # Errors
    /// As [`Image::clear_bitmap`]; `InvalidArgument` for a source of a disk of another size.
    pub fn merge_bitmaps(&self, target: impl AsRef<[u8]>, sources: &[Bits]) -> Result<()> {
        self.merge_bitmaps_as(&Job::new(), target, sources)
    }

    /// As [`Image::merge_bitmaps`]. Cancelled, the bitmap is what it was.
    ///
    /// # Errors
    /// As [`Image::merge_bitmaps`], and `Aborted`.
    pub fn merge_bitmaps_as(&self, job: &Job, target: impl AsRef<[u8]>, sources: &[Bits]) -> Result<()> {
        let target = target.as_ref();
        let session = refuse_old(Session::begin_as(self, job)?)?;
        let (bits, enabled) = session.bits_of(target)?;
        if let Some(odd) = sources.iter().find(|source| source.size() != bits.size()) {
            let message = format!(
                "a bitmap of a disk of {} bytes cannot be merged into one of {}",
                odd.size(),
                bits.size()
            );
            return Err(session.image.error(ErrorKind::InvalidArgument, message));
        }
        // Into others: an error leaves those in memory as they are.
        let merged = bits.resized(bits.size(), session.image.limits().max_memory)?;
        for source in sources {
            session.checkpoint()?;
            merged.merge(source);
        }
        session.keep(target, Arc::new(merged), enabled)
    }

    /// A copy of a bitmap's bits as they are now.
    ///
    /// # Errors
    /// `NoBitmap`; `Corrupt` for an inconsistent bitmap; `Io`.
    pub fn bitmap_bits(&self, name: impl AsRef<[u8]>) -> Result<Bits> {
        let name = name.as_ref();
        let image = qcow2(self)?;
        // Nobody frees what is read, nor gives it to others.
        let _shared = image.open_writer().map(|writer| writer.gate.read());
        if let Some(tracked) = image.open_writer().and_then(|w| w.bitmaps.find(name)) {
            return tracked.bits.resized(tracked.bits.size(), image.limits().max_memory);
        }
        load_consistent(image, name).map(|(bits, _)| bits)
    }

    /// The dirty guest bytes of a bitmap as ranges, in order.
    ///
    /// # Errors
    /// As [`Image::bitmap_bits`].
    pub fn bitmap_extents(&self, name: impl AsRef<[u8]>) -> Result<Vec<Range<u64>>> {
        Ok(self.bitmap_bits(name)?.extents().collect())
    }
}

fn qcow2(disk: &Image) -> Result<&Qcow2> {
    disk.top_qcow2().ok_or_else(|| {
        let message = format!("a {} disk has no persistent bitmaps", disk.format());
        Error::new(ErrorKind::UnsupportedFeature, message)
    })
}

fn begin(disk: &Image) -> Result<Session<'_>> {
    refuse_old(Session::begin(disk)?)
}

fn refuse_old(session: Session<'_>) -> Result<Session<'_>> {
    if session.image.header().version < 3 {
        let message = "a version 2 image cannot have persistent bitmaps";
        return Err(session.image.error(ErrorKind::UnsupportedFeature, message));
    }
    Ok(session)
}

fn missing(image: &Qcow2, name: &[u8]) -> Error {
    let name = String::from_utf8_lossy(name);
    image.error(ErrorKind::NoBitmap, format!("no bitmap is named '{name}'"))
}

fn load_consistent(image: &Qcow2, name: &[u8]) -> Result<(Bits, bool)> {
    let records = image.bitmaps()?;
    let record = records.iter().find(|r| r.entry.name == name);
    let entry = &record.ok_or_else(|| missing(image, name))?.entry;
    if entry.flags.contains(BitmapFlags::IN_USE) {
        let name = String::from_utf8_lossy(name);
        let message = format!("the bitmap '{name}' is inconsistent: it can only be removed");
        return Err(image.error(ErrorKind::Corrupt, message));
    }
    Ok((image.stored_bits(entry)?, entry.flags.contains(BitmapFlags::AUTO)))
}

impl Session<'_> {
    fn insert_bitmap(&self, name: &[u8], bits: Bits, enabled: bool) -> Result<()> {
        if bits.size() == 0 {
            return Err(self.image.no_bitmap_of_no_bytes(name));
        }
        let bits = Arc::new(bits);
        self.replace_bitmaps(|mut entries| {
            if entries.iter().any(|e| e.entry.name == name) {
                let name = String::from_utf8_lossy(name);
                let message = format!("a bitmap named '{name}' exists already");
                return Err(self.image.error(ErrorKind::InvalidArgument, message));
            }
            let flags = if enabled { BitmapFlags::AUTO | BitmapFlags::IN_USE } else { BitmapFlags::empty() };
            let entry = BitmapDirectoryEntry {
                table_offset: HostOffset(0),
                table_size: 0,
                flags,
                kind: DIRTY_TRACKING,
                granularity_bits: bits.granularity_bits(),
                name: name.to_vec(),
                extra_data: Vec::new(),
            };
            entries.push(NewEntry { entry, bits: Some(Arc::clone(&bits)), former: None });
            Ok(entries)
        })?;
        bits.note_stored();
        if enabled {
            self.writer.bitmaps.put(Tracked { name: name.to_vec(), bits, enabled });
        }
        Ok(())
    }

    /// The bits of a consistent bitmap, and whether it is enabled.
    fn bits_of(&self, name: &[u8]) -> Result<(Arc<Bits>, bool)> {
        match self.writer.bitmaps.find(name) {
            Some(tracked) => Ok((tracked.bits, tracked.enabled)),
            None => load_consistent(self.image, name).map(|(bits, enabled)| (Arc::new(bits), enabled)),
        }
    }

    /// Stores changed bits, and follows guest changes with them where the bitmap is enabled.
    fn keep(&self, name: &[u8], bits: Arc<Bits>, enabled: bool) -> Result<()> {
        self.replace_bitmaps(|mut entries| {
            if let Some(entry) = entries.iter_mut().find(|e| e.entry.name == name) {
                entry.entry.flags.set(BitmapFlags::AUTO, enabled);
                entry.entry.flags.set(BitmapFlags::IN_USE, enabled);
                entry.bits = Some(Arc::clone(&bits));
            }
            Ok(entries)
        })?;
        bits.note_stored();
        if enabled {
            self.writer.bitmaps.put(Tracked { name: name.to_vec(), bits, enabled });
        } else {
            self.writer.bitmaps.remove(name);
        }
        Ok(())
    }
}
