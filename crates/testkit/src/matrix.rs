//! The matrix: geometries of qcow2 images, and guest operations that leave every kind of entry behind.
//!
//! [`Case::build`] lets QEMU apply the operations to an image and applies them to the model as well, so a
//! test has the image, what QEMU reads from it, and what it must contain.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use crate::storage::Door;
use crate::{Disk, Fixture, Qemu, Rng};

/// The backing file of a geometry, by its size relative to the overlay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backing {
    /// None.
    None,
    /// A raw file that ends in the middle of the overlay, inside a cluster.
    ShorterRaw,
    /// A qcow2 image of the same size with a smaller cluster size.
    EqualQcow2,
    /// A qcow2 image that goes on behind the overlay's end.
    LongerQcow2,
}

/// Where guest clusters are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DataFile {
    /// In the image.
    Internal,
    /// In an external file.
    External,
    /// In an external file that is a raw image by itself.
    ExternalRaw,
}

/// How an image is laid out.
#[derive(Debug, Clone)]
pub struct Geometry {
    /// 2 or 3.
    pub version: u32,
    /// Bytes of a cluster.
    pub cluster_size: u64,
    /// Bits of a refcount.
    pub refcount_bits: u32,
    /// Subclusters.
    pub extended_l2: bool,
    /// zstd instead of zlib.
    pub zstd: bool,
    /// Guest clusters inside or outside the image.
    pub data_file: DataFile,
    /// Virtual size in bytes.
    pub size: u64,
    /// What lies under it.
    pub backing: Backing,
    /// What guest data is behind.
    pub door: Door,
}

impl Geometry {
    /// Version 3, 16-bit refcounts, zlib, `size` of some tens of clusters and an unaligned end.
    pub fn plain(cluster_size: u64) -> Self {
        Self {
            version: 3,
            cluster_size,
            refcount_bits: 16,
            extended_l2: false,
            zstd: false,
            data_file: DataFile::Internal,
            // Large clusters: few of them. Small ones: more than one L2 table.
            size: match cluster_size {
                0..=1024 => 400 * cluster_size + 512,
                1025..=65536 => 45 * cluster_size + 512,
                _ => 14 * cluster_size + 512 * 3,
            },
            backing: Backing::None,
            door: Door::None,
        }
    }

    /// A short name for messages and file names.
    pub fn name(&self) -> String {
        let mut name = format!("v{}-c{}-r{}", self.version, self.cluster_size, self.refcount_bits);
        for (yes, text) in [(self.extended_l2, "-el2"), (self.zstd, "-zstd")] {
            name += if yes { text } else { "" };
        }
        match self.data_file {
            DataFile::Internal => {}
            DataFile::External => name += "-ext",
            DataFile::ExternalRaw => name += "-extraw",
        }
        match self.backing {
            Backing::None => {}
            other => name += &format!("-{other:?}"),
        }
        if self.door.is_some() {
            name += &format!("-{}", self.door.name());
        }
        name
    }

    /// Whether internal snapshots are taken. Narrow refcounts cannot count both the compressed clusters of
    /// one host cluster and the snapshots that share them: 4 bits get snapshots, 1 and 2 bits compression.
    pub fn snapshots(&self) -> bool {
        self.data_file == DataFile::Internal && self.refcount_bits >= 4
    }

    /// Whether clusters are compressed.
    pub fn compression(&self) -> bool {
        self.data_file == DataFile::Internal && self.refcount_bits != 4
    }

    /// The value of qemu-img's `-o`, without backing and data file.
    pub fn options(&self) -> String {
        let compat = if self.version == 2 { "0.10" } else { "1.1" };
        let mut options = format!("compat={compat},cluster_size={}", self.cluster_size);
        if self.refcount_bits != 16 {
            options += &format!(",refcount_bits={}", self.refcount_bits);
        }
        for (yes, text) in [(self.extended_l2, ",extended_l2=on"), (self.zstd, ",compression_type=zstd")] {
            options += if yes { text } else { "" };
        }
        options
    }
}

/// All geometries that the interoperability tests run over: every value of every axis, and the pairs
/// that are known to be delicate.
pub fn geometries() -> Vec<Geometry> {
    let plain = Geometry::plain;
    let mut all: Vec<Geometry> = (9..=21).map(|bits| plain(1 << bits)).collect();
    for cluster_size in [512, 4096, 65536, 2 << 20] {
        all.push(Geometry { version: 2, ..plain(cluster_size) });
        all.push(Geometry { zstd: true, ..plain(cluster_size) });
    }
    for (bits, cluster_size) in [(1, 4096), (2, 512), (4, 65536), (8, 1024), (32, 65536), (64, 512), (1, 512)]
    {
        all.push(Geometry { refcount_bits: bits, ..plain(cluster_size) });
    }
    for cluster_size in [16384, 65536, 2 << 20] {
        let extended = Geometry { extended_l2: true, ..plain(cluster_size) };
        all.push(Geometry { zstd: true, backing: Backing::EqualQcow2, ..extended.clone() });
        all.push(Geometry { data_file: DataFile::External, ..extended.clone() });
        all.push(extended);
    }
    for (data_file, cluster_size) in [
        (DataFile::External, 65536),
        (DataFile::ExternalRaw, 65536),
        (DataFile::External, 512),
        (DataFile::ExternalRaw, 4096),
    ] {
        all.push(Geometry { data_file, ..plain(cluster_size) });
    }
    for backing in [Backing::ShorterRaw, Backing::EqualQcow2, Backing::LongerQcow2] {
        all.push(Geometry { backing, ..plain(65536) });
        all.push(Geometry { backing, version: 2, ..plain(4096) });
        all.push(Geometry { backing, extended_l2: true, ..plain(16384) });
        all.push(Geometry { backing, zstd: true, ..plain(512) });
    }
    all.push(Geometry { data_file: DataFile::External, backing: Backing::ShorterRaw, ..plain(65536) });
    all
}

/// A bounded sample of `geometries`: every axis once or twice.
pub fn sample() -> Vec<Geometry> {
    let plain = Geometry::plain;
    vec![
        plain(65536),
        plain(512),
        Geometry { version: 2, backing: Backing::LongerQcow2, ..plain(4096) },
        Geometry { zstd: true, refcount_bits: 2, ..plain(2 << 20) },
        Geometry { extended_l2: true, backing: Backing::ShorterRaw, ..plain(16384) },
        Geometry { data_file: DataFile::ExternalRaw, ..plain(65536) },
    ]
}

/// One guest operation. Offsets and lengths are in bytes.
#[derive(Debug, Clone)]
pub enum Op {
    /// Writes pseudo-random bytes of a seed.
    Write(u64, u64, u64),
    /// Writes one whole compressible cluster compressed.
    Compressed(u64, u64, u64),
    /// Writes zeroes; the flag allows to drop the allocation.
    Zero(u64, u64, bool),
    /// Discards whole clusters.
    Discard(u64, u64),
    /// Takes an internal snapshot.
    Snapshot(String),
}

/// A snapshot's name and what its disk contains.
#[derive(Debug)]
pub struct Frozen {
    /// Its name.
    pub name: String,
    /// Its disk.
    pub disk: Disk,
}

/// The seed to start from: `QCOW2_TEST_SEED`, which makes other operations than usual, or the test's own.
pub fn seed_or(usual: u64) -> u64 {
    std::env::var("QCOW2_TEST_SEED").map_or(usual, |text| text.parse().expect("QCOW2_TEST_SEED is a number"))
}

/// A geometry together with the operations of a seed.
#[derive(Debug, Clone)]
pub struct Case {
    /// The geometry.
    pub geometry: Geometry,
    /// Chooses the operations.
    pub seed: u64,
}

/// An image that QEMU wrote.
#[derive(Debug)]
pub struct Image {
    /// The folder with all files of the case.
    pub fixture: Fixture,
    /// The image.
    pub path: PathBuf,
    /// What it must contain.
    pub disk: Disk,
    /// Its snapshots.
    pub snapshots: Vec<Frozen>,
}

impl Case {
    /// The operations: a fixed part that leaves every kind of entry, then random ones.
    pub fn ops(&self) -> Vec<Op> {
        let g = &self.geometry;
        let c = g.cluster_size;
        let mut rng = Rng::new(self.seed);
        // Every kind of entry, before and after a snapshot.
        let mut ops = vec![
            Op::Write(0, 2 * c + c / 2, 1),
            Op::Write(3 * c, c, 2),
            Op::Zero(3 * c, c, false),
            Op::Write(4 * c, c, 3),
            Op::Zero(4 * c, c, true),
            Op::Zero(5 * c, c, false),
            Op::Write(8 * c + c / 4, c / 2, 4),
        ];
        if g.compression() {
            ops.extend([
                Op::Compressed(6 * c, c, 5),
                Op::Compressed(7 * c, c, 6),
                Op::Compressed(9 * c, c, 7),
            ]);
        }
        if g.data_file != DataFile::ExternalRaw {
            ops.extend([Op::Write(10 * c, 2 * c, 8), Op::Discard(10 * c, c)]);
        }
        if g.snapshots() {
            ops.push(Op::Snapshot("first".into()));
            ops.extend([
                Op::Write(c, 512, 9),
                Op::Zero(2 * c, c, true),
                Op::Write(6 * c + 3, 700 % c + 1, 10),
            ]);
            ops.push(Op::Snapshot("second".into()));
        }
        // The end of the disk, which is not the end of a cluster.
        ops.push(Op::Write(g.size - 512, 512, 11));
        let clusters = g.size / c;
        // QEMU refuses a compressed write over a cluster that has an allocation.
        let mut fresh: BTreeSet<u64> = (12..(g.size - 512) / c).collect();
        for _ in 0..24 {
            let offset = rng.below(g.size - 1);
            let len = (rng.below(2 * c) + 1).min(g.size - offset);
            let cluster = rng.below(clusters) * c;
            let seed = 100 + rng.below(1 << 30);
            let kind = rng.below(6);
            if kind == 3 && g.compression() && fresh.remove(&(cluster / c)) {
                ops.push(Op::Compressed(cluster, c, seed));
                continue;
            }
            fresh.retain(|n| (n + 1) * c <= offset || n * c >= offset + len);
            fresh.remove(&(cluster / c));
            ops.push(match kind {
                0 | 1 => Op::Write(offset, len, seed),
                2 => Op::Zero(offset, len, rng.below(2) == 0),
                4 if g.data_file != DataFile::ExternalRaw => Op::Discard(cluster, c),
                _ => Op::Write(cluster, c, seed),
            });
        }
        if g.snapshots() {
            ops.push(Op::Snapshot("third".into()));
            ops.push(Op::Write(0, c, 12));
        }
        ops
    }

    /// Lets QEMU build the image, with its backing file, and the model beside it.
    pub fn build(&self, qemu: &Qemu) -> Image {
        self.build_in(qemu, Fixture::new())
    }

    /// As `build`, in a folder of the caller's.
    pub fn build_in(&self, qemu: &Qemu, fixture: Fixture) -> Image {
        assert!(!self.geometry.door.is_some(), "QEMU knows no such door");
        let path = fixture.path(&format!("{}.qcow2", self.geometry.name()));
        let mut options = self.geometry.options();
        let mut disk = Disk::new(self.geometry.size);
        if let Some((name, format, backing)) = self.backing(qemu, &fixture) {
            options += &format!(",backing_file={name},backing_fmt={format}");
            disk = Disk::over(self.geometry.size, &backing);
        }
        if self.geometry.data_file != DataFile::Internal {
            let raw = if self.geometry.data_file == DataFile::ExternalRaw { "on" } else { "off" };
            let data = fixture.path("data.raw");
            options += &format!(",data_file={},data_file_raw={raw}", data.display());
        }
        qemu.create(&path, &options, Some(self.geometry.size));
        let mut image = Image { fixture, path, disk, snapshots: Vec::new() };
        image.apply(qemu, &self.geometry, &self.ops());
        image
    }

    fn backing(&self, qemu: &Qemu, fixture: &Fixture) -> Option<(String, &'static str, Disk)> {
        let size = self.geometry.size;
        let (backing_size, format) = match self.geometry.backing {
            Backing::None => return None,
            Backing::ShorterRaw => (size / 2 - 100, "raw"),
            Backing::EqualQcow2 => (size, "qcow2"),
            Backing::LongerQcow2 => (size + 3 * self.geometry.cluster_size, "qcow2"),
        };
        let name = format!("base.{format}");
        let path = fixture.path(&name);
        let mut disk = Disk::new(backing_size);
        let bytes = Rng::new(self.seed ^ 0xbac).text(backing_size as usize);
        // Stripes of data and holes, on no cluster's boundary.
        for (i, part) in bytes.chunks(9999).enumerate().filter(|(i, _)| i % 3 != 2) {
            disk.write(i as u64 * 9999, part);
        }
        let raw = if format == "raw" { path.clone() } else { fixture.path("base.tmp") };
        std::fs::write(&raw, disk.read(0, backing_size as usize)).unwrap();
        if format == "qcow2" {
            qemu.convert(&raw, "raw", &path, "qcow2", &["-c", "-o", "cluster_size=8192"]);
            std::fs::remove_file(raw).unwrap();
        }
        Some((name, format, disk))
    }
}

impl Image {
    fn apply(&mut self, qemu: &Qemu, geometry: &Geometry, ops: &[Op]) {
        let mut commands = Vec::new();
        for (i, op) in ops.iter().enumerate() {
            match op {
                Op::Write(offset, len, seed) => {
                    let pattern = Rng::new(*seed).bytes((*len).min(8192) as usize);
                    let file = self.fixture.file(&format!("pattern{i}"), &pattern);
                    commands.push(format!("write -q -s {} {offset} {len}", file.display()));
                    self.disk.write_repeated(*offset, &pattern, *len);
                }
                Op::Compressed(offset, len, seed) => {
                    // QEMU 10 goes on packing behind its last compressed cluster even if that was overwritten,
                    // freed and allocated for data meanwhile, which it then damages. A new process starts
                    // with a new cluster.
                    if i > 0 && !matches!(ops[i - 1], Op::Compressed(..)) {
                        qemu.io(&self.path, "qcow2", &std::mem::take(&mut commands));
                    }
                    let pattern = Rng::new(*seed).text((*len).min(60_000) as usize);
                    let file = self.fixture.file(&format!("pattern{i}"), &pattern);
                    commands.push(format!("write -q -c -s {} {offset} {len}", file.display()));
                    self.disk.write_repeated(*offset, &pattern, *len);
                }
                Op::Zero(offset, len, unmap) => {
                    commands.push(format!("write -q -z {}{offset} {len}", if *unmap { "-u " } else { "" }));
                    self.disk.zero(*offset, *len);
                }
                Op::Discard(offset, len) => {
                    commands.push(format!("discard -q {offset} {len}"));
                    // Version 2 cannot say "reads as zero" over a backing file, so QEMU leaves the data.
                    if geometry.version >= 3 || geometry.backing == Backing::None {
                        self.disk.zero(*offset, *len);
                    }
                }
                Op::Snapshot(name) => {
                    qemu.io(&self.path, "qcow2", &std::mem::take(&mut commands));
                    take_snapshot(qemu, &self.path, name);
                    self.snapshots.push(Frozen { name: name.clone(), disk: self.disk.clone() });
                }
            }
        }
        qemu.io(&self.path, "qcow2", &commands);
    }
}

fn take_snapshot(qemu: &Qemu, path: &Path, name: &str) {
    qemu.img(&["snapshot".as_ref(), "-c".as_ref(), name.as_ref(), path.as_os_str()]).ok();
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::assert_same;
    use crate::reader::SlowReader;

    /// The model, the slow reader and QEMU agree: three opinions on what an image contains.
    #[test]
    fn model_slow_reader_and_qemu_agree() {
        let Some(qemu) = Qemu::find() else { return };
        for geometry in sample() {
            let name = geometry.name();
            let image = Case { geometry, seed: 1 }.build(&qemu);
            let read = qemu.guest_bytes(&image.path, "qcow2", &[]);
            image.disk.assert_eq_at(0, &read, &format!("{name}: model and QEMU"));
            let slow = SlowReader::open(&image.path, "qcow2");
            assert_eq!(slow.size(), image.disk.size(), "{name}");
            assert_same(&read, &slow.read(0, read.len()), 0, &format!("{name}: QEMU and the slow reader"));
            for frozen in &image.snapshots {
                let what = format!("{name}, snapshot {}", frozen.name);
                let read = qemu.guest_bytes(&image.path, "qcow2", &["-l", &frozen.name]);
                frozen.disk.assert_eq_at(0, &read, &what);
                let slow = SlowReader::open_snapshot(&image.path, &frozen.name);
                assert_same(&read, &slow.read(0, read.len()), 0, &what);
            }
        }
    }
}
