//! Disks to run operations on: images of every geometry in memory, filled with sectors that carry their identity, and
//! opened for writing with everything that they name.

use std::sync::Arc;

use qcow2_engine::storage::{Access, FileStorage};
use qcow2_engine::{Image, Layer, Mem, MemMut, OpenOptions, Qcow2, Raw, Result, Storage, WriteOptions};

use crate::forge::codec;
use crate::matrix::{Backing, DataFile, Geometry};
use crate::ops::{Menu, SECTOR, Target, stamped};
use crate::recorder::RecordingStorage;
use crate::{Forge, Rng, Sparse};

impl Target for Image {
    fn size(&self) -> u64 {
        self.virtual_size()
    }
    fn read(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        self.read_at(MemMut::from(out), offset)
    }
    fn write(&self, offset: u64, data: &[u8]) -> Result<()> {
        self.write_at(Mem::from(data), offset)
    }
    fn write_compressed(&self, offset: u64, data: &[u8]) -> Result<()> {
        self.write_compressed_at(Mem::from(data), offset)
    }
    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> Result<()> {
        Image::write_zeroes(self, offset, len, unmap)
    }
    fn discard(&self, offset: u64, len: u64) -> Result<()> {
        Image::discard(self, offset, len)
    }
    fn flush(&self) -> Result<()> {
        Image::flush(self)
    }
    fn grow(&self, size: u64) -> Result<()> {
        self.resize(size)
    }
    fn shrink(&self, size: u64) -> Result<()> {
        self.resize_with(size, qcow2_engine::ResizeOptions { shrink: true, ..Default::default() })
    }
    fn close(&self) -> Result<()> {
        Image::close(self)
    }
}

/// How an image of the rig is opened.
#[derive(Debug, Clone, Default)]
pub struct Opening {
    /// For reading.
    pub read: OpenOptions,
    /// For writing; read-only without.
    pub write: Option<WriteOptions>,
}

/// An image with its data file and backing file, all in memory.
#[derive(Debug, Clone)]
pub struct Rig {
    /// How it is laid out.
    pub geometry: Geometry,
    /// The image.
    pub image: Sparse,
    /// Its external data file.
    pub data_file: Option<Sparse>,
    /// Its backing file: a raw disk or a qcow2 image.
    pub backing: Option<(Sparse, bool)>,
}

/// Generation of what the backing file contains.
pub const IN_BACKING: u32 = 1;
/// Generation of what a snapshot contains.
pub const IN_SNAPSHOT: u32 = 2;
/// Generation of what the active disk contains at the start.
pub const AT_START: u32 = 4;

impl Geometry {
    /// The operations that an image of this geometry has.
    pub fn menu(&self) -> Menu {
        let mut menu = Menu::new(self.cluster_size, self.size / SECTOR * SECTOR);
        menu.compression =
            self.data_file == DataFile::Internal && self.refcount_bits >= 8 && !self.door.is_some();
        // Snapshots of version 2 do not say the size of their disk.
        menu.grow = self.version >= 3 || !self.snapshots();
        menu
    }
}

impl Rig {
    /// An image with every kind of cluster, and with a snapshot where the geometry has them.
    pub fn forge(geometry: &Geometry, seed: u64) -> Self {
        let mut rng = Rng::new(seed ^ 0xf0);
        let bits = geometry.cluster_size.trailing_zeros();
        let mut forge = Forge::new(geometry.version, bits, geometry.size)
            .refcount_order(geometry.refcount_bits.trailing_zeros());
        if geometry.extended_l2 {
            forge = forge.extended_l2();
        }
        if geometry.zstd {
            forge = forge.zstd();
        }
        forge = forge.behind(geometry.door);
        match geometry.data_file {
            DataFile::Internal => {}
            DataFile::External => forge = forge.external("data.raw", false),
            DataFile::ExternalRaw => forge = forge.external("data.raw", true),
        }
        let backing = backing(geometry);
        if let Some((_, qcow2)) = &backing {
            forge = forge.backing("backing", if *qcow2 { "qcow2" } else { "raw" });
        }
        let clusters = geometry.size / geometry.cluster_size;
        if geometry.snapshots() {
            fill(&mut forge, geometry, &mut rng, IN_SNAPSHOT, clusters / 3);
            forge.snapshot("1", "first", geometry.size);
        }
        fill(&mut forge, geometry, &mut rng, AT_START, clusters / 4);
        let built = forge.build();
        let data_file = (geometry.data_file != DataFile::Internal).then_some(built.data_file);
        Self { geometry: geometry.clone(), image: built.bytes, data_file, backing }
    }

    /// The files that operations change: the image, and its data file.
    pub fn files(&self) -> Vec<Sparse> {
        std::iter::once(self.image.clone()).chain(self.data_file.clone()).collect()
    }

    /// The operations that this geometry has.
    pub fn menu(&self) -> Menu {
        self.geometry.menu()
    }

    /// Opens the disk on these files, in the order of [`Rig::files`].
    ///
    /// # Errors
    /// The engine's.
    pub fn open(&self, files: &[Arc<dyn Storage>], opening: &Opening) -> Result<Image> {
        let data_door = self.geometry.door.open().or_else(|| opening.read.data_door.clone());
        let read = OpenOptions { data_door, allow_weak: true, ..opening.read.clone() };
        let mut qcow2 = Qcow2::open(files[0].clone(), &read)?;
        if let Some(data_file) = files.get(1) {
            qcow2.set_data_file(data_file.clone());
        }
        if let Some(write) = &opening.write {
            qcow2.enable_writing(*write)?;
        }
        let mut layers: Vec<Box<dyn Layer>> = vec![Box::new(qcow2)];
        if let Some((bytes, is_qcow2)) = &self.backing {
            let storage: Arc<dyn Storage> = Arc::new(RecordingStorage::plain(bytes.clone()));
            layers.push(match is_qcow2 {
                true => Box::new(Qcow2::open(storage, &OpenOptions::default())?) as Box<dyn Layer>,
                false => Box::new(Raw::new(storage)?) as Box<dyn Layer>,
            });
        }
        Image::new(layers)
    }

    /// As `open`, on files in memory that record nothing.
    ///
    /// # Errors
    /// The engine's.
    pub fn open_state(&self, files: &[Sparse], opening: &Opening) -> Result<Image> {
        let storages: Vec<_> =
            files.iter().map(|f| Arc::new(RecordingStorage::plain(f.clone())) as Arc<dyn Storage>).collect();
        self.open(&storages, opening)
    }
}

/// Stripes of data and of holes, on no cluster's boundary.
fn backing(geometry: &Geometry) -> Option<(Sparse, bool)> {
    let size = geometry.size / SECTOR * SECTOR;
    let (len, qcow2) = match geometry.backing {
        Backing::None => return None,
        Backing::ShorterRaw => (size / 2 / SECTOR * SECTOR, false),
        Backing::EqualQcow2 => (size, true),
        Backing::LongerQcow2 => (size + 3 * geometry.cluster_size, true),
    };
    let stripe = 13 * SECTOR;
    let holes = |at: u64| at / stripe % 3 == 2;
    if !qcow2 {
        let mut raw = Sparse::new(len);
        for at in (0..len).step_by(stripe as usize).filter(|at| !holes(*at)) {
            raw.write(at, &stamped(at, stripe.min(len - at), IN_BACKING));
        }
        return Some((raw, false));
    }
    let mut forge = Forge::new(3, 13, len);
    for cluster in 0..len.div_ceil(8192) {
        let at = cluster * 8192;
        if !holes(at) {
            forge.data(cluster, &stamped(at, 8192.min(len - at), IN_BACKING));
        }
    }
    Some((forge.build().bytes, true))
}

/// Gives `count` random clusters each a kind in turn.
fn fill(forge: &mut Forge, geometry: &Geometry, rng: &mut Rng, generation: u32, count: u64) {
    let c = geometry.cluster_size;
    let clusters = geometry.size / c;
    for n in 0..count {
        let cluster = rng.below(clusters);
        let bytes = stamped(cluster * c, c, generation);
        // Only where the format can say it: version 2 has no zero flag.
        match n % 5 {
            1 if geometry.version >= 3 => forge.zero_plain(cluster),
            2 if geometry.version >= 3 => {
                forge.zero_allocated(cluster, &bytes);
            }
            3 if geometry.compression() && geometry.refcount_bits >= 8 => {
                let payload = if geometry.zstd { codec::zstd(&bytes, 1) } else { codec::deflate(&bytes) };
                forge.compressed(cluster, &payload);
            }
            4 if geometry.extended_l2 => {
                forge.data(cluster, &bytes);
                // Half data; of the rest, some zero and some from below.
                forge.subclusters(cluster, 0x0f0f_0000_0000_ffff);
            }
            _ => {
                forge.data(cluster, &bytes);
            }
        }
    }
}

/// Opens a chain of files from `path` down, the top for writing, names taken relative to the file that has them.
///
/// # Errors
/// The engine's.
pub fn open_file(path: &std::path::Path, opening: &Opening) -> Result<Image> {
    let access = if opening.write.is_some() { Access::ReadWrite } else { Access::ReadOnly };
    let mut qcow2 = Qcow2::open(Arc::new(FileStorage::open(path, access)?), &opening.read)?;
    let folder = path.parent().unwrap_or(path);
    let name = |bytes: &[u8]| folder.join(String::from_utf8_lossy(bytes).into_owned());
    let references = qcow2.references();
    if let Some(data_file) = references.data_file.and_then(|d| d.filename) {
        qcow2.set_data_file(Arc::new(FileStorage::open(name(&data_file), access)?));
    }
    if let Some(write) = &opening.write {
        qcow2.enable_writing(*write)?;
    }
    let mut layers: Vec<Box<dyn Layer>> = vec![Box::new(qcow2)];
    if let Some(backing) = references.backing {
        let storage = Arc::new(FileStorage::open(name(&backing.filename), Access::ReadOnly)?);
        layers.push(match backing.format.as_deref() {
            Some(b"qcow2") => Box::new(Qcow2::open(storage, &OpenOptions::default())?) as Box<dyn Layer>,
            _ => Box::new(Raw::new(storage)?) as Box<dyn Layer>,
        });
    }
    Image::new(layers)
}
