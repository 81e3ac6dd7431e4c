//! One thing held in the middle of another: races as they are at their worst, one by one.

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use qcow2_engine::create::{Backing, CreateOptions, DataFile, create};
use qcow2_engine::{
    Discard, ErrorKind, Image, Job, Layer, Mem, OpenOptions, Qcow2, Raw, ReadStorage, ResizeOptions, Storage,
    WriteOptions,
};
use qcow2_testkit::audit::audit;
use qcow2_testkit::ops::{Target, stamped};
use qcow2_testkit::plans::Table;
use qcow2_testkit::recorder::RecordingStorage;
use qcow2_testkit::storage::{Before, Hooked, Op};
use qcow2_testkit::{Rng, Sparse};

const SHRINK: ResizeOptions =
    ResizeOptions { shrink: true, preallocation: qcow2_engine::create::Preallocation::Off };

/// Long enough for another thread to come as far as it can.
const WHILE: Duration = Duration::from_millis(100);

type Which = Box<dyn Fn(Op, &Range<u64>) -> bool + Send + Sync>;

/// Holds the first call that fits, once it is armed.
struct Hold {
    which: Which,
    armed: AtomicBool,
    held: SyncSender<()>,
    go: Mutex<Receiver<()>>,
}

impl Before for Hold {
    fn before(&self, op: Op, range: Range<u64>) -> io::Result<()> {
        if self.armed.load(Ordering::Acquire)
            && (self.which)(op, &range)
            && self.armed.swap(false, Ordering::AcqRel)
        {
            self.held.send(()).unwrap();
            self.go.lock().unwrap().recv().unwrap();
        }
        Ok(())
    }
}

/// The other end of a [`Hold`].
struct Held {
    hold: Arc<Hold>,
    is_held: Receiver<()>,
    go: SyncSender<()>,
}

impl Held {
    fn arm(&self) {
        self.hold.armed.store(true, Ordering::Release);
    }
    fn wait(&self) {
        self.is_held.recv_timeout(Duration::from_secs(60)).unwrap();
    }
    fn release(&self) {
        self.go.send(()).unwrap();
    }
}

fn hold(which: impl Fn(Op, &Range<u64>) -> bool + Send + Sync + 'static) -> Held {
    let (held, is_held) = sync_channel(1);
    let (go, goes) = sync_channel(1);
    let armed = AtomicBool::new(false);
    let hold = Hold { which: Box::new(which), armed, held, go: Mutex::new(goes) };
    Held { hold: Arc::new(hold), is_held, go }
}

fn options() -> WriteOptions {
    WriteOptions { discard: Discard::Unmap, ..WriteOptions::default() }
}

fn new_image(cluster_size: u64, size: u64) -> Arc<RecordingStorage> {
    let file = Arc::new(RecordingStorage::plain(Sparse::new(0)));
    let options = CreateOptions { cluster_size, size, ..CreateOptions::default() };
    create(file.clone(), None, &options, &Job::new()).unwrap();
    file
}

fn open(storage: Arc<dyn Storage>, options: WriteOptions) -> Image {
    let mut qcow2 = Qcow2::open(storage, &OpenOptions::default()).unwrap();
    qcow2.enable_writing(options).unwrap();
    Image::new(vec![Box::new(qcow2)]).unwrap()
}

fn read_all(image: &Image) -> Vec<u8> {
    let mut bytes = vec![0; image.virtual_size() as usize];
    image.read(0, &mut bytes).unwrap();
    bytes
}

fn clean(file: &RecordingStorage, what: &str) {
    let findings = audit(&file.snapshot());
    assert!(findings.is_clean(), "{what}: {findings:#?}");
}

/// An external data file that is a raw image by itself is the same disk whatever came between.
#[test]
fn a_raw_data_file_and_the_table_say_the_same() {
    const CLUSTER: u64 = 65536;
    for discard in [false, true] {
        let (file, data) = (
            Arc::new(RecordingStorage::plain(Sparse::new(0))),
            Arc::new(RecordingStorage::plain(Sparse::new(0))),
        );
        let create_options = CreateOptions {
            size: 4 * CLUSTER,
            data_file: Some(DataFile { filename: "data".into(), raw: true }),
            ..CreateOptions::default()
        };
        create(file.clone(), Some(data.clone()), &create_options, &Job::new()).unwrap();
        let held = hold(|op, _| op == Op::Write);
        let mut qcow2 = Qcow2::open(file.clone(), &OpenOptions::default()).unwrap();
        qcow2.set_data_file(Arc::new(Hooked::with(data.clone() as Arc<dyn Storage>, held.hold.clone())));
        qcow2.enable_writing(options()).unwrap();
        let image = Image::new(vec![Box::new(qcow2)]).unwrap();
        for allocated in [false, true] {
            held.arm();
            std::thread::scope(|scope| {
                let writing = scope.spawn(|| image.write(CLUSTER, &[1 + u8::from(allocated); 4096]).unwrap());
                held.wait();
                let zeroing = scope.spawn(|| match discard {
                    true => image.discard(0, 3 * CLUSTER).unwrap(),
                    false => image
                        .write_zeroes(CLUSTER, 2048, false)
                        .and_then(|()| image.write_zeroes(0, 3 * CLUSTER, true))
                        .unwrap(),
                });
                std::thread::sleep(WHILE);
                held.release();
                writing.join().unwrap();
                zeroing.join().unwrap();
            });
            let disk = read_all(&image);
            assert!(data.snapshot().to_vec() == disk, "discard: {discard}, allocated: {allocated}");
            image.write(0, &vec![7; 3 * CLUSTER as usize]).unwrap();
        }
        image.close().unwrap();
        clean(&file, "a raw data file");
    }
}

/// What is remembered of a table goes with it, also where the table was shared with a snapshot meanwhile: another one may
/// be written in its place.
#[test]
fn a_table_in_the_place_of_another_is_read_as_it_is() {
    const CLUSTER: u64 = 4096;
    /// Guest bytes of an L2 table.
    const COVERED: u64 = CLUSTER / 8 * CLUSTER;
    for seed in 0..40 {
        let mut rng = Rng::new(seed);
        // Much that is remembered, of which the first tables are used.
        let file = new_image(CLUSTER, 40 * COVERED);
        let image = open(file.clone(), options());
        let mut model = vec![0; 3 * COVERED as usize];
        let mut snapshots: Vec<Vec<u8>> = Vec::new();
        for step in 0..40 {
            let table = Table::of(&image);
            let any = rng.below(snapshots.len().max(1) as u64) as usize;
            let act = match rng.below(7) {
                0 if snapshots.len() < 3 => {
                    image.execute(&table.create(&format!("{}", 1 + step), "new")).unwrap();
                    snapshots.push(model.clone());
                    "create"
                }
                1 if any < snapshots.len() => {
                    image.execute(&table.delete(any)).unwrap();
                    snapshots.remove(any);
                    "delete"
                }
                2 if any < snapshots.len() => {
                    image.execute(&table.apply(any)).unwrap();
                    model = snapshots[any].clone();
                    "apply"
                }
                3 => {
                    let size = (model.len() as u64 - COVERED / 4).max(COVERED / 2);
                    image.resize_with(size, SHRINK).unwrap();
                    model.truncate(size as usize);
                    "shrink"
                }
                4 => {
                    image.resize(40 * COVERED).unwrap();
                    model.resize(3 * COVERED as usize, 0);
                    "grow"
                }
                _ => {
                    for _ in 0..20 {
                        let at = rng.below(model.len() as u64 / CLUSTER) * CLUSTER;
                        let bytes = stamped(at, CLUSTER, step);
                        image.write(at, &bytes).unwrap();
                        model[at as usize..(at + CLUSTER) as usize].copy_from_slice(&bytes);
                    }
                    image.flush().unwrap();
                    "write"
                }
            };
            let mut found = vec![0; model.len()];
            image.read(0, &mut found).unwrap();
            assert!(found == model, "seed {seed}: {act} in step {step}");
        }
        image.close().unwrap();
        clean(&file, &format!("seed {seed}"));
    }
}

/// A request is judged by the disk that it meets, not by the one that it was made for.
#[test]
fn what_waited_for_a_shrink_does_not_write_behind_the_end() {
    const SIZE: u64 = 1 << 20;
    type Request = (&'static str, fn(&Image) -> qcow2_engine::Result<()>);
    let requests: [Request; 4] = [
        ("write", |image| image.write(SIZE - 4096, &[7; 4096])),
        ("zeroes", |image| image.write_zeroes(SIZE - 4096, 4096, false)),
        ("discard", |image| image.discard(SIZE - 65536, 65536)),
        ("write over the end", |image| image.write(SIZE / 2 - 4096, &[7; 8192])),
    ];
    for (what, request) in requests {
        for raw in [true, false] {
            let what = format!("{what}, raw {raw}");
            let file = if raw {
                Arc::new(RecordingStorage::plain(Sparse::new(SIZE)))
            } else {
                new_image(65536, SIZE)
            };
            // A raw disk is cut by its file's length; the other one's second sync is that of its new tables.
            let held = hold(move |op, _| op == if raw { Op::SetLen } else { Op::Sync });
            let storage: Arc<dyn Storage> = Arc::new(Hooked::with(file.clone(), Arc::clone(&held.hold)));
            let image = if raw {
                let raw = Raw::new(storage).unwrap().with_write_options(&options());
                Image::new(vec![Box::new(raw)]).unwrap()
            } else {
                open(storage, options())
            };
            image.write(0, &[1; 4096]).unwrap();
            image.flush().unwrap();
            std::thread::scope(|scope| {
                held.arm();
                let shrinking = scope.spawn(|| image.resize_with(SIZE / 2, SHRINK));
                held.wait();
                let request = scope.spawn(|| request(&image));
                std::thread::sleep(WHILE);
                held.release();
                shrinking.join().unwrap().unwrap();
                let error = request.join().unwrap().unwrap_err();
                assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{what}: {error}");
            });
            assert_eq!(image.virtual_size(), SIZE / 2, "{what}");
            image.close().unwrap();
            if raw {
                assert_eq!(file.snapshot().len(), SIZE / 2, "{what}: the file");
            } else {
                clean(&file, &what);
            }
        }
    }
}

/// Closing keeps what a request wrote that was there before, also when that was the first one.
#[test]
fn closing_waits_for_the_first_request() {
    let file = new_image(65536, 1 << 20);
    // The image is marked dirty before the first change.
    let held = hold(|op, range| op == Op::Write && range.start == 72);
    let storage = Arc::new(Hooked::with(file.clone(), Arc::clone(&held.hold)));
    let image = open(storage, WriteOptions { lazy_refcounts: true, ..options() });
    std::thread::scope(|scope| {
        held.arm();
        let writing = scope.spawn(|| image.write(0, &[5; 4096]));
        held.wait();
        let closing = scope.spawn(|| image.close());
        std::thread::sleep(WHILE);
        held.release();
        writing.join().unwrap().unwrap();
        closing.join().unwrap().unwrap();
    });
    clean(&file, "closed");
    let again = open(file, options());
    assert!(read_all(&again)[..4096].iter().all(|b| *b == 5), "what was written is gone");
}

/// A flush reserves clusters for later requests. That there is no room for those is their matter.
#[test]
fn a_flush_on_a_full_disk_writes_what_there_is() {
    const ENOSPC: i32 = 28;
    let file = new_image(512, 1 << 20);
    let full = Arc::new(Mutex::new(None));
    let limit = Arc::clone(&full);
    let hook = move |op: Op, range: Range<u64>| match *limit.lock().unwrap() {
        Some(end) if op == Op::Write && range.end > end => Err(io::Error::from_raw_os_error(ENOSPC)),
        _ => Ok(()),
    };
    let image = open(Arc::new(Hooked::with(file.clone(), hook)), options());
    image.write(0, &stamped(0, 8192, 1)).unwrap();
    image.flush().unwrap();
    *full.lock().unwrap() = Some(file.len().unwrap());
    let mut written = 8192;
    let error = loop {
        match image.write(written, &stamped(written, 512, 2)) {
            Ok(()) => written += 512,
            Err(error) => break error,
        }
        image.flush().unwrap();
    };
    assert!(error.is_no_space(), "{error}");
    assert!(written > 8192 + 32 * 512, "what was reserved was not used: {written}");
    image.flush().unwrap();
    // There is room again.
    *full.lock().unwrap() = None;
    image.write(written, &stamped(written, 512, 2)).unwrap();
    image.close().unwrap();
    clean(&file, "closed");
    let again = open(file, options());
    assert!(read_all(&again)[8192..written as usize + 512] == stamped(8192, written - 8192 + 512, 2));
}

/// A bitmap's bits are read as they are, whoever removes it meanwhile.
#[test]
fn a_bitmap_is_not_freed_while_it_is_read() {
    let file = new_image(4096, 64 << 20);
    let reads = AtomicBool::new(false);
    // The directory, then the table.
    let held = hold(move |op, _| op == Op::Read && reads.swap(true, Ordering::AcqRel));
    let image = open(Arc::new(Hooked::with(file.clone(), Arc::clone(&held.hold))), options());
    image.add_bitmap("bits", Some(9), true).unwrap();
    image.write(1 << 20, &[1; 4096]).unwrap();
    image.enable_bitmap("bits", false).unwrap();
    let marked: Vec<_> = std::iter::once(1 << 20..(1 << 20) + 4096).collect();
    assert_eq!(image.bitmap_extents("bits").unwrap(), marked);
    std::thread::scope(|scope| {
        held.arm();
        let reading = scope.spawn(|| image.bitmap_extents("bits"));
        held.wait();
        let removing = scope.spawn(|| {
            image.remove_bitmap("bits").unwrap();
            for n in 0..64 {
                image.write(n * 4096, &[0xff; 4096]).unwrap();
            }
        });
        std::thread::sleep(WHILE);
        held.release();
        assert_eq!(reading.join().unwrap().unwrap(), marked);
        removing.join().unwrap();
    });
    image.close().unwrap();
    clean(&file, "closed");
}

/// What fails changes nothing: a bitmap that could not be cleared still says what was written.
#[test]
fn a_bitmap_that_could_not_be_cleared_is_as_it_was() {
    let file = new_image(65536, 1 << 20);
    let full = Arc::new(AtomicBool::new(false));
    let is_full = Arc::clone(&full);
    let hook = move |op: Op, _: Range<u64>| match op == Op::Write && is_full.load(Ordering::Acquire) {
        true => Err(io::Error::from_raw_os_error(5)),
        false => Ok(()),
    };
    let image = open(Arc::new(Hooked::with(file.clone(), hook)), options());
    image.add_bitmap("bits", None, true).unwrap();
    image.write_at(Mem::from(&[1; 4096][..]), 0).unwrap();
    image.flush().unwrap();
    let marked = image.bitmap_extents("bits").unwrap();
    assert_eq!(marked.len(), 1);
    full.store(true, Ordering::Release);
    image.clear_bitmap("bits").unwrap_err();
    full.store(false, Ordering::Release);
    assert_eq!(image.bitmap_extents("bits").unwrap(), marked);
}

/// A bitmap that cannot follow the disk keeps it from growing: it would not know what is written there.
#[test]
fn a_disk_does_not_outgrow_its_bitmaps() {
    let file = new_image(65536, 1 << 20);
    let mut read = OpenOptions::default();
    // Bits of 512 bytes for 16 MiB.
    read.limits.max_memory = 4096;
    let mut qcow2 = Qcow2::open(file.clone(), &read).unwrap();
    qcow2.enable_writing(options()).unwrap();
    let image = Image::new(vec![Box::new(qcow2)]).unwrap();
    image.add_bitmap("bits", Some(9), true).unwrap();
    assert_eq!(image.resize(32 << 20).unwrap_err().kind(), ErrorKind::Limit);
    assert_eq!(image.virtual_size(), 1 << 20);
    image.resize(16 << 20).unwrap();
    image.write(15 << 20, &[1; 4096]).unwrap();
    image.close().unwrap();
    clean(&file, "closed");
    let again = open(file, options());
    let marked: Vec<_> = std::iter::once(15 << 20..(15 << 20) + 4096).collect();
    assert_eq!(again.bitmap_extents("bits").unwrap(), marked);
}

/// What a shrink takes away reads as what was there, or as zeroes: never as what a backing file has in its place.
#[test]
fn a_read_beside_a_shrink_does_not_see_through_the_disk() {
    const SIZE: u64 = 1 << 20;
    let file = Arc::new(RecordingStorage::plain(Sparse::new(0)));
    let backing = Backing { filename: b"below".to_vec(), format: Some(b"raw".to_vec()) };
    let made = CreateOptions { size: SIZE, backing: Some(backing), ..CreateOptions::default() };
    create(file.clone(), None, &made, &Job::new()).unwrap();
    let mut below = Sparse::new(SIZE);
    below.write(0, &[0xbb; SIZE as usize]);
    let below: Arc<dyn Storage> = Arc::new(RecordingStorage::plain(below));
    let open = |storage: Arc<dyn Storage>| {
        let mut qcow2 = Qcow2::open(storage, &OpenOptions::default()).unwrap();
        qcow2.enable_writing(options()).unwrap();
        let below = Box::new(Raw::new(Arc::clone(&below)).unwrap()) as Box<dyn Layer>;
        Image::new(vec![Box::new(qcow2), below]).unwrap()
    };
    let image = open(file.clone());
    image.write(0, &[0x11; SIZE as usize]).unwrap();
    image.close().unwrap();
    // The tables are not in memory.
    let held = hold(|op, _| op == Op::Read);
    let image = open(Arc::new(Hooked::with(file.clone(), Arc::clone(&held.hold))));
    std::thread::scope(|scope| {
        held.arm();
        let reading = scope.spawn(|| {
            let mut bytes = [0; 8192];
            image.read(SIZE / 2 - 4096, &mut bytes).map(|()| bytes)
        });
        held.wait();
        let shrinking = scope.spawn(|| image.resize_with(SIZE / 2, SHRINK));
        std::thread::sleep(WHILE);
        held.release();
        let bytes = reading.join().unwrap().unwrap();
        assert!(bytes[..4096].iter().all(|b| *b == 0x11));
        assert!(bytes[4096..].iter().all(|b| matches!(b, 0 | 0x11)), "the backing file: {:x}", bytes[4096]);
        shrinking.join().unwrap().unwrap();
    });
    image.close().unwrap();
    clean(&file, "closed");
}

/// A write that copies is held before its bytes reach the file; what is given up meanwhile comes behind it, be it the whole
/// cluster, other subclusters of it, or its neighbours.
#[test]
fn what_is_given_up_meets_a_write_that_copies() {
    const CLUSTER: u64 = 65536;
    type Give = (u64, u64, Option<bool>);
    // Offset and length; `None` discards, else zeroes are written, with or without unmapping.
    let given_up: [Give; 8] = [
        (CLUSTER, CLUSTER, None),
        (0, 4 * CLUSTER, None),
        (2 * CLUSTER, CLUSTER, None),
        (CLUSTER, CLUSTER, Some(true)),
        (CLUSTER + 32768, 8192, Some(true)),
        (CLUSTER + 2048, 4096, Some(true)),
        (CLUSTER + 20480, 1000, Some(false)),
        (0, 3 * CLUSTER + 512, Some(true)),
    ];
    for extended_l2 in [false, true] {
        for (offset, length, zero) in given_up {
            let what = format!("extended: {extended_l2}, {zero:?} of {length} at {offset}");
            let file = Arc::new(RecordingStorage::plain(Sparse::new(0)));
            let create_options = CreateOptions { size: 4 * CLUSTER, extended_l2, ..CreateOptions::default() };
            create(file.clone(), None, &create_options, &Job::new()).unwrap();
            let held = hold(|op, _| op == Op::Write);
            let image =
                open(Arc::new(Hooked::with(file.clone() as Arc<dyn Storage>, held.hold.clone())), options());
            image.write(0, &stamped(0, 4 * CLUSTER, 1)).unwrap();
            image.flush().unwrap();
            image.execute(&Table::of(&image).create("1", "old")).unwrap();
            let mut model = read_all(&image);
            let new = stamped(CLUSTER + 4096, 8192, 2);
            held.arm();
            std::thread::scope(|scope| {
                let writing = scope.spawn(|| image.write(CLUSTER + 4096, &new).unwrap());
                held.wait();
                let giving = scope.spawn(|| match zero {
                    None => image.discard(offset, length).unwrap(),
                    Some(unmap) => image.write_zeroes(offset, length, unmap).unwrap(),
                });
                std::thread::sleep(WHILE / 4);
                // A flush, and others that take what is free, between them.
                image.flush().unwrap();
                image.write(3 * CLUSTER + 1024, &stamped(3 * CLUSTER + 1024, 512, 3)).unwrap();
                held.release();
                writing.join().unwrap();
                giving.join().unwrap();
            });
            model[(CLUSTER + 4096) as usize..][..8192].copy_from_slice(&new);
            let last = 3 * CLUSTER as usize + 1024;
            let given = (offset as usize)..(offset + length) as usize;
            // What overlaps the write that came last is that one's, whichever of both came first.
            model[given].fill(0);
            let now = read_all(&image);
            assert!(now[..last] == model[..last] && now[last + 512..] == model[last + 512..], "{what}");
            image.close().unwrap();
            clean(&file, &what);
            let image = open(file.clone(), options());
            assert!(read_all(&image) == now, "{what}");
            image.execute(&Table::of(&image).apply(0)).unwrap();
            assert!(read_all(&image) == stamped(0, 4 * CLUSTER, 1), "the snapshot, {what}");
        }
    }
}

/// The same where nothing is copied: a late write goes to the cluster that was given up, which nobody else has yet.
#[test]
fn a_late_write_in_place_reaches_nobody_elses_cluster() {
    const CLUSTER: u64 = 65536;
    let file = new_image(CLUSTER, 8 * CLUSTER);
    let held = hold(|op, _| op == Op::Write);
    let image = open(Arc::new(Hooked::with(file.clone() as Arc<dyn Storage>, held.hold.clone())), options());
    image.write(0, &stamped(0, 2 * CLUSTER, 1)).unwrap();
    image.flush().unwrap();
    held.arm();
    std::thread::scope(|scope| {
        let writing = scope.spawn(|| image.write(4096, &stamped(4096, 8192, 2)).unwrap());
        held.wait();
        image.discard(0, CLUSTER).unwrap();
        image.flush().unwrap();
        for cluster in 2..8 {
            image.write(cluster * CLUSTER, &stamped(cluster * CLUSTER, CLUSTER, 3)).unwrap();
        }
        image.flush().unwrap();
        held.release();
        writing.join().unwrap();
    });
    let disk = read_all(&image);
    let first = CLUSTER as usize;
    assert!(disk[..first].iter().all(|byte| *byte == 0));
    assert!(disk[first..2 * first] == stamped(0, 2 * CLUSTER, 1)[first..]);
    assert!((2..8).all(|n| disk[n * first..][..first] == stamped(n as u64 * CLUSTER, CLUSTER, 3)[..]));
    image.close().unwrap();
    clean(&file, "a late write");
}
