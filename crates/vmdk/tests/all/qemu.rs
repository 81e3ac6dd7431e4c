//! Images that QEMU and VMware made, held against the contract of layers, and against what QEMU reads.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use qcow2_core::storage::{Access, MemoryStorage};
use qcow2_core::{Chain, ErrorKind, GuestSource, Job, Layer, MemMut, Storage, StorageExt};
use qcow2_testkit::contract::LayerContract;
use qcow2_testkit::{Fixture, Qemu, skipped};

use crate::support::{chain, disk, file, guest, open, open_with};

const SIZE: usize = 3 * (1 << 20) + 512;

/// The image at `path`, whose extents lie beside it, keeps the contract.
fn check(name: &str, path: &Path, expected: &[u8], below: Option<&[u8]>) {
    let bytes = std::fs::read(path).unwrap();
    let folder = path.parent().unwrap().to_owned();
    let find = |name: &str| -> Arc<dyn Storage> {
        Arc::new(MemoryStorage::from_bytes(&std::fs::read(folder.join(name)).unwrap()))
    };
    let open = |storage| Ok(Box::new(open_with(storage, &find)?) as Box<dyn Layer>);
    LayerContract { name, file: &bytes, open: &open, expected, below }.check();
}

#[test]
fn what_qemu_converts_keeps_the_contract_of_layers() {
    let Some(qemu) = Qemu::find() else { return };
    for (options, create_type) in [
        ("subformat=monolithicSparse", "monolithicSparse"),
        ("subformat=monolithicSparse,zeroed_grain=on", "monolithicSparse"),
        ("subformat=monolithicFlat", "monolithicFlat"),
        ("subformat=twoGbMaxExtentSparse", "twoGbMaxExtentSparse"),
        ("subformat=twoGbMaxExtentFlat", "twoGbMaxExtentFlat"),
        ("subformat=streamOptimized", "streamOptimized"),
    ] {
        for size in [SIZE, 512, 65536] {
            let fixture = Fixture::new();
            let expected = disk(1, size);
            let raw = fixture.file("raw", &expected);
            let path = fixture.path("image.vmdk");
            qemu.convert(&raw, "raw", &path, "vmdk", &["-o", options]);
            check(options, &path, &expected, None);
            let vmdk = open(&path, Access::ReadOnly).unwrap();
            assert_eq!((vmdk.create_type(), vmdk.format()), (create_type, "vmdk"));
        }
    }
}

#[test]
fn a_disk_of_several_extents_is_read_across_their_ends() {
    let Some(qemu) = Qemu::find() else { return };
    for subformat in ["twoGbMaxExtentSparse", "twoGbMaxExtentFlat"] {
        let fixture = Fixture::new();
        let path = fixture.path("image.vmdk");
        let option = format!("subformat={subformat}");
        qemu.img(&["create", "-q", "-f", "vmdk", "-o", &option, path.to_str().unwrap(), "5G"]).ok();
        let (two, four) = ((2u64 << 30) - 4096, (4u64 << 30) - 512);
        qemu.io(&path, "vmdk", &[format!("write -P 7 {two} 8192"), format!("write -P 9 {four} 1024")]);
        let vmdk = open(&path, Access::ReadOnly).unwrap();
        assert_eq!((vmdk.virtual_size(), vmdk.extents().count()), (5 << 30, 3));
        let disk = chain(vmdk);
        let mut bytes = vec![1; 16384];
        disk.read_at(MemMut::from(&mut bytes[..]), two - 4096).unwrap();
        assert!(bytes[..4096].iter().chain(&bytes[12288..]).all(|byte| *byte == 0));
        assert!(bytes[4096..12288].iter().all(|byte| *byte == 7));
        disk.read_at(MemMut::from(&mut bytes[..1024]), four).unwrap();
        assert!(bytes[..1024].iter().all(|byte| *byte == 9));
    }
}

#[test]
fn an_overlay_keeps_the_contract_of_layers_on_its_own_parent_alone() {
    let Some(qemu) = Qemu::find() else { return };
    let fixture = Fixture::new();
    let below = disk(2, SIZE);
    let raw = fixture.file("base.raw", &below);
    let base = fixture.path("base.vmdk");
    qemu.convert(&raw, "raw", &base, "vmdk", &[]);
    let path = fixture.path("overlay.vmdk");
    let (name, base_name) = (path.to_str().unwrap(), base.to_str().unwrap());
    qemu.img(&["create", "-q", "-f", "vmdk", "-o", "zeroed_grain=on", "-b", base_name, "-F", "vmdk", name])
        .ok();
    qemu.io(&path, "vmdk", &["write -P 7 1000 3000", "write -P 9 2097152 66000", "write -z 0x40000 0x20000"]);
    let expected = qemu.guest_bytes(&path, "vmdk", &[]);
    assert_ne!(expected, below);
    let overlay = open(&path, Access::ReadOnly).unwrap();
    let backing = overlay.references().backing.unwrap();
    assert_eq!(
        (&backing.filename[..], backing.format.as_deref()),
        (base_name.as_bytes(), Some(&b"vmdk"[..]))
    );
    let parent = open(&base, Access::ReadOnly).unwrap();
    let whole = Chain::new(vec![Box::new(overlay), Box::new(parent)]).unwrap();
    assert!(guest(&whole) == expected);
    // Any other disk is not the parent, be it the same file after a write.
    let overlay = || Box::new(open(&path, Access::ReadOnly).unwrap());
    let raw = qcow2_core::Raw::new(file(&raw, Access::ReadOnly)).unwrap();
    let error = Chain::new(vec![overlay(), Box::new(raw)]).unwrap_err();
    assert_eq!((error.kind(), error.field()), (ErrorKind::Chain, Some("parentCID")));
    qemu.io(&base, "vmdk", &["write -P 1 0 512"]);
    let error = Chain::new(vec![overlay(), Box::new(open(&base, Access::ReadOnly).unwrap())]).unwrap_err();
    assert_eq!((error.kind(), error.field()), (ErrorKind::Chain, Some("parentCID")));
}

/// QEMU's small images of other products, where its source package is.
fn sample(fixture: &Fixture, name: &str) -> Option<PathBuf> {
    let cache = std::env::var_os("QCOW2_IOTESTS").map_or_else(
        || Path::new(&std::env::var_os("HOME").unwrap_or_default()).join(".cache/qcow2-ci/iotests/trixie"),
        PathBuf::from,
    );
    let packed = cache.join("tests/qemu-iotests/sample_images").join(format!("{name}.bz2"));
    let unpacked = Command::new("bzip2").arg("-dc").arg(&packed).output();
    match unpacked {
        Ok(out) if out.status.success() => Some(fixture.file(name, &out.stdout)),
        _ => {
            skipped(format!("{} cannot be unpacked", packed.display()));
            None
        }
    }
}

#[test]
fn an_image_of_version_3_by_vmware_is_read_as_qemu_reads_it() {
    let Some(qemu) = Qemu::find() else { return };
    let fixture = Fixture::new();
    let Some(path) = sample(&fixture, "iotest-version3.vmdk") else { return };
    let vmdk = open(&path, Access::ReadOnly).unwrap();
    assert_eq!((vmdk.create_type(), vmdk.virtual_size()), ("streamOptimized", 16 << 30));
    let disk = chain(vmdk);
    let raw = fixture.path("raw");
    qemu.convert(&path, "vmdk", &raw, "raw", &[]);
    let raw = file(&raw, Access::ReadOnly);
    let mut extents = Vec::new();
    disk.extents(0, 16 << 30, &Job::new(), &mut extents).unwrap();
    let stored = extents.iter().filter(|extent| !extent.zero);
    assert!(stored.clone().count() > 0);
    for extent in stored {
        let (mut ours, mut theirs) = (vec![1; extent.length as usize], vec![2; extent.length as usize]);
        disk.read_at(MemMut::from(&mut ours[..]), extent.start).unwrap();
        raw.read_padded_at(MemMut::from(&mut theirs[..]), extent.start).unwrap();
        assert!(ours == theirs, "{}", extent.start);
    }
    // And nothing is left out.
    let mut zero = extents.iter().filter(|extent| extent.zero);
    assert!(zero.all(|extent| !raw.run(extent.start..extent.start + extent.length).unwrap().data));
}

#[test]
fn a_fuzzed_image_is_an_error_as_for_qemu() {
    let fixture = Fixture::new();
    let Some(path) = sample(&fixture, "afl9.vmdk") else { return };
    let error = open(&path, Access::ReadOnly).unwrap_err();
    assert!(
        matches!(error.kind(), ErrorKind::InvalidHeader | ErrorKind::Limit | ErrorKind::Corrupt),
        "{error}"
    );
}
