//! Compaction on every kind of image: the disk and its snapshots read the same, both checkers find nothing, the file is
//! smaller; at every power cut in between, too.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests")]

mod contents;

use std::sync::Arc;

use contents::{Contents, assert_clean, explore, geometries, snapshot_of, writable};
use qcow2_engine::compact::{CompactOptions, CompactResult};
use qcow2_engine::{Job, Mem, Storage};
use qcow2_testkit::audit::audit;
use qcow2_testkit::disk_model::{Opening, Rig};
use qcow2_testkit::matrix::Geometry;
use qcow2_testkit::recorder::RecordingStorage;
use qcow2_testkit::{Rng, Sparse};

const IN_PLACE: CompactOptions = CompactOptions { rewrite: false, zeroes: false, dry_run: false };
const ZEROES: CompactOptions = CompactOptions { zeroes: true, ..IN_PLACE };
const REWRITE: CompactOptions = CompactOptions { rewrite: true, ..IN_PLACE };

/// An image that was used and not closed: with discarded and overwritten clusters, clusters of zeroes, and leaks.
fn used(geometry: &Geometry, seed: u64) -> Rig {
    let mut rig = Rig::forge(geometry, seed);
    let files: Vec<_> = rig.files().into_iter().map(RecordingStorage::plain).map(Arc::new).collect();
    let storages: Vec<_> = files.iter().map(|f| f.clone() as Arc<dyn Storage>).collect();
    let image = rig.open(&storages, &writable()).unwrap();
    let (c, size) = (geometry.cluster_size, geometry.size / 512 * 512);
    let clusters = size / c;
    let mut rng = Rng::new(seed ^ 77);
    for n in 0..clusters {
        let at = rng.below(clusters) * c;
        match n % 4 {
            0 => image.write_at(Mem::from(&vec![0u8; c as usize][..]), at).unwrap(),
            1 => image.discard(at, c).unwrap(),
            2 if rig.menu().compression => {
                let mut bytes = vec![n as u8; c as usize];
                bytes[..c as usize / 3].copy_from_slice(&rng.bytes(c as usize)[..c as usize / 3]);
                image.write_compressed_at(Mem::from(&bytes[..]), at).unwrap();
            }
            _ => image.write_at(Mem::from(&rng.bytes(c as usize)[..]), at).unwrap(),
        }
    }
    for n in 0..clusters / 3 {
        image.discard((n * 2) * c, c).unwrap();
    }
    image.flush().unwrap();
    rig.image = snapshot_of(&*files[0]);
    rig.data_file = files.get(1).map(|f| snapshot_of(&**f));
    rig
}

fn compact(rig: &Rig, options: CompactOptions) -> (Vec<Sparse>, CompactResult) {
    let files: Vec<_> = rig.files().into_iter().map(RecordingStorage::plain).map(Arc::new).collect();
    let storages: Vec<_> = files.iter().map(|f| f.clone() as Arc<dyn Storage>).collect();
    let opening = if options.dry_run { Opening::default() } else { writable() };
    let image = rig.open(&storages, &opening).unwrap();
    let job = Job::new();
    let result = image.compact(options, &job).unwrap();
    let (current, total) = job.progress();
    assert!(
        current <= total + total / 100 && (options.dry_run || current > 0),
        "progress: {current} of {total}"
    );
    image.close().unwrap();
    (files.iter().map(|f| snapshot_of(&**f)).collect(), result)
}

#[test]
fn in_place_frees_leaks_and_zeroes_and_cuts_the_file() {
    for geometry in geometries() {
        let rig = used(&geometry, 3);
        let what = geometry.name();
        let leaks = rig.data_file.is_none();
        assert!(!leaks || !audit(&rig.image).is_clean(), "{what}: nothing leaked to begin with");
        let before = Contents::of(&rig, &rig.files());
        for options in [IN_PLACE, ZEROES] {
            let (same, told) = compact(&rig, CompactOptions { dry_run: true, ..options });
            assert!(same[0].len() == rig.image.len(), "{what}: a dry run changed the file");
            let (files, result) = compact(&rig, options);
            assert_clean(&files, &what);
            let difference = before.difference(&Contents::of(&rig, &files));
            assert!(difference.is_none(), "{what}: {difference:?}");
            assert!(!leaks || result.leaked_clusters > 0, "{what}: {result:?}");
            assert_eq!(result.leaked_clusters, told.leaked_clusters, "{what}");
            assert_eq!(result.zero_clusters, told.zero_clusters, "{what}");
            if options.zeroes && !(geometry.version < 3 && rig.backing.is_some()) {
                assert!(result.zero_clusters > 0, "{what}: {result:?}");
            }
            assert!(result.length_after <= result.length_before, "{what}: {result:?}");
            assert_eq!(result.length_after, files[0].len(), "{what}");
        }
    }
}

/// Clusters with a refcount.
fn in_use(file: &Sparse, geometry: &Geometry) -> u64 {
    let storage = RecordingStorage::plain(file.clone());
    let header = qcow2_engine::image::read_header(&storage).unwrap();
    let report = qcow2_engine::check::check(&storage, &header, &Default::default(), &Job::new()).unwrap();
    assert_eq!((report.corruptions, report.leaks, report.check_errors), (0, 0, 0), "{report:#?}");
    let (c, mut used) = (geometry.cluster_size, 0);
    let table = header.refcount_table_offset.get();
    for index in 0..u64::from(header.refcount_table_clusters) * c / 8 {
        let block = file.u64(table + index * 8);
        if block == 0 {
            continue;
        }
        let bytes = file.get(block, c as usize);
        let order = header.geometry.refcount_order();
        let entries = header.geometry.refcount_block_entries() as usize;
        used += (0..entries)
            .filter(|i| qcow2_engine::format::refcount::get(&bytes, *i, order).unwrap() > 0)
            .count() as u64;
    }
    used
}

#[test]
fn rewriting_makes_the_file_short() {
    for (number, geometry) in geometries().into_iter().enumerate() {
        let rig = used(&geometry, 30 + number as u64);
        let what = geometry.name();
        let before = Contents::of(&rig, &rig.files());
        for options in [REWRITE, CompactOptions { zeroes: true, ..REWRITE }] {
            let (files, result) = compact(&rig, options);
            assert_clean(&files, &what);
            let difference = before.difference(&Contents::of(&rig, &files));
            assert!(difference.is_none(), "{what}: {difference:?}");
            let (used, length) = (in_use(&files[0], &geometry), files[0].len() / geometry.cluster_size);
            assert!(length <= used + 3 + used / 20, "{what}: {used} clusters in use of {length}: {result:?}");
            // Beside an external data file, all but a few tables are elsewhere.
            let shorter = result.length_after < result.length_before;
            assert!(shorter || rig.data_file.is_some(), "{what}: {result:?}");
        }
    }
}

#[test]
fn no_power_cut_during_a_compaction_changes_what_is_read() {
    for (number, geometry) in geometries().into_iter().enumerate() {
        let random = if geometry.cluster_size > 65536 { 3 } else { 15 };
        let rig = used(&geometry, number as u64);
        let what = format!("{} in place", geometry.name());
        let files = explore(&rig, 1, random, &what, |image| image.compact(ZEROES, &Job::new()).map(drop));
        assert_clean(&files, &what);
        let what = format!("{} rewriting", geometry.name());
        let options = CompactOptions { zeroes: number % 2 == 0, ..REWRITE };
        let files = explore(&rig, 2, random, &what, |image| image.compact(options, &Job::new()).map(drop));
        assert_clean(&files, &what);
    }
}
