//! Images with a bit of everything, and ways to damage them.

use std::path::{Path, PathBuf};

use qcow2_testkit::{Fixture, Qemu};

/// An image with a bit of everything that its options allow.
pub(crate) fn image(
    qemu: &Qemu,
    dir: &Fixture,
    name: &str,
    cluster_size: u64,
    options: &str,
    features: &[&str],
) -> PathBuf {
    let path = dir.path(name);
    let c = cluster_size;
    let options = format!("{options},cluster_size={c}")
        .trim_start_matches(',')
        .replace("DATA", dir.path(name).with_extension("data").to_str().unwrap());
    qemu.create(&path, &options, Some(200 * c + 512));
    let has = |feature| features.contains(&feature);
    let mut commands = vec![format!("write -P 1 0 {}", 5 * c), format!("write -P 2 {} {c}", 40 * c)];
    commands.push(format!("write -P 3 {} {}", 20 * c, 3 * c));
    if has("zero") {
        commands.push(format!("write -z {} {}", 60 * c, 4 * c));
        commands.push(format!("write -z {} {c}", 2 * c));
    }
    if has("subclusters") {
        commands.push(format!("write -P 9 {} {}", 90 * c + c / 2, c / 4));
        commands.push(format!("write -z {} {}", 92 * c, c / 32));
    }
    if has("compressed") {
        commands.extend((100..120).map(|i| format!("write -c -P {i} {} {c}", i * c)));
        let noise = dir.file("noise", &noise(c as usize));
        commands.push(format!("write -c -s {} {} {c}", noise.display(), 121 * c));
    }
    qemu.io(&path, "qcow2", &commands);
    if has("snapshots") {
        let p = path.to_str().unwrap();
        qemu.img(&["snapshot", "-c", "one", p]).ok();
        qemu.io(
            &path,
            "qcow2",
            &[format!("write -P 7 {c} {}", 2 * c), format!("write -P 8 {} {c}", 180 * c)],
        );
        qemu.img(&["snapshot", "-c", "two", p]).ok();
    }
    if has("bitmaps") {
        let p = path.to_str().unwrap();
        qemu.img(&["bitmap", "--add", p, "b0"]).ok();
        qemu.img(&["bitmap", "--add", "--disable", "-g", "64k", p, "b1"]).ok();
        qemu.io(&path, "qcow2", &[format!("write -P 4 {} {}", 30 * c, 4 * c)]);
    }
    path
}

/// Bytes of which half shrink: compressed clusters of several sectors.
fn noise(length: usize) -> Vec<u8> {
    let mut rng = Rng(42);
    (0..length).map(|i| if i % 2 == 0 { rng.next() as u8 } else { 0 }).collect()
}

pub(crate) struct Rng(pub(crate) u64);

impl Rng {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
    pub(crate) fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
}

/// Name, cluster size, options and features of an image.
pub(crate) type Described = (&'static str, u64, &'static str, &'static [&'static str]);

pub(crate) const IMAGES: &[Described] = &[
    ("default", 65536, "", &["zero", "compressed", "snapshots", "bitmaps"]),
    ("plain", 65536, "", &["zero"]),
    ("v2", 4096, "compat=0.10", &["compressed", "snapshots"]),
    ("small", 512, "refcount_bits=16", &["zero", "compressed", "snapshots", "bitmaps"]),
    ("one-bit", 512, "refcount_bits=1", &["zero"]),
    ("two-bit", 1024, "refcount_bits=2", &["zero", "snapshots"]),
    ("four-bit", 2048, "refcount_bits=4", &["zero", "compressed"]),
    ("byte", 4096, "refcount_bits=8", &["zero", "compressed", "snapshots"]),
    ("wide", 8192, "refcount_bits=32", &["zero", "compressed", "snapshots"]),
    ("widest", 4096, "refcount_bits=64", &["zero", "compressed", "snapshots"]),
    ("zstd", 16384, "compression_type=zstd,lazy_refcounts=on", &["zero", "compressed", "snapshots"]),
    ("extended", 65536, "extended_l2=on", &["subclusters", "compressed", "snapshots", "bitmaps"]),
    ("extended-small", 16384, "extended_l2=on,refcount_bits=8", &["subclusters", "compressed"]),
    ("big", 2 << 20, "", &["zero", "compressed", "snapshots"]),
    ("data-file", 65536, "data_file=DATA", &["zero"]),
    ("data-file-raw", 65536, "data_file=DATA,data_file_raw=on,extended_l2=on", &[]),
    ("metadata", 4096, "preallocation=metadata", &["zero"]),
];

/// Writes `bytes` at `offset` of a file.
pub(crate) fn poke(path: &Path, offset: u64, bytes: &[u8]) {
    let file = std::fs::File::options().write(true).open(path).unwrap();
    qcow2_testkit::at::write_all_at(&file, bytes, offset).unwrap();
}

pub(crate) fn be64(bytes: &[u8], at: u64) -> u64 {
    u64::from_be_bytes(bytes[at as usize..][..8].try_into().unwrap())
}

/// Offsets of the 8-byte entries of the image's tables: refcount table, blocks, L1 and L2 tables, of snapshots too, the
/// snapshot table and the bitmap directory with its tables (as far as they lie where clusters are in use).
pub(crate) fn table_entries(bytes: &[u8]) -> Vec<u64> {
    let cluster = 1u64 << u32::from_be_bytes(bytes[20..24].try_into().unwrap());
    let mut tables = vec![(be64(bytes, 48), cluster), (be64(bytes, 40), 64)];
    let mask = 0x00ff_ffff_ffff_fe00;
    for i in 0..8 {
        for (table, size) in [(be64(bytes, 48), cluster), (be64(bytes, 40), cluster)] {
            if 8 * i < size {
                let block = be64(bytes, table + 8 * i) & mask;
                if block != 0 && block.is_multiple_of(cluster) && block + cluster <= bytes.len() as u64 {
                    tables.push((block, cluster.min(2048)));
                }
            }
        }
    }
    let snapshots = be64(bytes, 64);
    if snapshots != 0 {
        tables.push((snapshots, 96));
        tables.push((be64(bytes, snapshots), 64));
    }
    // The bitmaps extension has its directory offset behind a count, a reserved field and the size.
    let extension = 0x2385_2875u32.to_be_bytes();
    if let Some(at) = bytes[..cluster as usize].windows(4).position(|w| w == extension) {
        let directory = be64(bytes, at as u64 + 24);
        tables.push((directory, 56));
        tables.push((be64(bytes, directory), 16));
        tables.push((at as u64, 32));
    }
    // Snapshot count and table, refcount table, L1 table.
    tables.push((32, 40));
    tables
        .into_iter()
        .flat_map(|(at, size)| (at..at + size).step_by(8))
        .filter(|at| at + 8 <= bytes.len() as u64)
        .collect()
}

/// A damaged value for an entry that holds `old`.
pub(crate) fn damage(rng: &mut Rng, old: u64, cluster: u64, length: u64) -> u64 {
    match rng.below(10) {
        0 => 0,
        1 => old ^ 1 << 63,
        2 => old ^ 1 << 62,
        3 => old ^ 1,
        4 => old.wrapping_add(cluster),
        5 => old ^ 512,
        6 => (rng.below(length / cluster + 3) * cluster) | 1 << 63,
        7 => rng.below(length / cluster) * cluster,
        8 => old ^ 1 << rng.below(64),
        _ => old.rotate_left(8),
    }
}
