//! The check against `qemu-img check`: the same counters for the same image, sound or damaged in many ways.

use crate::damage;

use std::path::Path;
use std::sync::Arc;

use qcow2_engine::check::{CheckOptions, CheckReport, Finding, FindingCode, check};
use qcow2_engine::create::{CreateOptions, Preallocation, create};
use qcow2_engine::image::read_header;
use qcow2_engine::storage::{Access, FileStorage, MemoryStorage};
use qcow2_engine::{ErrorKind, Job, Mem, MemMut, Result, Storage, StorageExt};
use qcow2_testkit::{Fixture, Qemu};

use damage::{IMAGES, Rng, be64, damage, image, poke, table_entries};

fn run(storage: &dyn Storage, options: &CheckOptions) -> Result<CheckReport> {
    check(storage, &read_header(storage)?, options, &Job::new())
}

fn ours(path: &Path) -> Result<CheckReport> {
    run(&FileStorage::open(path, Access::ReadOnly)?, &CheckOptions::default())
}

/// Holds our report against QEMU's document and exit code. Returns the exit code.
#[track_caller]
fn compare(qemu: &Qemu, path: &Path, what: &str) -> i32 {
    let args = ["check", "-f", "qcow2", "--output=json", path.to_str().unwrap()];
    let theirs = qemu.img(&args);
    let report = ours(path);
    if theirs.code != 0 && report.as_ref().is_err_and(|e| e.kind() == ErrorKind::InvalidHeader) {
        // A header that we refuse, and in which QEMU finds fault as well.
        return 1;
    }
    let Some(document) = theirs.stdout.find('{').map(|_| qemu.check_json(path)) else {
        assert!(theirs.code != 0 && theirs.code != 2 && theirs.code != 3, "{what}: {theirs:?}");
        if theirs.code == 1 {
            // Where QEMU tries to read a snapshot's L1 table at no offset of a file, we go on.
            let nowhere = |f: &Finding| f.message.contains("lies behind the largest file offset");
            let unusable = |r: &CheckReport| r.failure.is_some() || r.findings.iter().any(nowhere);
            let unusable = report.as_ref().map_or(true, unusable);
            assert!(unusable, "{what}: QEMU gives up:\n{}\nours: {report:#?}", theirs.stderr);
        }
        return theirs.code;
    };
    let report = report.unwrap_or_else(|e| panic!("{what}: {e}\n{theirs:?}"));
    // What the end of the file cuts of a table reads as zeroes for QEMU, which does not tell of it.
    let cut = |f: &&Finding| {
        let told = theirs.stderr.contains(&f.to_string());
        !told && (f.message.ends_with("is incomplete") || f.message.starts_with("the file ends inside"))
    };
    let cut = report.findings.iter().filter(cut).count() as u64;
    let counters = [
        ("check-errors", report.check_errors),
        ("corruptions", report.corruptions - cut),
        ("leaks", report.leaks),
        ("image-end-offset", report.image_end_offset.unwrap_or(0)),
        ("total-clusters", report.total_clusters),
        ("allocated-clusters", report.allocated_clusters),
        ("fragmented-clusters", report.fragmented_clusters),
        ("compressed-clusters", report.compressed_clusters),
    ];
    for (name, value) in counters {
        let expected = document.get(name).and_then(|v| v.as_u64()).unwrap_or(0);
        assert_eq!(value, expected, "{what}: {name}\n{}\n{:#?}", theirs.stderr, report.findings);
    }
    assert!(report.failure.is_none(), "{what}: {:?}", report.failure);
    let code = match (report.check_errors, report.corruptions - cut, report.leaks) {
        (1.., ..) => 1,
        (_, 1.., _) => 2,
        (_, _, 1..) => 3,
        _ => 0,
    };
    assert_eq!(code, theirs.code, "{what}");
    assert_eq!(code == 0 && cut == 0, report.is_clean());
    let kept = report.findings.len() as u64 + report.omitted_findings;
    assert_eq!(kept, report.check_errors + report.corruptions + report.leaks, "{what}");
    code
}

#[test]
fn sound_images_of_every_geometry_are_clean() {
    let Some(qemu) = Qemu::find() else { return };
    let dir = Fixture::new();
    for (name, cluster_size, options, features) in IMAGES {
        let path = image(&qemu, &dir, name, *cluster_size, options, features);
        assert_eq!(compare(&qemu, &path, name), 0);
        std::fs::remove_file(path).unwrap();
    }
}

#[test]
fn findings_name_code_place_and_value_as_qemu_does() {
    let Some(qemu) = Qemu::find() else { return };
    let dir = Fixture::new();
    let path = dir.path("image");
    qemu.create(&path, "", Some(64 << 20));
    qemu.io(&path, "qcow2", &["write 0 192k"]);
    let sound = std::fs::read(&path).unwrap();
    let l1 = be64(&sound, 40);
    let l2 = be64(&sound, l1) & !(1 << 63);
    let refcounts = be64(&sound, be64(&sound, 48));
    let data = be64(&sound, l2) & !(1 << 63);
    let cluster = data >> 16;
    // The first two guest clusters share a host cluster, the third is unaligned, and a cluster that nobody uses is counted.
    poke(&path, l2 + 8, &sound[l2 as usize..][..8]);
    poke(&path, l2 + 16, &(1 << 63 | (data + 512)).to_be_bytes());
    poke(&path, l1, &l2.to_be_bytes());
    poke(&path, refcounts + 2 * (cluster + 2), &7u16.to_be_bytes());
    let theirs = qemu.img(&["check", path.to_str().unwrap()]);
    let report = ours(&path).unwrap();
    let lines: Vec<String> = report.findings.iter().map(ToString::to_string).collect();
    for line in &lines {
        assert!(theirs.stderr.contains(line.as_str()), "{line}\n{}", theirs.stderr);
    }
    let codes: Vec<_> = report.findings.iter().map(|f| (f.code, f.offset)).collect();
    let expected = [
        (FindingCode::ClusterUnaligned, Some(data + 512)),
        (FindingCode::RefcountTooLow, Some(data)),
        (FindingCode::Leak, Some((cluster + 2) << 16)),
        (FindingCode::L1Copied, Some(l2)),
    ];
    assert_eq!(codes, expected, "{lines:#?}");
    assert_eq!((report.corruptions, report.leaks), (3, 1));

    let few = CheckOptions { max_findings: 2, ..CheckOptions::default() };
    let report = run(&FileStorage::open(&path, Access::ReadOnly).unwrap(), &few).unwrap();
    assert_eq!((report.findings.len(), report.omitted_findings, report.corruptions), (2, 2, 3));
}

#[test]
fn an_encryption_header_is_referenced() {
    let Some(qemu) = Qemu::find() else { return };
    let dir = Fixture::new();
    let path = dir.path("luks");
    let secret = "secret,id=s,data=a";
    let options = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10";
    let p = path.to_str().unwrap();
    qemu.img(&["create", "-q", "-f", "qcow2", "--object", secret, "-o", options, p, "1M"]).ok();
    assert!(ours(&path).unwrap().is_clean());
}

#[test]
fn limits_and_cancellation_end_the_check() {
    // An image that claims references all over a large sparse file, without any tool.
    let storage = MemoryStorage::new();
    let (l1, l2) = (1 << 16, 2 << 16);
    let mut header = [0u8; 104];
    header[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
    header[23] = 16;
    header[24..32].copy_from_slice(&(512u64 << 20).to_be_bytes());
    header[39] = 1;
    header[40..48].copy_from_slice(&u64::to_be_bytes(l1));
    header[99] = 4;
    header[103] = 104;
    storage.write_all_at(Mem::from(&header[..]), 0).unwrap();
    storage.write_all_at(Mem::from(&u64::to_be_bytes(l2)[..]), l1).unwrap();
    for i in 0..8192u64 {
        let entry = i << 30;
        storage.write_all_at(Mem::from(&entry.to_be_bytes()[..]), l2 + 8 * i).unwrap();
    }
    storage.set_len(8192 << 30).unwrap();
    let mut options = CheckOptions::default();
    let report = run(&storage, &options).unwrap();
    assert!(report.corruptions >= 8191 && report.failure.is_none());
    options.limits.max_memory = 32 << 20;
    assert_eq!(run(&storage, &options).unwrap_err().kind(), ErrorKind::Limit);

    let job = Job::new();
    job.cancel();
    let header = read_header(&storage).unwrap();
    let error = check(&storage, &header, &CheckOptions::default(), &job).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Aborted);
}

#[test]
fn a_table_that_is_referred_to_without_end_is_not_read_without_end() {
    let storage = MemoryStorage::new();
    let options = CreateOptions { size: 1 << 50, cluster_size: 2 << 20, ..CreateOptions::default() };
    let storage: Arc<dyn Storage> = Arc::new(storage);
    create(storage.clone(), None, &options, &Job::new()).unwrap();
    let header = read_header(&*storage).unwrap();
    let l1 = header.l1_table_offset.get();
    let table = (l1 | 1 << 63).to_be_bytes().repeat(header.l1_size as usize);
    storage.write_all_at(Mem::from(&table[..]), l1).unwrap();
    let report = run(&*storage, &CheckOptions::default()).unwrap();
    assert_eq!(report.failure.unwrap().kind(), ErrorKind::Corrupt);
    // Behind the end of the file there is nothing to read.
    let table = (1u64 << 50 | 1 << 63).to_be_bytes().repeat(header.l1_size as usize);
    storage.write_all_at(Mem::from(&table[..]), l1).unwrap();
    let report = run(&*storage, &CheckOptions::default()).unwrap();
    assert!(report.failure.is_none());
    assert_eq!(report.corruptions, 2 * u64::from(header.l1_size));
}

/// A small image without any tool: its bytes.
fn own_image(cluster_size: u64, extended_l2: bool, refcount_bits: u32) -> Vec<u8> {
    let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::new());
    let options = CreateOptions {
        size: 40 * cluster_size,
        cluster_size,
        extended_l2,
        refcount_bits,
        preallocation: Preallocation::Metadata,
        ..CreateOptions::default()
    };
    create(storage.clone(), None, &options, &Job::new()).unwrap();
    let mut bytes = vec![0; storage.len().unwrap() as usize];
    storage.read_exact_at(MemMut::from(&mut bytes[..]), 0).unwrap();
    bytes
}

#[test]
fn any_damage_gives_a_report_or_an_error() {
    let mut rng = Rng(2);
    let mut options = CheckOptions::default();
    options.limits.max_memory = 64 << 20;
    let mut outcomes = [0; 3];
    for (cluster_size, extended_l2, refcount_bits) in [(512, false, 1), (4096, false, 64), (16384, true, 16)]
    {
        let sound = own_image(cluster_size, extended_l2, refcount_bits);
        for _ in 0..700 {
            let storage = MemoryStorage::new();
            storage.write_all_at(Mem::from(&sound[..]), 0).unwrap();
            for _ in 0..=rng.below(4) {
                let from = if rng.below(2) == 0 { 120 } else { sound.len() as u64 - 8 };
                let at = rng.below(from) & !rng.below(8);
                let new = damage(&mut rng, be64(&sound, at), cluster_size, sound.len() as u64);
                storage.write_all_at(Mem::from(&new.to_be_bytes()[..]), at).unwrap();
            }
            match run(&storage, &options) {
                Err(_) => outcomes[0] += 1,
                Ok(report) if report.is_clean() => outcomes[1] += 1,
                Ok(_) => outcomes[2] += 1,
            }
        }
    }
    assert!(outcomes.iter().all(|n| *n > 100), "{outcomes:?}");
}

#[test]
fn reading_ahead_changes_nothing() {
    let Some(qemu) = Qemu::find() else { return };
    let dir = Fixture::new();
    let path = dir.path("image");
    qemu.create(&path, "cluster_size=512,preallocation=metadata", Some(4 << 20));
    let sound = std::fs::read(&path).unwrap();
    let mut rng = Rng(3);
    let entries = table_entries(&sound);
    for _ in 0..20 {
        let at = entries[rng.below(entries.len() as u64) as usize];
        poke(&path, at, &damage(&mut rng, be64(&sound, at), 512, sound.len() as u64).to_be_bytes());
    }
    let storage = FileStorage::open(&path, Access::ReadOnly).unwrap();
    let reports = [0, 1, 3, 64].map(|readers| {
        let report = run(&storage, &CheckOptions { readers, ..CheckOptions::default() }).unwrap();
        assert!(report.corruptions > 0);
        format!("{report:?}")
    });
    assert!(reports.iter().all(|r| *r == reports[0]));
}

#[test]
fn progress_ends_at_its_total() {
    let Some(qemu) = Qemu::find() else { return };
    let dir = Fixture::new();
    let path = image(&qemu, &dir, "image", 512, "", &["snapshots"]);
    let storage = FileStorage::open(&path, Access::ReadOnly).unwrap();
    let job = Job::new();
    check(&storage, &read_header(&storage).unwrap(), &CheckOptions::default(), &job).unwrap();
    let (current, total) = job.progress();
    assert_eq!((current, total), (total, 3 * (200 * 512 + 512)));
}

#[test]
fn damaged_images_give_the_same_counters() {
    let Some(qemu) = Qemu::find() else { return };
    let dir = Fixture::new();
    let mut codes = std::collections::BTreeMap::new();
    for (name, cluster_size, options, features) in IMAGES.iter().filter(|image| image.1 < 1 << 20) {
        let path = image(&qemu, &dir, name, *cluster_size, options, features);
        let sound = std::fs::read(&path).unwrap();
        let entries = table_entries(&sound);
        let used: Vec<_> = entries.iter().copied().filter(|at| be64(&sound, *at) != 0).collect();
        let mut rng = Rng(cluster_size ^ 0x9e37_79b9);
        for round in 0..ROUNDS {
            std::fs::write(&path, &sound).unwrap();
            let mut what = format!("{name} {round}:");
            for _ in 0..=rng.below(3) {
                let from = if rng.below(4) == 0 { &entries } else { &used };
                let at = from[rng.below(from.len() as u64) as usize];
                let old = be64(&sound, at);
                let new = damage(&mut rng, old, *cluster_size, sound.len() as u64);
                what += &format!(" {at:#x}: {old:#x} -> {new:#x}");
                poke(&path, at, &new.to_be_bytes());
            }
            if rng.below(8) == 0 {
                let length = rng.below(sound.len() as u64 + 3 * cluster_size);
                what += &format!(" length {length}");
                std::fs::File::options().write(true).open(&path).unwrap().set_len(length).unwrap();
            }
            *codes.entry(compare(&qemu, &path, &what)).or_insert(0) += 1;
        }
        std::fs::remove_file(path).unwrap();
    }
    // Damage that nobody notices, failures, corruptions and leaks: all of them must have been among it.
    assert!((0..=3).all(|code| codes.contains_key(&code)), "{codes:?}");
}

/// Damages per image.
const ROUNDS: u32 = 8;
