//! Whatever a client says, in a handshake or after one: the server ends, writes nothing outside of the export, and holds little.
#![no_main]

use std::io::{self, IoSlice};
use std::sync::Arc;
use std::sync::Mutex;
use std::time::Instant;

use libfuzzer_sys::fuzz_target;
use qcow2_core::Mem;
use qcow2_engine::create::{CreateOptions, create};
use qcow2_engine::storage::MemoryStorage;
use qcow2_engine::{Discard, Image, Job, MemMut, OpenOptions, Qcow2, Storage, WriteOptions};
use qcow2_nbd::server::{Export, Transport, serve_connection};

const SIZE: u64 = 1 << 20;
const OFFSET: u64 = 4096;

/// A client that says what it has to say and goes.
struct Says(Mutex<Vec<u8>>);

impl Transport for Says {
    fn read(&self, to: &mut [u8], _: Option<Instant>) -> io::Result<usize> {
        let mut left = self.0.lock().unwrap();
        let length = left.len().min(to.len());
        to[..length].copy_from_slice(&left[..length]);
        left.drain(..length);
        Ok(length)
    }

    fn write(&self, parts: &[IoSlice<'_>], _: Option<Instant>) -> io::Result<usize> {
        Ok(parts.iter().map(|part| part.len()).sum())
    }

    fn forget_deadlines(&self) -> io::Result<()> {
        Ok(())
    }

    fn shutdown(&self) {}
}

fn disk() -> Arc<Image> {
    let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::new());
    let options = CreateOptions { size: SIZE, ..CreateOptions::default() };
    create(Arc::clone(&storage), None, &options, &Job::new()).expect("a new image");
    let mut top = Qcow2::open(storage, &OpenOptions::default()).expect("an image");
    let write = WriteOptions { discard: Discard::Unmap, ..WriteOptions::default() };
    top.enable_writing(write).expect("a writable image");
    let image = Image::new(vec![Box::new(top)]).expect("a disk");
    image.write_at(Mem::from(&[0xa5; OFFSET as usize][..]), 0).expect("a write");
    Arc::new(image)
}

fuzz_target!(|data: &[u8]| {
    let Some((how, said)) = data.split_first() else { return };
    let disk = disk();
    let export = Export {
        name: Vec::new(),
        description: b"fuzz".to_vec(),
        disk: Arc::<Image>::clone(&disk),
        offset: OFFSET,
        read_only: how & 1 != 0,
        fast_zeroes: true,
        allocation_depth: true,
        bitmaps: Vec::new(),
    };
    // No mutation finds all magics: most begin behind a handshake that is right.
    let mut all = 3u32.to_be_bytes().to_vec();
    let option = |code: u32, data: &[u8]| {
        [&b"IHAVEOPT"[..], &code.to_be_bytes(), &(data.len() as u32).to_be_bytes(), data].concat()
    };
    let extended = how & 16 != 0;
    if how & 2 != 0 {
        all.extend(option(if extended { 11 } else { 8 }, b""));
        all.extend(option(10, b"\0\0\0\0\0\0\0\x01\0\0\0\x0fbase:allocation"));
    }
    if how & 4 != 0 {
        all.extend(option(7, &[0; 6]));
    }
    // Requests with the magic in its place.
    let (magic, rest) = if extended && how & 2 != 0 { (0x21e4_1c71u32, 28) } else { (0x2560_9513, 24) };
    for piece in said.chunks(if how & 8 != 0 { rest } else { usize::MAX }) {
        if how & 8 != 0 {
            all.extend(magic.to_be_bytes());
        }
        all.extend(piece);
    }
    serve_connection(&Says(Mutex::new(all)), &[export]);
    let mut before = [0; OFFSET as usize];
    disk.read_at(MemMut::from(&mut before[..]), 0).expect("a read");
    assert!(before == [0xa5; OFFSET as usize], "what lies before the export changed");
});
