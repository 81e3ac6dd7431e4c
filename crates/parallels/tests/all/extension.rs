//! The format extension, whose bitmaps are wrong as soon as the disk is another one.

use qcow2_core::check::Repair;
use qcow2_core::{Disk, DiskOptions, ErrorKind, Job, Mem};
use qcow2_engine::Image;
use qcow2_testkit::crash::{Durability, Session};
use qcow2_testkit::{Fixture, Qemu, Sparse};

use crate::support::{bytes_of, image, memory, new, open, read};

const CLUSTER: usize = 65536;
const CLOSED: [u8; 4] = *b"v2.1";

/// An image with data, and behind it an extension with these features: magic, flags, bytes of data.
fn extended(features: &[(u64, u64, u32)], mark: [u8; 4]) -> Vec<u8> {
    let storage = memory(&new(3 << 20, CLUSTER as u64));
    let disk = image(storage.clone(), true);
    disk.write_at(Mem::from(&[1; 5000][..]), 100).unwrap();
    disk.close().unwrap();
    let mut bytes = bytes_of(&*storage);
    let start = bytes.len().next_multiple_of(CLUSTER);
    bytes.resize(start, 0);
    bytes.extend(0xab23_4cef_23dc_ea87_u64.to_le_bytes());
    bytes.extend([0; 16]);
    for (magic, flags, size) in features {
        bytes.extend([magic.to_le_bytes(), flags.to_le_bytes()].concat());
        bytes.extend([size.to_le_bytes(), [0; 4]].concat());
        bytes.extend(vec![5; size.next_multiple_of(8) as usize]);
    }
    bytes.resize(start + CLUSTER, 0);
    bytes[44..48].copy_from_slice(&mark);
    bytes[56..64].copy_from_slice(&(start as u64 / 512).to_le_bytes());
    bytes
}

type Change<'a> = &'a dyn Fn(&Image);

const BITMAP: (u64, u64, u32) = (0x2038_5fae_252c_b34a, 0, 41);

fn guest(bytes: &[u8]) -> Vec<u8> {
    read(vec![open(memory(bytes)).unwrap()]).unwrap()
}

#[test]
fn an_image_that_is_not_changed_keeps_its_extension() {
    let bytes = extended(&[BITMAP], CLOSED);
    let storage = memory(&bytes);
    let disk = image(storage.clone(), true);
    assert_eq!(bytes_of(&*storage)[44..48], *b"Ynot");
    disk.flush().unwrap();
    disk.close().unwrap();
    assert!(bytes_of(&*storage) == bytes);
    let report = open(storage.clone()).unwrap().as_checkable().unwrap().repair(Repair::All, 10, &Job::new());
    assert!(report.unwrap().is_clean() && bytes_of(&*storage) == bytes);
}

#[test]
fn whatever_changes_the_disk_drops_the_extension() {
    let changes: [(&str, Change<'_>); 4] = [
        ("write", &|disk| disk.write_at(Mem::from(&[7; 900][..]), 70_000).unwrap()),
        ("zeroes", &|disk| disk.write_zeroes(1000, 900, false).unwrap()),
        ("discard", &|disk| disk.discard(0, 4096).unwrap()),
        ("grow", &|disk| disk.grow(4 << 20).unwrap()),
    ];
    let qemu = Qemu::find();
    let fixture = Fixture::new();
    // One that nobody has to keep goes with the bitmap.
    let features = [BITMAP, (77, 0, 8), BITMAP];
    for (what, change) in changes {
        let storage = memory(&extended(&features, CLOSED));
        let disk = image(storage.clone(), true);
        change(&disk);
        assert_eq!(bytes_of(&*storage)[56..64], [0; 8], "{what}");
        disk.close().unwrap();
        let bytes = bytes_of(&*storage);
        assert_eq!((&bytes[44..48], &bytes[56..64]), (&[0; 4][..], &[0; 8][..]), "{what}");
        let Some(qemu) = &qemu else { continue };
        let path = fixture.file("image", &bytes);
        assert!(qemu.guest_bytes(&path, "parallels", &[]) == guest(&bytes), "{what}");
    }
}

/// The bitmap is gone, durably, before the first byte of the disk is another one.
#[test]
fn no_power_cut_leaves_a_bitmap_of_another_disk() {
    let old = extended(&[BITMAP], CLOSED);
    let disk = guest(&old);
    let mut file = Sparse::new(old.len() as u64);
    file.write(0, &old);
    let (mut session, files) = Session::new(vec![file], Durability::Flush);
    let written = image(files[0].clone(), true);
    for (at, byte) in [(100, 9), (400_000, 8), (2_000_000, 7)] {
        written.write_at(Mem::from(&[byte; 3000][..]), at).unwrap();
        written.flush().unwrap();
    }
    written.close().unwrap();
    let (mut kept, mut dropped) = (0, 0);
    for state in session.states(1, 100) {
        let bytes = state.files[0].to_vec();
        if bytes[56..64] == [0; 8] {
            dropped += 1;
        } else {
            kept += 1;
            assert!(guest(&bytes) == disk, "cut {}, {:?}", state.cut, state.shape);
            assert!(bytes[old.len() - CLUSTER..old.len()] == old[old.len() - CLUSTER..]);
        }
    }
    assert!(kept > 0 && dropped > kept, "{kept}, {dropped}");
}

#[test]
fn what_others_have_to_keep_is_not_dropped() {
    let mut damaged = extended(&[BITMAP], CLOSED);
    let start = damaged.len() - CLUSTER;
    damaged[start] = 0;
    let beyond = extended(&[(BITMAP.0, 0, 40)], CLOSED);
    let mut endless = beyond.clone();
    endless[start + 40..start + 44].fill(0xff);
    let mut outside = beyond;
    outside[56..64].copy_from_slice(&(1u64 << 50).to_le_bytes());
    for (what, bytes, kind) in [
        ("a necessary bitmap", extended(&[(BITMAP.0, 1, 8)], CLOSED), ErrorKind::UnsupportedFeature),
        ("an unknown one to keep", extended(&[BITMAP, (77, 2, 8)], CLOSED), ErrorKind::UnsupportedFeature),
        ("many", extended(&[(77, 0, 0); 2000], CLOSED), ErrorKind::Limit),
        ("no magic", damaged, ErrorKind::Corrupt),
        ("no end", endless, ErrorKind::Corrupt),
        ("no cluster", outside, ErrorKind::Corrupt),
    ] {
        let storage = memory(&bytes);
        let error = open(storage.clone()).unwrap().make_writable(DiskOptions::default()).unwrap_err();
        assert_eq!((error.kind(), error.offset().is_some()), (kind, true), "{what}: {error}");
        assert!(bytes_of(&*storage) == bytes, "{what}");
    }
}

/// Nobody knows what was written since the bitmap was.
#[test]
fn the_bitmap_of_an_image_that_was_not_closed_is_dropped() {
    let bytes = extended(&[BITMAP], *b"Ynot");
    for repair in [false, true] {
        let storage = memory(&bytes);
        let mut layer = open(storage.clone()).unwrap();
        if repair {
            layer.as_checkable().unwrap().repair(Repair::All, 10, &Job::new()).unwrap();
        } else {
            layer.make_writable(DiskOptions::default()).unwrap();
            layer.as_writable().unwrap().close().unwrap();
        }
        let found = bytes_of(&*storage);
        assert_eq!((&found[44..48], &found[56..64]), (&[0; 4][..], &[0; 8][..]));
        assert!(guest(&found) == guest(&bytes) && found.len() < bytes.len());
    }
}
