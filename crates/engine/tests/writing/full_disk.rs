//! A file system that runs full: requests that need more space fail, and every one that did not is kept. Closing and
//! flushing need no space that was not there when a request ended.

use std::collections::BTreeMap;
use std::sync::Arc;

use qcow2_engine::create::{CreateOptions, create};
use qcow2_engine::{Discard, Image, Job, OpenOptions, Qcow2, Storage, WriteOptions};
use qcow2_testkit::Rng;
use qcow2_testkit::Sparse;
use qcow2_testkit::audit::audit;
use qcow2_testkit::ops::{Target, stamped};
use qcow2_testkit::plans::Table;
use qcow2_testkit::recorder::RecordingStorage;
use qcow2_testkit::storage::{Hooked, Space};

fn open(storage: Arc<dyn Storage>) -> Image {
    let options = WriteOptions { discard: Discard::Unmap, ..WriteOptions::default() };
    let mut qcow2 = Qcow2::open(storage, &OpenOptions::default()).unwrap();
    qcow2.enable_writing(options).unwrap();
    Image::new(vec![Box::new(qcow2)]).unwrap()
}

/// Scattered writes on a disk that runs full after some of them.
fn play(cluster_size: u64, extended_l2: bool, seed: u64) {
    let what = format!("clusters of {cluster_size}, extended {extended_l2}, seed {seed}");
    let mut rng = Rng::new(seed);
    let file = Arc::new(RecordingStorage::plain(Sparse::new(0)));
    let space = Arc::new(Space::default());
    let storage: Arc<dyn Storage> = Arc::new(Hooked::with(file.clone(), Arc::clone(&space)));
    // Room for many L2 tables.
    let size = cluster_size / 8 * cluster_size * 40;
    let options = CreateOptions { cluster_size, size, extended_l2, ..CreateOptions::default() };
    create(Arc::clone(&storage), None, &options, &Job::new()).unwrap();
    let image = open(Arc::clone(&storage));
    // What each place must read as; nothing is said of a place where a change failed.
    let mut model: BTreeMap<u64, Option<Vec<u8>>> = BTreeMap::new();
    let places = size / cluster_size;
    let put = |model: &mut BTreeMap<u64, Option<Vec<u8>>>, rng: &mut Rng, generation: u32| {
        let at = rng.below(places) * cluster_size;
        let (done, bytes) = match rng.below(8) {
            0 => {
                let bytes = stamped(at, 512, generation).repeat((cluster_size / 512) as usize);
                let done = image.write_compressed(at, &bytes);
                (done, bytes)
            }
            1 => (image.write_zeroes(at, cluster_size, true), vec![0; 512]),
            _ => {
                let bytes = stamped(at, 512, generation);
                (image.write(at, &bytes), bytes)
            }
        };
        if let Err(error) = &done {
            assert!(error.is_no_space(), "{what}: {error:?}");
        }
        let kept = done.is_ok();
        model.insert(at, kept.then_some(bytes));
        kept
    };
    for generation in 1..10 {
        assert!(put(&mut model, &mut rng, generation), "{what}");
    }
    if rng.below(2) == 0 {
        // From here on tables are copied.
        image.execute(&Table::of(&image).create("1", "snapshot")).unwrap();
    }
    space.fill_up(rng.below(200) as usize);
    let mut failed = 0;
    for generation in 10..2000 {
        failed += u32::from(!put(&mut model, &mut rng, generation));
        if rng.below(50) == 0 {
            image.flush().unwrap_or_else(|e| panic!("{what}: flush: {e:?}"));
        }
        if failed == 20 {
            break;
        }
    }
    assert!(failed > 0, "{what}: the disk is not full");
    image.close().unwrap_or_else(|e| panic!("{what}: close: {e:?}"));
    let findings = audit(&file.snapshot());
    assert!(findings.is_clean(), "{what}: {findings:#?}");
    let image = open(storage);
    for (at, expected) in model {
        let Some(expected) = expected else { continue };
        let mut bytes = vec![0; expected.len()];
        image.read(at, &mut bytes).unwrap();
        assert!(bytes == expected, "{what}: {at:#x} lost what was written");
    }
}

#[test]
fn what_was_written_before_the_disk_was_full_is_kept() {
    for (cluster_size, extended_l2) in [(512, false), (4096, false), (16384, true), (65536, false)] {
        for seed in 0..12 {
            play(cluster_size, extended_l2, seed);
        }
    }
}

/// A guest that discards what it wrote and writes it again without a flush between has the space at once.
#[test]
fn what_is_given_up_is_space_for_the_next_write() {
    for (cluster_size, lazy_refcounts) in [(4096, false), (65536, false), (65536, true)] {
        let what = format!("clusters of {cluster_size}, lazy {lazy_refcounts}");
        let file = Arc::new(RecordingStorage::plain(Sparse::new(0)));
        let space = Arc::new(Space::default());
        let storage: Arc<dyn Storage> = Arc::new(Hooked::with(file.clone(), Arc::clone(&space)));
        let size = 64 * cluster_size;
        let options = CreateOptions { cluster_size, size, ..CreateOptions::default() };
        create(Arc::clone(&storage), None, &options, &Job::new()).unwrap();
        let options = WriteOptions { discard: Discard::Unmap, lazy_refcounts, ..WriteOptions::default() };
        let mut qcow2 = Qcow2::open(Arc::clone(&storage), &OpenOptions::default()).unwrap();
        qcow2.enable_writing(options).unwrap();
        let image = Image::new(vec![Box::new(qcow2)]).unwrap();
        image.write(0, &stamped(0, size, 1)).unwrap();
        image.flush().unwrap();
        space.fill_up(0);
        for (generation, at) in (2..).zip([0, 8, 3, 40]) {
            let at = at * cluster_size;
            let bytes = stamped(at, 20 * cluster_size, generation);
            match generation % 2 {
                0 => image.discard(at, 20 * cluster_size).unwrap(),
                _ => image.write_zeroes(at, 20 * cluster_size, true).unwrap(),
            }
            image.write(at, &bytes).unwrap_or_else(|e| panic!("{what}: {e:?}"));
            let mut read = vec![0; bytes.len()];
            image.read(at, &mut read).unwrap();
            assert!(read == bytes, "{what}");
        }
        // Nothing waits: there is no space.
        let error = image.execute(&Table::of(&image).create("1", "snapshot")).unwrap_err();
        assert!(error.is_no_space(), "{what}: {error:?}");
        image.close().unwrap_or_else(|e| panic!("{what}: close: {e:?}"));
        assert!(audit(&file.snapshot()).is_clean(), "{what}");
    }
}
