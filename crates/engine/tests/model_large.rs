//! Disks of many terabytes, in memory that does not grow with them. One test at a time: the counting allocator is
//! the process's.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, reason = "tests")]

use std::time::{Duration, Instant};

use parking_lot::Mutex;
use qcow2_engine::create::CreateOptions;
use qcow2_engine::measure::{MeasureTarget, Qcow2Target, measure};
use qcow2_engine::{Discard, GuestSource, Job, OpenOptions, WriteOptions};
use qcow2_testkit::alloc::Counting;
use qcow2_testkit::disk_model::{Opening, open_file};
use qcow2_testkit::{Fixture, Forge, Qemu, chain};

#[global_allocator]
static MEMORY: Counting = Counting::new();

static ALONE: Mutex<()> = Mutex::new(());

/// L1 tables beyond one cluster, host offsets beyond 32 bits, and a cache that stays within its limit.
#[test]
fn disks_of_16_tib_are_read_in_bounded_memory() {
    let _alone = ALONE.lock();
    let fixture = Fixture::new();
    let size = (16u64 << 40) + 512;
    let mut forge = Forge::new(3, 14, size);
    let clusters = size >> 14;
    let step = clusters / 1500;
    for i in 0..1500u64 {
        forge.data(i * step, &i.to_be_bytes());
    }
    let far = forge.place(clusters, 5 << 40, b"the last sector, stored at 5 TiB");
    let path = fixture.path("large.qcow2");
    forge.build().bytes.write_to(&path);
    let before = MEMORY.reset();
    let start = Instant::now();
    let options = OpenOptions { l2_cache_bytes: Some(1 << 20), ..OpenOptions::default() };
    let image = chain::open(&path, "qcow2", &options).unwrap();
    for round in 0..2 {
        for i in 0..1500u64 {
            assert_eq!(chain::read(&image, (i * step) << 14, 8).unwrap(), i.to_be_bytes(), "round {round}");
        }
    }
    assert_eq!(chain::read(&image, size - 512, 32).unwrap(), b"the last sector, stored at 5 TiB");
    assert_eq!(chain::read(&image, size - 520, 8).unwrap(), [0; 8]);
    let mut extents = Vec::new();
    image.extents(0, size, &Job::new(), &mut extents).unwrap();
    assert_eq!(extents.len(), 2 * 1500 + 1);
    assert_eq!(extents.last().unwrap().host.as_ref().unwrap().1, far);
    let used = MEMORY.peak() - before;
    // The L1 table takes 4 MiB and once more while it is decoded.
    assert!(used < 12 << 20, "{used} bytes in use");
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
}

/// A small file can have an extent for every sector of a large disk, behind a hole that invites large steps: walking
/// it takes time, and no memory.
#[test]
fn a_disk_of_countless_extents_is_walked_in_bounded_memory() {
    let _alone = ALONE.lock();
    let size = 1u64 << 32;
    let mut forge = Forge::new(3, 9, size);
    // One L2 table, zero and data by turns, that every L1 entry of the second half refers to.
    for cluster in (0..64).step_by(2) {
        forge.zero_plain(cluster);
        forge.data(cluster + 1, b"data");
    }
    let built = forge.build();
    let (l1, table) = (built.layout.l1, built.bytes.u64(built.layout.l1));
    let entries = size / (64 * 512);
    let mut built = built.with_u64(l1, 0);
    for index in entries / 2..entries {
        built.bytes.put_u64(l1 + index * 8, table);
    }
    let fixture = Fixture::new();
    let path = fixture.path("countless.qcow2");
    built.bytes.write_to(&path);
    let image = chain::open(&path, "qcow2", &OpenOptions::default()).unwrap();
    let before = MEMORY.reset();
    let (mut at, mut extents, mut count) = (0, Vec::new(), 0u64);
    while at < size {
        extents.clear();
        at = image.extents_up_to(at, size - at, 10_000, &Job::new(), &mut extents).unwrap();
        assert_eq!(extents.last().map(|e| e.start + e.length), Some(at));
        count += extents.len() as u64;
    }
    assert!(count > size / 2 / 512, "{count} extents");
    let options = CreateOptions { size, ..CreateOptions::default() };
    let target = MeasureTarget::Qcow2(Qcow2Target::from_options(&options).unwrap());
    measure(&image, &target, &Job::new()).unwrap();
    let other = chain::open(&path, "qcow2", &OpenOptions::default()).unwrap();
    let mut listed = Vec::new();
    other.extents_up_to(0, size, 10_000, &Job::new(), &mut listed).unwrap();
    assert!(listed.len() < 20_000, "{} extents at once", listed.len());
    let used = MEMORY.peak() - before;
    assert!(used < 24 << 20, "{used} bytes in use");
}

/// Zeroing all of a large disk makes more tables than may be in memory at once.
#[test]
fn zeroes_over_16_tib_are_written_in_bounded_memory() {
    let _alone = ALONE.lock();
    let fixture = Fixture::new();
    let size = 16u64 << 40;
    let base = fixture.path("base.qcow2");
    let mut forge = Forge::new(3, 21, size);
    forge.data(3, b"from below");
    forge.data((size >> 21) - 5, b"from below");
    forge.build().bytes.write_to(&base);
    let path = fixture.path("large.qcow2");
    let mut forge = Forge::new(3, 21, size).backing("base.qcow2", "qcow2");
    for i in 0..100u64 {
        forge.data(i * (size >> 21) / 100, b"from here");
    }
    forge.build().bytes.write_to(&path);
    let opening = Opening {
        read: OpenOptions { l2_cache_bytes: Some(1 << 20), ..OpenOptions::default() },
        write: Some(WriteOptions { discard: Discard::Unmap, ..WriteOptions::default() }),
    };
    for round in 0..3 {
        let image = open_file(&path, &opening).unwrap();
        let before = MEMORY.reset();
        match round {
            0 => image.write_zeroes(0, size, false).unwrap(),
            // Not on any cluster's boundary.
            1 => image.write_zeroes(512, size - 1024, true).unwrap(),
            _ => image.discard(0, size).unwrap(),
        }
        let used = MEMORY.peak() - before;
        // 64 MiB of L2 tables, of which 8 MiB may wait, and are written as bytes.
        assert!(used < 32 << 20, "round {round}: {used} bytes in use");
        assert_eq!(chain::read(&image, 3 << 21, 10).unwrap(), [0; 10]);
        image.close().unwrap();
    }
    let image = open_file(&path, &Opening::default()).unwrap();
    assert_eq!(chain::read(&image, size - (5 << 21), 10).unwrap(), [0; 10]);
    if let Some(qemu) = Qemu::find() {
        qemu.assert_clean(&path);
    }
}

/// The emptiest disks are the largest: a walk skips what has no tables.
#[test]
fn an_empty_disk_of_2_eib_is_walked_at_once() {
    let _alone = ALONE.lock();
    let size = (1u64 << 61) - 512;
    let fixture = Fixture::new();
    let path = fixture.path("huge.qcow2");
    let mut forge = Forge::new(3, 21, size);
    forge.data(1 << 39, b"far");
    forge.build().bytes.write_to(&path);
    let image = chain::open(&path, "qcow2", &OpenOptions::default()).unwrap();
    let start = Instant::now();
    let mut extents = Vec::new();
    image.extents(0, size, &Job::new(), &mut extents).unwrap();
    assert_eq!(extents.len(), 3);
    assert_eq!(extents[1].start, 1 << 60);
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
}

#[test]
fn every_cluster_size_reads_at_the_far_end_of_its_largest_disk() {
    let _alone = ALONE.lock();
    for bits in 9..=21u32 {
        // An L1 table of 1 MiB; 16 TiB and more from 32 KiB clusters on.
        let size = (1u64 << (17 + bits - 3 + bits)) - 512;
        let mut forge = Forge::new(3, bits, size);
        let last = (size - 1) >> bits;
        forge.data(last, b"end");
        forge.data(last / 2 + 1, b"middle");
        let fixture = Fixture::new();
        let path = fixture.path("far.qcow2");
        forge.build().bytes.write_to(&path);
        let image = chain::open(&path, "qcow2", &OpenOptions::default()).unwrap();
        assert_eq!(chain::read(&image, last << bits, 3).unwrap(), b"end", "cluster bits {bits}");
        assert_eq!(chain::read(&image, (last / 2 + 1) << bits, 6).unwrap(), b"middle", "cluster bits {bits}");
        assert_eq!(chain::read(&image, size - 10, 10).unwrap(), [0; 10], "cluster bits {bits}");
        if let Some(qemu) = Qemu::find() {
            let commands =
                [format!("read -q -s {} {} 512", fixture.file("end", b"end").display(), last << bits)];
            let _ = commands;
            qemu.assert_clean(&path);
        }
    }
}
