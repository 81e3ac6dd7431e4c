//! What requests do at the edges of what they are: refused ones, and options on disks that have nothing of their kind.

use std::sync::Arc;

use qcow2_engine::storage::{Access, FileStorage};
use qcow2_engine::{
    DetectZeroes, ErrorKind, Image, Layer, LayerExt, Mem, MemMut, Raw, Storage, WriteOptions,
};
use qcow2_testkit::Fixture;
use qcow2_testkit::disk_model::{Opening, Rig};
use qcow2_testkit::matrix::Geometry;
use qcow2_testkit::ops::Target;
use qcow2_testkit::recorder::RecordingStorage;

/// Autoclear bits that this library does not know are cleared by the first change, and by nothing else.
#[test]
fn a_refused_request_changes_nothing() {
    const AUTOCLEAR: u64 = 88;
    let mut rig = Rig::forge(&Geometry::plain(4096), 1);
    rig.image.put_u64(AUTOCLEAR, 1 << 40);
    let storage = Arc::new(RecordingStorage::plain(rig.image.clone()));
    let files: Vec<Arc<dyn Storage>> = vec![storage.clone()];
    let opening = Opening { write: Some(WriteOptions::default()), ..Opening::default() };
    let image = rig.open(&files, &opening).unwrap();
    let size = image.virtual_size();
    for (offset, length) in [(512, 4096), (0, 512), (size, 512), (size - 512, 1024), (u64::MAX, 4096)] {
        let error = image.write_compressed(offset, &vec![1; length]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{offset} {length}: {error:?}");
    }
    for error in [image.write(size, &[1]), image.write_zeroes(size, 1, true), image.discard(size - 1, 2)] {
        assert_eq!(error.unwrap_err().kind(), ErrorKind::InvalidArgument);
    }
    // Discards are ignored unless the image was opened to unmap.
    image.discard(0, size).unwrap();
    assert!(storage.snapshot().to_vec() == rig.image.to_vec(), "a refused request changed the file");
    image.write_compressed(0, &[1; 4096]).unwrap();
    assert_eq!(storage.snapshot().u64(AUTOCLEAR), 0);
}

/// A write of zeroes to a raw disk is a hole with `unmap`, allocated zeroes with `on`, and a plain write else.
#[test]
fn zeroes_are_detected_on_a_raw_disk() {
    const SIZE: u64 = 1 << 20;
    let fixture = Fixture::new();
    for (detect_zeroes, less) in
        [(DetectZeroes::Off, false), (DetectZeroes::On, false), (DetectZeroes::Unmap, true)]
    {
        let path = fixture.file("disk.raw", &vec![7; SIZE as usize]);
        let storage: Arc<dyn Storage> = Arc::new(FileStorage::open(&path, Access::ReadWrite).unwrap());
        storage.sync_data().unwrap();
        let full = storage.allocated_bytes().unwrap();
        let options = WriteOptions { detect_zeroes, ..WriteOptions::default() };
        let mut layer = Box::new(Raw::new(storage.clone()).unwrap()) as Box<dyn Layer>;
        layer.enable_writing(options).unwrap();
        let image = Image::new(vec![layer]).unwrap();
        image.write_at(Mem::from(&vec![0; 512 << 10][..]), 64 << 10).unwrap();
        // One byte that is not zero: data.
        let mut almost = vec![0; 128 << 10];
        *almost.last_mut().unwrap() = 1;
        image.write_at(Mem::from(&almost[..]), 768 << 10).unwrap();
        image.write_at(Mem::from(&[][..]), SIZE).unwrap();
        storage.sync_data().unwrap();
        let freed = full - storage.allocated_bytes().unwrap();
        assert_eq!(freed, if less { 512 << 10 } else { 0 }, "{detect_zeroes:?}");
        let mut expected = vec![7; SIZE as usize];
        expected[64 << 10..576 << 10].fill(0);
        expected[768 << 10..896 << 10].copy_from_slice(&almost);
        let mut bytes = vec![0; SIZE as usize];
        image.read_at(MemMut::from(&mut bytes[..]), 0).unwrap();
        assert!(bytes == expected, "{detect_zeroes:?}");
        assert_eq!(storage.len().unwrap(), SIZE);
    }
}

/// Host calls say what became of a write: `on` and `unmap` never write zeroes as data.
#[test]
fn a_detected_write_writes_no_data() {
    use qcow2_testkit::storage::{CountingStorage, Op};
    for (detect_zeroes, writes) in [(DetectZeroes::Off, 1), (DetectZeroes::On, 0), (DetectZeroes::Unmap, 0)] {
        let counting = Arc::new(CountingStorage::new(Arc::new(RecordingStorage::plain({
            let mut disk = qcow2_testkit::Sparse::new(8192);
            disk.write(0, &[9; 8192]);
            disk
        }))));
        let raw = Raw::new(counting.clone()).unwrap();
        let options = WriteOptions { detect_zeroes, ..WriteOptions::default() };
        let image = Image::new(vec![Box::new(raw.with_write_options(&options))]).unwrap();
        image.write_at(Mem::from(&[0; 4096][..]), 4096).unwrap();
        assert_eq!(counting.of(Op::Write).calls, writes, "{detect_zeroes:?}");
        let mut bytes = [1; 8192];
        image.read_at(MemMut::from(&mut bytes[..]), 0).unwrap();
        assert!(bytes[..4096] == [9; 4096] && bytes[4096..] == [0; 4096], "{detect_zeroes:?}");
    }
}
