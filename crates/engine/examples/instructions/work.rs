//! Requests on an image in memory, in one thread: what is counted in instructions and measured in time.

use std::hint::black_box;
use std::sync::Arc;

use qcow2_core::layer::Segment;
use qcow2_engine::create::{CreateOptions, Preallocation, create};
use qcow2_engine::storage::MemoryStorage;
use qcow2_engine::{Image, Job, Mem, MemMut, OpenOptions, Qcow2, Storage, WriteOptions};

pub(crate) const BLOCK: u64 = 4096;
const CLUSTER: u64 = 64 << 10;
const DISK: u64 = 4 << 30;
/// The part of the disk that requests go to: the cache has room for its tables several times.
const USED: u64 = 1 << 30;
/// Blocks that are read and rewritten: they have pages in memory before the requests begin.
const BLOCKS: u64 = 256;
/// Requests between two flushes.
const FLUSH_EVERY: u64 = 64;

/// An image that is open for writing; `allocated`: all its clusters are mapped.
pub(crate) fn open(allocated: bool) -> Image {
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

/// An allocated image whose blocks were written before.
pub(crate) fn written() -> Image {
    let image = open(true);
    let data = [0x42; BLOCK as usize];
    (0..BLOCKS).for_each(|n| image.write_at(Mem::from(&data[..]), scattered(n)).unwrap());
    image.flush().unwrap();
    image
}

fn write(image: &Image, n: u64, offset: u64) {
    let data = [n as u8 | 1; BLOCK as usize];
    image.write_at(Mem::from(&data[..]), offset).unwrap();
    if n % FLUSH_EVERY == FLUSH_EVERY - 1 {
        image.flush().unwrap();
    }
}

/// An image whose tables are all in memory.
pub(crate) fn looked_up() -> Image {
    let image = open(true);
    let layer = image.top_qcow2().unwrap();
    let mut segments = Vec::new();
    for at in (0..USED).step_by(CLUSTER as usize) {
        segments.clear();
        layer.plan_read(at..at + BLOCK, &mut segments).unwrap();
    }
    image
}

/// The plan of one block in a table that is in memory.
pub(crate) fn lookup(layer: &Qcow2, n: u64, segments: &mut Vec<Segment>) {
    segments.clear();
    let at = scattered(n);
    layer.plan_read(at..at + BLOCK, segments).unwrap();
    black_box(segments);
}

pub(crate) fn read(image: &Image, n: u64, buffer: &mut [u8; BLOCK as usize]) {
    image.read_at(MemMut::from(&mut buffer[..]), scattered(n % BLOCKS)).unwrap();
    black_box(buffer);
}

pub(crate) fn rewrite(image: &Image, n: u64) {
    write(image, n, scattered(n % BLOCKS));
}

/// Each request needs a new cluster.
pub(crate) fn allocate(image: &Image, n: u64) {
    write(image, n, n * CLUSTER % DISK);
}
