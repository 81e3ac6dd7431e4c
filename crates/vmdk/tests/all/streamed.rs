//! streamOptimized images as streams: over several tables, from any offset on.

use std::sync::Arc;

use qcow2_core::front_to_back::Planning;
use qcow2_core::storage::MemoryStorage;
use qcow2_core::{ErrorKind, Job, Mem, MemMut, NewImage, Raw, Storage, StorageExt};
use qcow2_engine::Image;
use qcow2_testkit::model::assert_same;
use qcow2_testkit::{Fixture, Qemu, Rng};
use qcow2_vmdk::{CreateOptions, NewVmdk, Subformat};

const MIB: u64 = 1 << 20;
/// More than three tables of 32 MiB, the last grain not a whole one.
const SIZE: u64 = 100 * MIB + 512 * 3;

fn options() -> CreateOptions {
    CreateOptions { size: SIZE, subformat: Subformat::StreamOptimized, ..Default::default() }
}

/// Noise, text, zeroes that are stored, and holes; nothing in the second table, something at the end.
fn source(rng: &mut Rng) -> (Image, Arc<dyn Storage>) {
    let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::new());
    storage.resize(SIZE).unwrap();
    let put = |at: u64, bytes: &[u8]| storage.write_all_at(Mem::from(bytes), at).unwrap();
    put(0, &rng.text(300_000));
    put(5 * MIB, &rng.bytes(200_000));
    put(65 * MIB, &vec![0; 200_000]);
    put(70 * MIB - 5, &rng.text(100_000));
    put(SIZE - 700, &rng.bytes(700));
    (Image::new(vec![Box::new(Raw::new(storage.clone()).unwrap())]).unwrap(), storage)
}

#[test]
fn a_stream_is_the_same_from_any_offset_on_and_qemu_reads_it() {
    let mut rng = Rng::new(11);
    let (disk, storage) = source(&mut rng);
    let job = Job::new();
    let planning = |threads| Planning {
        source: &disk,
        compression: None,
        concurrency: std::num::NonZeroUsize::new(threads),
        max_memory: 1 << 20,
        job: &job,
    };
    // Two images have other identifiers, which the stream does not.
    let plan = |threads| NewVmdk::new(options(), None).unwrap().front_to_back(&planning(threads)).unwrap();
    let (stream, again) = (plan(3), plan(1));
    let mut bytes = vec![0; stream.length() as usize];
    stream.fill(&disk, 0, MemMut::from(&mut bytes[..]), &job).unwrap();
    assert_eq!(again.length(), stream.length());
    for _ in 0..60 {
        let at = rng.below(bytes.len() as u64) as usize;
        let length = rng.below(9000).min((bytes.len() - at) as u64) as usize;
        let mut part = vec![0xee; length];
        again.fill(&disk, at as u64, MemMut::from(&mut part[..]), &job).unwrap();
        assert_same(&bytes[at..at + length], &part, at as u64, "a part");
    }
    let behind = again.fill(&disk, stream.length(), MemMut::from(&mut [0; 1][..]), &job);
    assert_eq!(behind.unwrap_err().kind(), ErrorKind::InvalidArgument);

    let mut whole = vec![0; SIZE as usize];
    storage.read_exact_at(MemMut::from(&mut whole[..]), 0).unwrap();
    let Some(qemu) = Qemu::find() else { return };
    let dir = Fixture::new();
    let path = dir.file("disk.vmdk", &bytes);
    assert_same(&whole, &qemu.guest_bytes(&path, "vmdk", &[]), 0, "the disk");
}

#[test]
fn other_subformats_are_refused_by_name() {
    let (disk, _) = source(&mut Rng::new(1));
    let job = Job::new();
    let planning =
        Planning { source: &disk, compression: None, concurrency: None, max_memory: 1 << 20, job: &job };
    let sparse = NewVmdk::new(CreateOptions { size: SIZE, ..Default::default() }, None).unwrap();
    let refused = sparse.front_to_back(&planning).err().unwrap();
    assert_eq!((refused.kind(), refused.field()), (ErrorKind::UnsupportedFeature, Some("subformat")));
}
