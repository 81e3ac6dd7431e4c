//! Images to manage, and every way to manage them, each with what must become of the image.

use std::ops::Range;
use std::sync::Arc;

use qcow2_engine::amend::{AmendOptions, amend_through};
use qcow2_engine::check::{CheckOptions, check};
use qcow2_engine::image::read_header;
use qcow2_engine::{Discard, Image, Job, ResizeOptions, Result, Storage, WriteOptions};
use qcow2_testkit::audit::audit;
use qcow2_testkit::contents::{Contents, Marked, Shot};
use qcow2_testkit::disk_model::{Opening, Rig};
use qcow2_testkit::matrix::{Backing, DataFile, Geometry};
use qcow2_testkit::ops::{Op, Target, stamped};
use qcow2_testkit::plans::Table;
use qcow2_testkit::recorder::RecordingStorage;
use qcow2_testkit::storage::Door;
use qcow2_testkit::{Fixture, Qemu, Rng, Sparse};

/// Bytes that a disk grows by: some clusters, and far enough for another L1 table.
pub(crate) const FAR: u64 = 64 << 20;

pub(crate) fn writable() -> Opening {
    let write = WriteOptions { discard: Discard::Unmap, ..WriteOptions::default() };
    Opening { write: Some(write), ..Opening::default() }
}

/// Every kind of layout that changes what is written when, small enough to be read as a whole for each state.
pub(crate) fn geometries() -> Vec<Geometry> {
    let plain = Geometry::plain;
    let small =
        |cluster_size, clusters| Geometry { size: clusters * cluster_size + 512, ..plain(cluster_size) };
    vec![
        small(4096, 45),
        small(512, 300),
        Geometry { backing: Backing::ShorterRaw, ..small(65536, 8) },
        Geometry { version: 2, backing: Backing::LongerQcow2, ..small(4096, 30) },
        Geometry { extended_l2: true, ..small(16384, 20) },
        Geometry { zstd: true, refcount_bits: 64, ..small(1024, 150) },
        Geometry { refcount_bits: 1, ..small(512, 200) },
        Geometry { refcount_bits: 8, ..small(512, 200) },
        Geometry { extended_l2: true, backing: Backing::EqualQcow2, ..small(16384, 20) },
        Geometry { data_file: DataFile::External, ..small(4096, 45) },
        Geometry { door: Door::Xts, backing: Backing::LongerQcow2, ..small(4096, 30) },
        Geometry { door: Door::LegacyAes, ..small(4096, 30) },
        Geometry { data_file: DataFile::ExternalRaw, extended_l2: true, ..small(16384, 20) },
    ]
}

/// Runs guest operations. Reopening is left out.
pub(crate) fn play(image: &dyn Target, ops: &[Op], first: u32) -> Result<()> {
    for (generation, op) in (first..).zip(ops) {
        match *op {
            Op::Write { offset, len } => image.write(offset, &stamped(offset, len, generation))?,
            Op::Compressed { offset, len } => {
                image.write_compressed(offset, &stamped(offset, len, generation))?
            }
            Op::Zero { offset, len, unmap } => image.write_zeroes(offset, len, unmap)?,
            Op::Discard { offset, len } => image.discard(offset, len)?,
            Op::Grow { .. } | Op::Shrink { .. } | Op::Reopen | Op::Read { .. } => {}
            Op::Flush => image.flush()?,
        }
    }
    Ok(())
}

/// An image with snapshots of different sizes and with bitmaps, as far as its geometry has them.
#[derive(Clone)]
pub(crate) struct World {
    pub(crate) rig: Rig,
    pub(crate) name: String,
}

impl World {
    pub(crate) fn build(geometry: &Geometry, seed: u64) -> Self {
        let rig = Rig::forge(geometry, seed);
        let mut world = Self { rig, name: format!("{} seed {seed}", geometry.name()) };
        let storages = world.storages();
        let image = world.open(&storages);
        if geometry.version >= 3 {
            image.add_bitmap("on", Some(12), true).unwrap();
            image.add_bitmap("off", Some(9), true).unwrap();
        }
        world.scribble(&image, seed, 2000).unwrap();
        if geometry.version >= 3 {
            image.enable_bitmap("off", false).unwrap();
        }
        if geometry.snapshots() {
            image.execute(&Table::of(&image).create("2", "second")).unwrap();
            // Snapshots of version 2 do not say their size: the disk keeps its own.
            if geometry.version >= 3 {
                image.resize(image.virtual_size() + 3 * geometry.cluster_size).unwrap();
            }
            world.scribble(&image, seed, 2100).unwrap();
            image.execute(&Table::of(&image).create("3", "third")).unwrap();
        }
        world.scribble(&image, seed, 2200).unwrap();
        image.close().unwrap();
        world.take(&storages);
        world
    }

    pub(crate) fn files(&self) -> Vec<Sparse> {
        self.rig.files()
    }

    fn storages(&self) -> Vec<Arc<RecordingStorage>> {
        self.files().into_iter().map(|f| Arc::new(RecordingStorage::plain(f))).collect()
    }

    fn take(&mut self, storages: &[Arc<RecordingStorage>]) {
        self.rig.image = storages[0].snapshot();
        self.rig.data_file = storages.get(1).map(|s| s.snapshot());
    }

    pub(crate) fn open(&self, storages: &[Arc<RecordingStorage>]) -> Image {
        let files: Vec<Arc<dyn Storage>> = storages.iter().map(|s| s.clone() as Arc<dyn Storage>).collect();
        self.rig.open(&files, &writable()).unwrap_or_else(|e| panic!("{}: {e:?}", self.name))
    }

    pub(crate) fn menu(&self, image: &Image) -> qcow2_testkit::ops::Menu {
        let mut menu = self.rig.menu();
        menu.size = image.virtual_size() / 512 * 512;
        (menu.grow, menu.reopen) = (false, false);
        menu
    }

    /// Eight guest operations.
    pub(crate) fn scribble(&self, image: &Image, seed: u64, first: u32) -> Result<()> {
        play(image, &self.menu(image).sequence(seed ^ u64::from(first), 8), first)
    }

    /// What the files hold; the test fails where it cannot be read.
    pub(crate) fn contents(&self, files: &[Sparse]) -> Contents {
        Contents::read(&self.rig, files).unwrap_or_else(|e| panic!("{}: {e}", self.name))
    }
}

/// A change of an open image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Action {
    Create,
    Apply(usize),
    Delete(usize),
    Rename(usize),
    AddBitmap(bool),
    RemoveBitmap(&'static str),
    RemoveAllBitmaps,
    ClearBitmap(&'static str),
    EnableBitmap(&'static str, bool),
    MergeBitmaps,
    Grow(u64),
    /// By so many bytes.
    Shrink(u64),
    Close,
}

impl Action {
    pub(crate) fn all() -> Vec<Self> {
        vec![
            Self::Create,
            Self::Apply(0),
            Self::Apply(2),
            Self::Delete(0),
            Self::Delete(1),
            Self::Delete(2),
            Self::Rename(1),
            Self::AddBitmap(true),
            Self::AddBitmap(false),
            Self::RemoveBitmap("on"),
            Self::RemoveBitmap("off"),
            Self::RemoveAllBitmaps,
            Self::ClearBitmap("on"),
            Self::ClearBitmap("off"),
            Self::EnableBitmap("on", false),
            Self::EnableBitmap("off", true),
            Self::MergeBitmaps,
            Self::Grow(512),
            Self::Grow(FAR),
            Self::Close,
        ]
    }

    /// Those that free space.
    pub(crate) fn freeing() -> Vec<Self> {
        let bitmaps = ["on", "off"];
        let mut all: Vec<Self> = (0..3).map(Self::Delete).collect();
        all.extend(bitmaps.map(Self::RemoveBitmap));
        all.extend(bitmaps.map(Self::ClearBitmap));
        all.extend([512, 9 << 10, 33 << 10, 80 << 10].map(Self::Shrink));
        all
    }

    /// Whether images of this layout have what the action is about.
    pub(crate) fn fits(self, geometry: &Geometry) -> bool {
        match self {
            Self::Create | Self::Apply(_) | Self::Delete(_) | Self::Rename(_) => geometry.snapshots(),
            Self::Close => true,
            // Snapshots of version 2 do not say their size.
            Self::Grow(_) | Self::Shrink(_) => geometry.version >= 3 || !geometry.snapshots(),
            _ => geometry.version >= 3,
        }
    }

    /// Whether bitmaps that do not record changes are touched too.
    pub(crate) fn resizes(self) -> bool {
        matches!(self, Self::Grow(_) | Self::Shrink(_) | Self::Apply(_))
    }

    pub(crate) fn run(self, image: &Image) -> Result<()> {
        match self {
            Self::Create => image.execute(&Table::of(image).create("9", "new")),
            Self::Apply(index) => image.execute(&Table::of(image).apply(index)),
            Self::Delete(index) => image.execute(&Table::of(image).delete(index)),
            Self::Rename(index) => {
                image.execute(&Table::of(image).rename(index, "another name, and a longer one"))
            }
            Self::AddBitmap(enabled) => image.add_bitmap("new", Some(10), enabled),
            Self::RemoveBitmap(name) => image.remove_bitmap(name),
            Self::RemoveAllBitmaps => image.remove_all_bitmaps(),
            Self::ClearBitmap(name) => image.clear_bitmap(name),
            Self::EnableBitmap(name, enabled) => image.enable_bitmap(name, enabled),
            Self::MergeBitmaps => {
                let source = image.bitmap_bits("on")?;
                image.merge_bitmaps("off", &[source])
            }
            Self::Grow(more) => image.resize((image.virtual_size() + more).next_multiple_of(512)),
            Self::Shrink(less) => {
                let shrink = ResizeOptions { shrink: true, ..ResizeOptions::default() };
                image.resize_with((image.virtual_size() - less) / 512 * 512, shrink)
            }
            Self::Close => image.close(),
        }
    }

    /// What `old` must become.
    pub(crate) fn expect(self, old: &Contents) -> Contents {
        let mut new = old.clone();
        let find = |c: &Contents, name: &str| c.bitmaps.iter().position(|b| b.name == name).unwrap();
        match self {
            Self::Create => {
                new.snapshots.push(Shot { id: "9".into(), name: "new".into(), disk: old.active.clone() });
            }
            Self::Apply(index) => {
                new.active = old.snapshots[index].disk.clone();
                let size = new.active.len() as u64;
                // Any byte may be another one now; what is behind the end is gone.
                for bitmap in &mut new.bitmaps {
                    bitmap.ranges = match bitmap.enabled {
                        true => Some(std::iter::once(0..size).collect()),
                        false => resized(bitmap, old.active.len() as u64, size),
                    };
                }
            }
            Self::Delete(index) => drop(new.snapshots.remove(index)),
            Self::Rename(index) => new.snapshots[index].name = "another name, and a longer one".into(),
            Self::AddBitmap(enabled) => {
                new.bitmaps.push(Marked {
                    name: "new".into(),
                    granularity: 1024,
                    enabled,
                    ranges: Some(Vec::new()),
                });
                new.consistent = true;
            }
            Self::RemoveBitmap(name) => {
                new.bitmaps.remove(find(old, name));
            }
            Self::RemoveAllBitmaps => {
                new.bitmaps.clear();
                new.consistent = false;
            }
            Self::ClearBitmap(name) => new.bitmaps[find(old, name)].ranges = Some(Vec::new()),
            Self::EnableBitmap(name, enabled) => new.bitmaps[find(old, name)].enabled = enabled,
            Self::MergeBitmaps => {
                let both = [find(old, "on"), find(old, "off")];
                let mut ranges: Vec<_> =
                    both.iter().flat_map(|i| old.bitmaps[*i].ranges.clone().unwrap()).collect();
                ranges.sort_by_key(|r: &Range<u64>| r.start);
                new.bitmaps[both[1]].ranges = Some(join(&ranges));
            }
            Self::Shrink(less) => {
                let size = (old.active.len() as u64 - less) / 512 * 512;
                new.active.truncate(size as usize);
                for bitmap in &mut new.bitmaps {
                    bitmap.ranges = resized(bitmap, old.active.len() as u64, size);
                }
            }
            Self::Grow(more) => {
                let size = (old.active.len() as u64 + more).next_multiple_of(512);
                new.active.resize(size as usize, 0);
                for bitmap in &mut new.bitmaps {
                    bitmap.ranges = resized(bitmap, old.active.len() as u64, size);
                }
            }
            Self::Close => {}
        }
        new
    }
}

/// What is dirty on a disk of another size: a last bit that was about less than its granularity is about more then.
fn resized(bitmap: &Marked, old: u64, new: u64) -> Option<Vec<Range<u64>>> {
    let end = |end: u64| if end == old { end.next_multiple_of(bitmap.granularity) } else { end };
    let ranges = bitmap.ranges.as_ref()?.iter();
    Some(ranges.map(|r| r.start.min(new)..end(r.end).min(new)).filter(|r| !r.is_empty()).collect())
}

fn join(ranges: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut out: Vec<Range<u64>> = Vec::new();
    for range in ranges {
        match out.last_mut().filter(|last| range.start <= last.end) {
            Some(last) => last.end = last.end.max(range.end),
            None => out.push(range.clone()),
        }
    }
    out
}

/// The changes of a file that nobody has open.
pub(crate) fn amendments(geometry: &Geometry) -> Vec<AmendOptions> {
    let none = AmendOptions::default;
    let mut all = Vec::new();
    if geometry.version == 2 {
        all.push(AmendOptions { version: Some(3), ..none() });
        all.push(AmendOptions {
            version: Some(3),
            refcount_bits: Some(64),
            lazy_refcounts: Some(true),
            ..none()
        });
        return all;
    }
    all.push(AmendOptions { lazy_refcounts: Some(true), ..none() });
    all.extend([8, 64, 16, 32].map(|bits| AmendOptions { refcount_bits: Some(bits), ..none() }));
    if geometry.data_file != DataFile::Internal {
        all.push(AmendOptions { data_file: Some(b"another name".to_vec()), ..none() });
        all.push(AmendOptions { data_file_raw: Some(false), ..none() });
    } else if !geometry.extended_l2 && !geometry.zstd && geometry.door != Door::LegacyAes {
        all.push(AmendOptions { version: Some(2), refcount_bits: Some(16), ..none() });
    }
    all
}

pub(crate) fn run_amend(
    storage: Arc<dyn Storage>,
    geometry: &Geometry,
    options: &AmendOptions,
) -> Result<()> {
    let data = geometry.door.open().map(|door| door.open(Arc::clone(&storage)));
    let check = CheckOptions { readers: 0, ..CheckOptions::default() };
    amend_through(&*storage, data.as_deref(), options, &check, &Job::new())
}

type Verdict = std::result::Result<(), String>;

/// Fails unless the image in the file has leaks at worst, by a judge of its own.
pub(crate) fn sound(file: &Sparse) -> Verdict {
    let findings = audit(file);
    if findings.is_sound() { Ok(()) } else { Err(format!("{:#?}", findings.corruptions)) }
}

/// As `sound`, by the engine's check.
pub(crate) fn checked(file: &Sparse) -> Verdict {
    let storage = RecordingStorage::plain(file.clone());
    let header = read_header(&storage).map_err(|e| format!("{e:?}"))?;
    let options = CheckOptions { readers: 0, ..CheckOptions::default() };
    let report = check(&storage, &header, &options, &Job::new()).map_err(|e| format!("{e:?}"))?;
    let fine = report.corruptions == 0 && report.check_errors == 0;
    if fine { Ok(()) } else { Err(format!("check: {report:#?}")) }
}

/// As `sound`, by QEMU.
pub(crate) fn checked_by_qemu(qemu: &Qemu, rig: &Rig, files: &[Sparse]) -> Verdict {
    let fixture = Fixture::new();
    let path = fixture.path("state.qcow2");
    files[0].write_to(&path);
    let mut options = format!("driver=qcow2,file.driver=file,file.filename={}", path.display());
    if let Some(data) = files.get(1) {
        let path = fixture.path("data.raw");
        data.write_to(&path);
        options += &format!(",data-file.driver=file,data-file.filename={}", path.display());
    }
    if let Some((backing, _)) = &rig.backing {
        backing.write_to(&fixture.path("backing"));
    }
    let out = qemu.img(&["check", "--output=json", "--image-opts", &options]);
    let report: serde_json::Value = serde_json::from_str(&out.stdout).map_err(|e| format!("{e}: {out:?}"))?;
    let count = |name: &str| report.get(name).and_then(serde_json::Value::as_u64).unwrap_or(0);
    let fine = count("corruptions") == 0 && count("check-errors") == 0;
    if fine { Ok(()) } else { Err(format!("qemu-img check: {report}\n{}", out.stderr)) }
}

/// The image goes on: guest writes, a snapshot, the end of all snapshots and bitmaps. Then it is sound, and holds what
/// the open image said it does.
pub(crate) fn goes_on(world: &World, files: &[Sparse], seed: u64) -> Verdict {
    let storages: Vec<_> = files.iter().map(|f| Arc::new(RecordingStorage::plain(f.clone()))).collect();
    let dynamic: Vec<Arc<dyn Storage>> = storages.iter().map(|s| s.clone() as Arc<dyn Storage>).collect();
    let text = |e| format!("going on: {e:?}");
    let image = world.rig.open(&dynamic, &writable()).map_err(text)?;
    let menu = world.menu(&image);
    let mut rng = Rng::new(seed);
    play(&image, &menu.sequence(rng.next_u64(), 4), 5000).map_err(text)?;
    let now = || storages.iter().map(|s| s.snapshot()).collect::<Vec<_>>();
    if world.rig.geometry.snapshots() {
        image.execute(&Table::of(&image).create("77", "going on")).map_err(text)?;
        play(&image, &menu.sequence(rng.next_u64(), 4), 6000).map_err(text)?;
    }
    image.flush().map_err(text)?;
    let before = Contents::live(&image, &world.rig, &now())?;
    image.close().map_err(text)?;
    drop(image);
    sound(&now()[0])?;
    let after = Contents::read(&world.rig, &now())?;
    after.judge(&before, &before, false)?;
    // Everything goes, and nothing is left but the active disk.
    let image = world.rig.open(&dynamic, &writable()).map_err(text)?;
    while Table::of(&image).count > 0 {
        let table = Table::of(&image);
        image.execute(&table.delete(rng.below(table.count as u64) as usize)).map_err(text)?;
    }
    for bitmap in &after.bitmaps {
        image.remove_bitmap(&bitmap.name).map_err(text)?;
    }
    image.close().map_err(text)?;
    sound(&now()[0])?;
    let end = Contents::read(&world.rig, &now())?;
    let fine = end.active == after.active && end.snapshots.is_empty() && end.bitmaps.is_empty();
    if fine { Ok(()) } else { Err(format!("at the end {end:?}, expected {after:?}")) }
}
