//! Snapshot tables that break the format, repaired beside `qemu-img check -r`: the same messages and counters, and as many
//! snapshots left.

#[allow(dead_code, reason = "other tests use the rest")]
use crate::damage;
use crate::repairing;

use std::path::{Path, PathBuf};

use qcow2_engine::check::{CheckReport, Repair};
use qcow2_testkit::{Fixture, Qemu, Sparse};

use damage::{be64, image, poke};
use repairing::{assert_kept, crash, disks_of, fix, look, open};

const MIB: u64 = 1 << 20;
const CLUSTER: u64 = 65536;

/// Repairs the image by us and a copy of it by QEMU, which tell and count the same; both are clean then. Gives our report.
#[track_caller]
fn repaired_as_by_qemu(qemu: &Qemu, path: &Path, messages: bool) -> CheckReport {
    let theirs = path.with_extension("theirs");
    std::fs::copy(path, &theirs).unwrap();
    let found = look(&open(path)).unwrap();
    let judged = qemu.img(&["check", "-f", "qcow2", path.to_str().unwrap()]);
    assert_eq!(found.failure.is_some(), judged.code == 1, "{found:#?}\n{}", judged.stderr);

    let expected = qemu.img(&["check", "-f", "qcow2", "-r", "all", theirs.to_str().unwrap()]);
    assert_eq!(expected.code, 0, "{}", expected.stderr);
    let report = fix(&open(path), Repair::All).unwrap();
    let counter = |name: &str| {
        let line = expected.stdout.lines().find(|line| line.ends_with(name));
        line.map_or(0, |line| line.trim().split(' ').next().unwrap().parse().unwrap())
    };
    let theirs_fixed = (counter(" corruptions"), counter(" leaked clusters"));
    assert_eq!(
        (report.corruptions_fixed, report.leaks_fixed),
        theirs_fixed,
        "{}\n{report:#?}",
        expected.stderr
    );
    if messages {
        let lines: Vec<String> = report.findings.iter().map(ToString::to_string).collect();
        assert_eq!(lines.join("\n"), expected.stderr.trim_end());
    }
    let left = look(&open(path)).unwrap();
    assert!(left.is_clean(), "{left:#?}");
    qemu.assert_clean(path);
    report
}

fn list(qemu: &Qemu, path: &Path) -> String {
    qemu.img(&["snapshot", "-l", path.to_str().unwrap()]).ok().to_owned()
}

/// An image with two snapshots, and the place of their table, which is the last thing in the file.
fn with_snapshots(qemu: &Qemu, dir: &Fixture, options: &str) -> (PathBuf, u64) {
    let path = image(qemu, dir, "image", CLUSTER, options, &["snapshots"]);
    let bytes = std::fs::read(&path).unwrap();
    let table = be64(&bytes, 64);
    assert!(table + CLUSTER > bytes.len() as u64, "the table is not the last cluster");
    (path, table)
}

/// Counts the clusters of a range once; they must belong to the first refcount block.
fn count_once(path: &Path, from: u64, to: u64) {
    let bytes = std::fs::read(path).unwrap();
    let block = be64(&bytes, be64(&bytes, 48));
    for cluster in from / CLUSTER..to.div_ceil(CLUSTER) {
        poke(path, block + 2 * cluster, &[0, 1]);
    }
}

#[test]
fn extra_data_that_leads_behind_the_file_is_cut() {
    let Some(qemu) = Qemu::find() else { return };
    for options in ["", "compat=0.10"] {
        let dir = Fixture::new();
        let (path, table) = with_snapshots(&qemu, &dir, options);
        let before = disks_of(&path);
        let first = 40 + 24 + 4u64;
        poke(&path, table + first.next_multiple_of(8) + 36, &CLUSTER.to_be_bytes()[4..]);
        let report = repaired_as_by_qemu(&qemu, &path, true);
        assert_eq!((report.corruptions_fixed, report.leaks_fixed), (2, 0));
        assert_eq!(list(&qemu, &path), list(&qemu, &path.with_extension("theirs")));
        assert_kept(&before, &disks_of(&path), options);
    }
}

/// A table of `count` zeroed entries of `size` bytes at 1 MiB. The one at `owner` has an L1 and an L2 table.
fn forged_table(path: &Path, count: u64, size: u64, fixed: &[u8], owner: u64) -> u64 {
    let end = MIB + count * size;
    let file = std::fs::File::options().write(true).open(path).unwrap();
    file.set_len(end).unwrap();
    poke(path, 60, &(count as u32).to_be_bytes());
    poke(path, 64, &MIB.to_be_bytes());
    if !fixed.is_empty() {
        (0..count).for_each(|i| poke(path, MIB + i * size, fixed));
    }
    let l1 = MIB - 2 * CLUSTER;
    poke(path, MIB + owner * size, &l1.to_be_bytes());
    poke(path, MIB + owner * size + 8, &1u32.to_be_bytes());
    poke(path, l1, &((l1 + CLUSTER) | 1 << 63).to_be_bytes());
    count_once(path, l1, end);
    end
}

#[test]
fn snapshots_behind_the_limit_are_given_up() {
    let Some(qemu) = Qemu::find() else { return };
    let dir = Fixture::new();
    let path = dir.path("many");
    qemu.create(&path, "compat=0.10", Some(64 * MIB));
    // Zeroes are valid entries in version 2.
    forged_table(&path, 2 * 65536, 40, &[], 65536);
    let report = repaired_as_by_qemu(&qemu, &path, true);
    assert_eq!(report.corruptions_fixed, 65536);
    let bytes = std::fs::read(&path).unwrap();
    assert_eq!((be64(&bytes, 60) >> 32, be64(&bytes, 64)), (65536, MIB));
}

#[test]
fn a_table_that_is_too_big_loses_its_end() {
    let Some(qemu) = Qemu::find() else { return };
    let dir = Fixture::new();
    let path = dir.path("big");
    qemu.create(&path, "", Some(64 * MIB));
    // 1 KiB of extra data, an id and a name of 65535 bytes.
    let mut fixed = [0; 40];
    fixed[12..16].fill(0xff);
    fixed[38] = 4;
    let size = 40 + 1024 + 2 * 65535 + 2;
    let count = 64 * MIB / size + 1;
    let end = forged_table(&path, count, size, &fixed, count - 1);
    let report = repaired_as_by_qemu(&qemu, &path, true);
    assert_eq!((report.corruptions_fixed, report.leaks_fixed), (1, 4));
    let left = |path: &Path| be64(&std::fs::read(path).unwrap(), 60) >> 32;
    assert_eq!(left(&path), count - 1);

    // The same table, with an entry whose extra data alone leads over the limit, and two behind it.
    let old = end - 3 * size;
    let extra = 64 * MIB + 8 - size - (old - MIB + size - 1024);
    poke(&path, old + 36, &(extra as u32).to_be_bytes());
    let next = old + size - 1024 + extra;
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    file.set_len(next + 2 * size).unwrap();
    (0..2).for_each(|i| poke(&path, next + i * size, &fixed));
    poke(&path, 60, &(count as u32).to_be_bytes());
    count_once(&path, end - size, next + 2 * size);
    let report = repaired_as_by_qemu(&qemu, &path, true);
    assert_eq!(report.corruptions_fixed, 2);
    assert_eq!(left(&path), left(&path.with_extension("theirs")));
}

#[test]
fn a_count_that_is_too_high_is_lowered() {
    let Some(qemu) = Qemu::find() else { return };
    let dir = Fixture::new();
    let (path, _) = with_snapshots(&qemu, &dir, "");
    let before = (disks_of(&path), list(&qemu, &path));
    let sound = std::fs::read(&path).unwrap();
    for count in [3u32, 100, 65536, u32::MAX] {
        std::fs::write(&path, &sound).unwrap();
        poke(&path, 60, &count.to_be_bytes());
        if count <= 100 {
            repaired_as_by_qemu(&qemu, &path, false);
        } else {
            // QEMU's repair writes its new table over the former one, which it does not count, and gives up.
            let report = fix(&open(&path), Repair::All).unwrap();
            assert_eq!(report.corruptions_fixed, u64::from(count) - 2);
            qemu.assert_clean(&path);
        }
        // QEMU keeps what it reads behind the file as snapshots without id, name and disk.
        let after = (disks_of(&path), list(&qemu, &path));
        assert_kept(&before.0, &after.0, "count");
        assert!(after.1.starts_with(before.1.trim_end()), "{}", after.1);
    }
    let mut file = Sparse::new(sound.len() as u64);
    file.write(0, &sound);
    file.write(60, &3000u32.to_be_bytes());
    assert!(crash(&file, "a count that is too high") > 10);
}

#[test]
fn no_snapshots_are_nowhere() {
    let Some(qemu) = Qemu::find() else { return };
    let dir = Fixture::new();
    let path = dir.path("none");
    qemu.create(&path, "", Some(MIB));
    qemu.io(&path, "qcow2", &["write -P 1 0 64k"]);
    let before = disks_of(&path);
    poke(&path, 64, &1u64.to_be_bytes());
    assert_eq!(qemu.img(&["check", path.to_str().unwrap()]).code, 1);
    assert!(look(&open(&path)).unwrap().failure.is_some());
    let report = fix(&open(&path), Repair::All).unwrap();
    assert_eq!((report.corruptions, report.corruptions_fixed), (0, 1), "{report:#?}");
    qemu.assert_clean(&path);
    assert_kept(&before, &disks_of(&path), "no snapshots");
    assert_eq!(be64(&std::fs::read(&path).unwrap(), 64), 0);
}

#[test]
fn too_much_extra_data_and_too_many_snapshots_are_cut() {
    let Some(qemu) = Qemu::find() else { return };
    let dir = Fixture::new();
    let path = image(&qemu, &dir, "image", 65536, "", &["snapshots"]);
    let mut bytes = std::fs::read(&path).unwrap();
    let table = be64(&bytes, 64) as usize;
    bytes.resize(bytes.len().next_multiple_of(65536), 0);
    // The first entry gets 2000 bytes of extra data; the others move behind it.
    let rest = bytes[table + 64..table + 256].to_vec();
    bytes[table + 36..table + 40].copy_from_slice(&2000u32.to_be_bytes());
    bytes[table + 64..table + 64 + 1976].fill(0x55);
    bytes[table + 2040..table + 2040 + rest.len()].copy_from_slice(&rest);
    std::fs::write(&path, &bytes).unwrap();
    let theirs = dir.path("theirs");
    std::fs::copy(&path, &theirs).unwrap();
    let expected = qemu.img(&["check", "-r", "all", theirs.to_str().unwrap()]);
    let report = fix(&open(&path), Repair::All).unwrap();
    let lines: Vec<String> = report.findings.iter().map(ToString::to_string).collect();
    assert_eq!(lines.join("\n"), expected.stderr.trim_end(), "{report:#?}");
    assert_eq!((report.corruptions_fixed, report.corruptions), (1, 0));
    qemu.assert_clean(&path);
    let list = |path: &Path| qemu.img(&["snapshot", "-l", path.to_str().unwrap()]).ok();
    assert_eq!(list(&path), list(&theirs));
    assert_kept(&disks_of(&theirs), &disks_of(&path), "extra data");
}
