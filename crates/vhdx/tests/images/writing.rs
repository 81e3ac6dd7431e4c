//! What writing does to the file: which space is used, when, and what happens when a call fails.

use std::sync::Arc;

use qcow2_core::layer::SegmentKind;
use qcow2_core::space::Preallocation;
use qcow2_core::storage::MemoryStorage;
use qcow2_core::{ErrorKind, Job, Layer, Mem, MemMut, Storage};
use qcow2_engine::Image;
use qcow2_testkit::Rng;
use qcow2_testkit::storage::{CountingStorage, Fault, FaultStorage, Op};
use qcow2_vhdx::{NewOptions, OpenOptions, Subformat, Vhdx};

use crate::forge::{MIB, bytes_of, check, create, memory, open_disk, open_source};

fn new(new: &NewOptions) -> Arc<dyn Storage> {
    let storage = memory(&[]);
    create(new, Arc::clone(&storage)).unwrap();
    storage
}

fn small(size: u64) -> NewOptions {
    NewOptions { size, block_size: MIB, ..NewOptions::default() }
}

fn is_sound(storage: &Arc<dyn Storage>) {
    let report = check(Arc::clone(storage)).unwrap();
    assert!(report.is_clean(), "{report:?}");
}

fn write(disk: &Image, at: u64, byte: u8, length: u64) {
    disk.write_at(Mem::from(&vec![byte; length as usize][..]), at).unwrap();
}

#[test]
fn space_that_was_given_up_is_used_again_and_reads_as_zeroes() {
    let storage = new(&small(16 * MIB));
    let disk = open_disk(Arc::clone(&storage)).unwrap();
    write(&disk, 0, 1, 4 * MIB);
    disk.flush().unwrap();
    let length = storage.len().unwrap();
    disk.write_zeroes(MIB, 2 * MIB, true).unwrap();
    // What is not durable yet can still be needed.
    write(&disk, 8 * MIB, 2, 100);
    assert_eq!(storage.len().unwrap(), length + MIB);
    disk.flush().unwrap();
    write(&disk, 9 * MIB + 512, 3, 100);
    write(&disk, 10 * MIB + 512, 4, 100);
    assert_eq!(storage.len().unwrap(), length + MIB);
    let mut expected = vec![0; 16 * MIB as usize];
    for (at, byte, length) in
        [(0, 1, MIB), (3 * MIB, 1, MIB), (8 * MIB, 2, 100), (9 * MIB + 512, 3, 100), (10 * MIB + 512, 4, 100)]
    {
        expected[at as usize..(at + length) as usize].fill(byte);
    }
    assert!(bytes_of(&disk) == expected);
    disk.discard(0, MIB).unwrap();
    disk.close().unwrap();
    is_sound(&storage);
    // A later opening finds the gap.
    let again = open_disk(Arc::clone(&storage)).unwrap();
    write(&again, 12 * MIB, 5, 1);
    assert_eq!(storage.len().unwrap(), length + MIB);
    again.close().unwrap();
    is_sound(&storage);
}

#[test]
fn a_reader_keeps_the_places_that_it_planned() {
    let storage = new(&small(8 * MIB));
    let disk = open_disk(storage).unwrap();
    write(&disk, 0, 1, MIB);
    disk.flush().unwrap();
    let layer = &disk.layers()[0];
    let pin = layer.pin();
    let mut segments = Vec::new();
    layer.plan(0..MIB, &mut segments).unwrap();
    disk.write_zeroes(0, MIB, true).unwrap();
    disk.flush().unwrap();
    disk.flush().unwrap();
    write(&disk, 2 * MIB, 9, MIB);
    let mut found = vec![0; MIB as usize];
    layer.read_segment(&segments[0], MemMut::from(&mut found[..])).unwrap();
    assert!(found == vec![1; MIB as usize], "the place was used for something else");
    drop(pin);
    disk.close().unwrap();
}

#[test]
fn a_flush_of_new_blocks_costs_two_syncs_and_one_without_one() {
    let storage = Arc::new(CountingStorage::new(new(&small(64 * MIB))));
    let disk = open_disk(storage.clone() as Arc<dyn Storage>).unwrap();
    write(&disk, 0, 1, 100);
    disk.flush().unwrap();
    for (at, syncs) in [(100, 1), (MIB, 2), (2 * MIB - 5, 2), (7, 1)] {
        storage.reset();
        write(&disk, at, 2, 100);
        disk.flush().unwrap();
        assert_eq!(storage.of(Op::Sync).calls, syncs, "{at}");
    }
    // Nothing is written by opening and closing.
    disk.close().unwrap();
    drop(disk);
    storage.reset();
    open_disk(storage.clone() as Arc<dyn Storage>).unwrap().close().unwrap();
    assert_eq!(storage.of(Op::Write).calls, 0);
}

/// The log is used from its start to its end, and from its start again.
#[test]
fn the_log_goes_around() {
    let storage = new(&small(400 * MIB));
    let disk = open_disk(Arc::clone(&storage)).unwrap();
    for block in 0..300 {
        write(&disk, block * MIB, block as u8, 3);
        disk.flush().unwrap();
        if block % 50 == 17 {
            let now = open_source(Arc::clone(&storage)).unwrap();
            let mut found = [0; 3];
            now.read_at(MemMut::from(&mut found[..]), block * MIB).unwrap();
            assert_eq!(found, [block as u8; 3]);
        }
    }
    disk.close().unwrap();
    is_sound(&storage);
}

#[test]
fn many_threads_write_one_block_and_others() {
    let storage = new(&small(24 * MIB));
    let disk = open_disk(Arc::clone(&storage)).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let disk = &disk;
            scope.spawn(move || {
                let mut rng = Rng::new(thread);
                for round in 0..60 {
                    // Each its own sectors of every block.
                    let block = rng.below(24);
                    let at = block * MIB + thread * 4096;
                    write(disk, at, (thread + 1) as u8, 4096);
                    let mut found = [0; 4096];
                    disk.read_at(MemMut::from(&mut found[..]), at).unwrap();
                    assert_eq!(found, [(thread + 1) as u8; 4096]);
                    match round % 20 {
                        7 => disk.flush().unwrap(),
                        13 if thread == 0 => disk.write_zeroes(block * MIB + 64 * 1024, 4096, true).unwrap(),
                        _ => {}
                    }
                }
            });
        }
    });
    let before = bytes_of(&disk);
    disk.close().unwrap();
    assert!(bytes_of(&open_source(Arc::clone(&storage)).unwrap()) == before);
    is_sound(&storage);
}

#[test]
fn a_disk_that_grows_out_of_its_table_moves_it() {
    for subformat in [Subformat::Dynamic, Subformat::Fixed] {
        let storage = new(&NewOptions { subformat, ..small(2 * MIB + 512) });
        let disk = open_disk(Arc::clone(&storage)).unwrap();
        write(&disk, 2 * MIB, 7, 512);
        disk.resize(4 * MIB).unwrap();
        write(&disk, 3 * MIB + 512, 8, 512);
        for (size, kind) in [(4 * MIB + 1, ErrorKind::InvalidArgument), (65 << 40, ErrorKind::Limit)] {
            assert_eq!(disk.resize(size).unwrap_err().kind(), kind, "{size}");
        }
        let layer = disk.layers()[0].as_writable().unwrap();
        layer.resize(3 * MIB, Preallocation::Off, &Job::new()).unwrap();
        assert_eq!(disk.virtual_size(), 3 * MIB);
        disk.resize(4 * MIB).unwrap();
        write(&disk, 3 * MIB + 512, 8, 512);
        // Blocks of 1 MiB: a table of 1 MiB has 131072 entries.
        let large = 140_000 * MIB;
        if subformat == Subformat::Dynamic {
            disk.resize(large).unwrap();
            write(&disk, large - 512, 9, 512);
        }
        disk.close().unwrap();
        is_sound(&storage);
        let again = open_source(storage).unwrap();
        let found = |at: u64| {
            let mut found = [1; 512];
            again.read_at(MemMut::from(&mut found[..]), at).unwrap();
            found
        };
        assert_eq!(
            (found(2 * MIB), found(2 * MIB + 512), found(3 * MIB + 512)),
            ([7; 512], [0; 512], [8; 512])
        );
        if subformat == Subformat::Dynamic {
            assert_eq!(
                (again.virtual_size(), found(large - 512), found(1 << 30)),
                (large, [9; 512], [0; 512])
            );
        }
    }
}

/// Entries behind the end of the disk can have anything in them.
#[test]
fn what_the_table_had_behind_its_end_is_nothing_to_a_larger_disk() {
    let storage = new(&small(2 * MIB));
    let place = {
        let disk = open_disk(Arc::clone(&storage)).unwrap();
        write(&disk, 0, 1, MIB);
        disk.close().unwrap();
        let mut segments = Vec::new();
        disk.layers()[0].plan(0..1, &mut segments).unwrap();
        let SegmentKind::Data(place) = segments[0].kind else { panic!("{segments:?}") };
        place.host
    };
    storage.write_at(Mem::from(&(place | 6).to_le_bytes()[..]), 2 * MIB + 3 * 8).unwrap();
    let disk = open_disk(Arc::clone(&storage)).unwrap();
    disk.resize(6 * MIB).unwrap();
    assert!(bytes_of(&disk)[2 * MIB as usize..] == vec![0; 4 * MIB as usize]);
    disk.close().unwrap();
    is_sound(&storage);
}

/// The last block has more than the disk, and can have anything there.
#[test]
fn what_the_last_block_had_behind_the_end_is_nothing_to_a_larger_disk() {
    let storage = new(&small(MIB + 512));
    let disk = open_disk(Arc::clone(&storage)).unwrap();
    write(&disk, MIB, 1, 512);
    disk.flush().unwrap();
    let mut segments = Vec::new();
    disk.layers()[0].plan(MIB..MIB + 512, &mut segments).unwrap();
    let SegmentKind::Data(place) = segments[0].kind else { panic!("{segments:?}") };
    storage.write_at(Mem::from(&[7; 4096][..]), place.host + 512).unwrap();
    disk.resize(2 * MIB).unwrap();
    let mut expected = vec![0; 2 * MIB as usize];
    expected[MIB as usize..MIB as usize + 512].fill(1);
    assert!(bytes_of(&disk) == expected);
    // An image that nobody closed brings its log in when it is dropped.
    drop(disk);
    is_sound(&storage);
    assert!(bytes_of(&open_source(storage).unwrap()) == expected);
}

/// Each call fails once: what was flushed is there, what was not is old or new, and the file is sound.
#[test]
fn any_call_can_fail() {
    let base = {
        let storage = Arc::new(MemoryStorage::new());
        create(&small(8 * MIB), storage.clone()).unwrap();
        let disk = open_disk(storage.clone()).unwrap();
        write(&disk, 0, 1, MIB);
        write(&disk, 5 * MIB, 1, MIB);
        disk.close().unwrap();
        storage.to_vec()
    };
    let mut calls = 0;
    loop {
        let storage = Arc::new(FaultStorage::new(
            memory(&base),
            Fault::nth(calls, if calls % 2 == 0 { 5 } else { 28 }),
        ));
        let flushed = operate(storage.clone());
        let failed = storage.failed() > 0;
        let storage = storage as Arc<dyn Storage>;
        let disk = open_disk(Arc::clone(&storage)).or_else(|_| open_disk(Arc::clone(&storage))).unwrap();
        let found = bytes_of(&disk);
        let byte = |block: u64| found[(block * MIB) as usize..][..MIB as usize].to_vec();
        let is = |block: u64, values: &[u8]| {
            let bytes = byte(block);
            assert!(
                values.iter().any(|value| bytes == vec![*value; MIB as usize]),
                "call {calls}: block {block}"
            );
        };
        let (old_or_new, new) = (!flushed, flushed);
        is(1, if new { &[2] } else { &[0, 2] });
        is(5, if new { &[0] } else { &[0, 1] });
        if old_or_new {
            assert!(byte(0).iter().all(|byte| [1, 3].contains(byte)), "call {calls}");
        } else {
            is(0, &[3]);
        }
        assert!(byte(7).iter().all(|byte| *byte == 0));
        disk.close().unwrap();
        is_sound(&storage);
        if !failed {
            assert!(flushed && calls > 20, "{calls}");
            return;
        }
        calls += 1;
    }
}

/// Whether all of it succeeded, the flush too.
fn operate(storage: Arc<dyn Storage>) -> bool {
    let Ok(disk) = open_disk(storage) else { return false };
    let block = |byte| vec![byte; MIB as usize];
    let done = disk
        .write_at(Mem::from(&block(2)[..]), MIB)
        .and_then(|()| disk.write_at(Mem::from(&block(3)[..]), 0))
        .and_then(|()| disk.write_zeroes(5 * MIB, MIB, true))
        .and_then(|()| disk.flush());
    let closed = disk.close();
    done.is_ok() && (closed.is_ok() || done.is_ok())
}

#[test]
fn a_sync_that_failed_is_the_end_of_writing() {
    let storage = Arc::new(FaultStorage::new(
        new(&small(8 * MIB)),
        Fault { ops: vec![Op::Sync], after: 2, once: true, errno: 5 },
    ));
    let disk = open_disk(storage.clone() as Arc<dyn Storage>).unwrap();
    write(&disk, 0, 1, 10);
    assert_eq!(disk.flush().unwrap_err().kind(), ErrorKind::Io);
    let error = disk.write_at(Mem::from(&[1][..]), 0).unwrap_err();
    assert!(error.message().contains("refuses writes since an earlier error"), "{error}");
    disk.flush().unwrap_err();
    disk.close().unwrap();
}

#[test]
fn options_that_a_new_image_cannot_have_are_refused() {
    let sound = small(MIB);
    let cases = [
        (NewOptions { block_size: 3 * MIB, ..sound.clone() }, "block_size"),
        (NewOptions { block_size: 512 * MIB, ..sound.clone() }, "block_size"),
        (NewOptions { log_size: 5000, ..sound.clone() }, "log_size"),
        (NewOptions { log_size: 4 << 30, ..sound.clone() }, "log_size"),
        (NewOptions { sector_size: 1024, ..sound.clone() }, "sector_size"),
        (NewOptions { size: 513, ..sound.clone() }, "size"),
        (NewOptions { size: (64 << 40) + 512, ..sound.clone() }, "size"),
    ];
    for (case, field) in cases {
        let error = case.plan().unwrap_err();
        assert_eq!(error.field(), Some(field), "{case:?}");
    }
    // Nothing, and a sector.
    for size in [0, 512] {
        let storage = new(&small(size));
        is_sound(&storage);
        assert_eq!(Vhdx::open(storage, &OpenOptions::default()).unwrap().virtual_size(), size);
    }
}
