//! Repairs beside `qemu-img check -r`: what is damaged becomes sound, what could be read still reads the same.

use crate::damage;
use crate::repairing;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

use qcow2_engine::check::{CheckReport, Finding, FindingCode, Repair};
use qcow2_engine::storage::{Access, FileStorage};
use qcow2_engine::{ErrorKind, Image, Mem, OpenOptions, Qcow2, Storage, WriteOptions};
use qcow2_testkit::{Fixture, Qemu, Sparse};

use damage::{IMAGES, Rng, be64, damage, image, poke, table_entries};
use repairing::{assert_kept, crash, disks_of, fix, look, open};

/// Errors, but for COPIED flags that could be set: where a leak goes without the right to touch more, one is left.
fn severity(report: &CheckReport) -> u64 {
    let missing = |f: &&Finding| {
        matches!(f.code, FindingCode::L1Copied | FindingCode::L2Copied) && f.message.ends_with("refcount=1")
    };
    let missing = report.findings.iter().filter(|f| !f.repaired).filter(missing).count() as u64;
    report.corruptions - missing + report.check_errors + u64::from(report.failure.is_some())
}

/// Eight bytes of a file that may be far larger than memory: repairs can make sparse files of terabytes.
fn word(path: &Path, at: u64) -> u64 {
    let mut bytes = [0; 8];
    qcow2_testkit::at::read_exact_at(&std::fs::File::open(path).unwrap(), &mut bytes, at).unwrap();
    u64::from_be_bytes(bytes)
}

/// Damages per image: more of them with `QCOW2_TEST_ROUNDS`.
fn rounds(default: u64) -> u64 {
    std::env::var("QCOW2_TEST_ROUNDS").ok().and_then(|n| n.parse().ok()).unwrap_or(default)
}

/// Other damages than `default` with `QCOW2_TEST_SEED`.
fn seed(default: u64) -> u64 {
    let other = std::env::var("QCOW2_TEST_SEED").ok().and_then(|n| n.parse::<u64>().ok());
    default ^ other.unwrap_or(0).wrapping_mul(0x2545_f491_4f6c_dd1d)
}

/// Damages each image in many ways and repairs it, by us and by QEMU. Gives how many of each outcome there were.
fn random_damage(what: Repair, argument: &str, rounds: u64, seed: u64) -> [u32; 3] {
    let outcomes = [const { AtomicU32::new(0) }; 3];
    let next = AtomicUsize::new(0);
    if let Some(qemu) = Qemu::find() {
        std::thread::scope(|scope| {
            for _ in 0..std::thread::available_parallelism().map_or(2, usize::from) {
                scope.spawn(|| {
                    while let Some(image) = IMAGES.get(next.fetch_add(1, Ordering::Relaxed)) {
                        if image.1 < 1 << 20 {
                            damage_image(&qemu, image, (what, argument), rounds, seed, &outcomes);
                        }
                    }
                });
            }
        });
    }
    outcomes.map(AtomicU32::into_inner)
}

fn damage_image(
    qemu: &Qemu,
    (name, cluster_size, options, features): &damage::Described,
    (what, argument): (Repair, &str),
    rounds: u64,
    seed: u64,
    outcomes: &[AtomicU32; 3],
) {
    let dir = Fixture::new();
    let path = image(qemu, &dir, name, *cluster_size, options, features);
    let sound = std::fs::read(&path).unwrap();
    let entries = table_entries(&sound);
    let used: Vec<_> = entries.iter().copied().filter(|at| be64(&sound, *at) != 0).collect();
    for round in 0..rounds {
        // A round is one by itself: a failing one can be repeated alone.
        let mut rng =
            Rng((cluster_size ^ seed).wrapping_add((round + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)));
        std::fs::write(&path, &sound).unwrap();
        let mut text = format!("{name} {round}:");
        for _ in 0..=rng.below(3) {
            let from = if rng.below(4) == 0 { &entries } else { &used };
            let at = from[rng.below(from.len() as u64) as usize];
            let old = be64(&sound, at);
            let new = damage(&mut rng, old, *cluster_size, sound.len() as u64);
            text += &format!(" {at:#x}: {old:#x} -> {new:#x}");
            poke(&path, at, &new.to_be_bytes());
        }
        let only = std::env::var("QCOW2_TEST_ONLY").unwrap_or_default();
        if text.contains(&only) {
            outcomes[one_damage(qemu, &path, what, argument, &text)].fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Repairs one damaged image. 0: it was sound or beyond both tools, 1: it is sound now, 2: something is left.
fn one_damage(qemu: &Qemu, path: &Path, what: Repair, argument: &str, text: &str) -> usize {
    let before = disks_of(path);
    let Ok(found) = look(&open(path)) else { return 0 };
    let snapshots = word(path, 56) as u32;
    let theirs = path.with_extension("theirs");
    std::fs::copy(path, &theirs).unwrap();
    let repaired = qemu.img(&["check", "-q", "-f", "qcow2", "-r", argument, theirs.to_str().unwrap()]);
    let report = match fix(&open(path), what) {
        Ok(report) => report,
        Err(error) => panic!("{text}: {error}\n{found:#?}"),
    };
    let after = disks_of(path);
    assert_kept(&before, &after, text);
    let left = look(&open(path)).unwrap();
    // An L1 table that claims half the file makes entries of all that is in it, refcounts among them.
    let noise = severity(&found) / 50;
    // What a check that ended early did not see cannot be compared.
    let worse = found.failure.is_none() && severity(&left) > severity(&found) + noise;
    assert!(!worse, "{text}: worse\n{found:#?}\n{left:#?}");
    if report.failure.is_none() {
        // What is beyond repair may count differently once its neighbours are repaired.
        let verdict = |report: &CheckReport| (report.corruptions == 0, report.leaks == 0);
        assert_eq!(verdict(&left), verdict(&report), "{text}\n{report:#?}\n{left:#?}");
    }
    let verdict = qemu.img(&["check", "-q", "-f", "qcow2", path.to_str().unwrap()]).code;
    if left.is_clean() {
        assert_eq!(verdict, 0, "{text}: QEMU sees what we do not");
    }
    // QEMU 10.0 gives all snapshots up where it repairs an image that has bitmaps too, or whose snapshot table is not in
    // the file: what it then calls clean is no measure.
    let count = |path: &Path| word(path, 56) as u32;
    let lost = count(&theirs) < snapshots
        // Nor does it tell of a name that the file's end cuts, which only a repair of all mends.
        || (what == Repair::Leaks && report.findings.iter().any(|f| f.message.ends_with("is incomplete")));
    // Where QEMU changed what could be read, as it does in a table that is guest data too, it is no measure either.
    let mut theirs = disks_of(&theirs);
    let harmed = theirs.iter().zip(&before).any(|pair| matches!(pair, (Ok(new), Ok(old)) if new != old));
    // Nor where it writes to a table that is something else of a disk that cannot be read: we do not.
    let refused = report.findings.iter().any(|f| f.message.contains("Overlap check failed"));
    if repaired.code == 0 && !lost && !harmed && !refused {
        let mine = (verdict, left.is_clean());
        assert_eq!(mine, (0, true), "{text}: QEMU repairs it\n{}\n{report:?}\n{left:#?}", repaired.stderr);
        // Entries of a damaged snapshot table can be anybody's guess.
        if report.findings.iter().any(|f| f.code == FindingCode::Snapshot) {
            theirs.truncate(1);
        }
        assert_kept(&theirs, &after, &format!("{text} (against QEMU's)"));
    }
    let again = fix(&open(path), what).unwrap();
    assert_kept(&before, &disks_of(path), &format!("{text} (again)"));
    if left.corruptions == 0 {
        assert_eq!(
            (again.corruptions_fixed, again.leaks_fixed),
            (0, 0),
            "{text}: not done at once\n{again:#?}"
        );
    }
    if found.is_clean() || report.failure.is_some() {
        0
    } else if left.is_clean() {
        1
    } else {
        2
    }
}

#[test]
fn all_that_qemu_repairs_is_repaired_and_no_disk_changes() {
    let outcomes = random_damage(Repair::All, "all", rounds(8), seed(0x51ce_37b2));
    assert!(Qemu::find().is_none() || outcomes.iter().all(|n| *n > 5), "{outcomes:?}");
}

#[test]
fn leaks_alone() {
    let outcomes = random_damage(Repair::Leaks, "leaks", rounds(4), seed(0x1234_9876));
    assert!(Qemu::find().is_none() || outcomes.iter().all(|n| *n > 2), "{outcomes:?}");
}

/// The places of a small image that QEMU made.
struct Places {
    l1: u64,
    l2: u64,
    table: u64,
    block: u64,
    data: u64,
}

fn small(qemu: &Qemu, dir: &Fixture) -> (std::path::PathBuf, Places) {
    let path = dir.path("small");
    qemu.create(&path, "", Some(8 << 20));
    qemu.io(&path, "qcow2", &["write -P 1 0 256k"]);
    let bytes = std::fs::read(&path).unwrap();
    let l1 = be64(&bytes, 40);
    let l2 = be64(&bytes, l1) & !(1 << 63);
    let table = be64(&bytes, 48);
    let data = be64(&bytes, l2) & !(1 << 63);
    (path, Places { l1, l2, table, block: be64(&bytes, table), data })
}

/// Bytes to write, and where.
type Poke = (u64, Vec<u8>);

/// Damages of one kind each, by name.
fn damages(p: &Places) -> Vec<(&'static str, Vec<Poke>)> {
    let cluster = |offset: u64| offset >> 16;
    let refcount = |offset: u64, value: u16| (p.block + 2 * cluster(offset), value.to_be_bytes().to_vec());
    let word = |at: u64, value: u64| (at, value.to_be_bytes().to_vec());
    let copied = 1 << 63;
    vec![
        ("leak", vec![refcount(9 << 16, 1)]),
        ("refcount too high", vec![refcount(p.data, 3)]),
        ("shared cluster", vec![word(p.l2 + 8, p.data | copied)]),
        ("refcount of zero", vec![refcount(p.data + 65536, 0)]),
        ("flag missing in L1", vec![word(p.l1, p.l2)]),
        ("flag missing in L2", vec![word(p.l2, p.data)]),
        ("unaligned zero cluster", vec![word(p.l2 + 8, (p.data + 512) | 1)]),
        ("block shared with data", vec![word(p.l2 + 8, p.block | copied)]),
        ("block unaligned", vec![word(p.table, p.block + 512)]),
        ("block missing", vec![word(p.table, 0)]),
        ("block all zero", vec![(p.block, vec![0; 65536])]),
        ("block with reserved bits", vec![word(p.table, p.block | 1)]),
        ("table in use by data", vec![word(p.l2 + 8, p.table | copied)]),
        ("dirty bit", vec![(79, vec![1])]),
        ("corrupt bit", vec![(79, vec![2])]),
        ("unknown autoclear bit", vec![(88, vec![0x80])]),
    ]
}

#[test]
fn messages_and_counters_are_those_of_qemu() {
    let Some(qemu) = Qemu::find() else { return };
    let dir = Fixture::new();
    let (path, places) = small(&qemu, &dir);
    let sound = std::fs::read(&path).unwrap();
    for (what, pokes) in damages(&places) {
        for (kind, argument) in [(Repair::All, "all"), (Repair::Leaks, "leaks")] {
            std::fs::write(&path, &sound).unwrap();
            pokes.iter().for_each(|(at, bytes)| poke(&path, *at, bytes));
            let before = disks_of(&path);
            let theirs = dir.path("theirs");
            std::fs::copy(&path, &theirs).unwrap();
            let args = ["check", "-f", "qcow2", "--output=json", "-r", argument, theirs.to_str().unwrap()];
            let expected = qemu.img(&args);
            let report = fix(&open(&path), kind).unwrap();
            let again = look(&open(&path)).unwrap();
            let mut lines: Vec<String> = report.findings.iter().map(ToString::to_string).collect();
            if report.corruptions_fixed + report.leaks_fixed > 0 {
                lines.extend(again.findings.iter().map(ToString::to_string));
            }
            let text = |lines: &str| -> Vec<String> {
                // What the system says about an unreadable block differs, and where it lies decides what is left of it.
                let told = |l: &&str| !l.starts_with("qemu-img: ") && !l.starts_with("qcow2: Marking");
                let unreadable = unreadable(what);
                let first = |l: &str| l.split(": ").next().unwrap().to_owned();
                let lines = lines.lines().filter(told).map(str::to_owned);
                let lines: Vec<String> = lines.map(|l| if unreadable { first(&l) } else { l }).collect();
                let end = lines.iter().position(|l| unreadable && l.starts_with("Rebuilding"));
                lines[..end.unwrap_or(lines.len())].to_vec()
            };
            assert_eq!(text(&lines.join("\n")), text(&expected.stderr), "{what}, -r {argument}");
            let fixed = |name: &str| {
                let line = expected.stdout.lines().find(|l| l.contains(name));
                line.map_or(0, |l| l.split(':').nth(1).unwrap().trim().trim_end_matches(',').parse().unwrap())
            };
            let counters = (fixed("\"corruptions-fixed\""), fixed("\"leaks-fixed\""));
            // There QEMU fails: its overlap check still counts the old block.
            if !unreadable(what) {
                let ours = (report.corruptions_fixed, report.leaks_fixed);
                assert_eq!(ours, counters, "{what}, -r {argument}");
            }
            assert_kept(&before, &disks_of(&path), what);
            if kind == Repair::All {
                assert!(again.is_clean(), "{what}: {again:#?}");
                qemu.assert_clean(&path);
                let features = be64(&std::fs::read(&path).unwrap(), 72);
                assert_eq!(features & 3, 0, "{what}: dirty or corrupt");
                assert_eq!(std::fs::read(&path).unwrap()[88] & 0x80, 0, "{what}: unknown autoclear bit");
            }
        }
    }
}

#[test]
fn a_crash_at_any_point_of_a_repair_does_no_harm() {
    let Some(qemu) = Qemu::find() else { return };
    let dir = Fixture::new();
    let (path, places) = small(&qemu, &dir);
    let sound = std::fs::read(&path).unwrap();
    let mut states = 0;
    for (what, pokes) in damages(&places) {
        let mut file = Sparse::new(sound.len() as u64);
        file.write(0, &sound);
        pokes.iter().for_each(|(at, bytes)| file.write(*at, bytes));
        states += crash(&file, what);
    }
    assert!(states > 200, "{states}");
}

#[test]
fn a_crash_while_snapshots_are_repaired_does_no_harm() {
    let Some(qemu) = Qemu::find() else { return };
    let dir = Fixture::new();
    let features = &["zero", "compressed", "snapshots", "bitmaps"];
    let path = image(&qemu, &dir, "image", 4096, "", features);
    let mut bytes = std::fs::read(&path).unwrap();
    let (table, blocks) = (be64(&bytes, 64) as usize, be64(&bytes, 48));
    strip_extra_data(&mut bytes[table..]);
    // The refcounts are lost as well.
    let block = be64(&bytes, blocks) as usize;
    bytes[block..block + 200].fill(0);
    let mut file = Sparse::new(bytes.len() as u64);
    file.write(0, &bytes);
    assert!(crash(&file, "snapshots and refcounts") > 10);

    std::fs::write(&path, &bytes).unwrap();
    let before = disks_of(&path);
    assert_eq!(before.iter().filter(|d| d.is_ok()).count(), 3);
    let report = fix(&open(&path), Repair::All).unwrap();
    assert!(report.corruptions_fixed > 2 && report.corruptions == 0, "{report:#?}");
    qemu.assert_clean(&path);
    assert_kept(&before, &disks_of(&path), "snapshots");
}

/// Makes the two entries of a snapshot table those of a version 2 image, without extra data.
fn strip_extra_data(table: &mut [u8]) {
    let mut at = 0;
    let mut new = Vec::new();
    for _ in 0..2 {
        let word = |at: usize| u16::from_be_bytes([table[at], table[at + 1]]) as usize;
        let (id, name, extra) = (word(at + 12), word(at + 14), word(at + 38));
        new.extend_from_slice(&table[at..at + 36]);
        new.extend_from_slice(&[0; 4]);
        new.extend_from_slice(&table[at + 40 + extra..][..id + name]);
        new.resize(new.len().next_multiple_of(8), 0);
        at += (40 + extra + id + name).next_multiple_of(8);
    }
    table[..new.len()].copy_from_slice(&new);
}

#[test]
fn a_dirty_image_is_repaired_when_it_is_opened_for_writing() {
    let Some(qemu) = Qemu::find() else { return };
    let dir = Fixture::new();
    let (path, places) = small(&qemu, &dir);
    let before = disks_of(&path);
    // Two refcounts were still to be written when the dirty bit was set.
    poke(&path, places.block + 2 * (places.data >> 16), &[0; 4]);
    poke(&path, 79, &[1]);
    let storage: Arc<dyn Storage> = Arc::new(open(&path));
    let mut image = Qcow2::open(storage.clone(), &OpenOptions::default()).unwrap();
    image.enable_writing(WriteOptions::default()).unwrap();
    assert!(look(&*storage).unwrap().is_clean());
    let image = Image::new(vec![Box::new(image)]).unwrap();
    image.write_at(Mem::from(&[7; 512][..]), 4 << 20).unwrap();
    image.close().unwrap();
    qemu.assert_clean(&path);
    assert_eq!(std::fs::read(&path).unwrap()[79], 0);
    let after = disks_of(&path);
    let same = |a: &[u8], b: &[u8]| a[..4 << 20] == b[..4 << 20];
    assert!(same(before[0].as_ref().unwrap(), after[0].as_ref().unwrap()));

    // Damage that nothing can repair keeps the image dirty and closed to writes.
    poke(&path, 79, &[1]);
    poke(&path, places.l2, &(1u64 << 63 | (places.data + 512)).to_be_bytes());
    let mut image = Qcow2::open(storage.clone(), &OpenOptions::default()).unwrap();
    let error = image.enable_writing(WriteOptions::default()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert_eq!(std::fs::read(&path).unwrap()[79], 1);
    // One that is marked corrupt is not touched.
    poke(&path, 79, &[3]);
    let bytes = std::fs::read(&path).unwrap();
    let mut image = Qcow2::open(storage, &OpenOptions::default()).unwrap();
    assert_eq!(image.enable_writing(WriteOptions::default()).unwrap_err().kind(), ErrorKind::Corrupt);
    assert!(bytes == std::fs::read(&path).unwrap());
}

#[test]
fn a_file_that_is_open_for_reading_is_not_repaired() {
    let Some(qemu) = Qemu::find() else { return };
    let dir = Fixture::new();
    let (path, _) = small(&qemu, &dir);
    let storage = FileStorage::open(&path, Access::ReadOnly).unwrap();
    assert_eq!(fix(&storage, Repair::All).unwrap_err().kind(), ErrorKind::ReadOnly);
}

/// Damages after which the refcounts cannot be read.
fn unreadable(what: &str) -> bool {
    what == "block unaligned" || what == "block with reserved bits"
}

/// Repairs the image at `path` at once, to what both checkers call clean, and no disk changes.
fn repaired_at_once(qemu: &Qemu, path: &Path, what: &str) {
    let before = disks_of(path);
    let report = fix(&open(path), Repair::All).unwrap();
    assert!(look(&open(path)).unwrap().is_clean(), "{what}: {report:#?}");
    qemu.assert_clean(path);
    assert_kept(&before, &disks_of(path), what);
}

#[test]
fn a_table_that_is_guest_data_too_moves_before_its_flags_change() {
    let Some(qemu) = Qemu::find() else { return };
    let dir = Fixture::new();
    let (path, p) = small(&qemu, &dir);
    for flag in [0, 1 << 63] {
        for guest in [1, 20] {
            let sound = std::fs::read(&path).unwrap();
            poke(&path, p.l2 + 8 * guest, &(p.l2 | flag).to_be_bytes());
            let what = format!("guest cluster {guest} is the table, flag {flag:x}");
            let bytes = std::fs::read(&path).unwrap();
            let mut file = Sparse::new(bytes.len() as u64);
            file.write(0, &bytes);
            assert!(crash(&file, &what) > 5, "{what}");
            repaired_at_once(&qemu, &path, &what);
            std::fs::write(&path, sound).unwrap();
        }
    }
}

#[test]
fn a_table_that_is_guest_data_too_moves_even_where_refcounts_cannot_tell() {
    let Some(qemu) = Qemu::find() else { return };
    let dir = Fixture::new();
    let path = dir.path("one-bit");
    qemu.create(&path, "cluster_size=512,refcount_bits=1", Some(64 << 9));
    qemu.io(&path, "qcow2", &["write -P 1 0 4k"]);
    let bytes = std::fs::read(&path).unwrap();
    let l2 = be64(&bytes, be64(&bytes, 40)) & !(1 << 63);
    // Two references to the table, of which one bit can count one. The flag of the second one is to be set.
    poke(&path, l2 + 8 * 62, &l2.to_be_bytes());
    let before = disks_of(&path);
    for round in 0..2 {
        let report = fix(&open(&path), Repair::All).unwrap();
        assert_kept(&before, &disks_of(&path), &format!("{round}: {report:#?}"));
    }
    // The first repair gave the table a cluster of its own.
    repaired_at_once(&qemu, &path, "no reference too many is left");
}

#[test]
fn what_cannot_be_written_is_told_and_frees_nothing() {
    let Some(qemu) = Qemu::find() else { return };
    let dir = Fixture::new();
    let path = dir.path("guest-table");
    qemu.create(&path, "cluster_size=4k", Some(4 << 20));
    qemu.io(&path, "qcow2", &["write -P 7 0 64k"]);
    let bytes = std::fs::read(&path).unwrap();
    let l1 = be64(&bytes, 40);
    let data = be64(&bytes, be64(&bytes, l1) & !(1 << 63));
    // Guest data as a table: its entries look like zero clusters whose place is not aligned. And a leaked cluster.
    poke(&path, l1 + 8, &data.to_be_bytes());
    let free = bytes.len() as u64 >> 12;
    poke(&path, be64(&bytes, be64(&bytes, 48)) + 2 * (free - 1), &[0, 3]);
    let read = || std::fs::read(&path).unwrap()[(data & !(1 << 63)) as usize..][..4096].to_vec();
    let before = read();
    let report = fix(&open(&path), Repair::All).unwrap();
    let left = look(&open(&path)).unwrap();
    assert!(left.corruptions > 0 && report.corruptions > 0, "{left:#?}");
    assert!(report.check_errors > 0 && report.leaks_fixed == 0, "{:?}", report.findings.last());
    assert_eq!(read(), before);
}

#[test]
fn what_refers_behind_the_file_never_gets_the_new_refcounts() {
    let Some(qemu) = Qemu::find() else { return };
    let dir = Fixture::new();
    let (path, p) = small(&qemu, &dir);
    let end = std::fs::metadata(&path).unwrap().len().next_multiple_of(65536);
    for behind in 0..3 {
        let sound = std::fs::read(&path).unwrap();
        // Guest clusters where the next clusters of the file would be, and no refcounts at all.
        poke(&path, p.l2 + 8 * 9, &((end + behind * 65536) | 1 << 63).to_be_bytes());
        poke(&path, p.l2 + 8 * 10, &((end + (behind + 1) * 65536) | 1 << 63).to_be_bytes());
        poke(&path, p.block, &[0; 64]);
        let before = disks_of(&path);
        let report = fix(&open(&path), Repair::All).unwrap();
        assert_kept(&before, &disks_of(&path), &format!("{behind} behind: {report:#?}"));
        fix(&open(&path), Repair::All).unwrap();
        assert_kept(&before, &disks_of(&path), &format!("{behind} behind, again"));
        std::fs::write(&path, sound).unwrap();
    }
}

#[test]
fn a_refcount_table_that_claims_too_much_hides_no_references() {
    let Some(qemu) = Qemu::find() else { return };
    let dir = Fixture::new();
    for (bits, clusters) in [(1, 256u32), (16, 2), (16, 4096), (64, 256)] {
        let path = dir.path("claims");
        qemu.create(&path, &format!("cluster_size=512,refcount_bits={bits}"), Some(100 << 10));
        qemu.io(&path, "qcow2", &["write -P 1 0 5k", "write -P 2 40k 512"]);
        poke(&path, 56, &clusters.to_be_bytes());
        repaired_at_once(&qemu, &path, &format!("{clusters} clusters of refcount table, {bits} bits"));
    }
}
