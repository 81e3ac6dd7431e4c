//! Images as streams: plans over maps of any kind, each offset's bytes against the whole, judged by QEMU and by our own check.

use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex};

use qcow2_engine::check::{CheckOptions, check};
use qcow2_engine::convert::Compression;
use qcow2_engine::create::{CreateOptions, Streamed};
use qcow2_engine::format::{CompressionType, Header};
use qcow2_engine::front_to_back::{Flat, FrontToBack, Planning};
use qcow2_engine::storage::MemoryStorage;
use qcow2_engine::{
    ErrorKind, Extent, ExtentKind, GuestSource, Image, Job, Mem, MemMut, OpenOptions, Qcow2, Result, Storage,
    StorageExt,
};
use qcow2_testkit::model::assert_same;
use qcow2_testkit::{Fixture, Qemu, Rng};

/// A disk that is its map: what it has is a pattern, noise, and some zeroes, the rest reads as zeroes.
#[derive(Debug)]
struct Mapped {
    size: u64,
    /// Start and length of what it has, in order.
    runs: Vec<(u64, u64)>,
}

impl Mapped {
    /// A map of up to `pieces` runs that begin and end anywhere.
    fn any(rng: &mut Rng, size: u64, pieces: u64) -> Self {
        let (mut runs, mut at) = (Vec::new(), 0);
        for _ in 0..rng.below(pieces + 1) {
            let gap = rng.below(1 + size / (pieces + 1)) * rng.below(2);
            let length = 1 + rng.below(1 + size / (pieces + 1));
            let start = (at + gap).min(size);
            let length = length.min(size - start);
            if length > 0 {
                runs.push((start, length));
            }
            at = start + length;
        }
        Self { size, runs }
    }

    fn byte(offset: u64) -> u8 {
        let noise = (offset + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        match (offset >> 14) % 5 {
            0 => 0,
            1 => ((noise ^ (noise >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 40) as u8,
            _ => (offset ^ (offset >> 9) ^ (offset >> 17)) as u8 | 1,
        }
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.size as usize];
        for (start, length) in &self.runs {
            for at in *start..start + length {
                bytes[at as usize] = Self::byte(at);
            }
        }
        bytes
    }
}

impl GuestSource for Mapped {
    fn virtual_size(&self) -> u64 {
        self.size
    }

    fn cluster_size(&self) -> u64 {
        65536
    }

    fn extents_up_to(
        &self,
        start: u64,
        length: u64,
        most: usize,
        _: &Job,
        out: &mut Vec<Extent>,
    ) -> Result<u64> {
        let end = start.saturating_add(length).min(self.size);
        let (mut at, first) = (start, out.len());
        let mut push = |from: u64, to: u64, zero: bool| {
            let kind = if zero { ExtentKind::Unallocated } else { ExtentKind::Compressed };
            out.push(Extent { start: from, length: to - from, kind, depth: 0, zero, host: None });
            out.len() - first >= most
        };
        for (run, length) in &self.runs {
            let (from, to) = ((*run).max(at).min(end), (run + length).min(end));
            if to <= at {
                continue;
            }
            if from > at && push(at, from, true) {
                return Ok(from);
            }
            if to > from && push(from, to, false) {
                return Ok(to);
            }
            at = to.max(at);
        }
        if at < end {
            push(at, end, true);
        }
        Ok(end)
    }

    fn read_at(&self, mut buf: MemMut<'_>, offset: u64) -> Result<()> {
        assert!(offset + buf.len() as u64 <= self.size, "a read of {} bytes at {offset}", buf.len());
        let has = |at: u64| {
            let index = self.runs.partition_point(|(start, _)| *start <= at);
            index > 0 && at < self.runs[index - 1].0 + self.runs[index - 1].1
        };
        let end = offset + buf.len() as u64;
        let bytes: Vec<u8> = (offset..end).map(|at| if has(at) { Self::byte(at) } else { 0 }).collect();
        buf.copy_from(&bytes);
        Ok(())
    }
}

/// What a stream is made of.
fn planning<'a>(source: &'a dyn GuestSource, max_memory: u64, job: &'a Job) -> Planning<'a> {
    Planning { source, compression: None, concurrency: None, max_memory, job }
}

fn planned(options: &CreateOptions, source: &dyn GuestSource, max_memory: u64) -> Result<Streamed> {
    Streamed::plan(options, &planning(source, max_memory, &Job::new()))
}

fn compressed(options: &CreateOptions, source: &dyn GuestSource, threads: usize) -> Result<Streamed> {
    let (compression, concurrency, job) =
        (Some(Compression::default()), NonZeroUsize::new(threads), Job::new());
    let plan =
        Streamed::plan(options, &Planning { compression, concurrency, ..planning(source, 1 << 20, &job) });
    assert_eq!(job.progress(), (source.virtual_size(), source.virtual_size()));
    plan
}

/// All bytes, in pieces of any length.
fn emitted(plan: &dyn FrontToBack, source: &dyn GuestSource, rng: &mut Rng) -> Vec<u8> {
    let mut bytes = vec![0xee; plan.length() as usize];
    let mut at = 0;
    while at < bytes.len() {
        let length = (1 + rng.below(300_000) as usize).min(bytes.len() - at);
        plan.fill(source, at as u64, MemMut::from(&mut bytes[at..at + length]), &Job::new()).unwrap();
        at += length;
    }
    bytes
}

fn storage_of(bytes: &[u8]) -> Arc<dyn Storage> {
    let storage = MemoryStorage::new();
    storage.write_all_at(Mem::from(bytes), 0).unwrap();
    Arc::new(storage)
}

/// The image is sound, and its disk is this one.
fn assert_image(bytes: &[u8], disk: &[u8], what: &str) {
    let storage = storage_of(bytes);
    let header = Header::parse(&bytes[..65536.min(bytes.len())]).unwrap();
    let report = check(&*storage, &header, &CheckOptions::default(), &Job::new()).unwrap();
    assert!(report.findings.is_empty() && report.failure.is_none(), "{what}: {report:?}");
    let image = Image::new(vec![Box::new(Qcow2::open(storage, &OpenOptions::default()).unwrap())]).unwrap();
    let mut guest = vec![0; image.virtual_size() as usize];
    image.read_at(MemMut::from(&mut guest[..]), 0).unwrap();
    let mut whole = disk.to_vec();
    whole.resize(disk.len().next_multiple_of(512), 0);
    assert_same(&whole, &guest, 0, what);
}

/// Options of any kind that a stream can have.
fn any_options(rng: &mut Rng) -> CreateOptions {
    let version = 2 + rng.below(2) as u32;
    let extended_l2 = version == 3 && rng.below(3) == 0;
    CreateOptions {
        version,
        cluster_size: 1 << (if extended_l2 { 14 } else { 9 } + rng.below(4)),
        extended_l2,
        refcount_bits: if version == 3 { 1 << rng.below(7) } else { 16 },
        compression_type: if version == 3 && rng.below(2) == 0 {
            CompressionType::Zstd
        } else {
            CompressionType::Zlib
        },
        ..CreateOptions::default()
    }
}

#[test]
fn any_map_is_a_sound_image_whose_bytes_can_be_had_from_any_offset_on() {
    for seed in 0..60 {
        let mut rng = Rng::new(seed);
        let options = any_options(&mut rng);
        let size = [0, 1, 513, 65536, 700_000, 3 << 20][rng.below(6) as usize];
        let disk = Mapped::any(&mut rng, size, 40);
        let what = format!("seed {seed}: {options:?} {size}");
        let compress = seed % 3 > 0;
        let plan = |threads| match compress {
            true => compressed(&options, &disk, threads).unwrap(),
            false => planned(&options, &disk, 1 << 20).unwrap(),
        };
        let bytes = emitted(&plan(3), &disk, &mut rng);
        assert_image(&bytes, &disk.bytes(), &what);
        // Planned again it is the same, wherever it begins.
        let again = plan(1);
        for _ in 0..40 {
            let at = rng.below(bytes.len() as u64) as usize;
            let length = rng.below(5000).min((bytes.len() - at) as u64) as usize;
            let mut part = vec![0xee; length];
            again.fill(&disk, at as u64, MemMut::from(&mut part[..]), &Job::new()).unwrap();
            assert_same(&bytes[at..at + length], &part, at as u64, &what);
        }
        let behind = again.fill(&disk, bytes.len() as u64, MemMut::from(&mut [0; 1][..]), &Job::new());
        assert_eq!(behind.unwrap_err().kind(), ErrorKind::InvalidArgument);
    }
}

#[test]
fn qemu_reads_what_is_streamed() {
    let Some(qemu) = Qemu::find() else { return };
    let dir = Fixture::new();
    for seed in 100..108 {
        let mut rng = Rng::new(seed);
        let options = any_options(&mut rng);
        let disk = Mapped::any(&mut rng, 3 << 20, 20);
        let plan = match seed % 2 {
            0 => planned(&options, &disk, 1 << 20).unwrap(),
            _ => compressed(&options, &disk, 2).unwrap(),
        };
        let path = dir.file("streamed", &emitted(&plan, &disk, &mut rng));
        qemu.assert_clean(&path);
        assert_same(&disk.bytes(), &qemu.guest_bytes(&path, "qcow2", &[]), 0, &format!("{options:?}"));
    }
}

#[test]
fn a_raw_stream_is_the_disk_and_its_tail() {
    for seed in 0..20 {
        let mut rng = Rng::new(seed);
        let size = [0, 513, 700_000, 9 << 20][rng.below(4) as usize];
        let disk = Mapped::any(&mut rng, size, 40);
        let mut whole = disk.bytes();
        whole.resize(whole.len().next_multiple_of(512), 0);
        let raw = Flat::raw(&planning(&disk, 1 << 20, &Job::new())).unwrap();
        assert_same(&whole, &emitted(&raw, &disk, &mut rng), 0, &format!("seed {seed}"));
        // A disk that is longer than its source, with something behind it.
        let longer = Flat::new(whole.len() as u64 + 1000, b"tail".to_vec());
        whole.resize(whole.len() + 1000, 0);
        whole.extend(b"tail");
        assert_same(&whole, &emitted(&longer, &disk, &mut rng), 0, &format!("seed {seed}, longer"));
    }
}

#[test]
fn a_plan_takes_what_the_map_has_in_runs() {
    let tib = 1 << 40;
    let full = Mapped { size: tib, runs: vec![(0, tib)] };
    // A few runs, however large the disk.
    let plan = planned(&CreateOptions::default(), &full, 4096).unwrap();
    let length = plan.length();
    assert!(length > tib && length < tib + tib / 4096, "{length}");
    // The last guest cluster is the last of the file, and the tables in front of it say so.
    let mut last = [0; 1024];
    plan.fill(&full, length - 1024, MemMut::from(&mut last[..]), &Job::new()).unwrap();
    let wanted: Vec<u8> = (tib - 1024..tib).map(Mapped::byte).collect();
    assert_same(&wanted, &last, 0, "the end of a full disk");

    let pieces = (0..1 << 12).map(|i| (i * (1 << 17), 512)).collect();
    let many = Mapped { size: tib, runs: pieces };
    let refused = planned(&CreateOptions::default(), &many, 60_000).err().unwrap();
    assert_eq!((refused.kind(), refused.field()), (ErrorKind::Limit, Some("max_memory")));
    planned(&CreateOptions::default(), &many, 1 << 20).unwrap();

    let small = CreateOptions { cluster_size: 512, ..CreateOptions::default() };
    assert_eq!(planned(&small, &full, 1 << 20).err().unwrap().kind(), ErrorKind::Limit);
    let job = Job::new();
    job.cancel();
    let cancelled = Streamed::plan(&CreateOptions::default(), &planning(&full, 1 << 20, &job));
    assert_eq!(cancelled.err().unwrap().kind(), ErrorKind::Aborted);
}

#[test]
fn a_disk_that_changes_between_counting_and_compressing_is_noticed() {
    let size = 1 << 20;
    let disk = Mapped { size, runs: vec![(0, size)] };
    let plan = compressed(&CreateOptions::default(), &disk, 2).unwrap();
    let other = Mapped { size, runs: vec![(0, size - 30_000)] };
    let mut bytes = vec![0; plan.length() as usize];
    let changed = plan.fill(&other, 0, MemMut::from(&mut bytes[..]), &Job::new()).unwrap_err();
    assert_eq!((changed.kind(), changed.offset()), (ErrorKind::Io, Some(size - 65536)));
}

#[test]
fn lengths_of_clusters_have_their_limit() {
    let disk = Mapped { size: 1 << 40, runs: vec![(0, 1 << 40)] };
    let job = Job::new();
    let plan = |max_memory| {
        let compression = Some(Compression::default());
        Streamed::plan(
            &CreateOptions::default(),
            &Planning { compression, ..planning(&disk, max_memory, &job) },
        )
    };
    // Before anything is allocated, or read.
    let refused = plan(1 << 26).err().unwrap();
    assert_eq!((refused.kind(), refused.field()), (ErrorKind::Limit, Some("max_memory")));
    job.cancel();
    assert_eq!(plan(1 << 27).err().unwrap().kind(), ErrorKind::Aborted);
}

/// The same disk, read front to back.
struct InOrder<'a>(&'a Mapped, Mutex<u64>);

impl GuestSource for InOrder<'_> {
    fn virtual_size(&self) -> u64 {
        self.0.size
    }

    fn cluster_size(&self) -> u64 {
        self.0.cluster_size()
    }

    fn is_sequential(&self) -> bool {
        true
    }

    fn extents_up_to(
        &self,
        start: u64,
        length: u64,
        most: usize,
        job: &Job,
        out: &mut Vec<Extent>,
    ) -> Result<u64> {
        self.0.extents_up_to(start, length, most, job, out)
    }

    fn read_at(&self, buf: MemMut<'_>, offset: u64) -> Result<()> {
        let mut next = self.1.lock().unwrap();
        assert!(*next <= offset, "a read at {offset} behind one up to {next}");
        *next = offset + buf.len() as u64;
        self.0.read_at(buf, offset)
    }
}

#[test]
fn a_disk_that_is_read_front_to_back_is_read_so_in_both_passes() {
    let mut rng = Rng::new(5);
    let disk = Mapped { size: 3 << 20, runs: vec![(0, 1 << 20), (1 << 21, 1 << 20)] };
    let in_order = || InOrder(&disk, Mutex::new(0));
    let whole = compressed(&CreateOptions::default(), &disk, 2).unwrap();
    let plan = compressed(&CreateOptions::default(), &in_order(), 3).unwrap();
    // Requests end in the middle of clusters.
    let bytes = emitted(&plan, &in_order(), &mut rng);
    assert_same(&emitted(&whole, &disk, &mut rng), &bytes, 0, "in order");
    let plain = planned(&CreateOptions::default(), &in_order(), 1 << 20).unwrap();
    assert_image(&emitted(&plain, &in_order(), &mut rng), &disk.bytes(), "as it is");
}
