//! An open image: what is special about Parallels.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use qcow2_core::blocks::{BlockLayer, Layout, OpenOptions, Scheme};
use qcow2_core::check::{CheckReport, Repair};
use qcow2_core::layer::SegmentKind;
use qcow2_core::{Error, ErrorKind, Job, Layer, Mem, MemMut, Result, Storage, StorageExt, check_limit};

use crate::check::check;
use crate::extension;
use crate::structures::{
    DATA_OFF, EXT_OFF, HEADER_LENGTH, Header, IN_USE, IN_USE_OFFSET, MAX_BAT_ENTRIES, SECTOR, SIZE_FIELDS,
    SIZE_FIELDS_END,
};

/// An open image.
pub type Parallels = BlockLayer<ParallelsScheme>;

/// What is special about Parallels.
#[derive(Debug)]
pub struct ParallelsScheme {
    /// As the file has it, but for the mark of an image that is in use: it stays as it was read.
    header: Mutex<Header>,
    /// The file has a format extension, of the disk as it was when the image was opened.
    extended: AtomicBool,
    layout: Layout,
}

/// Opens the image in `storage`.
///
/// # Errors
/// As [`Header::parse`]; `Limit`; `Corrupt` for a BAT that is not in the file; `Io`.
pub fn open(storage: Arc<dyn Storage>, options: &OpenOptions) -> Result<Parallels> {
    let mut bytes = [0; HEADER_LENGTH];
    let got = storage.read_up_to_at(MemMut::from(&mut bytes[..]), 0)?;
    let header = Header::parse(bytes.get(..got).unwrap_or_default()).map_err(|e| storage.located(e))?;
    let scheme = ParallelsScheme::new(header, storage.size()?);
    check_limit("size", scheme.layout.size, options.max_virtual_size)
        .and_then(|()| check_limit("BAT", scheme.layout.table_bytes(), options.max_metadata_bytes))
        .map_err(|e| storage.located(e))?;
    Parallels::new(storage, scheme, options.cache_bytes)
}

impl ParallelsScheme {
    pub(crate) fn new(header: Header, length: u64) -> Self {
        Self {
            layout: header.layout(length),
            extended: AtomicBool::new(header.ext_off != 0),
            header: Mutex::new(header),
        }
    }

    /// The header as the file has it; the mark as it was read.
    #[must_use]
    pub fn header(&self) -> Header {
        self.header.lock().clone()
    }

    fn write_mark(storage: &dyn Storage, mark: u32) -> Result<()> {
        storage.write_all_at(Mem::from(&mark.to_le_bytes()[..]), IN_USE_OFFSET)?;
        storage.flush()
    }

    /// The image is in nobody's use. With an extension it has the mark that it had: the extension counts by that.
    pub(crate) fn clear_mark(&self, storage: &dyn Storage) -> Result<()> {
        let mut header = self.header.lock();
        let mark = if header.ext_off == 0 { 0 } else { header.in_use };
        Self::write_mark(storage, mark)?;
        header.in_use = mark;
        Ok(())
    }

    /// The extension is dropped, durably: its bitmaps are wrong as soon as the disk is another one.
    ///
    /// # Errors
    /// As [`extension::check_droppable`]; `Io`.
    pub(crate) fn drop_extension(&self, storage: &dyn Storage) -> Result<()> {
        if !self.extended.load(Ordering::Acquire) {
            return Ok(());
        }
        let mut header = self.header.lock();
        if header.ext_off != 0 {
            extension::check_droppable(storage, &header)?;
            storage.write_all_at(Mem::from(&[0; 8][..]), EXT_OFF as u64)?;
            storage.flush()?;
            header.ext_off = 0;
        }
        self.extended.store(false, Ordering::Release);
        Ok(())
    }

    /// Says where the data begins.
    pub(crate) fn write_data_start(&self, storage: &dyn Storage) -> Result<()> {
        let sectors = u32::try_from(self.layout.data / SECTOR).unwrap_or(u32::MAX);
        self.header.lock().data_off = sectors;
        storage.write_all_at(Mem::from(&sectors.to_le_bytes()[..]), DATA_OFF as u64)
    }
}

impl Scheme for ParallelsScheme {
    fn format(&self) -> &'static str {
        "parallels"
    }

    fn entry_name(&self) -> &'static str {
        "BAT entry"
    }

    fn layout(&self) -> &Layout {
        &self.layout
    }

    fn absent(&self) -> SegmentKind {
        SegmentKind::Unallocated(None)
    }

    fn check(
        layer: &Parallels,
        repair: Option<Repair>,
        max_findings: usize,
        job: &Job,
    ) -> Result<CheckReport> {
        check(layer, repair, max_findings, job)
    }

    /// As QEMU: what was not closed is repaired first, and is marked as in use from here on.
    fn begin(layer: &Parallels) -> Result<()> {
        let (scheme, storage) = (layer.scheme(), &**layer.storage());
        let header = scheme.header();
        if header.ext_off != 0 {
            extension::check_droppable(storage, &header)?;
        }
        if header.is_in_use() || !header.has_data_start(storage.size()?) {
            check(layer, Some(Repair::All), 0, &Job::new())?;
        }
        Self::write_mark(storage, IN_USE)
    }

    fn change(&self, storage: &dyn Storage) -> Result<()> {
        self.drop_extension(storage)
    }

    fn resized(&self, size: u64) -> Result<()> {
        let header = self.header.lock();
        let sectors = if header.counts_clusters { i64::MAX as u64 / SECTOR } else { u32::MAX.into() };
        let most = sectors
            .saturating_mul(SECTOR)
            .min(u64::from(MAX_BAT_ENTRIES).saturating_mul(header.cluster_size()));
        if size <= most {
            return Ok(());
        }
        let message = format!("the image has a disk of at most {most} bytes, not of {size}");
        Err(Error::new(ErrorKind::Limit, message).with_field("size"))
    }

    /// The fields lie in one sector. The mark is between them.
    fn resize(&self, storage: &dyn Storage, size: u64, entries: u32, _: u64) -> Result<()> {
        let mut header = self.header.lock();
        let resized = Header {
            bat_entries: entries,
            nb_sectors: size / SECTOR,
            data_off: u32::try_from(self.layout.data / SECTOR).unwrap_or(u32::MAX),
            ..header.clone()
        };
        let bytes = Header { in_use: IN_USE, ..resized.clone() }.to_bytes();
        let fields = bytes.get(SIZE_FIELDS..SIZE_FIELDS_END).unwrap_or_default();
        storage.write_all_at(Mem::from(fields), SIZE_FIELDS as u64)?;
        *header = resized;
        Ok(())
    }

    /// Nothing is behind the last cluster of an image that was closed.
    fn finish(&self, storage: &dyn Storage, end: Option<u64>) -> Result<()> {
        if let Some(end) = end
            && !storage.traits().block_device
            && storage.size()? > end
        {
            storage.resize(end)?;
        }
        self.clear_mark(storage)
    }
}
