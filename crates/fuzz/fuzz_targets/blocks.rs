//! Any bytes give a VDI image, a VHD or a Parallels image, or an error; so do reading, checking, writing and opening again: no panic, no
//! hang, no unbounded memory. The descriptors of disks in XML, of Parallels bundles and of OVF packages, are read as well.
#![no_main]

use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use qcow2_core::check::Repair;
use qcow2_core::storage::MemoryStorage;
use qcow2_core::{Chain, DiskOptions, Job, Layer, Mem, MemMut, Result, Storage};

/// Bytes of a disk that are read.
const READ: u64 = 1 << 20;
/// Largest disk, and largest table.
const LIMITS: (u64, u64) = (1 << 40, 1 << 20);
/// Places of checksums in a VHD: of a footer, and of the header of a dynamic disk.
const SUMS: [(usize, usize, usize); 2] = [(0, 512, 64), (512, 1024, 36)];

fn open(storage: Arc<dyn Storage>) -> Result<Box<dyn Layer>> {
    let (max_virtual_size, max_metadata_bytes) = LIMITS;
    let cache_bytes = Some(1 << 20);
    let vdi = qcow2_vdi::OpenOptions { max_virtual_size, max_metadata_bytes, cache_bytes };
    let vpc = qcow2_vpc::OpenOptions { max_virtual_size, max_metadata_bytes, cache_bytes };
    let parallels = qcow2_parallels::OpenOptions { max_virtual_size, max_metadata_bytes, cache_bytes };
    let _ = qcow2_vdi::inspect(&*storage, &vdi);
    let _ = qcow2_vpc::inspect(&*storage, &vpc);
    let _ = qcow2_parallels::inspect(&*storage, &parallels);
    if let Ok(layer) = qcow2_vdi::open(Arc::clone(&storage), &vdi) {
        return Ok(Box::new(layer));
    }
    if let Ok(layer) = qcow2_parallels::open_any(Arc::clone(&storage), &parallels) {
        return Ok(layer);
    }
    qcow2_vpc::open(storage, &vpc)
}

/// A VHD whose checksums are right: no fuzzer guesses them.
fn sealed(data: &[u8]) -> Vec<u8> {
    let mut bytes = data.to_vec();
    if !bytes.starts_with(b"conectix") {
        return bytes;
    }
    for (start, length, at) in SUMS {
        if let Some(part) = bytes.get_mut(start..start + length) {
            part[at..at + 4].fill(0);
            let sum = !part.iter().map(|byte| u32::from(*byte)).sum::<u32>();
            part[at..at + 4].copy_from_slice(&sum.to_be_bytes());
        }
    }
    bytes
}

fn read(layer: Box<dyn Layer>) {
    let size = layer.virtual_size();
    let Ok(chain) = Chain::new(vec![layer]) else { return };
    let mut buffer = vec![0; size.min(READ) as usize];
    for start in [0, size.saturating_sub(READ)] {
        let _ = chain.read_at(MemMut::from(&mut buffer[..]), start);
    }
}

/// Descriptors with these elements: no fuzzer guesses the names of what is around them.
fn descriptors(data: &[u8]) {
    let within =
        |name: &str| [format!("<{name}>").as_bytes(), data, format!("</{name}>").as_bytes()].concat();
    if let Ok(disk) = qcow2_parallels::descriptor::Descriptor::parse(&within("Parallels_disk_image")) {
        let ends = disk.storages.iter().map(|part| part.end);
        assert!(disk.storages.len() <= 1024 && ends.max().is_some_and(|end| disk.size <= end));
    }
    let _ = qcow2_ovf::parse(data);
    if let Ok(disks) = qcow2_ovf::parse(&within("Envelope")) {
        assert!(disks.len() <= 1000);
    }
}

fuzz_target!(|data: &[u8]| {
    if data.contains(&b'<') {
        descriptors(data);
    }
    let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::from_bytes(&sealed(data)));
    let Ok(mut layer) = open(Arc::clone(&storage)) else { return };
    if let Some(checked) = layer.as_checkable() {
        let _ = checked.check(10, &Job::new());
    }
    if layer.make_writable(DiskOptions::default()).is_ok()
        && let Some(writable) = layer.as_writable()
        && layer.virtual_size() >= 1024
    {
        let last = layer.virtual_size() - 512;
        for offset in [0, last / 1024 * 512, last] {
            let _ = writable.write_at(Mem::from(&[7; 512][..]), offset);
            let _ = writable.write_zeroes(offset, 512, true);
        }
        let _ = writable.close();
    }
    read(layer);
    let Ok(again) = open(Arc::clone(&storage)) else { return };
    if let Some(checked) = again.as_checkable() {
        let _ = checked.repair(Repair::All, 10, &Job::new());
    }
    read(again);
});
