//! A sound image with bytes changed, or any bytes at all, gives data or an error: no panic, no hang, no unbounded memory,
//! the same answer twice, and extents that agree with what is read.
#![no_main]

use std::sync::{Arc, LazyLock};

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use qcow2_engine::storage::MemoryStorage;
use qcow2_engine::{ExtentKind, GuestSource, Image, Job, Layer, MemMut, OpenOptions, Qcow2};
use qcow2_testkit::forge::{Forge, codec};

#[derive(Debug, Arbitrary)]
struct Input {
    base: u8,
    patches: Vec<Patch>,
    /// Bytes cut from the end.
    cut: u16,
    snapshot: bool,
    small_cache: bool,
    reads: Vec<(u32, u16)>,
    /// The whole file, where `base` asks for none of the sound ones.
    bytes: Vec<u8>,
}

#[derive(Debug, Arbitrary)]
enum Patch {
    Byte {
        offset: u16,
        value: u8,
    },
    /// Any big-endian field: those of the header first.
    Field {
        offset: u8,
        value: u32,
    },
    /// A table entry, of which every sound image has its own in the first clusters.
    Entry {
        index: u16,
        value: u64,
    },
    /// Points an entry at another cluster, flags kept.
    Redirect {
        index: u16,
        cluster: u16,
    },
}

/// Images that hold every kind of cluster, in geometries that fit in a few clusters of file.
static BASES: LazyLock<Vec<Vec<u8>>> = LazyLock::new(|| {
    let mut bases = Vec::new();
    for (version, bits, extended, zstd) in [
        (3, 9, false, false),
        (2, 9, false, false),
        (3, 12, false, true),
        (3, 14, true, false),
        (3, 14, true, true),
        (3, 16, false, false),
    ] {
        let size = 24 << bits;
        let mut forge = Forge::new(version, bits, size);
        if extended {
            forge = forge.extended_l2();
        }
        if zstd {
            forge = forge.zstd();
        }
        let text = |seed: u8| (0..1usize << bits).map(|i| seed ^ (i / 7) as u8).collect::<Vec<_>>();
        let pack = |bytes: &[u8]| if zstd { codec::zstd(bytes, 2) } else { codec::deflate(bytes) };
        forge.data(0, &text(1));
        forge.compressed(1, &pack(&text(2)));
        forge.snapshot("1", "before", size);
        forge.data(2, &text(3));
        forge.compressed(4, &pack(&text(4)));
        forge.compressed(5, &pack(&text(5)));
        if version == 3 {
            forge.zero_plain(6);
            forge.zero_allocated(7, &text(6));
            forge.bitmap("dirty", 2, 16, &[0xff; 8]);
        }
        if extended {
            forge.data(8, &text(7));
            forge.subclusters(8, 0xff00_00ff | 0x00ff_0000 << 32);
        }
        bases.push(forge.build().bytes.to_vec());
    }
    bases
});

fn put(file: &mut [u8], offset: usize, bytes: &[u8]) {
    if let Some(place) = file.get_mut(offset..offset + bytes.len()) {
        place.copy_from_slice(bytes);
    }
}

fn apply(file: &mut [u8], patch: &Patch) {
    match *patch {
        Patch::Byte { offset, value } => put(file, usize::from(offset), &[value]),
        Patch::Field { offset, value } => put(file, usize::from(offset) & !3, &value.to_be_bytes()),
        Patch::Entry { index, value } => put(file, usize::from(index) * 8, &value.to_be_bytes()),
        Patch::Redirect { index, cluster } => {
            let at = usize::from(index) * 8;
            let bits = file.get(23).map_or(9, |&b| u32::from(b).clamp(9, 21));
            let flags = file.get(at).copied().unwrap_or(0) & 0xc0;
            let entry = u64::from(flags) << 56 | u64::from(cluster) << bits;
            put(file, at, &entry.to_be_bytes());
        }
    }
}

/// What a read gave, or the code of its error.
fn read(image: &Image, offset: u64, length: usize) -> Result<Vec<u8>, &'static str> {
    let mut bytes = vec![0xa5; length];
    image.read_at(MemMut::from(&mut bytes[..]), offset).map_err(|e| e.kind().code())?;
    Ok(bytes)
}

fuzz_target!(|input: Input| {
    let mut file = match BASES.get(usize::from(input.base) % (BASES.len() + 1)) {
        Some(base) => base.clone(),
        None => input.bytes.clone(),
    };
    for patch in input.patches.iter().take(64) {
        apply(&mut file, patch);
    }
    file.truncate(file.len().saturating_sub(usize::from(input.cut)));
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
    let image = Image::new(vec![Layer::Qcow2(Box::new(layer))]).expect("one layer makes a chain");
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
