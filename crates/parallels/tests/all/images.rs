//! Images that QEMU and Parallels make, read by us, and the reverse.

use std::sync::Arc;

use qcow2_core::convert::ConvertOptions;
use qcow2_core::new_image::{Hosts, NewImage};
use qcow2_core::{Job, Mem, Raw};
use qcow2_engine::Image;
use qcow2_engine::convert::{ConvertTarget, convert};
use qcow2_engine::create::NewTarget;
use qcow2_parallels::NewParallels;
use qcow2_testkit::contract::LayerContract;
use qcow2_testkit::{Fixture, Qemu, skipped};

use crate::support::{bytes_of, disk, file, forged, image, memory, new, open, read};

fn contract(name: &str, file: &[u8], expected: &[u8]) {
    LayerContract { name, file, open: &open, expected, below: None }.check();
}

#[test]
fn images_of_qemu_keep_the_contract_of_layers() {
    let Some(qemu) = Qemu::find() else { return };
    let fixture = Fixture::new();
    let size = 5 * (1 << 20) + 512;
    let (expected, path) = (disk(size, 1), fixture.path("image"));
    let raw = fixture.file("raw", &expected);
    for options in ["cluster_size=1M", "cluster_size=64k", "cluster_size=31k"] {
        qemu.convert(&raw, "raw", &path, "parallels", &["-o", options]);
        contract(options, &std::fs::read(&path).unwrap(), &expected);
    }
    qemu.img(&["create", "-q", "-f", "parallels", path.to_str().unwrap(), &size.to_string()]).ok();
    contract("empty", &std::fs::read(&path).unwrap(), &vec![0; size as usize]);
}

#[test]
fn tables_that_count_sectors() {
    let Some(qemu) = Qemu::find() else { return };
    let fixture = Fixture::new();
    for tracks in [8, 63, 100] {
        let path = fixture.file("sectors", &forged(60, tracks));
        let expected = disk(60 * 512 * u64::from(tracks), 7);
        let written = image(file(&path), true);
        written.write_at(Mem::from(&expected[..]), 0).unwrap();
        written.close().unwrap();
        assert!(qemu.guest_bytes(&path, "parallels", &[]) == expected, "{tracks}");
        qemu.img(&["check", "-f", "parallels", path.to_str().unwrap()]).ok();
        contract("sectors", &std::fs::read(&path).unwrap(), &expected);
    }
}

#[test]
fn what_is_made_here_is_read_and_checked_by_qemu() {
    let Some(qemu) = Qemu::find() else { return };
    let fixture = Fixture::new();
    let mib = 1 << 20;
    for (size, cluster_size) in [
        (0, mib),
        (512, mib),
        (3 * mib - 512, 65536),
        (2 * mib + 512, 512),
        (130 * mib, mib),
        (5 * mib, 2048),
    ] {
        let what = format!("{size} bytes in clusters of {cluster_size}");
        let path = fixture.file("ours", &new(size, cluster_size));
        let name = path.to_str().unwrap();
        let theirs = fixture.path("theirs");
        let options = format!("cluster_size={cluster_size}");
        qemu.img(&[
            "create",
            "-q",
            "-f",
            "parallels",
            "-o",
            &options,
            theirs.to_str().unwrap(),
            &size.to_string(),
        ])
        .ok();
        assert!(
            std::fs::read(&path).unwrap() == std::fs::read(&theirs).unwrap(),
            "{what}: another empty image"
        );
        let written = image(file(&path), true);
        let mut expected = vec![0; size as usize];
        for (at, length) in [(size / 2, size / 3), (size - size / 4, size / 4), (0, size / 9)] {
            let data = disk(length, size + at);
            written.write_at(Mem::from(&data[..]), at).unwrap();
            expected[at as usize..][..data.len()].copy_from_slice(&data);
        }
        written.write_zeroes(size / 2, size / 8, true).unwrap();
        expected[(size / 2) as usize..][..(size / 8) as usize].fill(0);
        written.close().unwrap();
        qemu.img(&["check", "-f", "parallels", name]).ok();
        assert!(qemu.guest_bytes(&path, "parallels", &[]) == expected, "{what}");
        // QEMU goes on where we ended, and we where it did; what it discards leaves places that we give out.
        if size > 2 * mib && 65536 % cluster_size == 0 {
            qemu.io(&path, "parallels", &["write -P 3 1000k 2k", "discard 64k 128k"]);
            expected[1_024_000..][..2048].fill(3);
            expected[65536..65536 + 131_072].fill(0);
            assert!(read(vec![open(file(&path)).unwrap()]).unwrap() == expected, "{what}, after QEMU");
            let again = image(file(&path), true);
            again.write_at(Mem::from(&[8; 4096][..]), 65536).unwrap();
            expected[65536..][..4096].fill(8);
            again.close().unwrap();
            qemu.img(&["check", "-f", "parallels", name]).ok();
            assert!(qemu.guest_bytes(&path, "parallels", &[]) == expected, "{what}, after QEMU and us");
        }
    }
}

/// Small images that QEMU's suite carries.
#[test]
fn images_of_other_products() {
    let Some(qemu) = Qemu::find() else { return };
    let home = std::env::var_os("HOME").map(std::path::PathBuf::from).unwrap_or_default();
    let suite = ".cache/qcow2-ci/iotests/trixie/tests/qemu-iotests/sample_images";
    let fixture = Fixture::new();
    for name in ["parallels-v1", "parallels-v2", "parallels-with-bitmap"] {
        let packed = home.join(suite).join(format!("{name}.bz2"));
        let unpacked = std::process::Command::new("bunzip2").arg("-kc").arg(&packed).output();
        let Some(bytes) = unpacked.ok().filter(|out| out.status.success() && packed.exists()) else {
            skipped(format!("{} is not there", packed.display()));
            continue;
        };
        let path = fixture.file(name, &bytes.stdout);
        let mut layer = open(file(&path)).unwrap();
        let report = layer.as_checkable().unwrap().check(10, &Job::new()).unwrap();
        assert!(report.is_clean(), "{name}: {report:?}");
        if name.contains("bitmap") {
            // Its clusters are no leak, as QEMU has them, until the disk is changed.
            layer.make_writable(qcow2_core::DiskOptions::default()).unwrap();
            let writable = layer.as_writable().unwrap();
            writable.close().unwrap();
            assert!(std::fs::read(&path).unwrap() == bytes.stdout);
            writable.write_at(Mem::from(&[9; 512][..]), 0).unwrap();
            writable.close().unwrap();
            qemu.img(&["check", "-f", "parallels", path.to_str().unwrap()]).ok();
            qemu.io(&path, "parallels", &["read -P 9 0 512"]);
            continue;
        }
        assert!(read(vec![layer]).unwrap() == qemu.guest_bytes(&path, "parallels", &[]), "{name}");
    }
}

#[test]
fn conversions_into_new_images() {
    let Some(qemu) = Qemu::find() else { return };
    let fixture = Fixture::new();
    let size = 7 * (1 << 20) + 512;
    let expected = disk(size, 11);
    let raw = fixture.file("raw", &expected);
    let source = Image::new(vec![Box::new(Raw::new(memory(&expected)).unwrap())]).unwrap();
    for cluster_size in [1 << 20, 4 << 10] {
        let path = fixture.file("converted", b"");
        let image = Arc::new(NewParallels::new(size, cluster_size).unwrap());
        let target = ConvertTarget::New(NewTarget::Format { image, hosts: Hosts::from(file(&path)) });
        convert(&source, target, &ConvertOptions::default(), &Job::new()).unwrap();
        qemu.img(&["check", "-f", "parallels", path.to_str().unwrap()]).ok();
        assert!(qemu.guest_bytes(&path, "parallels", &[]) == expected, "{cluster_size}");
        assert!(read(vec![open(file(&path)).unwrap()]).unwrap() == expected);
        let theirs = fixture.path("theirs");
        qemu.convert(&raw, "raw", &theirs, "parallels", &["-o", &format!("cluster_size={cluster_size}")]);
        let length = |path: &std::path::Path| std::fs::metadata(path).unwrap().len();
        // QEMU gives a place to more than has data.
        assert!(length(&path) <= length(&theirs), "{cluster_size}");
    }
}

/// A disk that is written to before it is an image: a live clone's target.
#[test]
fn disks_that_become_images() {
    let storage = memory(b"");
    let (image, hosts) = (NewParallels::new(3 << 20, 65536).unwrap(), Hosts::from(Arc::clone(&storage)));
    let layer = image.disk(&hosts, &Job::new()).unwrap();
    let writable = layer.as_writable().unwrap();
    writable.write_at(Mem::from(&[3; 5000][..]), (2 << 20) - 100).unwrap();
    writable.close().unwrap();
    assert!(open(Arc::clone(&storage)).is_err(), "an image before its time");
    image.publish(&hosts).unwrap();
    let found = read(vec![open(Arc::clone(&storage)).unwrap()]).unwrap();
    assert!(found[(2 << 20) - 100..(2 << 20) + 4900] == [3; 5000]);
    assert_eq!(bytes_of(&*storage)[44..48], [0; 4]);
}
