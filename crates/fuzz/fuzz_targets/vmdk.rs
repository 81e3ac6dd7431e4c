//! Any bytes give a VMDK image or an error, alone and as an extent: no panic, no hang, no unbounded memory.
#![no_main]

use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use qcow2_core::check::CheckLayer;
use qcow2_core::storage::MemoryStorage;
use qcow2_core::{Chain, Job, Layer, MemMut, Storage};
use qcow2_vmdk::{OpenOptions, Vmdk, inspect_bytes};

/// Bytes of a disk that are read.
const READ: u64 = 1 << 20;

const LIMITS: OpenOptions =
    OpenOptions { max_virtual_size: 1 << 40, max_metadata_bytes: 1 << 20, l2_cache_bytes: Some(1 << 20) };

fn storage(bytes: &[u8]) -> Arc<dyn Storage> {
    Arc::new(MemoryStorage::from_bytes(bytes))
}

fn read(vmdk: Vmdk) {
    let _ = vmdk.check(10, &Job::new());
    let size = vmdk.virtual_size();
    let Ok(chain) = Chain::new(vec![Box::new(vmdk)]) else { return };
    let mut buffer = vec![0; size.min(READ) as usize];
    for start in [0, size.saturating_sub(READ)] {
        let _ = chain.read_at(MemMut::from(&mut buffer[..]), start);
    }
}

fuzz_target!(|data: &[u8]| {
    let _ = inspect_bytes(data, None, &LIMITS);
    if let Ok(vmdk) = Vmdk::open(storage(data), &LIMITS) {
        read(vmdk);
    }
    // As the extent of a descriptor that says what its header does.
    for (kind, sectors) in [("SPARSE", 2048), ("SESPARSE", 2048)] {
        let text = format!(
            "CID=1\nparentCID=ffffffff\ncreateType=\"custom\"\nRW {sectors} {kind} \"extent\"\nRW 8 FLAT \"flat\" 0\n"
        );
        let Ok(mut vmdk) = Vmdk::open(storage(text.as_bytes()), &LIMITS) else { continue };
        if vmdk.attach_extent(0, storage(data)).and_then(|()| vmdk.attach_extent(1, storage(data))).is_ok() {
            read(vmdk);
        }
    }
});
