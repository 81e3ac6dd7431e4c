//! A number of requests of one kind on an image in memory, in one thread: for a counter of instructions (`.ci/instructions`).
//! Two runs of different lengths tell what a request takes, without what making and opening the image took.
//!
//! `cargo run --release -p qcow2-engine --example instructions -- KIND COUNT`
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a benchmark"
)]

use std::hint::black_box;
use std::sync::Arc;

use qcow2_engine::create::{CreateOptions, Preallocation, create};
use qcow2_engine::storage::MemoryStorage;
use qcow2_engine::{Image, Job, Mem, MemMut, OpenOptions, Qcow2, Storage, WriteOptions};

const BLOCK: u64 = 4096;
const CLUSTER: u64 = 64 << 10;
const DISK: u64 = 4 << 30;
/// The part of the disk that requests go to: the cache has room for its tables several times.
const USED: u64 = 1 << 30;
/// Blocks that are read and rewritten: they have pages in memory before the requests begin.
const BLOCKS: u64 = 256;
/// Requests between two flushes.
const FLUSH_EVERY: u64 = 64;

/// An image that is open for writing; `allocated`: all its clusters are mapped.
fn open(allocated: bool) -> Image {
    let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::new());
    let preallocation = if allocated { Preallocation::Metadata } else { Preallocation::Off };
    let options = CreateOptions { size: DISK, preallocation, ..CreateOptions::default() };
    create(storage.clone(), None, &options, &Job::new()).unwrap();
    let mut qcow2 = Qcow2::open(storage, &OpenOptions::default()).unwrap();
    qcow2.enable_writing(WriteOptions::default()).unwrap();
    Image::new(vec![Box::new(qcow2)]).unwrap()
}

/// Guest offset of request `n`: an odd number of blocks comes to every block once, far from the one before.
fn scattered(n: u64) -> u64 {
    n.wrapping_mul(196_613 * BLOCK) % USED
}

/// Runs `request` on the blocks in turn, which were written before.
fn on_blocks(image: &Image, count: u64, mut request: impl FnMut(u64)) {
    let data = [0x42; BLOCK as usize];
    (0..BLOCKS).for_each(|n| image.write_at(Mem::from(&data[..]), scattered(n)).unwrap());
    image.flush().unwrap();
    (0..count).for_each(|n| request(scattered(n % BLOCKS)));
}

fn write(image: &Image, n: u64, offset: u64) {
    let data = [n as u8 | 1; BLOCK as usize];
    image.write_at(Mem::from(&data[..]), offset).unwrap();
    if n % FLUSH_EVERY == FLUSH_EVERY - 1 {
        image.flush().unwrap();
    }
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [kind, count] = &arguments[..] else { panic!("usage: instructions KIND COUNT") };
    let count: u64 = count.parse().unwrap();
    match kind.as_str() {
        // The plan of one block in a table that is in memory.
        "lookup" => {
            let image = open(true);
            let layer = image.top_qcow2().unwrap();
            let mut segments = Vec::new();
            for at in (0..USED).step_by(CLUSTER as usize) {
                segments.clear();
                layer.plan_read(at..at + BLOCK, &mut segments).unwrap();
            }
            for n in 0..count {
                segments.clear();
                let at = scattered(n);
                layer.plan_read(at..at + BLOCK, &mut segments).unwrap();
                black_box(&segments);
            }
        }
        "read" => {
            let image = open(true);
            let mut buffer = [0; BLOCK as usize];
            on_blocks(&image, count, |at| {
                image.read_at(MemMut::from(&mut buffer[..]), at).unwrap();
                black_box(&buffer);
            });
        }
        "rewrite" => {
            let image = open(true);
            let mut n = 0;
            on_blocks(&image, count, |at| {
                write(&image, n, at);
                n += 1;
            });
        }
        // Each request needs a new cluster.
        "allocate" => {
            let image = open(false);
            (0..count).for_each(|n| write(&image, n, n * CLUSTER % DISK));
        }
        other => panic!("no kind of request is called {other}"),
    }
}
