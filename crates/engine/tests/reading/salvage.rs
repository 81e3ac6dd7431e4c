//! Saving what can be read from a disk with bad sectors.

use std::io;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::Arc;

use qcow2_engine::convert::{ConvertOptions, ConvertTarget, convert};
use qcow2_engine::create::{NewTarget, Preallocation};
use qcow2_engine::salvage::Salvage;
use qcow2_engine::storage::MemoryStorage;
use qcow2_engine::{ErrorKind, GuestSource, Image, Job, Mem, MemMut, Raw, Storage, StorageExt};
use qcow2_testkit::storage::{Hooked, Op};

fn eio() -> io::Error {
    io::Error::from_raw_os_error(5)
}

/// A disk of which some ranges cannot be read.
fn disk(bad: Vec<Range<u64>>) -> (Image, Vec<u8>) {
    let bytes: Vec<u8> = (0..3u32 << 20).map(|at| (at / 512 % 255) as u8 + 1).collect();
    let inner = Arc::new(MemoryStorage::new());
    inner.write_all_at(Mem::from(&bytes[..]), 0).unwrap();
    let damaged = Hooked::with(inner, move |op: Op, range: Range<u64>| match op {
        Op::Read if bad.iter().any(|bad| bad.start < range.end && range.start < bad.end) => Err(eio()),
        // Where data is cannot be told either.
        Op::Run if range.start == 2 << 20 => Err(eio()),
        _ => Ok(()),
    });
    let raw = Raw::new(Arc::new(damaged)).unwrap();
    (Image::new(vec![Box::new(raw)]).unwrap(), bytes)
}

#[test]
fn bad_sectors_become_zeroes_and_are_told() {
    // Part of a sector, several, one that two chunks share, and the last one.
    let bad = [1000..1001, 5120..7000, (1 << 20) - 1..(1 << 20) + 1, (3 << 20) - 1..3 << 20];
    let (image, mut want) = disk(bad.to_vec());
    let lost = [512..1024, 5120..7168, (1 << 20) - 512..(1 << 20) + 512, (3 << 20) - 512..3 << 20];
    for range in &lost {
        want[range.clone()].fill(0);
    }
    let target: Arc<dyn Storage> = Arc::new(MemoryStorage::new());
    let options = ConvertOptions { concurrency: NonZeroUsize::new(3), ..ConvertOptions::default() };
    let to = |storage: &Arc<dyn Storage>| {
        ConvertTarget::New(NewTarget::Raw {
            storage: Arc::clone(storage),
            preallocation: Preallocation::Off,
            keep: false,
        })
    };
    assert_eq!(convert(&image, to(&target), &options, &Job::new()).unwrap_err().kind(), ErrorKind::Io);
    let salvage = Salvage::new(&image);
    convert(&salvage, to(&target), &options, &Job::new()).unwrap();
    let mut got = vec![9; want.len()];
    target.read_exact_at(MemMut::from(&mut got[..]), 0).unwrap();
    assert!(got == want);
    let told = salvage.into_lost();
    assert!(told.iter().all(|range| range.error.kind() == ErrorKind::Io));
    // Workers may meet in the middle of a range: then it is told in two parts.
    let sectors: Vec<u64> = told.iter().flat_map(|r| (r.start..r.start + r.length).step_by(512)).collect();
    let all: Vec<u64> = lost.iter().flat_map(|r| (r.start as u64..r.end as u64).step_by(512)).collect();
    assert_eq!(sectors, all);
}

#[test]
fn a_cancelled_job_is_not_a_damage() {
    let (image, _) = disk(Vec::new());
    let job = Job::new();
    job.cancel();
    let cancelled = Salvage::new(&image).extents(0, 1 << 20, &job, &mut Vec::new());
    assert_eq!(cancelled.unwrap_err().kind(), ErrorKind::Aborted);
}
