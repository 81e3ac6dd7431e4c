//! Many threads on one image: what each wrote alone is exactly there, what several wrote at once is what one of them
//! wrote, and the image is clean.

use std::collections::HashMap;
use std::sync::{Arc, Barrier, Mutex};

use qcow2_engine::{Discard, Image, Storage, WriteOptions};
use qcow2_testkit::audit::audit;
use qcow2_testkit::disk_model::{Opening, Rig};
use qcow2_testkit::matrix::{Backing, DataFile, Geometry};
use qcow2_testkit::ops::{Found, Op, SECTOR, Target, Value, identify, stamped};
use qcow2_testkit::recorder::RecordingStorage;

const THREADS: u32 = 6;

fn writable(flush_each: bool) -> Opening {
    let write = WriteOptions { discard: Discard::Unmap, flush_each, ..WriteOptions::default() };
    Opening { write: Some(write), ..Opening::default() }
}

fn geometries() -> Vec<Geometry> {
    let plain = Geometry::plain;
    vec![
        plain(65536),
        plain(512),
        Geometry { backing: Backing::EqualQcow2, ..plain(4096) },
        Geometry { extended_l2: true, backing: Backing::ShorterRaw, ..plain(16384) },
        Geometry { zstd: true, ..plain(2 << 20) },
        Geometry { data_file: DataFile::External, ..plain(65536) },
        Geometry { data_file: DataFile::ExternalRaw, ..plain(4096) },
    ]
}

/// What each sector may be when a round has ended: values from before it, and all that the round wrote.
type Possible = HashMap<u64, Vec<Value>>;

/// Runs one operation and notes what it may leave.
fn act(image: &Image, op: Op, generation: u32, notes: &Mutex<Vec<(u64, u64, Value, bool)>>) {
    let note = |offset: u64, len: u64, value, sure| notes.lock().unwrap().push((offset, len, value, sure));
    match op {
        Op::Write { offset, len } => {
            image.write(offset, &stamped(offset, len, generation)).unwrap();
            note(offset, len, Value::Written(generation), true);
        }
        Op::Compressed { offset, len } => {
            image.write_compressed(offset, &stamped(offset, len, generation)).unwrap();
            note(offset, len, Value::Written(generation), true);
        }
        Op::Zero { offset, len, unmap } => {
            image.write_zeroes(offset, len, unmap).unwrap();
            note(offset, len, Value::Zero, true);
        }
        Op::Discard { offset, len } => {
            image.discard(offset, len).unwrap();
            note(offset, len, Value::Zero, false);
        }
        Op::Read { offset, len } => {
            // Whatever it is, every sector is a whole one that belongs there.
            let mut bytes = vec![0; len as usize];
            image.read(offset, &mut bytes).unwrap();
            for (sector, part) in (offset / SECTOR..).zip(bytes.chunks_exact(SECTOR as usize)) {
                let found = identify(sector, part);
                assert!(!matches!(found, Found::Stray { .. }), "sector {sector}: {found:?}");
            }
        }
        Op::Flush | Op::Grow { .. } | Op::Shrink { .. } | Op::Reopen => image.flush().unwrap(),
    }
}

/// Takes a round's notes in, and compares the whole disk.
fn settle(image: &Image, possible: &mut Possible, notes: Vec<(u64, u64, Value, bool)>, what: &str) {
    let mut written: HashMap<u64, (Vec<Value>, bool)> = HashMap::new();
    for (offset, len, value, sure) in notes {
        for sector in offset / SECTOR..(offset + len) / SECTOR {
            let entry = written.entry(sector).or_default();
            entry.0.push(value);
            entry.1 |= sure;
        }
    }
    for (sector, (values, sure)) in written {
        let before = possible.entry(sector).or_insert_with(|| vec![Value::Zero]);
        if sure {
            before.clear();
        }
        before.extend(values);
    }
    let mut bytes = vec![0; image.virtual_size() as usize];
    image.read(0, &mut bytes).unwrap();
    for (sector, part) in (0..).zip(bytes.chunks_exact(SECTOR as usize)) {
        let Found::Value(found) = identify(sector, part) else {
            panic!("{what}: sector {sector}: {:?}", identify(sector, part))
        };
        let allowed = possible.get(&sector).map_or(&[Value::Zero][..], |v| v);
        assert!(allowed.contains(&found), "{what}: sector {sector} is {found:?}, not one of {allowed:?}");
        // Until the next write it stays what it is.
        possible.insert(sector, vec![found]);
    }
}

fn stress(geometry: &Geometry, seed: u64, rounds: usize, flush_each: bool) {
    let rig = Rig::forge(geometry, seed);
    let storages: Vec<_> = rig.files().into_iter().map(|f| Arc::new(RecordingStorage::plain(f))).collect();
    let files: Vec<Arc<dyn Storage>> = storages.iter().map(|s| s.clone() as Arc<dyn Storage>).collect();
    let image = rig.open(&files, &writable(flush_each)).unwrap();
    let what = format!("{} seed {seed} flush_each {flush_each}", geometry.name());
    let mut possible = Possible::new();
    let mut bytes = vec![0; image.virtual_size() as usize];
    image.read(0, &mut bytes).unwrap();
    for (sector, part) in (0..).zip(bytes.chunks_exact(SECTOR as usize)) {
        if let Found::Value(value) = identify(sector, part) {
            possible.insert(sector, vec![value]);
        }
    }
    let mut menu = rig.menu();
    // Everyone at the same few clusters.
    menu.size = (6 * menu.cluster).min(menu.size);
    let raw = geometry.data_file == DataFile::ExternalRaw;
    if raw {
        // The forged one holds something else where the disk reads as zeroes.
        image.write(0, &bytes[..menu.size as usize]).unwrap();
    }
    for round in 0..rounds {
        let notes = Mutex::new(Vec::new());
        let barrier = Barrier::new(THREADS as usize);
        std::thread::scope(|scope| {
            for thread in 0..THREADS {
                let (image, menu, notes, barrier) = (&image, &menu, &notes, &barrier);
                scope.spawn(move || {
                    let ops = menu.sequence(seed ^ (round as u64) << 8 ^ u64::from(thread) << 4, 12);
                    barrier.wait();
                    for (n, op) in (0u32..).zip(ops) {
                        let generation = 1000 + (round as u32 * 100 + n) * THREADS + thread;
                        // The menu's later operations may lie in what it believes to have grown.
                        if !matches!(op, Op::Write { offset, len } | Op::Compressed { offset, len } | Op::Zero { offset, len, .. }
                            | Op::Discard { offset, len } | Op::Read { offset, len } if offset + len > menu.size)
                        {
                            act(image, op, generation, notes);
                        }
                    }
                });
            }
        });
        settle(&image, &mut possible, notes.into_inner().unwrap(), &format!("{what}, round {round}"));
        if raw {
            let mut disk = vec![0; menu.size as usize];
            image.read(0, &mut disk).unwrap();
            let data = storages[1].snapshot().to_vec();
            let differs = disk.iter().zip(&data).position(|(a, b)| a != b);
            assert_eq!(differs, None, "{what}, round {round}: the data file is another disk");
        }
    }
    image.close().unwrap();
    settle(&image, &mut possible, Vec::new(), &format!("{what}, closed"));
    drop(image);
    let findings = audit(&storages[0].snapshot());
    assert!(findings.is_clean(), "{what}: {findings:#?}");
}

#[test]
fn overlapping_requests_leave_what_one_of_them_wrote() {
    for geometry in geometries() {
        for seed in 1..=3 {
            stress(&geometry, seed, 6, seed == 3);
        }
    }
}

/// Closing waits for requests, and later ones are refused.
#[test]
fn closing_races_with_requests() {
    for seed in 0..20 {
        let rig = Rig::forge(&Geometry::plain(4096), seed);
        let storage = Arc::new(RecordingStorage::plain(rig.image.clone()));
        let files: Vec<Arc<dyn Storage>> = vec![storage.clone()];
        let image = rig.open(&files, &writable(false)).unwrap();
        std::thread::scope(|scope| {
            for thread in 0..4u64 {
                let image = &image;
                scope.spawn(move || {
                    for n in 0..50u64 {
                        let offset = (n * 4 + thread) % 40 * 4096;
                        match image.write(offset, &stamped(offset, 4096, 9)) {
                            Ok(()) => {}
                            Err(e) => {
                                assert_eq!(e.kind(), qcow2_engine::ErrorKind::Closed, "{e:?}");
                                return;
                            }
                        }
                    }
                });
            }
            scope.spawn(|| image.close().unwrap());
        });
        image.close().unwrap();
        let findings = audit(&storage.snapshot());
        assert!(findings.is_clean(), "seed {seed}: {findings:#?}");
    }
}
