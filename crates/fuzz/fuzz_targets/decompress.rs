//! Any bytes decompress to exactly one cluster or give an error, and what was compressed comes back. Any compressed file gives a disk or
//! an error: no panic, no hang, no unbounded memory.
#![no_main]

use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use qcow2_compressed::{Compressed, OpenOptions};
use qcow2_core::storage::MemoryStorage;
use qcow2_core::{Chain, Job, MemMut, Storage};
use qcow2_transform::{Codec, CompressOptions, Compressor, Decompressor};

/// Largest disk in a file, and largest window of its decoder.
const LIMITS: OpenOptions = OpenOptions { max_virtual_size: 1 << 20, max_window: 1 << 20, size: None };

/// Reads the disk in a file, from its end and from its start. The bytes are those of every kind of file: no fuzzer needs to find its magic.
fn read_file(choice: u8, input: &[u8]) {
    use qcow2_compressed::Codec;
    let (codec, magic): (Codec, &[u8]) = match choice % 3 {
        0 => (Codec::Gzip, b"\x1f\x8b\x08"),
        1 => (Codec::Xz, b"\xfd7zXZ\0"),
        _ => (Codec::Zstd, b"\x28\xb5\x2f\xfd"),
    };
    let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::from_bytes(&[magic, input].concat()));
    let found = qcow2_compressed::inspect(&storage, codec, &LIMITS).expect("memory reads");
    // What the caller knows of it may be wrong.
    let known = (choice >= 128).then(|| u64::from(choice) << 6);
    let limits = OpenOptions { size: known, ..LIMITS };
    let Ok(disk) = Compressed::open(storage, codec, &limits, &Job::new()) else { return };
    let Ok(chain) = Chain::new(vec![Box::new(disk)]) else { return };
    let size = chain.virtual_size();
    assert!(size <= (1 << 20) + 511);
    assert!(known.or(found.virtual_size).is_none_or(|said| said.next_multiple_of(512) == size));
    let mut bytes = vec![0; size.min(4096) as usize];
    for start in [size - bytes.len() as u64, 0] {
        let _ = chain.read_at(MemMut::from(&mut bytes[..]), start);
    }
}

fuzz_target!(|data: &[u8]| {
    let [choice, input @ ..] = data else {
        return;
    };
    read_file(choice >> 4, input);
    let codec = if choice & 1 == 0 { Codec::Zlib } else { Codec::Zstd };
    let mut cluster = vec![0u8; 512 << (choice >> 1 & 7)];
    let mut decompressor = Decompressor::new(codec).expect("a context");
    // The result of the first read must not depend on what the context read before.
    let first = decompressor.decompress(input, &mut cluster).is_ok();
    let bytes = first.then(|| cluster.clone());
    assert_eq!(decompressor.decompress(input, &mut cluster).is_ok(), first);
    assert!(bytes.is_none_or(|bytes| bytes == cluster));

    let mut plain = input.to_vec();
    plain.resize(cluster.len(), 0);
    let options = CompressOptions { codec, ..CompressOptions::default() };
    let mut compressor = Compressor::new(&options).expect("a context");
    let mut packed = vec![0u8; cluster.len()];
    if let Some(length) = compressor.compress(&plain, &mut packed).expect("compression") {
        assert!(length < cluster.len());
        decompressor.decompress(&packed[..length], &mut cluster).expect("what was compressed decompresses");
        assert!(plain == cluster);
    }
});
