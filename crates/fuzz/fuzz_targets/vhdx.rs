//! Any bytes in any structure of a VHDX image, under checksums that are right: a disk or an error, no panic, no hang, no unbounded memory.
#![no_main]

use std::sync::Arc;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use qcow2_core::check::CheckLayer;
use qcow2_core::disk::WriteLayer;
use qcow2_core::new_image::{Hosts, NewImage};
use qcow2_core::storage::MemoryStorage;
use qcow2_core::{DiskOptions, Job, Layer, Mem, MemMut, Storage, StorageExt};
use qcow2_vhdx::structures::{Guid, HEADER_OFFSETS, MIB, REGION_TABLE_OFFSETS, encode_entry, seal};
use qcow2_vhdx::{NewOptions, OpenOptions, Vhdx, inspect};

const SIZE: u64 = 6 * MIB;
/// Structures of the image, and how long they are: those with a checksum get one that is right.
const PARTS: [(u64, usize, bool); 8] = [
    (HEADER_OFFSETS[0], 4096, true),
    (HEADER_OFFSETS[1], 4096, true),
    (REGION_TABLE_OFFSETS[0], 64 << 10, true),
    (REGION_TABLE_OFFSETS[1], 64 << 10, true),
    (MIB, 8192, true),
    (2 * MIB, 4096, false),
    (3 * MIB, 4096, false),
    (3 * MIB + (64 << 10), 4096, false),
];

#[derive(Arbitrary, Debug)]
struct Input {
    /// Structure, place in it, bytes.
    damage: Vec<(u8, u16, Vec<u8>)>,
    /// Bytes of the table that the log brings.
    logged: Option<Vec<u8>>,
}

fn damaged(input: &Input) -> Option<Arc<dyn Storage>> {
    let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::new());
    let new = NewOptions { size: SIZE, block_size: MIB, ..NewOptions::default() };
    new.plan().ok()?.create(&Hosts::from(Arc::clone(&storage)), &Job::new()).ok()?;
    let mut file = vec![0; 4 << 20];
    storage.read_exact_at(MemMut::from(&mut file[..]), 0).ok()?;
    if let Some(logged) = &input.logged {
        let mut sector = vec![0; 4096];
        let length = logged.len().min(4096);
        sector[..length].copy_from_slice(&logged[..length]);
        let guid = Guid([7; 16]);
        let entry = encode_entry(guid, 0, 1, 8 * MIB, &[(2 * MIB, &sector)]);
        file[MIB as usize..][..entry.len()].copy_from_slice(&entry);
        HEADER_OFFSETS.into_iter().for_each(|at| file[at as usize + 48..][..16].copy_from_slice(&guid.0));
    }
    for (part, at, bytes) in input.damage.iter().take(16) {
        let (start, length, _) = PARTS[usize::from(*part) % PARTS.len()];
        let at = usize::from(*at) % length;
        let bytes = &bytes[..bytes.len().min(length - at)];
        file[start as usize + at..][..bytes.len()].copy_from_slice(bytes);
    }
    for (start, length, _) in PARTS.into_iter().filter(|(_, _, sealed)| *sealed) {
        seal(&mut file[start as usize..][..length]);
    }
    storage.write_all_at(Mem::from(&file[..]), 0).ok()?;
    Some(storage)
}

fuzz_target!(|input: Input| {
    let Some(storage) = damaged(&input) else { return };
    let limits = OpenOptions { max_virtual_size: 64 << 30, ..OpenOptions::default() };
    let _ = inspect(&*storage, &limits);
    let Ok(mut disk) = Vhdx::open(Arc::clone(&storage), &limits) else { return };
    let _ = disk.check(100, &Job::new());
    let size = disk.virtual_size();
    let mut segments = Vec::new();
    let _ = disk.plan(0..size.min(64 * MIB), &mut segments);
    for segment in segments.iter().filter(|segment| segment.length <= MIB) {
        let mut bytes = vec![0; segment.length as usize];
        let _ = disk.read_segment(segment, MemMut::from(&mut bytes[..]));
    }
    if disk.make_writable(DiskOptions::default()).is_err() || size < MIB {
        return;
    }
    let written = [9; 5000];
    let done = disk.write_at(Mem::from(&written[..]), size - 5000).and_then(|()| disk.close());
    drop(disk);
    if done.is_ok() {
        let again = Vhdx::open(storage, &limits).expect("what was written to opens");
        let mut segments = Vec::new();
        again.plan(size - 5000..size, &mut segments).expect("what was written is there");
    }
});
