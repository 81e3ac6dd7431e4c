//! Persistent bitmaps made by one tool and managed by the other; kept current by our writes.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use qcow2_engine::storage::{Access, FileStorage};
use qcow2_engine::{Discard, ErrorKind, Image, Mem, OpenOptions, Qcow2, ResizeOptions, WriteOptions};
use qcow2_testkit::plans::Table;
use qcow2_testkit::storage::{Hooked, Op, free_clusters};
use qcow2_testkit::{Fixture, Qemu};

const MIB: u64 = 1 << 20;

fn open(path: &Path) -> Image {
    let storage = Arc::new(FileStorage::open(path, Access::ReadWrite).unwrap());
    let mut image = Qcow2::open(storage, &OpenOptions::default()).unwrap();
    image.enable_writing(WriteOptions { discard: Discard::Unmap, ..WriteOptions::default() }).unwrap();
    Image::new(vec![Box::new(image)]).unwrap()
}

fn write(image: &Image, offset: u64, length: usize) {
    image.write_at(Mem::from(&vec![0x5a; length][..]), offset).unwrap();
}

fn bitmap(qemu: &Qemu, path: &Path, args: &[&str]) {
    let mut all = vec!["bitmap"];
    all.extend(args);
    let name = all.pop().unwrap();
    all.extend([path.to_str().unwrap(), name]);
    qemu.img(&all).ok();
}

fn extents(path: &Path, name: &str) -> Vec<Range<u64>> {
    let image = open(path);
    let found = image.bitmap_extents(name).unwrap();
    image.close().unwrap();
    found
}

/// What QEMU reads of a bitmap: it merges it into a new one, which is read back.
fn seen_by_qemu(qemu: &Qemu, path: &Path, name: &str, granularity: &str) -> Vec<Range<u64>> {
    bitmap(qemu, path, &["--add", "--disable", "-g", granularity, "copy"]);
    bitmap(qemu, path, &["--merge", name, "copy"]);
    let found = extents(path, "copy");
    bitmap(qemu, path, &["--remove", "copy"]);
    found
}

#[test]
fn writes_of_either_tool_are_recorded() {
    let Some(qemu) = Qemu::find() else { return };
    for options in ["", "cluster_size=4k", "extended_l2=on", "backing"] {
        let fixture = Fixture::new();
        let path = fixture.path("a.qcow2");
        if options == "backing" {
            // The backing file's name must move to make room for the extension.
            let base = fixture.path("base.raw");
            std::fs::write(&base, vec![1; 8 * MIB as usize]).unwrap();
            qemu.create(&path, &format!("backing_file={},backing_fmt=raw", base.display()), Some(64 * MIB));
        } else {
            qemu.create(&path, options, Some(64 * MIB));
        }
        let image = open(&path);
        image.add_bitmap("ours", Some(16), true).unwrap();
        write(&image, 5 * MIB, 100);
        image.write_zeroes(20 * MIB, MIB, true).unwrap();
        image.discard(30 * MIB, 128 << 10).unwrap();
        let expected =
            [5 * MIB..5 * MIB + 65536, 20 * MIB..21 * MIB, 30 * MIB..30 * MIB + (128 << 10)].to_vec();
        assert_eq!(image.bitmap_extents("ours").unwrap(), expected);
        image.close().unwrap();
        qemu.assert_clean(&path);
        assert_eq!(seen_by_qemu(&qemu, &path, "ours", "64k"), expected, "{options}");

        bitmap(&qemu, &path, &["--add", "-g", "32k", "theirs"]);
        qemu.io(&path, "qcow2", &["write -P 3 40M 1k"]);
        let image = open(&path);
        write(&image, 50 * MIB, 40_000);
        image.close().unwrap();
        qemu.assert_clean(&path);
        let both = [40 * MIB..40 * MIB + 32768, 50 * MIB..50 * MIB + 65536].to_vec();
        assert_eq!(extents(&path, "theirs"), both, "{options}");
        assert_eq!(seen_by_qemu(&qemu, &path, "theirs", "32k"), both, "{options}");

        let image = open(&path);
        image.clear_bitmap("ours").unwrap();
        image.enable_bitmap("ours", false).unwrap();
        write(&image, 0, 1);
        assert_eq!(image.bitmap_extents("ours").unwrap(), Vec::<Range<u64>>::new());
        let theirs = image.bitmap_bits("theirs").unwrap();
        image.merge_bitmaps("ours", &[theirs]).unwrap();
        image.remove_bitmap("theirs").unwrap();
        assert_eq!(image.remove_bitmap("theirs").unwrap_err().kind(), ErrorKind::NoBitmap);
        image.close().unwrap();
        qemu.assert_clean(&path);
        let mut merged = both.clone();
        merged[0].end = 40 * MIB + 65536;
        merged.insert(0, 0..65536);
        assert_eq!(seen_by_qemu(&qemu, &path, "ours", "64k"), merged, "{options}");
        let image = open(&path);
        image.add_bitmap("another", None, true).unwrap();
        image.remove_all_bitmaps().unwrap();
        image.remove_all_bitmaps().unwrap();
        image.close().unwrap();
        qemu.assert_clean(&path);
        assert!(qemu.info_json(&path)["format-specific"]["data"]["bitmaps"].is_null(), "{options}");
    }
}

#[test]
fn a_crash_leaves_them_inconsistent_never_stale() {
    let Some(qemu) = Qemu::find() else { return };
    let fixture = Fixture::new();
    let path = fixture.path("a.qcow2");
    qemu.create(&path, "", Some(8 * MIB));
    bitmap(&qemu, &path, &["--add", "b"]);
    bitmap(&qemu, &path, &["--add", "--disable", "kept"]);
    let image = open(&path);
    write(&image, 0, 10);
    image.flush().unwrap();
    drop(image);
    let image = open(&path);
    assert_eq!(image.bitmap_extents("b").unwrap_err().kind(), ErrorKind::Corrupt);
    assert_eq!(image.clear_bitmap("b").unwrap_err().kind(), ErrorKind::Corrupt);
    assert!(image.bitmap_extents("kept").unwrap().is_empty());
    image.remove_bitmap("b").unwrap();
    image.close().unwrap();
}

#[test]
fn bitmaps_follow_the_disks_size() {
    let Some(qemu) = Qemu::find() else { return };
    let fixture = Fixture::new();
    let path = fixture.path("a.qcow2");
    qemu.create(&path, "", Some(8 * MIB));
    bitmap(&qemu, &path, &["--add", "on"]);
    bitmap(&qemu, &path, &["--add", "--disable", "off"]);
    let image = open(&path);
    write(&image, 7 * MIB, 10);
    image.resize(5 << 40).unwrap();
    write(&image, (5 << 40) - 10, 10);
    image.close().unwrap();
    qemu.assert_clean(&path);
    let expected = [7 * MIB..7 * MIB + 65536, (5 << 40) - 65536..5 << 40].to_vec();
    assert_eq!(seen_by_qemu(&qemu, &path, "on", "64k"), expected);
    assert!(extents(&path, "off").is_empty());
}

#[test]
fn bad_requests_change_nothing() {
    let Some(qemu) = Qemu::find() else { return };
    let fixture = Fixture::new();
    let path = fixture.path("a.qcow2");
    qemu.create(&path, "", Some(8 * MIB));
    let image = open(&path);
    image.add_bitmap("a", None, false).unwrap();
    for (name, granularity) in [("a", None), ("", None), ("b", Some(8)), ("b", Some(32))] {
        let error = image.add_bitmap(name, granularity, true).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{name} {granularity:?}");
    }
    let long = "x".repeat(1024);
    assert_eq!(image.add_bitmap(&long, None, true).unwrap_err().kind(), ErrorKind::InvalidArgument);
    assert_eq!(image.clear_bitmap("none").unwrap_err().kind(), ErrorKind::NoBitmap);
    image.close().unwrap();
    qemu.assert_clean(&path);
    let old = fixture.path("old.qcow2");
    qemu.create(&old, "compat=0.10", Some(MIB));
    assert_eq!(open(&old).add_bitmap("a", None, true).unwrap_err().kind(), ErrorKind::UnsupportedFeature);
}

#[test]
fn names_are_bytes() {
    let Some(qemu) = Qemu::find() else { return };
    let fixture = Fixture::new();
    let path = fixture.path("a.qcow2");
    qemu.create(&path, "", Some(8 * MIB));
    let image = open(&path);
    let (one, two, three) = (b"caf\xe9", b"caf\xe8", b"caf\xc3\xa9");
    image.add_bitmap(one, None, true).unwrap();
    image.add_bitmap(two, None, false).unwrap();
    image.add_bitmap(three, None, false).unwrap();
    write(&image, 0, 10);
    assert_eq!(image.bitmap_extents(one).unwrap(), std::slice::from_ref(&(0..65536)));
    assert!(image.bitmap_extents(two).unwrap().is_empty());
    image.merge_bitmaps(two, &[image.bitmap_bits(one).unwrap()]).unwrap();
    image.clear_bitmap(one).unwrap();
    image.remove_bitmap(three).unwrap();
    assert_eq!(image.remove_bitmap(b"caf\xea").unwrap_err().kind(), ErrorKind::NoBitmap);
    image.close().unwrap();
    qemu.assert_clean(&path);
    let image = open(&path);
    assert!(image.bitmap_extents(one).unwrap().is_empty());
    assert_eq!(image.bitmap_extents(two).unwrap(), std::slice::from_ref(&(0..65536)));
    image.close().unwrap();
}

/// The format knows no table of no entries, so that a disk of no bytes has no bitmaps.
#[test]
fn a_disk_with_bitmaps_does_not_become_empty() {
    let Some(qemu) = Qemu::find() else { return };
    let fixture = Fixture::new();
    let path = fixture.path("a.qcow2");
    qemu.create(&path, "", Some(0));
    let image = open(&path);
    let error = image.add_bitmap("a", None, true).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::UnsupportedFeature, "{error}");
    image.execute(&Table::of(&image).create("1", "empty")).unwrap();
    image.resize(MIB).unwrap();
    image.add_bitmap("a", None, true).unwrap();
    image.add_bitmap("b", None, false).unwrap();
    write(&image, 0, 10);
    let shrink = ResizeOptions { shrink: true, ..ResizeOptions::default() };
    let error = image.resize_with(0, shrink).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::UnsupportedFeature, "{error}");
    let error = image.execute(&Table::of(&image).apply(0)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::UnsupportedFeature, "{error}");
    assert_eq!(image.virtual_size(), MIB);
    image.close().unwrap();
    qemu.assert_clean(&path);
    assert_eq!(extents(&path, "a").first(), Some(&(0..65536)));
    let image = open(&path);
    image.remove_bitmap("a").unwrap();
    image.remove_bitmap("b").unwrap();
    image.execute(&Table::of(&image).apply(0)).unwrap();
    assert_eq!(image.virtual_size(), 0);
    image.close().unwrap();
    qemu.assert_clean(&path);
}

/// An image of which neither a byte behind the end nor one of a free cluster can be written, with two bitmaps: `a` has recorded a write to its first cluster.
fn full_disk(qemu: &Qemu, path: &Path) -> Image {
    qemu.create(path, "", Some(8 * MIB));
    bitmap(qemu, path, &["--add", "a"]);
    qemu.io(path, "qcow2", &["write 0 64k"]);
    bitmap(qemu, path, &["--add", "b"]);
    let end = std::fs::metadata(path).unwrap().len();
    let free = free_clusters(&std::fs::read(path).unwrap());
    let file = Arc::new(FileStorage::open(path, Access::ReadWrite).unwrap());
    let full = Hooked::with(file, move |op, range: Range<u64>| {
        let mut clusters = range.start >> 16..range.end.div_ceil(1 << 16);
        let takes_space = matches!(op, Op::Write | Op::Zero | Op::Allocate)
            && (range.end > end || clusters.any(|cluster| free.contains(&cluster)));
        if takes_space { Err(std::io::Error::from_raw_os_error(28)) } else { Ok(()) }
    });
    let mut image = Qcow2::open(Arc::new(full), &OpenOptions::default()).unwrap();
    image.enable_writing(WriteOptions::default()).unwrap();
    Image::new(vec![Box::new(image)]).unwrap()
}

#[test]
fn a_merge_that_finds_no_space_changes_no_bitmap() {
    let Some(qemu) = Qemu::find() else { return };
    let fixture = Fixture::new();
    let path = fixture.path("a.qcow2");
    let image = full_disk(&qemu, &path);
    write(&image, 0, 512);
    let dirty = image.bitmap_bits("a").unwrap();
    let error = image.merge_bitmaps("b", &[dirty]).unwrap_err();
    assert!(error.is_no_space(), "{error:?}");
    assert_eq!(image.bitmap_extents("b").unwrap(), std::slice::from_ref(&(0..65536)), "what the guest wrote");
    drop(image);

    let fixture = Fixture::new();
    let path = fixture.path("a.qcow2");
    let image = full_disk(&qemu, &path);
    let dirty = image.bitmap_bits("a").unwrap();
    assert!(image.merge_bitmaps("b", &[dirty]).unwrap_err().is_no_space());
    assert!(image.bitmap_extents("b").unwrap().is_empty());
    image.close().unwrap();
    qemu.assert_clean(&path);
    assert_eq!(extents(&path, "a"), std::slice::from_ref(&(0..65536)));
    assert!(extents(&path, "b").is_empty());
}

#[test]
fn a_bitmap_that_cannot_be_stored_takes_no_other_with_it() {
    let Some(qemu) = Qemu::find() else { return };
    let fixture = Fixture::new();
    let path = fixture.path("a.qcow2");
    let image = full_disk(&qemu, &path);
    // Dirty in `a` already, new to `b`.
    write(&image, 512, 512);
    assert!(image.close().unwrap_err().is_no_space());
    let error = image.write_at(Mem::from(&[1; 512][..]), 0).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Closed);
    drop(image);
    assert_eq!(extents(&path, "a"), std::slice::from_ref(&(0..65536)));
    assert_eq!(open(&path).bitmap_extents("b").unwrap_err().kind(), ErrorKind::Corrupt);
}
