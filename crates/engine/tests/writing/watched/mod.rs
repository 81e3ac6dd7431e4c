//! Images whose files remember what was written to them, and disks that are written with a mark.

use std::ops::Range;
use std::sync::Arc;

use qcow2_engine::compact::CompactOptions;
use qcow2_engine::create::{CreateOptions, Preallocation, create};
use qcow2_engine::{
    DataDoor, Discard, Image, Job, Layer, Mem, MemMut, OpenOptions, Qcow2, ResizeOptions, Storage,
    WriteOptions,
};
use qcow2_testkit::Sparse;
use qcow2_testkit::audit::audit;
use qcow2_testkit::model::assert_same;
use qcow2_testkit::recorder::{Change, Journal, RecordingStorage};

const MARK: &[u8; 16] = b"a plain mark 016";
pub(crate) const MIB: u64 = 1 << 20;
pub(crate) const REWRITE: CompactOptions = CompactOptions { rewrite: true, zeroes: true, dry_run: false };

pub(crate) fn marks(length: u64) -> Vec<u8> {
    MARK.repeat(length as usize / 16 + 1)[..length as usize].to_vec()
}

pub(crate) fn bytes_of(image: &Image) -> Vec<u8> {
    let mut bytes = vec![0xa5; image.virtual_size() as usize];
    image.read_at(MemMut::from(&mut bytes[..]), 0).unwrap();
    bytes
}

/// An image whose files remember all that was ever written to them.
pub(crate) struct Watched {
    pub(crate) journal: Arc<Journal>,
    pub(crate) files: Vec<Arc<RecordingStorage>>,
    pub(crate) door: Option<Arc<dyn DataDoor>>,
}

impl Watched {
    /// Empty files for an image with these options.
    pub(crate) fn files(create: &CreateOptions) -> Self {
        let journal = Journal::new();
        let count = 1 + usize::from(create.data_file.is_some());
        let file = |number| Arc::new(RecordingStorage::new(Sparse::new(0), &journal, number));
        let files = (0..count).map(file).collect();
        Self { journal, files, door: create.data_door.clone() }
    }

    pub(crate) fn create(options: &CreateOptions) -> Self {
        let made = Self::files(options);
        create(made.storage(), made.data_file(), options, &Job::new()).unwrap();
        made
    }

    pub(crate) fn storage(&self) -> Arc<dyn Storage> {
        self.files[0].clone()
    }

    pub(crate) fn data_file(&self) -> Option<Arc<dyn Storage>> {
        self.files.get(1).map(|file| file.clone() as Arc<dyn Storage>)
    }

    pub(crate) fn layer(&self, writable: bool) -> Box<dyn Layer> {
        let options =
            OpenOptions { data_door: self.door.clone(), allow_weak: true, ..OpenOptions::default() };
        let mut qcow2 = Qcow2::open(self.storage(), &options).unwrap();
        if let Some(data_file) = self.data_file() {
            qcow2.set_data_file(data_file);
        }
        if writable {
            let write = WriteOptions { discard: Discard::Unmap, ..WriteOptions::default() };
            qcow2.enable_writing(write).unwrap();
        }
        Box::new(qcow2)
    }

    pub(crate) fn open(&self) -> Image {
        Image::new(vec![self.layer(true)]).unwrap()
    }

    /// Whether a mark was written to a file since the last time, or is in one.
    pub(crate) fn has_marks(&self) -> bool {
        let written = self.journal.take().1.into_iter().any(|entry| match entry.change {
            Change::Write { data, .. } => contains_mark(&data),
            _ => false,
        });
        written || self.files.iter().any(|file| contains_mark(&file.snapshot().to_vec()))
    }

    /// Read anew, it is `disk`; the image is sound.
    pub(crate) fn assert_holds(&self, disk: &[u8], what: &str) {
        let image = Image::new(vec![self.layer(false)]).unwrap();
        assert_same(disk, &bytes_of(&image), 0, what);
        let findings = audit(&self.files[0].snapshot());
        assert!(findings.is_sound(), "{what}: {findings:#?}");
    }
}

/// At any offset: sectors may have been moved, but what is in them keeps its place.
fn contains_mark(bytes: &[u8]) -> bool {
    bytes.chunks_exact(16).any(|part| part == MARK)
}

/// A disk under test, and what it must read as.
pub(crate) struct Run {
    pub(crate) what: String,
    pub(crate) image: Image,
    pub(crate) disk: Vec<u8>,
}

impl Run {
    pub(crate) fn write(&mut self, at: u64, bytes: &[u8]) {
        self.image.write_at(Mem::from(bytes), at).unwrap_or_else(|e| panic!("{}: {e:?}", self.what));
        self.disk[at as usize..][..bytes.len()].copy_from_slice(bytes);
    }
    pub(crate) fn mark(&mut self, at: u64, length: u64) {
        // The marks are where they are on the disk: sixteen bytes each.
        let whole = marks(length + 16);
        self.write(at, &whole[(at % 16) as usize..][..length as usize]);
    }
    pub(crate) fn zero(&mut self, at: u64, length: u64, unmap: bool) {
        self.image.write_zeroes(at, length, unmap).unwrap();
        self.disk[at as usize..(at + length) as usize].fill(0);
    }
    pub(crate) fn discard(&mut self, range: Range<u64>) {
        self.image.discard(range.start, range.end - range.start).unwrap();
        self.disk[range.start as usize..range.end as usize].fill(0);
    }
    pub(crate) fn resize(&mut self, size: u64, preallocation: Preallocation) {
        let options = ResizeOptions { shrink: true, preallocation };
        self.image.resize_with(size, options).unwrap_or_else(|e| panic!("{}: {e:?}", self.what));
        self.disk.resize(size as usize, 0);
    }
    pub(crate) fn check(&self, step: &str) {
        assert_same(&self.disk, &bytes_of(&self.image), 0, &format!("{}, {step}", self.what));
    }
}
