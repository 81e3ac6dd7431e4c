//! Replays the recorded installation of a system, request by request, on a raw file and on a qcow2 image, through this
//! engine and through QEMU's drivers (qemu-io), in turn, and prints time and host calls.
//!
//! `cargo run --release -p qcow2-engine --example replay -- [--dir DIR] [--runs N] [--modes none,writethrough,writeback]
//! [--requests N] [--without-qemu] [--rewrite] [--luks]`
//!
//! The image grows from nothing; with `--rewrite`, the installation was on it before, so that all its clusters are allocated.
//! With `--luks`, both are encrypted: a LUKS file with a raw disk, and a qcow2 image with LUKS.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a benchmark"
)]

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use qcow2_core::NewImage;
use qcow2_engine::create::{CreateOptions, Preallocation, create};
use qcow2_engine::encryption::{Encryption, Secret};
use qcow2_engine::storage::{Access, CacheMode, DirectStorage, FileStorage};
use qcow2_engine::{Discard, Image, Job, Layer, LayerExt, OpenOptions, Qcow2, Raw, Storage, WriteOptions};
use qcow2_luks::{Luks, OpenOptions as LuksOptions};
use qcow2_testkit::Forge;
use qcow2_testkit::ops::Op;
use qcow2_testkit::storage::{CountingStorage, Op as Call};
use qcow2_testkit::trace::{self, Expected};

struct Arguments {
    dir: PathBuf,
    runs: usize,
    modes: Vec<CacheMode>,
    requests: usize,
    qemu: bool,
    rewrite: bool,
    luks: bool,
}

fn arguments() -> Arguments {
    let mut arguments = Arguments {
        dir: std::env::temp_dir(),
        runs: 5,
        modes: vec![CacheMode::None, CacheMode::Writethrough, CacheMode::Writeback],
        requests: usize::MAX,
        qemu: true,
        rewrite: false,
        luks: false,
    };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let mut value = || words.next().unwrap_or_else(|| panic!("{word} needs a value"));
        match word.as_str() {
            "--dir" => arguments.dir = value().into(),
            "--runs" => arguments.runs = value().parse().unwrap(),
            "--requests" => arguments.requests = value().parse().unwrap(),
            "--modes" => {
                let mode =
                    |name: &str| CacheMode::from_name(name).unwrap_or_else(|| panic!("cache mode {name}"));
                arguments.modes = value().split(',').map(mode).collect();
            }
            "--without-qemu" => arguments.qemu = false,
            "--rewrite" => arguments.rewrite = true,
            "--luks" => arguments.luks = true,
            other => panic!("unknown argument {other}"),
        }
    }
    arguments
}

/// What is installed, and on which disk.
struct Work<'a> {
    path: &'a Path,
    requests: &'a [Op],
    rewrite: bool,
    luks: Option<Encryption>,
}

const SECRET: &str = "secret";

/// QEMU's defaults, and a secret that costs nothing to guess: opening is not what is timed.
fn encryption() -> Encryption {
    Encryption { iter_time_ms: Some(0), ..Encryption::luks(Secret::new(SECRET.into())) }
}

/// A new empty disk, or one with the installation on it.
fn make(work: &Work<'_>, format: &str) {
    let path = work.path;
    let _ = std::fs::remove_file(path);
    match (&work.luks, format) {
        (None, "raw") => std::fs::File::create(path).unwrap().set_len(trace::DISK).unwrap(),
        (None, _) => Forge::new(3, 16, trace::DISK).build().bytes.write_to(path),
        (Some(encryption), _) => {
            std::fs::File::create(path).unwrap();
            let file = FileStorage::open_cached(path, Access::ReadWrite, CacheMode::Writeback).unwrap();
            let (file, job) = (Arc::new(file) as Arc<dyn Storage>, Job::new());
            if format == "raw" {
                let luks = encryption.new_luks(trace::DISK, Preallocation::Off, &job).unwrap();
                luks.create(&file.into(), &job).unwrap();
            } else {
                let data_door = Some(encryption.door(&job).unwrap());
                let options = CreateOptions { size: trace::DISK, data_door, ..CreateOptions::default() };
                create(file, None, &options, &job).unwrap();
            }
        }
    }
    if work.rewrite {
        let (image, _) = open(work, format, CacheMode::Unsafe);
        trace::replay(&image, work.requests).unwrap();
        image.close().unwrap();
    }
    // The next one starts with nothing to write back.
    rustix::fs::sync();
}

fn open(work: &Work<'_>, format: &str, mode: CacheMode) -> (Image, Arc<CountingStorage>) {
    let file = Arc::new(FileStorage::open_cached(work.path, Access::ReadWrite, mode).unwrap());
    let calls = Arc::new(CountingStorage::new(file));
    // Below the bounce buffers of direct I/O, so that what they cost is counted.
    let storage = DirectStorage::over(calls.clone() as Arc<dyn Storage>);
    let flush_each = mode.flushes_every_write();
    let write = WriteOptions { discard: Discard::Unmap, flush_each, ..WriteOptions::default() };
    let mut layer: Box<dyn Layer> = match (format, &work.luks) {
        ("raw", None) => Box::new(Raw::new(storage).unwrap().with_write_options(&write)),
        ("raw", Some(_)) => Box::new(Luks::open(storage, &LuksOptions::default()).unwrap()),
        _ => Box::new(Qcow2::open(storage, &OpenOptions::default()).unwrap()),
    };
    if work.luks.is_some() {
        layer.unlock(SECRET.as_bytes(), &Job::new()).unwrap();
    }
    if format != "raw" || work.luks.is_some() {
        layer.enable_writing(write).unwrap();
    }
    (Image::new(vec![layer]).unwrap(), calls)
}

/// Time and calls: fdatasync, pwrite, fallocate.
fn ours(work: &Work<'_>, format: &str, mode: CacheMode, expected: Option<&Expected>) -> (Duration, [u64; 3]) {
    make(work, format);
    let (image, calls) = open(work, format, mode);
    let begun = Instant::now();
    trace::replay(&image, work.requests).unwrap();
    image.close().unwrap();
    let time = begun.elapsed();
    let of = |call| calls.of(call).calls;
    let counts = [of(Call::Sync), of(Call::Write), of(Call::Zero) + of(Call::Discard) + of(Call::Allocate)];
    drop(image);
    verify(work, format, expected);
    (time, counts)
}

fn verify(work: &Work<'_>, format: &str, expected: Option<&Expected>) {
    // Where nothing was written, a raw disk behind LUKS reads as noise.
    let is_noise = format == "raw" && work.luks.is_some();
    if let Some(expected) = expected.filter(|_| !is_noise) {
        expected.verify(&open(work, format, CacheMode::Writeback).0);
    }
}

fn qemu(work: &Work<'_>, format: &str, mode: CacheMode, expected: Option<&Expected>) -> Duration {
    make(work, format);
    let commands = trace::qemu_io_commands(work.requests);
    let begun = Instant::now();
    let mut child = Command::new("qemu-io")
        .args(["-f", format, "-t", mode.name(), "-d", "unmap"])
        .arg(work.path)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .expect("qemu-io");
    child.stdin.take().unwrap().write_all(commands.as_bytes()).unwrap();
    assert!(child.wait().unwrap().success());
    let time = begun.elapsed();
    verify(work, format, expected);
    time
}

fn median(times: &mut [Duration]) -> f64 {
    times.sort_unstable();
    times[times.len() / 2].as_secs_f64()
}

fn main() {
    let arguments = arguments();
    let Some(requests) = trace::load() else { return };
    let requests = &requests[..requests.len().min(arguments.requests)];
    let expected = Expected::after(requests);
    let has_qemu = arguments.qemu
        && !arguments.luks
        && Command::new("qemu-io").arg("--version").output().is_ok_and(|o| o.status.success());
    let path = arguments.dir.join(format!("replay-{}.img", std::process::id()));
    let luks = arguments.luks.then(encryption);
    let work = Work { path: &path, requests, rewrite: arguments.rewrite, luks };
    println!(
        "{} requests on {}{}, {} runs, medians; files in {}",
        requests.len(),
        if work.luks.is_some() { "LUKS, " } else { "" },
        if work.rewrite { "a disk that has them" } else { "an empty disk" },
        arguments.runs,
        arguments.dir.display()
    );
    println!(
        "| cache | layout | seconds | fdatasync | pwrite | fallocate | QEMU: seconds | faster than QEMU |"
    );
    println!("|---|---|---|---|---|---|---|---|");
    for mode in &arguments.modes {
        let formats = ["raw", "qcow2"];
        let mut times = [(Vec::new(), Vec::new()), (Vec::new(), Vec::new())];
        let mut counts = [[0; 3]; 2];
        // The first round is verified and not timed: it finds the host's memory and disk cold.
        for run in 0..=arguments.runs {
            let expected = (run == 0).then_some(&expected);
            for (n, format) in formats.iter().enumerate() {
                let (time, calls) = ours(&work, format, *mode, expected);
                counts[n] = calls;
                let qemu = has_qemu.then(|| qemu(&work, format, *mode, expected));
                if run > 0 {
                    times[n].0.push(time);
                    times[n].1.extend(qemu);
                }
            }
        }
        let medians: Vec<(f64, f64)> = times
            .iter_mut()
            .map(|(ours, qemu)| (median(ours), if has_qemu { median(qemu) } else { f64::NAN }))
            .collect();
        for ((format, [syncs, writes, fallocates]), (ours, qemu)) in formats.iter().zip(counts).zip(&medians)
        {
            let faster = qemu / ours;
            println!(
                "| {mode} | {format} | {ours:.2} | {syncs} | {writes} | {fallocates} | {qemu:.2} | {faster:.2} |"
            );
        }
        let ratio = |n: usize| counts[1][n] as f64 / counts[0][n] as f64;
        println!(
            "| {mode} | qcow2 / raw | {:.3} | {:.3} | {:.3} | {:.3} | {:.3} | |",
            medians[1].0 / medians[0].0,
            ratio(0),
            ratio(1),
            ratio(2),
            medians[1].1 / medians[0].1
        );
    }
    let _ = std::fs::remove_file(&path);
}
