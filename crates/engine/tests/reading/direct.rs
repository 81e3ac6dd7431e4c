//! Direct I/O: any request on storages that take aligned ones only, and the cache modes on real files.

use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use proptest::prelude::*;
use qcow2_engine::storage::{Access, CacheMode, DirectStorage, FileStorage, MemoryStorage};
use qcow2_engine::{ErrorKind, Mem, MemMut, ReadStorage, Storage, StorageExt};
use qcow2_testkit::loop_device::LoopDevice;
use qcow2_testkit::storage::{AlignedOnly, CountingStorage, Fault, FaultStorage, Op, ShortIo};
use qcow2_testkit::{Rng, skipped};

fn bytes_of(storage: &dyn Storage) -> Vec<u8> {
    let mut bytes = vec![1; usize::try_from(storage.size().unwrap()).unwrap()];
    storage.read_exact_at(MemMut::from(&mut bytes[..]), 0).unwrap();
    bytes
}

/// A storage with these rules, over `inner`, that takes any request.
fn direct(inner: Arc<dyn Storage>, alignment: u32, memory: u32) -> Arc<dyn Storage> {
    DirectStorage::over(Arc::new(AlignedOnly::new(inner, alignment, memory)))
}

/// A file past the page cache, or a line on standard error where the file system has no direct I/O.
fn direct_file(path: &Path) -> Option<Arc<dyn Storage>> {
    match FileStorage::open_cached(path, Access::ReadWrite, CacheMode::None) {
        Ok(file) => Some(file.into_storage()),
        Err(e) if e.kind() == ErrorKind::UnsupportedFeature => {
            skipped(e);
            None
        }
        Err(e) => panic!("{e}"),
    }
}

/// `len` bytes of memory that start `skew` bytes behind a multiple of 4096.
struct Skewed {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl Skewed {
    fn new(len: usize, skew: usize) -> Self {
        let bytes = vec![0; len + 8192];
        let start = bytes.as_ptr().align_offset(4096) + skew;
        Self { bytes, start, len }
    }
    fn get(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + self.len]
    }
}

#[derive(Debug, Clone)]
enum Step {
    Write { offset: u64, length: usize, skew: usize },
    Vectored { offset: u64, lengths: Vec<usize> },
    Read { offset: u64, length: usize, skew: usize },
    Zero { offset: u64, length: u64, unmap: bool },
    Discard { offset: u64, length: u64 },
    Resize(u64),
    Reserve { offset: u64, length: u64 },
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let offset = || prop_oneof![0..20_000u64, (0..40u64).prop_map(|n| n * 512), 0..2_500_000u64];
    let length = || prop_oneof![0..9_000usize, (0..32usize).prop_map(|n| n * 512), 60_000..1_500_000usize];
    let skew = || prop_oneof![Just(0), Just(4), Just(512), 0..4096usize];
    let step = prop_oneof![
        4 => (offset(), length(), skew()).prop_map(|(offset, length, skew)| Step::Write { offset, length, skew }),
        2 => (offset(), prop::collection::vec(length(), 0..4))
            .prop_map(|(offset, lengths)| Step::Vectored { offset, lengths }),
        3 => (offset(), length(), skew()).prop_map(|(offset, length, skew)| Step::Read { offset, length, skew }),
        2 => (offset(), length(), any::<bool>())
            .prop_map(|(offset, length, unmap)| Step::Zero { offset, length: length as u64, unmap }),
        1 => (offset(), length()).prop_map(|(offset, length)| Step::Discard { offset, length: length as u64 }),
        1 => offset().prop_map(Step::Resize),
        1 => (offset(), length()).prop_map(|(offset, length)| Step::Reserve { offset, length: length as u64 }),
    ];
    prop::collection::vec(step, 1..16)
}

/// Does the step on both; their bytes and lengths must agree afterwards.
fn apply(step: &Step, under_test: &dyn Storage, plain: &dyn Storage, rng: &mut Rng) {
    match step {
        Step::Write { offset, length, skew } => {
            let mut data = Skewed::new(*length, *skew);
            data.get().copy_from_slice(&rng.bytes(*length));
            plain.write_all_at(Mem::from(&*data.get()), *offset).unwrap();
            under_test.write_all_at(Mem::from(&*data.get()), *offset).unwrap();
        }
        Step::Vectored { offset, lengths } => {
            let parts: Vec<Vec<u8>> = lengths.iter().map(|n| rng.bytes(*n)).collect();
            let mems = || parts.iter().map(|p| Mem::from(&p[..])).collect::<Vec<_>>();
            plain.write_all_vectored_at(&mut mems(), *offset).unwrap();
            under_test.write_all_vectored_at(&mut mems(), *offset).unwrap();
        }
        Step::Read { offset, length, skew } => {
            let (mut a, mut b) = (Skewed::new(*length, 0), Skewed::new(*length, *skew));
            let n = plain.read_up_to_at(a.get().into(), *offset).unwrap();
            assert_eq!(under_test.read_up_to_at(b.get().into(), *offset).unwrap(), n);
            assert!(a.get()[..n] == b.get()[..n]);
        }
        Step::Zero { offset, length, unmap } => {
            plain.zero(*offset, *length, *unmap).unwrap();
            under_test.zero(*offset, *length, *unmap).unwrap();
        }
        Step::Discard { offset, length } => {
            // What a discard leaves is unspecified: both get zeroes, so that they can be compared.
            under_test.discard(*offset, *length).unwrap();
            let end = (*offset + *length).min(plain.size().unwrap());
            for storage in [plain, under_test] {
                storage.zero(*offset, end.saturating_sub(*offset), false).unwrap();
            }
        }
        Step::Resize(len) => {
            plain.resize(*len).unwrap();
            under_test.resize(*len).unwrap();
        }
        Step::Reserve { offset, length } => {
            plain.reserve(*offset, *length).unwrap();
            under_test.reserve(*offset, *length).unwrap();
        }
    }
    assert_eq!(under_test.size().unwrap(), plain.size().unwrap());
}

/// Gives the final bytes.
fn agrees_with_plain_memory(steps: &[Step], under_test: &dyn Storage) -> Vec<u8> {
    let plain = MemoryStorage::new();
    let mut rng = Rng::new(steps.len() as u64);
    for step in steps {
        apply(step, under_test, &plain, &mut rng);
    }
    let bytes = bytes_of(under_test);
    assert!(bytes == bytes_of(&plain));
    bytes
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_request_does_what_it_does_without_rules(steps in steps()) {
        let memory = || Arc::new(MemoryStorage::new());
        agrees_with_plain_memory(&steps, &*direct(memory(), 512, 4));
        agrees_with_plain_memory(&steps, &*direct(memory(), 4096, 4096));
        agrees_with_plain_memory(&steps, &*direct(memory(), 1, 512));
        let short = Arc::new(ShortIo::new(memory(), 70_000));
        agrees_with_plain_memory(&steps, &*direct(short, 512, 512));
    }

    #[test]
    fn any_request_does_it_on_a_real_file(steps in steps()) {
        let file = tempfile::NamedTempFile::new().unwrap();
        if let Some(storage) = direct_file(file.path()) {
            let bytes = agrees_with_plain_memory(&steps, &*storage);
            drop(storage);
            // The page cache shows the same file.
            prop_assert!(std::fs::read(file.path()).unwrap() == bytes);
        }
    }
}

/// Bytes that one thread alone writes, between those of others: the neighbours share blocks.
struct Stripe {
    start: u64,
    bytes: Vec<u8>,
}

/// Cuts `len` bytes into stripes of all sizes and deals them out.
fn deal(len: u64, threads: usize) -> Vec<Vec<Stripe>> {
    let mut rng = Rng::new(len);
    let mut hands: Vec<Vec<Stripe>> = (0..threads).map(|_| Vec::new()).collect();
    let (mut start, mut next) = (0, 0);
    while start < len {
        let size = [1, 100, 513, 4097, 30_000, 200_001][rng.below(6) as usize] + rng.below(97);
        let size = size.min(len - start);
        hands[next % threads].push(Stripe { start, bytes: vec![0; size as usize] });
        start += size;
        next += 1;
    }
    hands
}

/// Random unaligned changes inside a thread's own stripes, each stripe read back now and then.
fn play(storage: &dyn Storage, hand: &mut [Stripe], rounds: usize, seed: u64, written_end: &AtomicU64) {
    let mut rng = Rng::new(seed);
    for _ in 0..rounds {
        let pick = rng.below(hand.len() as u64) as usize;
        let stripe = &mut hand[pick];
        let len = stripe.bytes.len() as u64;
        let from = rng.below(len);
        let n = 1 + rng.below(len - from);
        let (at, range) = (stripe.start + from, from as usize..(from + n) as usize);
        match rng.below(8) {
            0 => {
                let unmap = rng.below(2) == 0;
                storage.zero(at, n, unmap).unwrap();
                stripe.bytes[range].fill(0);
            }
            1 => {
                let mut back = Skewed::new(stripe.bytes.len(), rng.below(4096) as usize);
                storage.read_padded_at(back.get().into(), stripe.start).unwrap();
                assert!(back.get() == &stripe.bytes[..], "stripe at {}", stripe.start);
                continue;
            }
            kind => {
                let skew = if kind < 5 { 0 } else { rng.below(4096) as usize };
                let mut data = Skewed::new(n as usize, skew);
                data.get().copy_from_slice(&rng.bytes(n as usize));
                storage.write_all_at(Mem::from(&*data.get()), at).unwrap();
                stripe.bytes[range].copy_from_slice(data.get());
            }
        }
        written_end.fetch_max(at + n, Ordering::SeqCst);
    }
}

/// Four threads, each with stripes of its own: nobody ever loses a byte to a neighbour.
fn neighbours_lose_nothing(storage: &dyn Storage, rounds: usize) -> u64 {
    const LEN: u64 = 3_000_017;
    let mut hands = deal(LEN, 4);
    let written_end = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for (seed, hand) in hands.iter_mut().enumerate() {
            let end = &written_end;
            scope.spawn(move || play(storage, hand, rounds, seed as u64 + 1, end));
        }
    });
    for stripe in hands.iter().flatten() {
        let mut back = vec![0; stripe.bytes.len()];
        storage.read_padded_at(MemMut::from(&mut back[..]), stripe.start).unwrap();
        assert!(back == stripe.bytes, "stripe at {}", stripe.start);
    }
    written_end.into_inner()
}

#[test]
fn threads_that_write_into_one_block_lose_nothing() {
    for (alignment, memory, short) in [(512, 4, 0), (4096, 4096, 0), (512, 512, 90_000)] {
        let plain = Arc::new(MemoryStorage::new());
        let inner: Arc<dyn Storage> = match short {
            0 => plain.clone(),
            max => Arc::new(ShortIo::new(plain.clone(), max)),
        };
        let end = neighbours_lose_nothing(&*direct(inner, alignment, memory), 400);
        assert_eq!(plain.size().unwrap(), end);
    }
    let file = tempfile::NamedTempFile::new().unwrap();
    if let Some(storage) = direct_file(file.path()) {
        let end = neighbours_lose_nothing(&*storage, 300);
        assert_eq!(file.as_file().metadata().unwrap().len(), end);
    }
}

#[test]
fn a_device_with_large_sectors_takes_any_request() {
    for sector in [4096u32, 512] {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(8 << 20).unwrap();
        let device = match LoopDevice::new(file.path(), sector) {
            Ok(device) => device,
            Err(why) => return skipped(why),
        };
        let raw = FileStorage::open_cached(device.path(), Access::ReadWrite, CacheMode::Directsync).unwrap();
        assert_eq!(raw.traits().alignment, sector);
        let mut byte = Skewed::new(sector as usize, 0);
        let part = &mut byte.get()[..sector as usize / 2];
        assert_eq!(raw.read_at(part.into(), 0).unwrap_err().raw_os_error(), Some(22));
        let storage = raw.into_storage();
        assert_eq!((storage.traits().alignment, storage.traits().memory_alignment), (1, 1));
        assert_eq!(storage.size().unwrap(), 8 << 20);
        neighbours_lose_nothing(&*storage, 60);
        // The last bytes of a device, and none behind them.
        storage.write_all_at(Mem::from(&b"end"[..]), (8 << 20) - 3).unwrap();
        let mut back = [1; 8];
        assert_eq!(storage.read_up_to_at(MemMut::from(&mut back[..]), (8 << 20) - 3).unwrap(), 3);
        assert_eq!(&back[..3], b"end");
        assert!(storage.write_all_at(Mem::from(&b"four"[..]), (8 << 20) - 3).is_err());
    }
}

#[test]
fn a_failing_disk_costs_only_the_request_that_met_it() {
    let steps: [(u64, usize); 5] = [(100, 50), (4000, 9000), (12_288, 4096), (700, 200_000), (250_001, 777)];
    for errno in [5, 28] {
        for n in 0.. {
            let plain = Arc::new(MemoryStorage::new());
            plain.write_all_at(Mem::from(&[7; 220_000][..]), 0).unwrap();
            let faulty = Arc::new(FaultStorage::new(plain.clone(), Fault::nth(n, errno)));
            let storage = direct(faulty.clone(), 512, 4);
            let mut expected = vec![7; 220_000];
            for (i, (offset, length)) in steps.into_iter().enumerate() {
                let data = vec![i as u8 + 10; length];
                let range = offset as usize..offset as usize + length;
                match storage.write_all_at(Mem::from(&data[..]), offset) {
                    Ok(()) => {
                        expected.resize(expected.len().max(range.end), 0);
                        expected[range].copy_from_slice(&data);
                    }
                    Err(e) => {
                        assert_eq!(e.errno(), Some(errno));
                        // What the failed one covers is unspecified: the next try settles it.
                        storage.write_all_at(Mem::from(&data[..]), offset).unwrap();
                        expected.resize(expected.len().max(range.end), 0);
                        expected[range].copy_from_slice(&data);
                    }
                }
            }
            // A cut that failed leaves the padding of its block, nothing else.
            let bytes = bytes_of(&*plain);
            let (content, padding) = bytes.split_at(expected.len());
            assert!(content == expected, "call {n}");
            assert!(padding.len() < 512 && padding.iter().all(|b| *b == 0), "call {n}");
            if faulty.failed() == 0 {
                assert!(n > 10, "the fault hit {n} calls only");
                break;
            }
        }
    }
}

#[test]
fn a_disk_that_moves_less_than_a_sector_is_an_error_not_a_loop() {
    let stuck = Arc::new(ShortIo::new(Arc::new(MemoryStorage::new()), 100));
    let error = direct(stuck, 4096, 1).write_all_at(Mem::from(&[1; 5000][..]), 3).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Io);
}

#[test]
fn aligned_requests_go_straight_through() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let plain = FileStorage::open(file.path(), Access::ReadWrite).unwrap();
    let counting = Arc::new(CountingStorage::new(Arc::new(plain)));
    let storage = direct(counting.clone(), 512, 512);
    let mut data = Skewed::new(1 << 20, 0);
    data.get().fill(3);
    storage.write_all_at(Mem::from(&*data.get()), 8192).unwrap();
    assert_eq!((counting.of(Op::Write).calls, counting.of(Op::Read).calls), (1, 0));
    storage.read_exact_at(data.get().into(), 8192).unwrap();
    assert_eq!((counting.of(Op::Read).calls, counting.of(Op::Read).bytes), (1, 1 << 20));

    // A long one with ragged edges: one write, and a read for each edge.
    counting.reset();
    let mut ragged = Skewed::new(300_000, 512 - 100);
    ragged.get().fill(4);
    storage.write_all_at(Mem::from(&*ragged.get()), 8192 + 412).unwrap();
    assert_eq!((counting.of(Op::Write).calls, counting.of(Op::Read).calls), (1, 2));
    // A short read with ragged edges is one call.
    counting.reset();
    storage.read_exact_at(MemMut::from(&mut [0; 3000][..]), 8192 + 100).unwrap();
    assert_eq!(counting.of(Op::Read).calls, 1);
}

#[test]
fn a_storage_without_rules_is_left_alone() {
    let plain: Arc<dyn Storage> = Arc::new(MemoryStorage::new());
    assert!(Arc::ptr_eq(&plain, &DirectStorage::over(plain.clone())));
}

#[test]
fn the_modes_open_files_as_they_say() {
    let file = tempfile::NamedTempFile::new().unwrap();
    for cache in CacheMode::ALL {
        let storage = match FileStorage::open_cached(file.path(), Access::ReadWrite, cache) {
            Ok(storage) => storage,
            Err(e) if cache.is_direct() && e.kind() == ErrorKind::UnsupportedFeature => {
                skipped(e);
                continue;
            }
            Err(e) => panic!("{e}"),
        };
        #[cfg(target_os = "linux")]
        {
            assert_eq!(goes_past_the_cache(storage.as_fd().unwrap()), cache.is_direct(), "{cache}");
            assert_eq!(storage.traits().alignment > 1, cache.is_direct(), "{cache}");
        }
        storage.flush().unwrap();
        let storage = storage.into_storage();
        storage.write_all_at(Mem::from(&b"abc"[..]), 5).unwrap();
        assert_eq!(storage.size().unwrap(), 8);
    }
    let again = FileStorage::from_borrowed_cached(file.as_file().as_fd(), None, CacheMode::None);
    #[cfg(target_os = "linux")]
    if let Ok(again) = &again {
        assert!(goes_past_the_cache(again.as_fd().unwrap()));
        // The owner's descriptor is as it was.
        assert!(!goes_past_the_cache(file.as_file().as_fd()));
    }
    drop(again);
}

/// What the system says of a descriptor. macOS has no question for that.
#[cfg(target_os = "linux")]
fn goes_past_the_cache(file: std::os::fd::BorrowedFd<'_>) -> bool {
    rustix::fs::fcntl_getfl(file).unwrap().contains(rustix::fs::OFlags::DIRECT)
}

#[cfg(target_os = "linux")]
#[test]
fn a_file_system_without_direct_io_is_named() {
    let path = Path::new("/proc/self/status");
    let error = FileStorage::open_cached(path, Access::ReadOnly, CacheMode::None).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::UnsupportedFeature);
    assert!(error.to_string().contains("'none'"), "{error}");
    assert_eq!(error.path(), Some(path));
}
