//! Replays the recorded installation of a system once, request by request, on a raw file or a qcow2 image, through this engine or
//! through QEMU's drivers (qemu-io), and prints time and host calls as JSON. `npm run bench -- installation` makes the table of it.
//!
//! `replay --dir DIR --by ours|old|qemu --format raw|qcow2 --mode none|writethrough|writeback [--requests N] [--rewrite] [--luks]
//! [--delay US] [--preload LIBRARY] [--verify]`
//!
//! The image grows from nothing; with `--rewrite`, the installation was on it before, so that all its clusters are allocated.
//! With `--luks`, both are encrypted: a LUKS file with a raw disk, and a qcow2 image with LUKS.
//! `--by old`: this engine with the policy of QEMU 0.10.5, which exists here alone.
//! `--delay`: each sync takes so many microseconds more; in QEMU's process the library to preload sees to that.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a benchmark"
)]

mod policy;

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

use self::policy::{Device, Old};

struct Arguments {
    dir: PathBuf,
    by: String,
    format: String,
    mode: CacheMode,
    requests: usize,
    rewrite: bool,
    luks: bool,
    delay: Duration,
    preload: Option<String>,
    verify: bool,
}

fn arguments() -> Arguments {
    let mut arguments = Arguments {
        dir: std::env::temp_dir(),
        by: "ours".into(),
        format: "qcow2".into(),
        mode: CacheMode::Writeback,
        requests: usize::MAX,
        rewrite: false,
        luks: false,
        delay: Duration::ZERO,
        preload: None,
        verify: false,
    };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let mut value = || words.next().unwrap_or_else(|| panic!("{word} needs a value"));
        match word.as_str() {
            "--dir" => arguments.dir = value().into(),
            "--by" => arguments.by = value(),
            "--format" => arguments.format = value(),
            "--mode" => {
                let name = value();
                arguments.mode = CacheMode::from_name(&name).unwrap_or_else(|| panic!("cache mode {name}"));
            }
            "--requests" => arguments.requests = value().parse().unwrap(),
            "--rewrite" => arguments.rewrite = true,
            "--luks" => arguments.luks = true,
            "--delay" => arguments.delay = Duration::from_micros(value().parse().unwrap()),
            "--preload" => arguments.preload = Some(value()),
            "--verify" => arguments.verify = true,
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
        let image = open(work, format, CacheMode::Unsafe, Duration::ZERO, false).image;
        trace::replay(&image, work.requests).unwrap();
        image.close().unwrap();
    }
    // The next one starts with nothing to write back.
    #[cfg(unix)]
    rustix::fs::sync();
}

/// The disk as it is stored, its device, and what was asked of the file.
struct Opened {
    image: Image,
    device: Arc<Device>,
    calls: Arc<CountingStorage>,
}

fn open(work: &Work<'_>, format: &str, mode: CacheMode, delay: Duration, old: bool) -> Opened {
    let file = Arc::new(FileStorage::open_cached(work.path, Access::ReadWrite, mode).unwrap());
    let calls = Arc::new(CountingStorage::new(file));
    let each_write = old && mode.flushes_every_write();
    let device = Arc::new(Device::new(calls.clone(), delay, each_write));
    // Below the bounce buffers of direct I/O, so that what they cost is counted.
    let storage = DirectStorage::over(device.clone() as Arc<dyn Storage>);
    let flush_each = !old && mode.flushes_every_write();
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
    Opened { image: Image::new(vec![layer]).unwrap(), device, calls }
}

/// Time and calls: fdatasync, pwrite, fallocate.
fn ours(work: &Work<'_>, arguments: &Arguments) -> (Duration, [u64; 3]) {
    let is_old = arguments.by == "old";
    let Opened { image, device, calls } =
        open(work, &arguments.format, arguments.mode, arguments.delay, is_old);
    let time = if is_old {
        let before = if work.rewrite { work.requests } else { &[] };
        let mut old = Old::new(image, device, arguments.mode, before);
        let mut data = trace::buffer(work.requests);
        let begun = Instant::now();
        old.replay(work.requests, |disk, n, op| trace::run(disk, n, op, &mut data)).unwrap();
        begun.elapsed()
    } else {
        let begun = Instant::now();
        trace::replay(&image, work.requests).unwrap();
        image.close().unwrap();
        begun.elapsed()
    };
    let of = |call| calls.of(call).calls;
    (time, [of(Call::Sync), of(Call::Write), of(Call::Zero) + of(Call::Discard) + of(Call::Allocate)])
}

fn qemu(work: &Work<'_>, arguments: &Arguments) -> Duration {
    let commands = trace::qemu_io_commands(work.requests);
    let mut command = Command::new(std::env::var_os("QEMU_IO_PROG").unwrap_or_else(|| "qemu-io".into()));
    if let Some(library) = &arguments.preload {
        let delay = arguments.delay.as_micros().to_string();
        command.env("LD_PRELOAD", library).env("QCOW2_SYNC_DELAY_US", delay);
    }
    let begun = Instant::now();
    let mut child = command
        .args(["-f", &arguments.format, "-t", arguments.mode.name(), "-d", "unmap"])
        .arg(work.path)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .expect("qemu-io");
    child.stdin.take().unwrap().write_all(commands.as_bytes()).unwrap();
    assert!(child.wait().unwrap().success());
    begun.elapsed()
}

fn verify(work: &Work<'_>, format: &str) {
    // Where nothing was written, a raw disk behind LUKS reads as noise.
    if format == "raw" && work.luks.is_some() {
        return;
    }
    let opened = open(work, format, CacheMode::Writeback, Duration::ZERO, false);
    Expected::after(work.requests).verify(&opened.image);
}

fn main() {
    let arguments = arguments();
    let Some(requests) = trace::load() else { return };
    let requests = &requests[..requests.len().min(arguments.requests)];
    let path = arguments.dir.join(format!("replay-{}.img", std::process::id()));
    let luks = arguments.luks.then(encryption);
    let work = Work { path: &path, requests, rewrite: arguments.rewrite, luks };
    make(&work, &arguments.format);
    if arguments.by == "qemu" {
        let seconds = qemu(&work, &arguments).as_secs_f64();
        println!("{{\"seconds\": {seconds}}}");
    } else {
        let (time, [syncs, writes, spaces]) = ours(&work, &arguments);
        let seconds = time.as_secs_f64();
        println!(
            "{{\"seconds\": {seconds}, \"syncs\": {syncs}, \"writes\": {writes}, \"spaces\": {spaces}}}"
        );
    }
    if arguments.verify {
        verify(&work, &arguments.format);
    }
    let _ = std::fs::remove_file(&path);
}
