//! A sound image with bytes changed, or any bytes at all, gives data or an error: no panic, no hang, no unbounded memory,
//! the same answer twice, and extents that agree with what is read.
#![no_main]

use std::sync::Arc;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use qcow2_engine::storage::MemoryStorage;
use qcow2_engine::{ExtentKind, GuestSource, Image, Job, MemMut, OpenOptions, Qcow2};
use qcow2_fuzz::Damaged;

#[derive(Debug, Arbitrary)]
struct Input {
    image: Damaged,
    snapshot: bool,
    small_cache: bool,
    reads: Vec<(u32, u16)>,
}

/// What a read gave, or the code of its error.
fn read(image: &Image, offset: u64, length: usize) -> Result<Vec<u8>, &'static str> {
    let mut bytes = vec![0xa5; length];
    image.read_at(MemMut::from(&mut bytes[..]), offset).map_err(|e| e.kind().code())?;
    Ok(bytes)
}

fuzz_target!(|input: Input| {
    let file = input.image.file();
    let options = OpenOptions {
        snapshot: input.snapshot.then(|| "before".into()),
        l2_cache_bytes: input.small_cache.then_some(0),
        inflated_cache_bytes: input.small_cache.then_some(0),
        ..OpenOptions::default()
    };
    let Ok(layer) = Qcow2::open(Arc::new(MemoryStorage::from_bytes(&file)), &options) else {
        return;
    };
    let _ = layer.bitmaps();
    let _ = layer.references();
    let image = Image::new(vec![Box::new(layer)]).expect("one layer makes a chain");
    let size = image.virtual_size();
    let mut starts: Vec<(u64, usize)> =
        input.reads.iter().take(16).map(|&(at, n)| (u64::from(at) % size.max(1), usize::from(n))).collect();
    starts.extend([(0, 1 << 16), (size.saturating_sub(70_000), 70_000)]);
    for (offset, length) in starts {
        let length = length.min(usize::try_from(size - offset).unwrap_or(usize::MAX));
        let whole = read(&image, offset, length);
        assert_eq!(read(&image, offset, length), whole, "the second answer differs");
        let half = length / 2;
        let (left, right) = (read(&image, offset, half), read(&image, offset + half as u64, length - half));
        match (&left, &right) {
            (Ok(left), Ok(right)) => assert_eq!(whole, Ok([&left[..], right].concat()), "the split matters"),
            _ => assert!(whole.is_err(), "a part fails and the whole does not"),
        }
        check_extents(&image, offset, length as u64);
    }
});

/// Extents must cover their range in order and without gaps; what they call zero must read as zeroes.
fn check_extents(image: &Image, start: u64, length: u64) {
    let mut extents = Vec::new();
    if image.extents(start, length, &Job::new(), &mut extents).is_err() {
        return;
    }
    let mut at = start;
    for extent in &extents {
        assert_eq!(extent.start, at);
        assert!(extent.length > 0);
        at += extent.length;
        if matches!(extent.kind, ExtentKind::Zero | ExtentKind::Unallocated) {
            let bytes = read(image, extent.start, extent.length as usize).expect("zeroes can be read");
            assert!(bytes.iter().all(|&b| b == 0));
        }
    }
    assert_eq!(at, start + length);
}
