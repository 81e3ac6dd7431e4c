//! Speed and size of every codec and level on one core, on the data clusters of a file: how the default levels are
//! chosen. `cargo run --release -p qcow2-transform --example throughput -- FILE [CLUSTER_SIZE]`

use std::error::Error;
use std::fs::File;
use std::io::Read;
use std::time::Instant;

use qcow2_transform::{Codec, CompressOptions, Compressor, Decompressor, Window, is_zero};

/// Data to measure with: enough for steady numbers, few enough for the slow levels.
const SAMPLE_BYTES: usize = 64 << 20;

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let path = args.next().ok_or("usage: throughput FILE [CLUSTER_SIZE]")?;
    let cluster_size: usize = args.next().map_or(Ok(65536), |s| s.parse())?;
    let clusters = sample(&path, cluster_size)?;
    println!("{} clusters of {cluster_size} bytes", clusters.len());

    let began = Instant::now();
    let mut zero = 0usize;
    let zeros = vec![0u8; cluster_size];
    for _ in &clusters {
        zero += usize::from(is_zero(std::hint::black_box(&zeros)));
    }
    report("zero scan", zero * cluster_size, began, None);

    for level in 1..=12 {
        measure(&clusters, CompressOptions { codec: Codec::Zlib, level: Some(level), window: Window::Full })?;
    }
    for level in [1, 6, 9] {
        measure(
            &clusters,
            CompressOptions { codec: Codec::Zlib, level: Some(level), window: Window::Qemu4KiB },
        )?;
    }
    for level in [1, 2, 3, 5, 9] {
        measure(&clusters, CompressOptions { codec: Codec::Zstd, level: Some(level), ..Default::default() })?;
    }
    Ok(())
}

/// Non-zero clusters spread evenly over the file.
fn sample(path: &str, cluster_size: usize) -> Result<Vec<Vec<u8>>, Box<dyn Error>> {
    let mut file = File::open(path)?;
    let total = usize::try_from(file.metadata()?.len())? / cluster_size;
    let wanted = (SAMPLE_BYTES / cluster_size).max(1);
    let mut data = Vec::new();
    let mut cluster = vec![0u8; cluster_size];
    for _ in 0..total {
        file.read_exact(&mut cluster)?;
        if !is_zero(&cluster) {
            data.push(cluster.clone());
        }
        if data.len() >= wanted * 8 {
            break;
        }
    }
    let step = data.len().div_ceil(wanted).max(1);
    Ok(data.into_iter().step_by(step).collect())
}

fn measure(clusters: &[Vec<u8>], options: CompressOptions) -> Result<(), Box<dyn Error>> {
    let mut compressor = Compressor::new(&options)?;
    let mut decompressor = Decompressor::new(options.codec)?;
    let mut stored = 0;
    let mut bytes = 0;
    let mut streams = Vec::with_capacity(clusters.len());
    let mut output = vec![0u8; clusters.first().map_or(0, Vec::len)];
    let began = Instant::now();
    for cluster in clusters {
        let length = compressor.compress(cluster, &mut output)?;
        bytes += cluster.len();
        stored += length.unwrap_or(cluster.len());
        streams.push(length.and_then(|n| output.get(..n)).map(<[u8]>::to_vec));
    }
    let name = format!("{} {:?} level {:?}", options.codec.name(), options.window, options.level);
    report(&name, bytes, began, Some(stored));
    let began = Instant::now();
    let mut inflated = 0;
    for stream in streams.iter().flatten() {
        decompressor.decompress(stream, &mut output)?;
        inflated += output.len();
    }
    report("  inflate", inflated, began, None);
    Ok(())
}

fn report(name: &str, bytes: usize, began: Instant, stored: Option<usize>) {
    let speed = bytes as f64 / 1e6 / began.elapsed().as_secs_f64();
    let ratio = stored.map_or(String::new(), |stored| format!(" {:.4}", stored as f64 / bytes as f64));
    println!("{name:34} {speed:8.0} MB/s{ratio}");
}
