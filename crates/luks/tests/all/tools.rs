//! Headers that other tools make, opened here, and ours, opened by them.

use crate::support;

use qcow2_core::{ErrorKind, Job};
use qcow2_luks::luks1::format;
use qcow2_luks::{Cost, FormatOptions};
use support::{Folder, SECRET, cryptsetup, data, open, qemu_create, qemu_to_raw};

#[test]
fn what_qemu_makes_opens_here_and_reads_alike() {
    let Some(folder) = Folder::new() else { return };
    let image = folder.path("qemu.luks");
    qemu_create(&image, "1M", "iter-time=10");
    let plain = folder.write("plain", &data(1 << 20));
    support::qemu_write(&plain, &image);
    let (mut bytes, opened) = open(&image, SECRET).unwrap();
    assert_eq!((opened.slot, opened.payload_offset), (0, 2_068_480));
    let payload = &mut bytes[opened.payload_offset as usize..];
    opened.cipher.decrypt(0, payload);
    assert!(payload == data(1 << 20));
}

#[test]
fn what_is_made_here_opens_in_qemu_and_cryptsetup() {
    let Some(folder) = Folder::new() else { return };
    let options = FormatOptions { cost: Cost::Iterations(1000), ..FormatOptions::new(SECRET.as_bytes()) };
    let made = format(&options, &Job::new()).unwrap();
    assert_eq!(made.bytes.len(), 2_068_480);
    let mut file = made.bytes.clone();
    let mut payload = data(1 << 20);
    made.cipher.encrypt(0, &mut payload);
    file.extend(payload);
    let image = folder.write("ours.luks", &file);
    assert!(qemu_to_raw(&image, &folder.path("raw")) == data(1 << 20));
    support::cryptsetup_opens(&image, SECRET, 0);
}

#[test]
fn what_cryptsetup_makes_opens_here() {
    let Some(folder) = Folder::new() else { return };
    let image = folder.write("cryptsetup.luks", &vec![0; 4 << 20]);
    let args = ["luksFormat", "--type", "luks1", "--pbkdf-force-iterations", "1000", "--key-file", "-", "-q"];
    cryptsetup(&args, &image, SECRET);
    let (_, opened) = open(&image, SECRET).unwrap();
    assert_eq!(opened.slot, 0);
    assert_eq!(open(&image, "hunter3").unwrap_err().kind(), ErrorKind::BadSecret);
}
