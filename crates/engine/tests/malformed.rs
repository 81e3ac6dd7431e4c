//! Broken images are answered with a coded error at the right place: no panic, no hang, no memory that the
//! file's own size does not justify. A counting allocator proves the last.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, reason = "tests")]

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use qcow2_engine::storage::MemoryStorage;
use qcow2_engine::{Error, ErrorKind, Image, Job, OpenOptions, Qcow2, Result, Storage};
use qcow2_testkit::alloc::Counting;
use qcow2_testkit::forge::Built;
use qcow2_testkit::malformed::{self, Malformed, Stage};
use qcow2_testkit::{Forge, Rng, chain};

#[global_allocator]
static MEMORY: Counting = Counting::new();

/// The counters are the process's: one measuring test at a time.
static ALONE: Mutex<()> = Mutex::new(());

/// More than any of these small files justifies: a few buffers of one cluster, decompression contexts, caches.
const MEMORY_BOUND: usize = 6 << 20;

fn storage(built: &Built) -> Arc<dyn Storage> {
    Arc::new(MemoryStorage::from_bytes(&built.bytes.to_vec()))
}

fn open(storage: &Arc<dyn Storage>, snapshot: Option<&str>) -> Result<Image> {
    let options = OpenOptions { snapshot: snapshot.map(Into::into), ..OpenOptions::default() };
    let mut qcow2 = Qcow2::open(Arc::clone(storage), &options)?;
    if qcow2.references().data_file.is_some() {
        qcow2.set_data_file(Arc::new(MemoryStorage::from_bytes(&[0; 1 << 20])));
    }
    Image::new(vec![Box::new(qcow2)])
}

/// Runs a broken image up to the stage where it must fail; gives the error.
fn provoke(case: &Malformed, storage: &Arc<dyn Storage>) -> Error {
    let expect = |result: Result<()>| match result {
        Err(error) => error,
        Ok(()) => panic!("{}: accepted at {:?}", case.name, case.stage),
    };
    let image = match (open(storage, None), &case.stage) {
        (result, Stage::Open) => return expect(result.map(drop)),
        (result, _) => result.unwrap_or_else(|e| panic!("{}: refused too early: {e}", case.name)),
    };
    match &case.stage {
        Stage::Read(cluster) => {
            let size = image.top_qcow2().unwrap().geometry().cluster_size();
            // By part and as a whole: the paths differ for compressed clusters.
            let part = chain::read(&image, cluster * size + 1, 100);
            let whole = chain::read(&image, cluster * size, size as usize);
            assert_eq!(
                part.as_ref().err().map(Error::kind),
                whole.as_ref().err().map(Error::kind),
                "{}: a part and the whole of the cluster",
                case.name
            );
            expect(whole.map(drop))
        }
        Stage::Snapshot(name) => {
            chain::read(&image, 0, 4096).unwrap();
            expect(open(storage, Some(name)).and_then(|view| chain::read(&view, 0, 512)).map(drop))
        }
        Stage::Bitmaps => {
            chain::read(&image, 0, 4096).unwrap();
            expect(image.top_qcow2().unwrap().bitmaps().map(drop))
        }
        Stage::Open => unreachable!(),
    }
}

#[test]
fn every_broken_image_gives_its_coded_error_in_bounded_memory_and_time() {
    let _alone = ALONE.lock();
    let mut wrong = Vec::new();
    for case in malformed::all() {
        let storage = storage(&case.built);
        let before = MEMORY.reset();
        let start = Instant::now();
        let error = provoke(&case, &storage);
        let (used, largest) = (MEMORY.peak() - before, MEMORY.largest());
        if error.kind().code() != case.code {
            wrong.push(format!("{}: expected {}, got {error:?}", case.name, case.code));
        }
        if used > MEMORY_BOUND {
            wrong.push(format!("{}: {used} bytes in use, {largest} in one piece", case.name));
        }
        if error.message().len() < 10 {
            wrong.push(format!("{}: says too little: {error:?}", case.name));
        }
        assert!(start.elapsed() < Duration::from_secs(5), "{} took {:?}", case.name, start.elapsed());
    }
    assert!(wrong.is_empty(), "{} of the broken images:\n{}", wrong.len(), wrong.join("\n"));
}

/// A lie in one table must not take the rest of the disk with it.
#[test]
fn clusters_beside_a_broken_one_are_still_read() {
    let mut forge = Forge::new(3, 16, 10 << 16);
    forge.data(0, b"broken");
    forge.data(1, b"whole");
    let built = forge.build().with_entry(0, (1 << 63) | (5 << 16) | 512);
    let image = open(&storage(&built), None).unwrap();
    assert_eq!(chain::read(&image, 0, 10).unwrap_err().kind(), ErrorKind::Corrupt);
    assert_eq!(chain::read(&image, 1 << 16, 5).unwrap(), b"whole");
    let mut extents = Vec::new();
    let error =
        qcow2_engine::GuestSource::extents(&image, 0, 1 << 20, &Job::new(), &mut extents).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
}

/// Any byte of the metadata changed, any prefix of the file: a value or an error, in bounded memory.
#[test]
fn damaged_and_truncated_files_never_panic() {
    let _alone = ALONE.lock();
    let mut forge = Forge::new(3, 12, 60 << 12).feature_names(&[(0, 0, "dirty"), (1, 0, "lazy")]);
    let text = Rng::new(5).text(4096);
    for cluster in 0..20 {
        match cluster % 4 {
            0 => drop(forge.data(cluster, &text)),
            1 => drop(forge.compressed(cluster, &qcow2_testkit::forge::codec::deflate(&text))),
            2 => forge.zero_plain(cluster),
            _ => drop(forge.zero_allocated(cluster, &text)),
        }
    }
    forge.snapshot("1", "one", 60 << 12);
    forge.bitmap("map", 0, 12, &[0xff; 8]);
    let bytes = forge.build().bytes.to_vec();
    let mut rng = Rng::new(77);
    let before = MEMORY.reset();
    for round in 0..4000u32 {
        let mut bytes = bytes.clone();
        if round % 8 == 0 {
            bytes.truncate(rng.below(bytes.len() as u64) as usize);
        }
        for _ in 0..rng.below(4) {
            // The header most of all: it is where sizes come from.
            let bound = if rng.below(2) == 0 { 160 } else { bytes.len() as u64 };
            let at = rng.below(bound) as usize;
            if let Some(byte) = bytes.get_mut(at) {
                *byte = if rng.below(3) == 0 { 0xff } else { rng.below(256) as u8 };
            }
        }
        use_everything(Arc::new(MemoryStorage::from_bytes(&bytes)));
    }
    let used = MEMORY.peak() - before;
    // The L1 table may claim as much as the file has; nothing else grows.
    assert!(used < MEMORY_BOUND, "{used} bytes in use");
}

/// Everything that opens or reads; errors are fine, panics are not.
fn use_everything(storage: Arc<dyn Storage>) {
    let Ok(image) = open(&storage, None) else { return };
    let size = image.virtual_size();
    for offset in [0, 4096, 40 << 12, size.saturating_sub(3000)] {
        let len = size.saturating_sub(offset).min(3000);
        let _ = chain::read(&image, offset.min(size), len as usize);
    }
    let mut extents = Vec::new();
    let _ = qcow2_engine::GuestSource::extents(&image, 0, 1 << 22, &Job::new(), &mut extents);
    if let Some(qcow2) = image.top_qcow2() {
        let _ = qcow2.bitmaps();
    }
    let _ =
        open(&storage, Some("one")).map(|view| chain::read(&view, 0, view.virtual_size().min(4096) as usize));
}

#[test]
fn limits_of_the_caller_are_enforced_before_allocation() {
    use qcow2_engine::format::Limits;
    let _alone = ALONE.lock();
    let mut forge = Forge::new(3, 16, 1 << 50);
    forge.data(0, b"x");
    forge.snapshot("1", "one", 1 << 50);
    let built = forge.build();
    let path = qcow2_testkit::Fixture::new();
    let file = path.path("large.qcow2");
    built.bytes.write_to(&file);
    let refuse = |limits: Limits, field: &str| {
        let storage = chain::file(&file).unwrap();
        let before = MEMORY.reset();
        let error = Qcow2::open(storage, &OpenOptions { limits, ..OpenOptions::default() }).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Limit, "{error}");
        assert!(error.to_string().contains(field), "{error}");
        assert!(MEMORY.peak() - before < 1 << 20, "{} bytes", MEMORY.peak() - before);
    };
    refuse(Limits { max_virtual_size: (1 << 50) - 1, ..Limits::default() }, "size");
    refuse(Limits { max_metadata_bytes: 1 << 20, ..Limits::default() }, "l1_size");
    refuse(Limits { max_snapshots: 0, ..Limits::default() }, "nb_snapshots");
}
