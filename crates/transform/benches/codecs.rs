//! Speed and size of every codec and level on one core, on data clusters of 64 KiB: how the default levels are chosen.
//! `cargo bench -p qcow2-transform --bench codecs`, with `QCOW2_BENCH_FILE=FILE` on the data of that file, a disk with files say.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a benchmark")]

use std::fs::File;
use std::io::Read;
use std::sync::OnceLock;

use divan::Bencher;
use divan::counter::BytesCount;
use qcow2_transform::{Codec, CompressOptions, Compressor, Decompressor, Window, is_zero};

const CLUSTER: usize = 64 << 10;
/// Enough for steady numbers, few enough for the slow levels.
const CLUSTERS: usize = 256;

const ZLIB: [u32; 7] = [1, 2, 4, 6, 8, 9, 12];
const ZSTD: [u32; 5] = [1, 2, 3, 5, 9];

fn main() {
    for level in ZLIB {
        tell(CompressOptions { codec: Codec::Zlib, level: Some(level), window: Window::Full });
    }
    for level in ZSTD {
        tell(CompressOptions { codec: Codec::Zstd, level: Some(level), window: Window::Full });
    }
    divan::main();
}

/// The data clusters, spread evenly over the file; without one, words and numbers.
fn clusters() -> &'static [Vec<u8>] {
    static CLUSTERS_OF_FILE: OnceLock<Vec<Vec<u8>>> = OnceLock::new();
    CLUSTERS_OF_FILE.get_or_init(|| match std::env::var_os("QCOW2_BENCH_FILE") {
        Some(path) => sample(File::open(path).unwrap()),
        None => (0..CLUSTERS).map(made).collect(),
    })
}

fn sample(mut file: File) -> Vec<Vec<u8>> {
    let (mut data, mut cluster) = (Vec::new(), vec![0; CLUSTER]);
    while data.len() < CLUSTERS * 8 && file.read_exact(&mut cluster).is_ok() {
        if !is_zero(&cluster) {
            data.push(cluster.clone());
        }
    }
    let step = data.len().div_ceil(CLUSTERS).max(1);
    data.into_iter().step_by(step).collect()
}

fn made(n: usize) -> Vec<u8> {
    let mut text = String::new();
    for line in 0.. {
        let number = (n * 7919 + line).wrapping_mul(2_654_435_761) % 100_000;
        text += &format!("{line:06} record {number} of cluster {n}, state {}\n", number % 7);
        if text.len() >= CLUSTER {
            break;
        }
    }
    text.truncate(CLUSTER);
    text.into_bytes()
}

/// The size that a level gives, as a part of the data's.
fn tell(options: CompressOptions) {
    let (stored, data) = (stored(options), clusters().len() * CLUSTER);
    let bytes: usize = stored.iter().map(|stream| stream.as_ref().map_or(CLUSTER, Vec::len)).sum();
    println!(
        "{} level {}: {:.4}",
        options.codec.name(),
        options.level.unwrap_or(0),
        bytes as f64 / data as f64
    );
}

fn stored(options: CompressOptions) -> Vec<Option<Vec<u8>>> {
    let mut compressor = Compressor::new(&options).unwrap();
    let mut output = vec![0; CLUSTER];
    let mut one = |cluster: &Vec<u8>| {
        let length = compressor.compress(cluster, &mut output).unwrap()?;
        output.get(..length).map(<[u8]>::to_vec)
    };
    clusters().iter().map(&mut one).collect()
}

fn compress(bencher: Bencher, options: CompressOptions) {
    let mut compressor = Compressor::new(&options).unwrap();
    let mut output = vec![0; CLUSTER];
    let mut next = clusters().iter().cycle();
    bencher
        .counter(BytesCount::new(CLUSTER))
        .bench_local(|| compressor.compress(next.next().unwrap(), &mut output));
}

fn inflate(bencher: Bencher, codec: Codec) {
    let streams = stored(CompressOptions { codec, ..CompressOptions::default() });
    let mut decompressor = Decompressor::new(codec).unwrap();
    let mut output = vec![0; CLUSTER];
    let mut next = streams.iter().flatten().cycle();
    bencher
        .counter(BytesCount::new(CLUSTER))
        .bench_local(|| decompressor.decompress(next.next().unwrap(), &mut output));
}

#[divan::bench(args = ZLIB)]
fn zlib(bencher: Bencher, level: u32) {
    compress(bencher, CompressOptions { codec: Codec::Zlib, level: Some(level), window: Window::Full });
}

/// For readers that stream.
#[divan::bench(args = [1, 6, 9])]
fn zlib_4_kib_window(bencher: Bencher, level: u32) {
    compress(bencher, CompressOptions { codec: Codec::Zlib, level: Some(level), window: Window::Qemu4KiB });
}

#[divan::bench(args = ZSTD)]
fn zstd(bencher: Bencher, level: u32) {
    compress(bencher, CompressOptions { codec: Codec::Zstd, level: Some(level), window: Window::Full });
}

#[divan::bench]
fn zlib_inflate(bencher: Bencher) {
    inflate(bencher, Codec::Zlib);
}

#[divan::bench]
fn zstd_inflate(bencher: Bencher) {
    inflate(bencher, Codec::Zstd);
}

#[divan::bench]
fn zero_scan(bencher: Bencher) {
    let zeroes = vec![0; CLUSTER];
    bencher.counter(BytesCount::new(CLUSTER)).bench_local(|| is_zero(std::hint::black_box(&zeroes)));
}
