//! Damaged images, and their repair.

use std::sync::Arc;

use qcow2_core::check::Repair;
use qcow2_core::{ErrorKind, Job, Mem, Storage};
use qcow2_parallels::{OpenOptions, inspect, inspect_bytes};
use qcow2_testkit::{Fixture, Qemu};

use crate::support::{bytes_of, disk, image, memory, new, open, read};

const CLUSTER: u64 = 64 << 10;

/// An image with data, as bytes, and the data.
fn filled() -> (Vec<u8>, Vec<u8>) {
    let storage = memory(&new(12 * CLUSTER, CLUSTER));
    let mut expected = disk(12 * CLUSTER, 2);
    for (index, cluster) in expected.chunks_mut(CLUSTER as usize).enumerate() {
        cluster[..100].fill(index as u8 + 1);
    }
    let written = image(Arc::clone(&storage), true);
    written.write_at(Mem::from(&expected[..]), 0).unwrap();
    written.close().unwrap();
    (bytes_of(&*storage), expected)
}

fn with(bytes: &[u8], fields: &[(usize, u32)]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    for (at, value) in fields {
        bytes[*at..at + 4].copy_from_slice(&value.to_le_bytes());
    }
    bytes
}

fn damaged() -> Vec<(&'static str, Vec<u8>)> {
    let (sound, _) = filled();
    let mut long = sound.clone();
    long.extend(vec![7; 100_000]);
    vec![
        ("sound", sound.clone()),
        ("not closed", with(&sound, &[(44, 0x746f_6e59)])),
        ("no data_off", with(&sound, &[(48, 0)])),
        ("data_off outside", with(&sound, &[(48, 1 << 30)])),
        ("leak", long),
        ("outside", with(&sound, &[(64 + 4 * 3, 1000)])),
        ("duplicate", with(&sound, &[(64 + 4 * 5, 2)])),
        ("cut", sound[..sound.len() - 70_000].to_vec()),
        ("all of it", {
            let mut bytes =
                with(&sound, &[(44, 0x746f_6e59), (64 + 4 * 5, 2), (64 + 4 * 3, 1000), (64 + 4 * 11, 0)]);
            bytes.extend([1; 100]);
            bytes
        }),
    ]
}

#[test]
fn what_a_check_finds_is_what_qemu_finds() {
    let Some(qemu) = Qemu::find() else { return };
    let fixture = Fixture::new();
    for (what, bytes) in damaged() {
        let path = fixture.file("damaged", &bytes);
        let theirs = qemu.img(&["check", "-f", "parallels", path.to_str().unwrap()]);
        let storage = memory(&bytes);
        let layer = open(Arc::clone(&storage)).unwrap();
        let report = layer.as_checkable().unwrap().check(10, &Job::new()).unwrap();
        let lines: Vec<_> = report.findings.iter().map(ToString::to_string).collect();
        // QEMU's tool dies where entries lead outside.
        let died = theirs.code == -1;
        let said: Vec<_> = theirs.stderr.lines().filter(|line| !line.starts_with("qemu-img")).collect();
        assert!(
            if died {
                lines.starts_with(&said.iter().map(|&line| line.to_owned()).collect::<Vec<_>>())
            } else {
                lines == said
            },
            "{what}: {lines:?} {theirs:?}"
        );
        let end = format!("Image end offset: {}", report.image_end_offset.unwrap());
        assert!(died || theirs.stdout.contains(&end), "{what}: {end}, {theirs:?}");
        assert_eq!(report.is_clean(), theirs.code == 0, "{what}");
        assert!(bytes_of(&*storage) == bytes, "{what}: a check changes nothing");
    }
}

#[test]
fn what_a_repair_leaves_is_what_qemus_leaves() {
    let Some(qemu) = Qemu::find() else { return };
    let fixture = Fixture::new();
    for (mode, repair) in [("leaks", Repair::Leaks), ("all", Repair::All)] {
        for (what, bytes) in damaged() {
            let path = fixture.file("damaged", &bytes);
            let name = path.to_str().unwrap();
            let theirs = qemu.img(&["check", "-r", mode, "-f", "parallels", name]);
            let storage = memory(&bytes);
            let layer = open(Arc::clone(&storage)).unwrap();
            let report = layer.as_checkable().unwrap().repair(repair, 10, &Job::new()).unwrap();
            let fixed = report.corruptions_fixed + report.leaks_fixed;
            let counted = |what: &str| theirs.stdout.contains(what);
            // QEMU's tool dies where entries lead outside and are not repaired.
            if theirs.code != -1 {
                assert_eq!(fixed > 0, counted("were found and repaired"), "{what} {mode}: {theirs:?}");
            }
            let ours = fixture.file("ours", &bytes_of(&*storage));
            let again = qemu.img(&["check", "-f", "parallels", ours.to_str().unwrap()]);
            if repair == Repair::All {
                assert_eq!(again.code, 0, "{what}: {again:?}");
                assert_eq!(qemu.img(&["check", "-f", "parallels", name]).code, 0, "{what}");
            } else {
                // The mark stays: what else is wrong was not repaired.
                assert!(!again.stderr.contains("leaked"), "{what}: {again:?}");
            }
            if theirs.code == -1 {
                continue;
            }
            let disk = read(vec![open(storage).unwrap()]);
            if let Ok(disk) = disk {
                assert!(disk == qemu.guest_bytes(&path, "parallels", &[]), "{what} {mode}: another disk");
            }
        }
    }
}

#[test]
fn damage_is_named_where_it_is_met() {
    let (sound, expected) = filled();
    for entry in [1000u32, 0xffff_ffff] {
        let error = read(vec![open(memory(&with(&sound, &[(76, entry)]))).unwrap()]).unwrap_err();
        let found = (error.kind(), error.field(), error.offset());
        assert_eq!(found, (ErrorKind::Corrupt, Some("BAT entry"), Some(76)), "{entry}");
    }
    // Nothing is written where that could hit another block.
    for fields in [[(64, 0), (76, 1000)], [(64, 0), (76, 3)]] {
        let written = image(memory(&with(&sound, &fields)), true);
        let error = written.write_at(Mem::from(&[1; 512][..]), 0).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{fields:?}");
    }
    assert!(read(vec![open(memory(&sound)).unwrap()]).unwrap() == expected);
    assert_eq!(open(memory(&sound[..80])).unwrap_err().kind(), ErrorKind::Corrupt);
}

#[test]
fn what_speaks_against_an_image_is_found() {
    let (sound, _) = filled();
    let usual = OpenOptions::default();
    let tight = OpenOptions { max_virtual_size: 4096, max_metadata_bytes: 3, ..OpenOptions::default() };
    for (bytes, limits, expected) in [
        (sound.clone(), &usual, &[][..]),
        (sound.clone(), &tight, &["LIMIT", "LIMIT"]),
        (with(&sound, &[(44, 0x746f_6e59)]), &usual, &["DIRTY_BIT"]),
        (with(&sound, &[(48, 0)]), &usual, &["TABLE_OUT_OF_BOUNDS"]),
        (with(&sound, &[(28, 0)]), &usual, &["HEADER_INVALID"]),
        (with(&sound, &[(16, 9)]), &usual, &["UNKNOWN_FEATURE"]),
        (sound[..80].to_vec(), &usual, &["TABLE_OUT_OF_BOUNDS", "TABLE_OUT_OF_BOUNDS"]),
    ] {
        let storage: Arc<dyn Storage> = memory(&bytes);
        let found = inspect(&*storage, limits).unwrap();
        let codes: Vec<_> = found.findings.iter().map(|finding| finding.code.as_str()).collect();
        assert_eq!(codes, expected);
    }
    assert!(inspect_bytes(&sound[..64], None, &usual).findings.is_empty());
    for options in [
        OpenOptions { max_virtual_size: 12 * CLUSTER - 1, ..OpenOptions::default() },
        OpenOptions { max_metadata_bytes: 47, ..OpenOptions::default() },
    ] {
        assert_eq!(qcow2_parallels::open(memory(&sound), &options).unwrap_err().kind(), ErrorKind::Limit);
    }
}
