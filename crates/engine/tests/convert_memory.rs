//! The memory of a convert is bounded, whatever the size of the disk and the amount of data.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, reason = "tests")]

use std::io;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use qcow2_engine::convert::{Compression, ConvertOptions, ConvertTarget, convert};
use qcow2_engine::create::{CreateOptions, NewTarget, Preallocation, create};
use qcow2_engine::storage::{Access, FileStorage, NewFile, Overwrite, Traits};
use qcow2_engine::{
    Extent, ExtentKind, GuestSource, Image, Job, Mem, MemMut, Raw, ReadStorage, Result, Storage, StorageExt,
};
use qcow2_testkit::alloc::Counting;
use qcow2_testkit::{Fixture, Qemu};

#[global_allocator]
static ALLOCATOR: Counting = Counting::new();

const MIB: usize = 1 << 20;
const TIB: u64 = 1 << 40;

/// A disk that is data from end to end, made up as it is read.
struct Endless(u64);

impl GuestSource for Endless {
    fn virtual_size(&self) -> u64 {
        self.0
    }
    fn cluster_size(&self) -> u64 {
        65536
    }
    fn extents_up_to(
        &self,
        start: u64,
        length: u64,
        _: usize,
        _: &Job,
        out: &mut Vec<Extent>,
    ) -> Result<u64> {
        let length = length.min(self.0 - start);
        out.push(Extent { start, length, kind: ExtentKind::Data, depth: 0, zero: false, host: None });
        Ok(start + length)
    }
    fn read_at(&self, mut buf: MemMut<'_>, offset: u64) -> Result<()> {
        for (i, word) in buf.exclusive().unwrap().chunks_mut(8).enumerate() {
            let value = ((offset / 8 + i as u64) * 0x9e37_79b9) >> 20;
            word.copy_from_slice(&value.to_be_bytes()[..word.len()]);
        }
        Ok(())
    }
}

/// A file that keeps nothing but its length.
#[derive(Debug, Default)]
struct Forgetful(AtomicU64);

impl ReadStorage for Forgetful {
    fn read_at(&self, _: MemMut<'_>, _: u64) -> io::Result<usize> {
        Ok(0)
    }
    fn len(&self) -> io::Result<u64> {
        Ok(self.0.load(Ordering::Relaxed))
    }
    fn traits(&self) -> Traits {
        Traits { writable: true, ..Traits::default() }
    }
}

impl Storage for Forgetful {
    fn write_at(&self, buf: Mem<'_>, offset: u64) -> io::Result<usize> {
        self.0.fetch_max(offset + buf.len() as u64, Ordering::Relaxed);
        Ok(buf.len())
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.store(len, Ordering::Relaxed);
        Ok(())
    }
    fn sync_data(&self) -> io::Result<()> {
        Ok(())
    }
    fn write_zeroes(&self, _: u64, _: u64, _: bool) -> io::Result<()> {
        Ok(())
    }
}

/// Peak of what `work` allocates beyond what was there, in MiB.
fn peak(work: impl FnOnce()) -> usize {
    let before = ALLOCATOR.reset();
    work();
    (ALLOCATOR.peak() - before) / MIB
}

// One test: the allocator counts for the whole process.
#[test]
fn peaks() {
    let two = NonZeroUsize::new(2);
    for (compression, cluster_size, size, limit) in [
        (None, 65536, 1 << 30, 8),
        (None, 512, 1 << 28, 12),
        (None, 2 << 20, 1 << 30, 48),
        (Some(Compression { level: Some(1), ..Default::default() }), 65536, 1 << 28, 24),
        (Some(Compression { level: Some(1), ..Default::default() }), 2 << 20, 1 << 28, 48),
    ] {
        let create = Box::new(CreateOptions { cluster_size, ..Default::default() });
        let used = peak(|| {
            let target = ConvertTarget::New(NewTarget::Qcow2 {
                storage: Arc::<Forgetful>::default(),
                data_file: None,
                create,
            });
            let options = ConvertOptions { concurrency: two, compression, ..Default::default() };
            let result = convert(&Endless(size), target, &options, &Job::new()).unwrap();
            assert_eq!(result.bytes_read, size);
        });
        assert!(used <= limit, "{used} MiB for {compression:?}, clusters of {cluster_size}");
    }

    // All of 1 TiB mapped: 128 MiB of L2 tables pass through.
    let used = peak(|| {
        let options =
            CreateOptions { size: TIB, preallocation: Preallocation::Metadata, ..Default::default() };
        create(Arc::<Forgetful>::default(), None, &options, &Job::new()).unwrap();
    });
    assert!(used <= 8, "{used} MiB for create");

    let Some(qemu) = Qemu::find() else { return };
    let dir = Fixture::new();
    let raw = dir.path("raw");
    {
        let file = std::fs::File::create(&raw).unwrap();
        file.set_len(16 * TIB - 4096).unwrap();
        let storage = FileStorage::open(&raw, Access::ReadWrite).unwrap();
        for n in 0..200 {
            storage.write_all_at(Mem::from(&[n as u8 | 1; 5000][..]), n * 80_000_000_123).unwrap();
        }
    }
    let source = Image::new(vec![Box::new(
        Raw::new(Arc::new(FileStorage::open(&raw, Access::ReadOnly).unwrap())).unwrap(),
    )])
    .unwrap();
    let out = dir.path("out");
    let used = peak(|| {
        let new = NewFile::create(&out, Overwrite::Refuse, &[]).unwrap();
        let target = ConvertTarget::New(NewTarget::Qcow2 {
            storage: new.storage(),
            data_file: None,
            create: Box::default(),
        });
        let options = ConvertOptions { concurrency: two, ..Default::default() };
        convert(&source, target, &options, &Job::new()).unwrap();
        new.commit().unwrap();
    });
    assert!(used <= 8, "{used} MiB for 16 TiB");
    qemu.assert_clean(&out);
    qemu.assert_identical(&raw, "raw", &out, "qcow2");
}
