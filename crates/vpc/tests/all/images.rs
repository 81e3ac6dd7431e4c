//! Images that QEMU and others make, read by us, and the reverse.

use qcow2_core::convert::ConvertOptions;
use qcow2_core::new_image::Hosts;
use qcow2_core::{Job, Mem, Raw};
use qcow2_engine::Image;
use qcow2_engine::convert::{ConvertTarget, convert};
use qcow2_engine::create::NewTarget;
use qcow2_testkit::contract::LayerContract;
use qcow2_testkit::{Fixture, Qemu, skipped};
use qcow2_vpc::{Subformat, new_vpc};

use crate::support::{disk, file, image, memory, new, open, options, read};

fn contract(name: &str, file: &[u8], expected: &[u8]) {
    LayerContract { name, file, open: &open, expected, below: None }.check();
}

#[test]
fn images_of_qemu_keep_the_contract_of_layers() {
    let Some(qemu) = Qemu::find() else { return };
    let fixture = Fixture::new();
    let data = disk(5 * (1 << 20) + 512, 1);
    let raw = fixture.file("raw", &data);
    for options in [
        "subformat=dynamic",
        "subformat=fixed",
        "subformat=dynamic,force_size=on",
        "subformat=fixed,force_size=on",
    ] {
        let path = fixture.path(options);
        qemu.convert(&raw, "raw", &path, "vpc", &["-o", options]);
        let expected = qemu.guest_bytes(&path, "vpc", &[]);
        assert!(
            expected[..data.len()] == data && (expected.len() == data.len()) == options.contains("force")
        );
        contract(options, &std::fs::read(&path).unwrap(), &expected);
    }
}

#[test]
fn what_is_made_here_is_read_by_qemu() {
    let Some(qemu) = Qemu::find() else { return };
    let fixture = Fixture::new();
    let mib = 1 << 20;
    for (size, subformat) in [
        (0, Subformat::Dynamic),
        (512, Subformat::Dynamic),
        (512, Subformat::Fixed),
        (3 * mib - 512, Subformat::Fixed),
        (3 * mib, Subformat::Dynamic),
        (33 * mib + 512, Subformat::Dynamic),
    ] {
        for force_size in [false, true] {
            let what = format!("{size} bytes, {subformat:?}, {force_size}");
            let path = fixture.file("ours", &new(size, subformat, force_size));
            let written = image(file(&path), true);
            let size = written.virtual_size();
            let mut expected = vec![0; size as usize];
            for (at, length) in [(size / 2, size / 3), (size - size / 4, size / 4), (0, size / 9)] {
                let data = disk(length, size + at);
                written.write_at(Mem::from(&data[..]), at).unwrap();
                expected[at as usize..][..data.len()].copy_from_slice(&data);
            }
            written.write_zeroes(size / 2, size / 8, true).unwrap();
            expected[(size / 2) as usize..][..(size / 8) as usize].fill(0);
            written.close().unwrap();
            assert!(qemu.guest_bytes(&path, "vpc", &[]) == expected, "{what}");
            // QEMU goes on where we ended, and we where it did.
            if size > mib {
                qemu.io(&path, "vpc", &["write -P 3 1000k 2k"]);
                expected[1_024_000..][..2048].fill(3);
                assert!(read(vec![open(file(&path)).unwrap()]).unwrap() == expected, "{what}, after QEMU");
            }
        }
    }
}

/// The size of new disks, and where their parts lie, is QEMU's.
#[test]
fn new_images_are_as_qemu_makes_them() {
    let Some(qemu) = Qemu::find() else { return };
    let fixture = Fixture::new();
    let path = fixture.path("theirs");
    for size in [
        0,
        512,
        1 << 20,
        3_000_320,
        10 << 20,
        100 << 20,
        504 << 20,
        1 << 30,
        8 << 30,
        127 << 30,
        130 << 30,
        2040 << 30,
    ] {
        for (force_size, option) in [(false, "force_size=off"), (true, "force_size=on")] {
            qemu.img(&["create", "-q", "-f", "vpc", "-o", option, path.to_str().unwrap(), &size.to_string()])
                .ok();
            let (mut theirs, mut ours) =
                (std::fs::read(&path).unwrap(), new(size, Subformat::Dynamic, force_size));
            // The time, the UUID and the checksum.
            for bytes in [&mut theirs, &mut ours] {
                let end = bytes.len() - 512;
                for at in [0, end] {
                    bytes[at + 24..at + 28].fill(0);
                    bytes[at + 64..at + 84].fill(0);
                }
            }
            assert!(theirs == ours, "{size} {option}");
        }
    }
}

/// Small images that QEMU's suite carries, of Virtual PC, Hyper-V and Disk2vhd.
#[test]
fn images_of_other_products() {
    let Some(qemu) = Qemu::find() else { return };
    let home = std::env::var_os("HOME").map(std::path::PathBuf::from).unwrap_or_default();
    let suite = ".cache/qcow2-ci/iotests/trixie/tests/qemu-iotests/sample_images";
    let fixture = Fixture::new();
    for (name, size) in [
        ("virtualpc-dynamic.vhd", 136_363_130_880),
        ("hyperv2012r2-dynamic.vhd", 136_365_211_648),
        ("d2v-zerofilled.vhd", 263_454_720),
    ] {
        let packed = home.join(suite).join(format!("{name}.bz2"));
        let unpacked = std::process::Command::new("bunzip2").arg("-kc").arg(&packed).output();
        let Some(bytes) = unpacked.ok().filter(|out| out.status.success() && packed.exists()) else {
            skipped(format!("{} is not there", packed.display()));
            continue;
        };
        let path = fixture.file(name, &bytes.stdout);
        let layer = open(file(&path)).unwrap();
        assert_eq!(layer.virtual_size(), size, "{name}");
        let mut segments = Vec::new();
        layer.plan(0..size, &mut segments).unwrap();
        let data = segments.iter().filter(|s| matches!(s.kind, qcow2_core::layer::SegmentKind::Data(_)));
        let stored: u64 = data.map(|segment| segment.length).sum();
        let map = qemu.map_json(&path, "vpc");
        let theirs: u64 = map
            .as_array()
            .unwrap()
            .iter()
            .filter(|run| run["data"] == true)
            .map(|run| run["length"].as_u64().unwrap())
            .sum();
        assert_eq!(stored, theirs, "{name}");
    }
}

#[test]
fn footers_of_511_bytes_and_entries_too_many() {
    let data = disk(1 << 20, 4);
    let mut bytes = new(1 << 20, Subformat::Fixed, true);
    bytes[..1 << 20].copy_from_slice(&data);
    bytes.pop();
    contract("511", &bytes, &data);
    let storage = memory(&bytes);
    let written = image(storage.clone(), true);
    written.write_at(Mem::from(&[9; 600][..]), (1 << 20) - 600).unwrap();
    written.resize((1 << 20) + 512).unwrap();
    written.close().unwrap();
    let mut expected = data;
    expected[(1 << 20) - 600..].fill(9);
    expected.extend([0; 512]);
    assert!(read(vec![open(storage).unwrap()]).unwrap() == expected);
    let mut bytes = new(2 << 20, Subformat::Dynamic, true);
    let header = qcow2_vpc::structures::Header::new(2);
    bytes[512..1536].copy_from_slice(header.bytes());
    contract("an entry too many", &bytes, &vec![0; 2 << 20]);
}

/// What a conversion makes is what QEMU's makes: as long, and with the same disk.
#[test]
fn conversions_into_new_images() {
    let Some(qemu) = Qemu::find() else { return };
    let fixture = Fixture::new();
    let size = 7 * (1 << 20) + 512;
    let data = disk(size, 11);
    let raw = fixture.file("raw", &data);
    let source = Image::new(vec![Box::new(Raw::new(memory(&data)).unwrap())]).unwrap();
    for (subformat, name) in [(Subformat::Dynamic, "dynamic"), (Subformat::Fixed, "fixed")] {
        for (force_size, force) in [(false, "off"), (true, "on")] {
            let path = fixture.file("converted", b"");
            let image = new_vpc(options(size, subformat, force_size)).unwrap();
            let target = ConvertTarget::New(NewTarget::Format { image, hosts: Hosts::from(file(&path)) });
            convert(&source, target, &ConvertOptions::default(), &Job::new()).unwrap();
            let theirs = fixture.path("theirs");
            let options = format!("subformat={name},force_size={force}");
            qemu.convert(&raw, "raw", &theirs, "vpc", &["-o", &options]);
            let expected = qemu.guest_bytes(&theirs, "vpc", &[]);
            assert!(qemu.guest_bytes(&path, "vpc", &[]) == expected, "{options}");
            assert!(read(vec![open(file(&path)).unwrap()]).unwrap() == expected, "{options}");
            let length = |path: &std::path::Path| std::fs::metadata(path).unwrap().len();
            assert_eq!(length(&path), length(&theirs), "{options}");
        }
    }
}

/// A disk that is written to before it is an image: a live clone's target.
#[test]
fn disks_that_become_images() {
    for subformat in [Subformat::Dynamic, Subformat::Fixed] {
        let storage = memory(b"");
        let image = new_vpc(options(5 << 20, subformat, true)).unwrap();
        let hosts = Hosts::from(std::sync::Arc::clone(&storage));
        let layer = image.disk(&hosts, &Job::new()).unwrap();
        let writable = layer.as_writable().unwrap();
        writable.write_at(Mem::from(&[3; 5000][..]), (2 << 20) - 100).unwrap();
        writable.flush().unwrap();
        assert!(open(std::sync::Arc::clone(&storage)).is_err(), "an image before its time");
        image.publish(&hosts).unwrap();
        let found = read(vec![open(storage).unwrap()]).unwrap();
        assert!(found[(2 << 20) - 100..(2 << 20) + 4900] == [3; 5000] && found.len() == 5 << 20);
    }
}
