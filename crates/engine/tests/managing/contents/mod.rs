//! What an image contains, as a whole, and power cuts during operations that must not change it, or change it at once.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests")]

use std::sync::Arc;

use qcow2_engine::{Discard, Error, Image, MemMut, OpenOptions, Storage, WriteOptions};
use qcow2_testkit::Sparse;
use qcow2_testkit::audit::audit;
use qcow2_testkit::crash::{Durability, Session};
use qcow2_testkit::disk_model::{Opening, Rig};
use qcow2_testkit::matrix::{Backing, DataFile, Geometry};
use qcow2_testkit::storage::Door;

/// The guest bytes of the active disk and of each snapshot.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Contents {
    pub(crate) active: Vec<u8>,
    pub(crate) snapshots: Vec<Vec<u8>>,
    /// Dirty ranges of the bitmap of the name [`KEPT`], where there is one.
    pub(crate) kept: Vec<std::ops::Range<u64>>,
}

/// A bitmap that does not record: it is consistent at every moment.
pub(crate) const KEPT: &str = "kept";

impl Contents {
    pub(crate) fn of(rig: &Rig, files: &[Sparse]) -> Self {
        let open = |snapshot: Option<String>| {
            let read = OpenOptions { snapshot: snapshot.map(Into::into), ..OpenOptions::default() };
            rig.open_state(files, &Opening { read, write: None }).unwrap()
        };
        let image = open(None);
        let records = image.top_qcow2().unwrap().snapshots();
        let id =
            |record: &qcow2_engine::format::SnapshotRecord| String::from_utf8(record.id.clone()).unwrap();
        let snapshots = records.iter().map(|record| bytes(&open(Some(id(record))))).collect();
        let kept = image.bitmap_extents(KEPT).unwrap_or_default();
        Self { active: bytes(&image), snapshots, kept }
    }

    /// Where two contents differ first.
    pub(crate) fn difference(&self, other: &Self) -> Option<String> {
        if self.snapshots.len() != other.snapshots.len() {
            return Some(format!("{} snapshots, not {}", self.snapshots.len(), other.snapshots.len()));
        }
        if self.kept != other.kept {
            return Some(format!("the bitmap has {:?}, not {:?}", self.kept, other.kept));
        }
        let disks = std::iter::once((&self.active, &other.active));
        for (number, (a, b)) in disks.chain(self.snapshots.iter().zip(&other.snapshots)).enumerate() {
            if a.len() != b.len() {
                return Some(format!("disk {number} has {} bytes, not {}", a.len(), b.len()));
            }
            if let Some(at) = a.iter().zip(b).position(|(a, b)| a != b) {
                return Some(format!("disk {number} differs at {at:#x}"));
            }
        }
        None
    }
}

pub(crate) fn bytes(image: &Image) -> Vec<u8> {
    let mut bytes = vec![0u8; image.virtual_size() as usize];
    image.read_at(MemMut::from(&mut bytes[..]), 0).unwrap();
    bytes
}

pub(crate) fn writable() -> Opening {
    let write = WriteOptions { discard: Discard::Unmap, ..WriteOptions::default() };
    Opening { write: Some(write), ..Opening::default() }
}

/// Layouts that differ in what a change of tables does.
pub(crate) fn geometries() -> Vec<Geometry> {
    let plain = Geometry::plain;
    vec![
        plain(65536),
        plain(512),
        plain(4096),
        plain(2 << 20),
        Geometry { backing: Backing::LongerQcow2, ..plain(4096) },
        Geometry { version: 2, ..plain(4096) },
        Geometry { version: 2, refcount_bits: 16, backing: Backing::ShorterRaw, ..plain(512) },
        Geometry { extended_l2: true, ..plain(16384) },
        Geometry { extended_l2: true, zstd: true, backing: Backing::EqualQcow2, ..plain(65536) },
        Geometry { zstd: true, refcount_bits: 64, ..plain(1024) },
        Geometry { refcount_bits: 1, ..plain(512) },
        Geometry { refcount_bits: 2, ..plain(512) },
        Geometry { refcount_bits: 4, ..plain(4096) },
        Geometry { refcount_bits: 8, ..plain(512) },
        Geometry { refcount_bits: 32, ..plain(65536) },
        Geometry { data_file: DataFile::External, ..plain(4096) },
        Geometry { data_file: DataFile::ExternalRaw, ..plain(65536) },
        Geometry { data_file: DataFile::External, extended_l2: true, ..plain(16384) },
        Geometry { door: Door::Scrambling, ..plain(4096) },
        Geometry { door: Door::LegacyAes, extended_l2: true, backing: Backing::ShorterRaw, ..plain(16384) },
        Geometry { door: Door::Xts, data_file: DataFile::External, ..plain(4096) },
    ]
}

/// Runs `change` on an image of the rig; then, for every power cut during it, the image must contain what it did
/// before or what it does afterwards, and have leaks at worst. Returns the files afterwards.
pub(crate) fn explore(
    rig: &Rig,
    seed: u64,
    random: usize,
    what: &str,
    change: impl FnOnce(&Image) -> Result<(), Error>,
) -> Vec<Sparse> {
    let before = Contents::of(rig, &rig.files());
    let (mut session, files) = Session::new(rig.files(), Durability::Flush);
    let storages: Vec<Arc<dyn Storage>> = files.iter().map(|f| Arc::clone(f) as Arc<dyn Storage>).collect();
    let image = rig.open(&storages, &writable()).unwrap_or_else(|e| panic!("{what}: {e:?}"));
    change(&image).unwrap_or_else(|e| panic!("{what}: {e:?}"));
    image.close().unwrap_or_else(|e| panic!("{what}, closing: {e:?}"));
    drop(image);
    let now: Vec<Sparse> = files.iter().map(|file| snapshot_of(&**file)).collect();
    let after = Contents::of(rig, &now);
    let (mut seen, mut old, mut new) = (0, 0, 0);
    for state in session.states(seed, random) {
        let findings = audit(&state.files[0]);
        assert!(
            findings.is_sound(),
            "{what}, cut {}, {:?}: {:#?}",
            state.cut,
            state.shape,
            findings.corruptions
        );
        let found = Contents::of(rig, &state.files);
        match (found.difference(&before), found.difference(&after)) {
            (None, _) => old += 1,
            (_, None) => new += 1,
            (Some(a), Some(b)) => panic!(
                "{what}, cut {}, {:?}: neither the old contents ({a}) nor the new ones ({b})",
                state.cut, state.shape
            ),
        }
        seen += 1;
    }
    assert!(
        seen > 1 && old > 0 && (new > 0 || before == after),
        "{what}: {seen} states, {old} old, {new} new"
    );
    now
}

/// The bytes of a recorded file.
pub(crate) fn snapshot_of(storage: &dyn Storage) -> Sparse {
    let len = storage.len().unwrap();
    let mut out = Sparse::new(len);
    let mut buf = vec![0; 1 << 20];
    for at in (0..len).step_by(buf.len()) {
        let n = storage.read_at(MemMut::from(&mut buf[..]), at).unwrap();
        for (i, page) in buf[..n].chunks(4096).enumerate().filter(|(_, p)| p.iter().any(|b| *b != 0)) {
            out.write(at + i as u64 * 4096, page);
        }
    }
    out
}

/// No leak, no damage.
pub(crate) fn assert_clean(files: &[Sparse], what: &str) {
    let findings = audit(&files[0]);
    assert!(findings.is_clean(), "{what}: {findings:#?}");
}
