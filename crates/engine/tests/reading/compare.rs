//! Comparing against `qemu-img compare`: the same verdict, and the same place of the first difference.

use std::path::Path;
use std::sync::Arc;

use qcow2_engine::compare::{CompareOptions, Comparison, Difference, compare};
use qcow2_engine::storage::{Access, FileStorage};
use qcow2_engine::{
    Error, ErrorKind, Extent, GuestSource, Image, Job, Layer, MemMut, OpenOptions, Qcow2, Raw, Result,
};
use qcow2_testkit::{Fixture, Qemu};

fn open(path: &Path, format: &str) -> Image {
    let storage = Arc::new(FileStorage::open(path, Access::ReadOnly).unwrap());
    let layer = match format {
        "raw" => Box::new(Raw::new(storage).unwrap()) as Box<dyn Layer>,
        _ => Box::new(Qcow2::open(storage, &OpenOptions::default()).unwrap()) as Box<dyn Layer>,
    };
    Image::new(vec![layer]).unwrap()
}

/// Compares both ways, with one worker and with several, and holds the result against QEMU's.
#[track_caller]
fn check(qemu: &Qemu, a: (&Path, &str), b: (&Path, &str), strict: bool) -> Comparison {
    let mut results = vec![];
    for ((a, fa), (b, fb)) in [(a, b), (b, a)] {
        let (image_a, image_b) = (open(a, fa), open(b, fb));
        let mut args = vec!["compare", "-f", fa, "-F", fb, a.to_str().unwrap(), b.to_str().unwrap()];
        if strict {
            args.insert(1, "-s");
        }
        let theirs = qemu.img(&args);
        for workers in [1, 4] {
            let job = Job::new();
            let ours = compare(&image_a, &image_b, &CompareOptions { strict, workers }, &job).unwrap();
            let printed = match ours.difference {
                None => "Images are identical.\n".to_owned(),
                Some(Difference::Size) => "Strict mode: Image size mismatch!\n".to_owned(),
                Some(Difference::Allocation(at)) => {
                    format!("Strict mode: Offset {at} block status mismatch!\n")
                }
                // QEMU tells the sector.
                Some(Difference::Content(at)) => format!("Content mismatch at offset {}!\n", at / 512 * 512),
            };
            assert!(theirs.stdout.ends_with(&printed), "{workers} {ours:?}\n{theirs:?}");
            assert_eq!(theirs.code, i32::from(ours.difference.is_some()));
            if ours.difference.is_none() {
                let size = image_a.virtual_size().max(image_b.virtual_size());
                assert_eq!(job.progress(), (size, size));
            }
            results.push(ours);
        }
    }
    assert!(results.iter().all(|r| *r == results[0]), "{results:?}");
    results[0]
}

fn write(path: &Path, offset: u64, bytes: &[u8]) {
    let file = std::fs::File::options().write(true).open(path).unwrap();
    qcow2_testkit::at::write_all_at(&file, bytes, offset).unwrap();
}

#[test]
fn equal_and_different_disks() {
    let Some(qemu) = Qemu::find() else { return };
    let dir = Fixture::new();
    let (raw, image) = (dir.path("raw"), dir.path("image"));
    let size = 64 << 20;
    qemu.img(&["create", "-q", "-f", "raw", raw.to_str().unwrap(), &size.to_string()]).ok();
    qemu.io(
        &raw,
        "raw",
        &["write -P 1 0 5M", "write -P 0 7M 1M", "write -P 2 20M 12345", "write -P 3 63M 1M"],
    );
    qemu.convert(&raw, "raw", &image, "qcow2", &["-c"]);
    let pair = ((raw.as_path(), "raw"), (image.as_path(), "qcow2"));
    let same = Comparison { difference: None, sizes_differ: false };
    assert_eq!(check(&qemu, pair.0, pair.1, false), same);

    // From the end to the start: each new difference must hide the ones behind it.
    for at in [size - 1, (63 << 20) + 700, 40 << 20, (20 << 20) + 12344, (7 << 20) + 4096, 4_000_001, 513, 0]
    {
        write(&raw, at, &[0xee]);
        let different = Comparison { difference: Some(Difference::Content(at)), sizes_differ: false };
        assert_eq!(check(&qemu, pair.0, pair.1, false), different);
    }
}

#[test]
fn the_longer_disk_must_end_in_zeroes() {
    let Some(qemu) = Qemu::find() else { return };
    let dir = Fixture::new();
    let (short, long) = (dir.path("short"), dir.path("long"));
    qemu.img(&["create", "-q", "-f", "raw", short.to_str().unwrap(), "3M"]).ok();
    qemu.create(&long, "", Some(9 << 20));
    for path in [&short, &long] {
        let format = if path == &short { "raw" } else { "qcow2" };
        qemu.io(path, format, &["write -P 1 0 100k"]);
    }
    qemu.io(&long, "qcow2", &["write -P 0 3M 2M"]);
    let pair = ((short.as_path(), "raw"), (long.as_path(), "qcow2"));
    assert_eq!(check(&qemu, pair.0, pair.1, false), Comparison { difference: None, sizes_differ: true });
    let size = Comparison { difference: Some(Difference::Size), sizes_differ: true };
    assert_eq!(check(&qemu, pair.0, pair.1, true), size);
    qemu.io(&long, "qcow2", &["write -P 1 8000000 1"]);
    let tail = Comparison { difference: Some(Difference::Content(8_000_000)), sizes_differ: true };
    assert_eq!(check(&qemu, pair.0, pair.1, false), tail);
}

#[test]
fn strict_comparison_sees_the_allocation() {
    let Some(qemu) = Qemu::find() else { return };
    let dir = Fixture::new();
    let (a, b) = (dir.path("a"), dir.path("b"));
    for path in [&a, &b] {
        qemu.create(path, "", Some(8 << 20));
        qemu.io(path, "qcow2", &["write -P 1 0 1M"]);
    }
    let pair = ((a.as_path(), "qcow2"), (b.as_path(), "qcow2"));
    let same = Comparison { difference: None, sizes_differ: false };
    assert_eq!(check(&qemu, pair.0, pair.1, true), same);
    qemu.io(&a, "qcow2", &["write -P 0 4M 64k"]);
    assert_eq!(check(&qemu, pair.0, pair.1, false), same);
    // To QEMU, a hole up to the end of the disk is not one up to the next data.
    let allocation = Comparison { difference: Some(Difference::Allocation(1 << 20)), sizes_differ: false };
    assert_eq!(check(&qemu, pair.0, pair.1, true), allocation);
    qemu.io(&a, "qcow2", &["write -P 0 7M 1M"]);
    qemu.io(&b, "qcow2", &["write -P 0 7M 1M"]);
    let allocation = Comparison { difference: Some(Difference::Allocation(4 << 20)), sizes_differ: false };
    assert_eq!(check(&qemu, pair.0, pair.1, true), allocation);
    qemu.io(&b, "qcow2", &["write -P 2 65000 3"]);
    let content = Comparison { difference: Some(Difference::Content(65000)), sizes_differ: false };
    assert_eq!(check(&qemu, pair.0, pair.1, true), content);
}

#[test]
fn many_small_extents() {
    let Some(qemu) = Qemu::find() else { return };
    let dir = Fixture::new();
    let (a, b) = (dir.path("a"), dir.path("b"));
    let writes: Vec<_> = (0..300).map(|i| format!("write -P {} {} 512", i % 255 + 1, i * 40_448)).collect();
    for (path, options) in [(&a, "cluster_size=512"), (&b, "cluster_size=64k")] {
        qemu.create(path, options, Some(300 * 40_448));
        qemu.io(path, "qcow2", &writes);
    }
    let pair = ((a.as_path(), "qcow2"), (b.as_path(), "qcow2"));
    assert!(check(&qemu, pair.0, pair.1, false).difference.is_none());
    qemu.io(&b, "qcow2", &["write -P 77 12000000 1"]);
    assert_eq!(check(&qemu, pair.0, pair.1, false).difference, Some(Difference::Content(12_000_000)));
}

/// A disk that cannot be read from an offset on.
struct BadFrom(Image, u64);

impl GuestSource for BadFrom {
    fn virtual_size(&self) -> u64 {
        self.0.virtual_size()
    }
    fn cluster_size(&self) -> u64 {
        self.0.cluster_size()
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
        if offset + buf.len() as u64 > self.1 {
            return Err(Error::io(std::io::Error::from_raw_os_error(5), "pread"));
        }
        self.0.read_at(buf, offset)
    }
}

#[test]
fn errors_and_cancellation() {
    let dir = Fixture::new();
    let bytes = vec![7; 8 << 20];
    let path = dir.file("a", &bytes);
    let image = open(&path, "raw");
    let job = Job::new();
    job.cancel();
    let error = compare(&image, &image, &CompareOptions::default(), &job).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Aborted);

    let faulty = BadFrom(open(&path, "raw"), 6 << 20);
    for workers in [1, 3] {
        let options = CompareOptions { workers, ..CompareOptions::default() };
        let error = compare(&image, &faulty, &options, &Job::new()).unwrap_err();
        assert_eq!((error.kind(), error.errno()), (ErrorKind::Io, Some(5)));
        // A difference before the place that cannot be read is found all the same.
        let mut other = bytes.clone();
        other[5 << 20] = 8;
        let other = open(&dir.file("b", &other), "raw");
        let found = compare(&other, &faulty, &options, &Job::new()).unwrap();
        assert_eq!(found.difference, Some(Difference::Content(5 << 20)));
    }
}
