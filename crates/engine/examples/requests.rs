//! Requests of 4 KiB through this engine for a while, and how many a second as JSON. `npm run bench -- requests` compares.
//!
//! `requests --image FILE --format raw|qcow2 --kind read|write --cache writeback|none --depth N --seconds S --size BYTES
//! --step BYTES --count N [--backing RAW] [--luks]`
//!
//! They go round the disk of `size`, each `step` behind the one before, until so many are done or the time is over.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a benchmark"
)]

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use qcow2_engine::storage::{Access, CacheMode, DirectStorage, FileStorage};
use qcow2_engine::{
    Image, Job, Layer, LayerExt, Mem, MemMut, OpenOptions, Qcow2, Raw, Storage, WriteOptions,
};

const BLOCK: u64 = 4096;

/// The words of the command line: flags without a value have an empty one.
fn arguments() -> HashMap<String, String> {
    let mut found = HashMap::new();
    let mut words = std::env::args().skip(1).peekable();
    while let Some(word) = words.next() {
        let value = words.next_if(|next| !next.starts_with("--")).unwrap_or_default();
        found.insert(word.trim_start_matches("--").to_owned(), value);
    }
    found
}

fn open(arguments: &HashMap<String, String>, cache: CacheMode, writes: bool) -> Image {
    let access = if writes { Access::ReadWrite } else { Access::ReadOnly };
    let file = Arc::new(FileStorage::open_cached(&arguments["image"], access, cache).unwrap());
    let storage = DirectStorage::over(file as Arc<dyn Storage>);
    let mut top: Box<dyn Layer> = match arguments["format"].as_str() {
        "raw" if writes => Box::new(Raw::new(storage).unwrap().with_write_options(&WriteOptions::default())),
        "raw" => Box::new(Raw::new(storage).unwrap()),
        _ => Box::new(Qcow2::open(storage, &OpenOptions::default()).unwrap()),
    };
    if arguments.contains_key("luks") {
        top.unlock(b"secret", &Job::new()).unwrap();
    }
    if writes && arguments["format"] != "raw" {
        top.enable_writing(WriteOptions::default()).unwrap();
    }
    let mut layers = vec![top];
    if let Some(backing) = arguments.get("backing") {
        let backing = Arc::new(FileStorage::open(backing, Access::ReadOnly).unwrap());
        layers.push(Box::new(Raw::new(backing).unwrap()));
    }
    Image::new(layers).unwrap()
}

fn main() {
    let arguments = arguments();
    let number = |name: &str| arguments[name].parse::<u64>().unwrap();
    let (size, step, count) = (number("size"), number("step"), number("count"));
    let cache = CacheMode::from_name(&arguments["cache"]).unwrap();
    let writes = arguments["kind"] == "write";
    let image = open(&arguments, cache, writes);
    // What is in the page cache needs no waiting: more threads than a few per core would measure the scheduler.
    let cores = std::thread::available_parallelism().map_or(2, usize::from);
    let depth = number("depth") as usize;
    let threads = if cache == CacheMode::None { depth } else { depth.min(2 * cores) };
    let (next, done) = (AtomicU64::new(0), AtomicU64::new(0));
    let begun = Instant::now();
    let end = begun + Duration::from_secs_f64(arguments["seconds"].parse().unwrap());
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                // Direct I/O wants memory at a multiple of the block.
                let mut memory = vec![0x5a_u8; 2 * BLOCK as usize];
                let at = memory.as_ptr().align_offset(BLOCK as usize);
                let buffer = &mut memory[at..at + BLOCK as usize];
                let mut mine = 0;
                while Instant::now() < end {
                    let n = next.fetch_add(1, Ordering::Relaxed);
                    if n >= count {
                        break;
                    }
                    let offset = n.wrapping_mul(step) % size;
                    if writes {
                        image.write_at(Mem::from(&*buffer), offset).unwrap();
                    } else {
                        image.read_at(MemMut::from(&mut *buffer), offset).unwrap();
                    }
                    mine += 1;
                }
                done.fetch_add(mine, Ordering::Relaxed);
            });
        }
    });
    let seconds = begun.elapsed().as_secs_f64();
    if writes {
        image.close().unwrap();
    }
    println!("{{\"rate\": {}}}", done.into_inner() as f64 / seconds);
}
