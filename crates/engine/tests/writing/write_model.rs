//! Writing against a byte model: random sequences of every operation over every geometry, on images that QEMU made,
//! with backing chains, snapshots and preallocation. After each sequence everything is read back, QEMU's check and ours
//! find nothing, and QEMU reads the same bytes.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use qcow2_engine::create::{self, CreateOptions, Preallocation, create};
use qcow2_engine::storage::MemoryStorage;
use qcow2_engine::{Discard, Image, Job, Mem, MemMut, OpenOptions, Storage, WriteOptions};
use qcow2_testkit::audit::audit;
use qcow2_testkit::disk_model::{Opening, open_file};
use qcow2_testkit::matrix::{Backing, Case, DataFile, Geometry, geometries};
use qcow2_testkit::ops::{Menu, Op, SECTOR, Target, stamped};
use qcow2_testkit::storage::Door;
use qcow2_testkit::{Disk, Fixture, Qemu, Rng, Sparse};

/// Reads that were answered from memory.
static AT_HAND: AtomicUsize = AtomicUsize::new(0);

fn writable() -> Opening {
    let write = WriteOptions { discard: Discard::Unmap, ..WriteOptions::default() };
    Opening { write: Some(write), ..Opening::default() }
}

fn sparse_of(path: &Path) -> Sparse {
    let bytes = std::fs::read(path).unwrap();
    let mut sparse = Sparse::new(bytes.len() as u64);
    for (n, page) in bytes.chunks(4096).enumerate().filter(|(_, p)| p.iter().any(|b| *b != 0)) {
        sparse.write(n as u64 * 4096, page);
    }
    sparse
}

/// An image, the model beside it, and how requests reach it.
struct Run<'a> {
    path: &'a Path,
    image: Option<Image>,
    opening: Opening,
    disk: Disk,
    geometry: &'a Geometry,
    /// Cuts every request into pieces of this generator.
    split: Option<Rng>,
    what: String,
}

impl Run<'_> {
    fn image(&self) -> &Image {
        self.image.as_ref().unwrap()
    }

    /// The pieces that a request goes in.
    fn pieces(&mut self, offset: u64, len: u64) -> Vec<(u64, u64)> {
        let Some(rng) = &mut self.split else { return vec![(offset, len)] };
        let mut pieces = Vec::new();
        let mut at = offset;
        while at < offset + len {
            let n = (1 + rng.below(len.div_ceil(2))).min(offset + len - at);
            pieces.push((at, n));
            at += n;
        }
        pieces
    }

    fn apply(&mut self, op: Op, generation: u32) {
        let what = format!("{}, operation {generation}, {op:?}", self.what);
        let fine = |result: qcow2_engine::Result<()>| result.unwrap_or_else(|e| panic!("{what}: {e:?}"));
        match op {
            Op::Write { offset, len } => {
                for (at, n) in self.pieces(offset, len) {
                    fine(self.image().write_at(Mem::from(&stamped(at, n, generation)[..]), at));
                }
                self.disk.write(offset, &stamped(offset, len, generation));
            }
            Op::Compressed { offset, len } => {
                let data = stamped(offset, len, generation);
                fine(self.image().write_compressed_at(Mem::from(&data[..]), offset));
                self.disk.write(offset, &data);
            }
            Op::Zero { offset, len, unmap } => {
                for (at, n) in self.pieces(offset, len) {
                    fine(self.image().write_zeroes(at, n, unmap));
                }
                self.disk.zero(offset, len);
            }
            Op::Discard { offset, len } => {
                fine(self.image().discard(offset, len));
                self.observe_discard(offset, len, &what);
            }
            Op::Read { offset, len } => self.compare(offset, len, &what),
            Op::Flush => fine(self.image().flush()),
            Op::Grow { size } => {
                fine(self.image().resize(size));
                self.disk.grow(size);
            }
            Op::Shrink { size } => unreachable!("{size} bytes are not on the menu"),
            Op::Reopen => {
                fine(self.image().close());
                self.image = None;
                self.image =
                    Some(open_file(self.path, &self.opening).unwrap_or_else(|e| panic!("{what}: {e:?}")));
            }
        }
    }

    /// Whole clusters read as zeroes where the format can say so; the rest as zeroes or as before.
    fn observe_discard(&mut self, offset: u64, len: u64, what: &str) {
        let mut now = vec![0; len as usize];
        self.image().read(offset, &mut now).unwrap();
        let before = self.disk.read(offset, len as usize);
        let c = self.geometry.cluster_size;
        let whole = offset.div_ceil(c) * c..(offset + len) / c * c;
        let strict = self.geometry.version >= 3 || self.geometry.backing == Backing::None;
        let mut at = 0;
        while at < len {
            let n = (SECTOR - (offset + at) % SECTOR).min(len - at);
            let range = at as usize..(at + n) as usize;
            let zero = now[range.clone()].iter().all(|b| *b == 0);
            assert!(
                zero || now[range.clone()] == before[range],
                "{what}: neither zero nor as before at {at}"
            );
            assert!(
                zero || !strict || !whole.contains(&(offset + at)),
                "{what}: a whole cluster stays at {at}"
            );
            at += n;
        }
        self.disk.write(offset, &now);
    }

    /// What is in memory is as good as what is read.
    fn compare_at_hand(&self, offset: u64, len: u64, what: &str) {
        for at in [offset, offset + len - len.min(SECTOR)] {
            let mut bytes = vec![0xa5; len.min(SECTOR) as usize];
            if self.image().read_at_hand(MemMut::from(&mut bytes[..]), at) {
                AT_HAND.fetch_add(1, Ordering::Relaxed);
                self.disk.assert_eq_at(at, &bytes, &format!("{what}, at hand"));
            }
        }
    }

    fn compare(&self, offset: u64, len: u64, what: &str) {
        self.compare_at_hand(offset, len, what);
        let mut bytes = vec![0xa5; len as usize];
        self.image().read(offset, &mut bytes).unwrap_or_else(|e| panic!("{what}: {e:?}"));
        self.disk.assert_eq_at(offset, &bytes, what);
        self.compare_at_hand(offset, len, what);
    }

    /// Reads all, closes, and lets everyone judge.
    fn finish(&mut self, qemu: &Qemu) {
        let size = self.disk.size();
        assert_eq!(self.image().virtual_size(), size, "{}", self.what);
        self.compare(0, size, &self.what);
        self.image().close().unwrap_or_else(|e| panic!("{}: closing: {e:?}", self.what));
        self.compare(0, size, &format!("{}, closed", self.what));
        self.image = None;
        let findings = audit(&sparse_of(self.path));
        assert!(findings.is_clean(), "{}: {findings:#?}", self.what);
        let read = match self.geometry.door {
            Door::None => {
                qemu.assert_clean(self.path);
                qemu.guest_bytes(self.path, "qcow2", &[])
            }
            // QEMU knows this encryption, and these images say that they have it.
            Door::LegacyAes => qemu.decrypted(self.path, Door::SECRET),
            Door::Scrambling | Door::Xts => return qemu.assert_clean(self.path),
        };
        self.disk.assert_eq_at(0, &read, &format!("{}: read by QEMU", self.what));
    }
}

/// Runs a sequence on the image of a case; gives the run and the snapshots' disks.
fn run(qemu: &Qemu, case: &Case, opening: Opening, split: Option<u64>, count: usize) -> Disk {
    let made = case.build(qemu);
    let what = format!("{} seed {} split {split:?}", case.geometry.name(), case.seed);
    let mut run = Run {
        path: &made.path,
        image: Some(open_file(&made.path, &opening).unwrap_or_else(|e| panic!("{what}: {e:?}"))),
        opening,
        disk: made.disk,
        geometry: &case.geometry,
        split: split.map(Rng::new),
        what,
    };
    let menu = Menu { size: run.disk.size(), granularity: 1, ..case.geometry.menu() };
    for (generation, op) in (1u32..).zip(menu.sequence(case.seed, count)) {
        run.apply(op, generation);
    }
    run.finish(qemu);
    for frozen in &made.snapshots {
        let read = qemu.guest_bytes(&made.path, "qcow2", &["-l", &frozen.name]);
        // QEMU shows a snapshot in the size that the disk has now.
        let read = &read[..frozen.disk.size() as usize];
        frozen.disk.assert_eq_at(0, read, &format!("{}: snapshot {}", run.what, frozen.name));
    }
    run.disk
}

#[test]
fn every_geometry_keeps_to_the_model() {
    let Some(qemu) = Qemu::find() else { return };
    let seeds = std::env::var("QCOW2_MODEL_SEEDS").ok().and_then(|n| n.parse().ok()).unwrap_or(1);
    for geometry in geometries() {
        for seed in 1..=seeds {
            run(&qemu, &Case { geometry: geometry.clone(), seed }, writable(), None, 60);
        }
    }
    assert!(AT_HAND.load(Ordering::Relaxed) > 0, "nothing was at hand");
}

/// The same sequence in other pieces and with other caches ends in the same disk.
#[test]
fn results_do_not_depend_on_split_or_caches() {
    let Some(qemu) = Qemu::find() else { return };
    for geometry in qcow2_testkit::matrix::sample() {
        let case = Case { geometry, seed: 7 };
        let whole = run(&qemu, &case, writable(), None, 60);
        let split = run(&qemu, &case, writable(), Some(3), 60);
        let read =
            OpenOptions { l2_cache_bytes: Some(1), inflated_cache_bytes: Some(1), ..OpenOptions::default() };
        let small = run(&qemu, &case, Opening { read, ..writable() }, Some(4), 60);
        // Discards of partial clusters may differ; those are observed, and each run was judged by its own model.
        assert_eq!(whole.size(), split.size());
        assert_eq!(whole.size(), small.size());
        if case.geometry.version >= 3 {
            for disk in [split, small] {
                let bytes = disk.read(0, disk.size() as usize);
                whole.assert_eq_at(0, &bytes, &format!("{}, the other way", case.geometry.name()));
            }
        }
    }
}

/// QEMU, told to do the same, ends with the same disk.
#[test]
fn qemu_io_ends_with_the_same_disk() {
    let Some(qemu) = Qemu::find() else { return };
    for geometry in qcow2_testkit::matrix::sample() {
        let case = Case { geometry: geometry.clone(), seed: 11 };
        let twin = case.build(&qemu);
        let made = case.build(&qemu);
        let mut menu = Menu { size: made.disk.size(), granularity: SECTOR, ..geometry.menu() };
        // What QEMU refuses, or promises less for than we do.
        (menu.compression, menu.discard, menu.grow) = (false, false, false);
        let ops = menu.sequence(case.seed, 60);
        let mut commands = Vec::new();
        for (generation, op) in (1u32..).zip(&ops) {
            match *op {
                Op::Write { offset, len } => {
                    let data = stamped(offset, len, generation);
                    let file = twin.fixture.file(&format!("data{generation}"), &data);
                    commands.push(format!("write -q -s {} {offset} {len}", file.display()));
                }
                Op::Zero { offset, len, unmap } => {
                    commands.push(format!("write -q -z {}{offset} {len}", if unmap { "-u " } else { "" }));
                }
                Op::Flush => commands.push("flush".into()),
                Op::Reopen => {
                    qemu.io(&twin.path, "qcow2", &std::mem::take(&mut commands));
                }
                _ => {}
            }
        }
        qemu.io(&twin.path, "qcow2", &commands);
        let image = open_file(&made.path, &writable()).unwrap();
        let what = format!("{}, with QEMU", geometry.name());
        let mut run = Run {
            path: &made.path,
            image: Some(image),
            opening: writable(),
            disk: made.disk,
            geometry: &geometry,
            split: None,
            what,
        };
        (1u32..).zip(ops).for_each(|(generation, op)| run.apply(op, generation));
        run.finish(&qemu);
        qemu.assert_identical(&made.path, "qcow2", &twin.path, "qcow2");
    }
}

/// Images whose clusters were allocated beforehand, and QEMU's other options.
#[test]
fn preallocated_images_keep_to_the_model() {
    let Some(qemu) = Qemu::find() else { return };
    for options in [
        "preallocation=metadata",
        "preallocation=falloc",
        "preallocation=full",
        "preallocation=metadata,extended_l2=on",
        "preallocation=metadata,cluster_size=512",
        "lazy_refcounts=on",
        "preallocation=metadata,compat=0.10",
        "preallocation=metadata,data_file=data.raw,data_file_raw=on",
        "preallocation=metadata,data_file=data.raw",
    ] {
        let fixture = Fixture::new();
        let path = fixture.path("image.qcow2");
        let size = 2 << 20;
        qemu.create(
            &path,
            &options.replace("data.raw", &fixture.path("data.raw").to_string_lossy()),
            Some(size),
        );
        let mut geometry = Geometry::plain(if options.contains("512") { 512 } else { 65536 });
        geometry.size = size;
        if options.contains("data_file") {
            geometry.data_file = DataFile::External;
        }
        let mut run = Run {
            path: &path,
            image: Some(open_file(&path, &writable()).unwrap_or_else(|e| panic!("{options}: {e:?}"))),
            opening: writable(),
            disk: Disk::new(size),
            geometry: &geometry,
            split: None,
            what: options.to_owned(),
        };
        let menu = Menu { size, granularity: 1, ..geometry.menu() };
        (1u32..).zip(menu.sequence(3, 80)).for_each(|(generation, op)| run.apply(op, generation));
        run.finish(&qemu);
    }
}

/// Behind a door the disk is the same, in requests of any bytes.
#[test]
fn behind_a_door_images_keep_to_the_model() {
    let Some(qemu) = Qemu::find() else { return };
    let behind = |door, cluster_size| Geometry { size: 2 << 20, door, ..Geometry::plain(cluster_size) };
    let door = |cluster_size| behind(Door::Scrambling, cluster_size);
    for (geometry, preallocation) in [
        (door(65536), Preallocation::Off),
        (door(512), Preallocation::Off),
        (Geometry { version: 2, ..door(4096) }, Preallocation::Falloc),
        (behind(Door::Xts, 4096), Preallocation::Off),
        (behind(Door::LegacyAes, 4096), Preallocation::Off),
        (Geometry { version: 2, ..behind(Door::LegacyAes, 512) }, Preallocation::Metadata),
        (Geometry { extended_l2: true, ..behind(Door::LegacyAes, 16384) }, Preallocation::Full),
        (Geometry { data_file: DataFile::External, ..behind(Door::LegacyAes, 65536) }, Preallocation::Falloc),
        (Geometry { extended_l2: true, ..door(16384) }, Preallocation::Metadata),
        (Geometry { data_file: DataFile::External, ..door(65536) }, Preallocation::Off),
        (Geometry { data_file: DataFile::External, ..door(4096) }, Preallocation::Full),
    ] {
        let fixture = Fixture::new();
        let (image, data) = (Arc::new(MemoryStorage::new()), Arc::new(MemoryStorage::new()));
        let external = geometry.data_file != DataFile::Internal;
        let name = fixture.path("data.raw").into_os_string().into_encoded_bytes();
        let options = CreateOptions {
            size: geometry.size,
            version: geometry.version,
            cluster_size: geometry.cluster_size,
            extended_l2: geometry.extended_l2,
            preallocation,
            data_file: external.then_some(create::DataFile { filename: name, raw: false }),
            data_door: geometry.door.open(),
            ..CreateOptions::default()
        };
        let data_file = external.then(|| data.clone() as Arc<dyn Storage>);
        create(image.clone(), data_file, &options, &Job::new()).unwrap();
        let path = fixture.file("image.qcow2", &image.to_vec());
        fixture.file("data.raw", &data.to_vec());
        let mut opening = writable();
        opening.read.data_door = geometry.door.open();
        opening.read.allow_weak = true;
        let what = format!("{} {preallocation:?}", geometry.name());
        let mut run = Run {
            path: &path,
            image: Some(open_file(&path, &opening).unwrap_or_else(|e| panic!("{what}: {e:?}"))),
            opening,
            disk: Disk::new(geometry.size),
            geometry: &geometry,
            split: None,
            what,
        };
        let menu = Menu { granularity: 1, ..geometry.menu() };
        (1u32..).zip(menu.sequence(5, 80)).for_each(|(generation, op)| run.apply(op, generation));
        run.finish(&qemu);
    }
}
