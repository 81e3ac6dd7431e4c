//! New images: held against those of QEMU, and read by it.

use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::Arc;

use qcow2_core::storage::{Access, Overwrite};
use qcow2_core::{Chain, ErrorKind, GuestSource, Job, Layer, NewImage, Raw};
use qcow2_engine::Image;
use qcow2_engine::convert::{ConvertOptions, Delta};
use qcow2_engine::files::{ConvertJob, Destination, NewDisk, Target, create};
use qcow2_testkit::{Fixture, Qemu};
use qcow2_vmdk::{AdapterType, CreateOptions, NewVmdk, Parent, Subformat};

use crate::support::{chain, disk, file, guest, open};

fn target(path: &Path) -> Target {
    Target { path: path.to_owned(), overwrite: Overwrite::Refuse, in_use: Vec::new() }
}

fn new_disk(options: CreateOptions, path: &Path) -> NewDisk {
    NewDisk::Format(Arc::new(NewVmdk::new(options, Some(path)).unwrap()))
}

pub(crate) fn convert(source: &Image, options: CreateOptions, path: &Path, how: ConvertOptions) {
    let job = ConvertJob {
        sources: &[source],
        start: None,
        length: None,
        salvage: false,
        bitmaps: None,
        options: how,
    };
    job.run(Destination::New(&target(path), new_disk(options, path)), &Job::new()).unwrap();
}

pub(crate) fn raw(path: &Path) -> Image {
    Image::new(vec![Box::new(Raw::new(file(path, Access::ReadOnly)).unwrap())]).unwrap()
}

/// The bytes of an image and its extents; the digits of CIDs are replaced.
fn files(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let mut found: Vec<_> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| {
            let entry = entry.unwrap();
            let mut bytes = std::fs::read(entry.path()).unwrap();
            // Descriptors stand in front.
            let front = &bytes[..bytes.len().min(4096)];
            if let Some(at) = front.windows(5).position(|word| word == b"\nCID=") {
                let digits = bytes[at + 5..].iter().take_while(|byte| **byte != b'\n').count();
                bytes.splice(at + 5..at + 5 + digits, *b"........");
                // A CID of fewer digits moves the rest of an embedded descriptor.
                if at > 512 {
                    let fill = bytes[at..].iter().position(|byte| *byte == 0).unwrap() + at;
                    bytes.splice(fill..fill + 8 - digits, []);
                }
            }
            (entry.file_name().into_string().unwrap(), bytes)
        })
        .collect();
    found.sort();
    found
}

#[test]
fn an_empty_image_has_the_bytes_of_qemus() {
    let Some(qemu) = Qemu::find() else { return };
    for (options, line) in [
        (CreateOptions::default(), "subformat=monolithicSparse"),
        (
            CreateOptions { zeroed_grain: true, compat6: true, ..Default::default() },
            "zeroed_grain=on,compat6=on",
        ),
        (
            CreateOptions { subformat: Subformat::MonolithicFlat, ..Default::default() },
            "subformat=monolithicFlat",
        ),
        (
            CreateOptions {
                subformat: Subformat::TwoGbMaxExtentSparse,
                adapter_type: AdapterType::LsiLogic,
                hardware_version: Some("10".to_owned()),
                tools_version: Some("12".to_owned()),
                ..Default::default()
            },
            "subformat=twoGbMaxExtentSparse,adapter_type=lsilogic,hwversion=10,toolsversion=12",
        ),
        (
            CreateOptions {
                subformat: Subformat::TwoGbMaxExtentFlat,
                adapter_type: AdapterType::LegacyEsx,
                ..Default::default()
            },
            "subformat=twoGbMaxExtentFlat,adapter_type=legacyESX",
        ),
    ] {
        for size in [512, 1_000_000, 5 << 20, (4 << 30) + 512] {
            // Files of 4 GiB are compared by the others.
            if size > 1 << 30 && options.subformat.is_flat() {
                continue;
            }
            let (ours, theirs) = (Fixture::new(), Fixture::new());
            let path = ours.path("disk.v1.vmdk");
            create(&target(&path), &new_disk(CreateOptions { size, ..options.clone() }, &path), &Job::new())
                .unwrap();
            let path = theirs.path("disk.v1.vmdk");
            qemu.img(&["create", "-q", "-f", "vmdk", "-o", line, path.to_str().unwrap(), &size.to_string()])
                .ok();
            let (ours, theirs) = (files(ours.dir()), files(theirs.dir()));
            assert_eq!(ours.len(), theirs.len(), "{line}, {size}");
            for ((name, a), (other, b)) in ours.iter().zip(&theirs) {
                assert!(
                    name == other && a == b,
                    "{line}, {size}: {name} {other}: {} {} bytes",
                    a.len(),
                    b.len()
                );
            }
        }
    }
}

#[test]
fn what_is_converted_is_what_qemu_reads() {
    let Some(qemu) = Qemu::find() else { return };
    for subformat in Subformat::ALL {
        for size in [512, 65_536, 3 * (1 << 20) + 512] {
            let fixture = Fixture::new();
            let expected = disk(5, size);
            let source = fixture.file("raw", &expected);
            let path = fixture.path("disk.vmdk");
            let options = CreateOptions { size: size as u64, subformat, ..Default::default() };
            convert(&raw(&source), options, &path, ConvertOptions { durable: true, ..Default::default() });
            assert!(qemu.guest_bytes(&path, "vmdk", &[]) == expected, "{subformat:?}, {size}");
            qemu.img(&["check", "-q", "-f", "vmdk", path.to_str().unwrap()]).ok();
            let vmdk = open(&path, Access::ReadOnly).unwrap();
            assert_eq!(vmdk.create_type(), subformat.name());
            assert!(guest(&chain(vmdk)) == expected, "{subformat:?}, {size}");
        }
    }
}

#[test]
fn an_empty_stream_is_one() {
    let Some(qemu) = Qemu::find() else { return };
    for size in [512, 5 << 30] {
        let fixture = Fixture::new();
        let path = fixture.path("disk.vmdk");
        let options = CreateOptions { size, subformat: Subformat::StreamOptimized, ..Default::default() };
        create(&target(&path), &new_disk(options, &path), &Job::new()).unwrap();
        qemu.img(&["check", "-q", "-f", "vmdk", path.to_str().unwrap()]).ok();
        assert_eq!(open(&path, Access::ReadOnly).unwrap().virtual_size(), size);
    }
    // Nothing is there, and QEMU opens none of its own either.
    let fixture = Fixture::new();
    for subformat in Subformat::ALL {
        let path = fixture.path(subformat.name());
        create(
            &target(&path),
            &new_disk(CreateOptions { subformat, ..Default::default() }, &path),
            &Job::new(),
        )
        .unwrap();
        assert_eq!(open(&path, Access::ReadOnly).unwrap().virtual_size(), 0);
    }
}

/// A disk over the ends of tables and of files, of which little is written.
#[test]
fn a_large_disk_has_the_same_bytes_whatever_the_number_of_workers() {
    let Some(qemu) = Qemu::find() else { return };
    let fixture = Fixture::new();
    let source = fixture.path("source.qcow2");
    qemu.create(&source, "", Some(5 << 30));
    let places: [u64; 6] =
        [0, (32 << 20) - 4096, 700 << 20, (2 << 30) - 8192, (4 << 30) - 512, (5 << 30) - 512];
    let writes: Vec<String> = (1..)
        .zip(places)
        .map(|(n, at)| {
            format!("write -P {n} {at} {}", 512 * (n * n).min(if at == places[5] { 1 } else { 99 }))
        })
        .collect();
    qemu.io(&source, "qcow2", &writes);
    let flat = fixture.path("raw");
    qemu.convert(&source, "qcow2", &flat, "raw", &[]);
    for subformat in
        [Subformat::MonolithicSparse, Subformat::TwoGbMaxExtentSparse, Subformat::StreamOptimized]
    {
        let made = [1, 4].map(|workers| {
            let folder = Fixture::new();
            let path = folder.path("disk.vmdk");
            let options = CreateOptions { size: 5 << 30, subformat, ..Default::default() };
            let how = ConvertOptions { concurrency: NonZeroUsize::new(workers), ..Default::default() };
            convert(&raw(&flat), options, &path, how);
            if workers > 1 {
                qemu.assert_identical(&path, "vmdk", &source, "qcow2");
            }
            qemu.img(&["check", "-q", "-f", "vmdk", path.to_str().unwrap()]).ok();
            files(folder.dir())
        });
        assert!(made[0] == made[1], "{subformat:?}");
    }
}

#[test]
fn an_overlay_holds_what_its_parent_does_not() {
    let Some(qemu) = Qemu::find() else { return };
    for subformat in
        [Subformat::MonolithicSparse, Subformat::TwoGbMaxExtentSparse, Subformat::StreamOptimized]
    {
        let fixture = Fixture::new();
        let size = (3 << 20) + 512;
        let below = disk(7, size);
        let plain = fixture.file("raw", &below);
        let base = fixture.path("base.vmdk");
        let options = CreateOptions { size: size as u64, ..Default::default() };
        convert(&raw(&plain), options, &base, ConvertOptions::default());
        let top = fixture.path("top.vmdk");
        let names = [base.to_str().unwrap(), top.to_str().unwrap()];
        qemu.img(&["create", "-q", "-f", "vmdk", "-b", names[0], "-F", "vmdk", names[1]]).ok();
        qemu.io(&top, "vmdk", &["write -P 3 1000 70000", "write -z 2000000 5000"]);
        let expected = qemu.guest_bytes(&top, "vmdk", &[]);
        let layers: Vec<Box<dyn Layer>> = [&top, &base]
            .map(|path| Box::new(open(path, Access::ReadOnly).unwrap()) as Box<dyn Layer>)
            .into();
        let parent =
            Parent { filename: b"base.vmdk".to_vec(), cid: open(&base, Access::ReadOnly).unwrap().cid() };
        let path = fixture.path("copy.vmdk");
        let options =
            CreateOptions { size: size as u64, subformat, parent: Some(parent), ..Default::default() };
        let delta = Some(Delta { layers: 1, base_size: size as u64 });
        convert(&Image::new(layers).unwrap(), options, &path, ConvertOptions { delta, ..Default::default() });
        assert!(qemu.guest_bytes(&path, "vmdk", &[]) == expected, "{subformat:?}");
        let copy = open(&path, Access::ReadOnly).unwrap();
        let mut extents = Vec::new();
        Chain::new(vec![Box::new(copy)]).unwrap().extents(0, size as u64, &Job::new(), &mut extents).unwrap();
        let own: u64 = extents.iter().filter(|extent| !extent.zero).map(|extent| extent.length).sum();
        assert!(own <= 4 * 65536, "{own} bytes are more than what changed");
    }
}

#[test]
fn what_contradicts_itself_is_refused() {
    let parent = Some(Parent { filename: b"base.vmdk".to_vec(), cid: 5 });
    let flat = Subformat::MonolithicFlat;
    for (options, field) in [
        (
            CreateOptions { compat6: true, hardware_version: Some("7".to_owned()), ..Default::default() },
            "compat6",
        ),
        (CreateOptions { subformat: flat, parent, ..Default::default() }, "backing_file"),
        (CreateOptions { subformat: flat, zeroed_grain: true, ..Default::default() }, "zeroed_grain"),
        (CreateOptions { tools_version: Some("\"".to_owned()), ..Default::default() }, "toolsversion"),
        (CreateOptions { size: 3 << 40, ..Default::default() }, "size"),
    ] {
        let error = NewVmdk::new(options, Some(Path::new("disk"))).unwrap_err();
        assert_eq!(error.field(), Some(field));
        assert!(matches!(error.kind(), ErrorKind::InvalidArgument | ErrorKind::Limit));
    }
    let split = CreateOptions { subformat: Subformat::TwoGbMaxExtentFlat, size: 512, ..Default::default() };
    assert_eq!(NewVmdk::new(split, None).unwrap_err().kind(), ErrorKind::InvalidArgument);
    let stream = CreateOptions { subformat: Subformat::StreamOptimized, ..Default::default() };
    let new = NewVmdk::new(stream, None).unwrap();
    let hosts = Arc::new(qcow2_core::storage::MemoryStorage::new()) as Arc<dyn qcow2_core::Storage>;
    assert_eq!(new.disk(&hosts.into(), &Job::new()).unwrap_err().kind(), ErrorKind::UnsupportedFeature);
}
