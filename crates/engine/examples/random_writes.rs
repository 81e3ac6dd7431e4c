//! Random 4 KiB writes through this engine against `qemu-img bench -w`, on growing and on allocated images and on
//! overlays, at depth 1 and 32; requests per second, medians, both in turn in one run.
//!
//! `cargo run --release -p qcow2-engine --example random_writes -- [--dir DIR] [--runs N] [--count N]`
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a benchmark"
)]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use qcow2_engine::storage::{Access, FileStorage};
use qcow2_engine::{Image, Layer, Mem, OpenOptions, Qcow2, Raw, WriteOptions};

const BLOCK: u64 = 4096;
const DISK: u64 = 8 << 30;

/// What the image is before the writes.
#[derive(Clone, Copy, PartialEq)]
enum Start {
    Empty,
    Allocated,
    Overlay,
}

struct Workload {
    name: &'static str,
    start: Start,
    /// Distance in bytes of one request to the next, round the disk.
    step: u64,
}

const WORKLOADS: [Workload; 4] = [
    Workload { name: "growing, 64 KiB stride", start: Start::Empty, step: 64 << 10 },
    // An odd number of blocks comes to every block of the disk once, far from the one before.
    Workload { name: "growing, uniform", start: Start::Empty, step: 393_217 * BLOCK },
    Workload { name: "rewriting an allocated image", start: Start::Allocated, step: 393_217 * BLOCK },
    Workload { name: "overlay on a raw file", start: Start::Overlay, step: 64 << 10 },
];

fn run(tool: &str, args: &[&str]) -> String {
    let out = Command::new(tool).args(args).output().expect(tool);
    assert!(out.status.success(), "{tool} {args:?}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8_lossy(&out.stdout).into_owned()
}

fn make(path: &Path, base: &Path, start: Start) {
    let _ = std::fs::remove_file(path);
    let (path, size) = (path.to_str().unwrap(), DISK.to_string());
    match start {
        Start::Empty => drop(run("qemu-img", &["create", "-q", "-f", "qcow2", path, &size])),
        Start::Allocated => {
            drop(run(
                "qemu-img",
                &["create", "-q", "-f", "qcow2", "-o", "preallocation=falloc", path, &size],
            ));
        }
        Start::Overlay => {
            let backing = ["-b", base.to_str().unwrap(), "-F", "raw"];
            run("qemu-img", &[&["create", "-q", "-f", "qcow2"], &backing[..], &[path, &size]].concat());
        }
    }
    rustix::fs::sync();
}

/// Requests per second.
fn ours(path: &Path, base: Option<&Path>, count: u64, depth: usize, step: u64) -> f64 {
    let storage = Arc::new(FileStorage::open(path, Access::ReadWrite).unwrap());
    let mut qcow2 = Qcow2::open(storage, &OpenOptions::default()).unwrap();
    qcow2.enable_writing(WriteOptions::default()).unwrap();
    let mut layers: Vec<Box<dyn Layer>> = vec![Box::new(qcow2)];
    if let Some(base) = base {
        let base = Arc::new(FileStorage::open(base, Access::ReadOnly).unwrap());
        layers.push(Box::new(Raw::new(base).unwrap()));
    }
    let image = Image::new(layers).unwrap();
    let next = AtomicU64::new(0);
    let begun = Instant::now();
    // Depth is requests in flight; more threads than a few per core would measure the scheduler.
    let threads = depth.min(2 * std::thread::available_parallelism().map_or(2, usize::from));
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                let data = vec![0x42u8; BLOCK as usize];
                loop {
                    let n = next.fetch_add(1, Ordering::Relaxed);
                    if n >= count {
                        return;
                    }
                    image.write_at(Mem::from(&data[..]), n.wrapping_mul(step) % DISK).unwrap();
                }
            });
        }
    });
    let seconds = begun.elapsed().as_secs_f64();
    image.close().unwrap();
    count as f64 / seconds
}

fn qemu(path: &Path, count: u64, depth: usize, step: u64) -> f64 {
    let (count_text, depth, step) = (count.to_string(), depth.to_string(), step.to_string());
    let args =
        ["bench", "-w", "-f", "qcow2", "-t", "writeback", "-s", "4096", "-c", &count_text, "-d", &depth];
    let printed = run("qemu-img", &[&args[..], &["-S", &step, path.to_str().unwrap()]].concat());
    // "Run completed in 1.234 seconds."
    let seconds =
        printed.split("completed in ").nth(1).and_then(|t| t.split(' ').next()).expect("qemu-img bench");
    count as f64 / seconds.parse::<f64>().unwrap()
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn main() {
    let (mut dir, mut runs, mut count) = (std::env::temp_dir(), 5, 40_000);
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let value = words.next().unwrap_or_else(|| panic!("{word} needs a value"));
        match word.as_str() {
            "--dir" => dir = PathBuf::from(value),
            "--runs" => runs = value.parse().unwrap(),
            "--count" => count = value.parse().unwrap(),
            other => panic!("unknown argument {other}"),
        }
    }
    let path = dir.join(format!("random-writes-{}.qcow2", std::process::id()));
    let base = dir.join(format!("random-writes-{}.raw", std::process::id()));
    std::fs::File::create(&base).unwrap().set_len(DISK).unwrap();
    println!("{count} writes of 4 KiB, {runs} runs, medians; files in {}", dir.display());
    println!("| workload | depth | per second | QEMU | ratio |\n|---|---|---|---|---|");
    for workload in &WORKLOADS {
        for depth in [1, 32] {
            let (mut mine, mut theirs) = (Vec::new(), Vec::new());
            let overlay = workload.start == Start::Overlay;
            for _ in 0..runs {
                make(&path, &base, workload.start);
                mine.push(ours(&path, overlay.then_some(&*base), count, depth, workload.step));
                make(&path, &base, workload.start);
                theirs.push(qemu(&path, count, depth, workload.step));
            }
            let (mine, theirs) = (median(&mut mine), median(&mut theirs));
            println!("| {} | {depth} | {mine:.0} | {theirs:.0} | {:.2} |", workload.name, mine / theirs);
        }
    }
    let _ = (std::fs::remove_file(&path), std::fs::remove_file(&base));
}
