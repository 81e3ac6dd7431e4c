//! LUKS version 2, as cryptsetup makes it.

use crate::support;

use std::fs;

use qcow2_core::{Error, ErrorKind, Job};
use qcow2_luks::luks2::unlock;
use qcow2_luks::{Limits, Luks2Header, Unlocked, luks1, version};
use support::{Folder, SECRET, cryptsetup, reader};

const ARGON2ID: &[&str] = &[
    "--pbkdf",
    "argon2id",
    "--pbkdf-force-iterations",
    "4",
    "--pbkdf-memory",
    "64",
    "--pbkdf-parallel",
    "2",
];
const ARGON2I: &[&str] =
    &["--pbkdf", "argon2i", "--pbkdf-force-iterations", "4", "--pbkdf-memory", "32", "--pbkdf-parallel", "1"];
const PBKDF2: &[&str] = &["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"];

/// What cryptsetup makes with these options.
fn made(folder: &Folder, options: &[&[&str]]) -> Vec<u8> {
    let image = folder.write("luks2", &vec![0; 17 << 20]);
    let args = ["luksFormat", "--type", "luks2", "--key-file", "-", "-q"];
    cryptsetup(&[&args, options.concat().as_slice()].concat(), &image, SECRET);
    fs::read(image).unwrap()
}

fn open(bytes: &[u8], secret: &str, limits: &Limits) -> Result<Unlocked, Error> {
    unlock(&Luks2Header::read(&reader(bytes))?, secret.as_bytes(), &reader(bytes), &Job::new(), limits)
}

#[test]
fn what_cryptsetup_makes_with_each_derivation_opens_here() {
    let Some(folder) = Folder::new() else { return };
    let cases: [(&[&str], &[&str], usize, &str); 4] = [
        (ARGON2ID, &["--sector-size", "4096"], 4096, "aes-256-xts-plain64"),
        (ARGON2I, &["--sector-size", "512", "--hash", "sha512"], 512, "aes-256-xts-plain64"),
        (
            PBKDF2,
            &["--cipher", "aes-cbc-essiv:sha256", "--key-size", "128", "--sector-size", "512"],
            512,
            "aes-128-cbc-essiv:sha256",
        ),
        (
            PBKDF2,
            &["--cipher", "aes-cbc-plain64", "--key-size", "256", "--sector-size", "1024"],
            1024,
            "aes-256-cbc-plain64",
        ),
    ];
    for (derivation, options, sector_size, spec) in cases {
        let bytes = made(&folder, &[derivation, options]);
        assert_eq!(version(&bytes), Some(2));
        let opened = open(&bytes, SECRET, &Limits::default()).unwrap();
        assert_eq!((opened.slot, opened.payload_offset, opened.payload_size), (0, 16 << 20, None));
        assert_eq!(
            (opened.cipher.sector_size(), opened.cipher.spec().to_string().as_str()),
            (sector_size, spec)
        );
        assert_eq!(key_by_cryptsetup(&folder), opened.key.bytes());
        assert_eq!(open(&bytes, "hunter3", &Limits::default()).unwrap_err().kind(), ErrorKind::BadSecret);
    }
}

/// The volume key, as cryptsetup finds it.
fn key_by_cryptsetup(folder: &Folder) -> Vec<u8> {
    let file = folder.path("key");
    let _ = fs::remove_file(&file);
    let args = [
        "luksDump",
        "--dump-volume-key",
        "--volume-key-file",
        file.to_str().unwrap(),
        "--key-file",
        "-",
        "-q",
    ];
    cryptsetup(&args, &folder.path("luks2"), SECRET);
    fs::read(file).unwrap()
}

/// A copy that is damaged is passed over, wherever the damage lies.
#[test]
fn either_copy_of_the_header_is_enough() {
    let Some(folder) = Folder::new() else { return };
    let sound = made(&folder, &[PBKDF2]);
    for at in [0, 9, 80, 300, 450, 5000] {
        let mut bytes = sound.clone();
        bytes[at] ^= 0xff;
        assert_eq!(open(&bytes, SECRET, &Limits::default()).unwrap().slot, 0, "{at}");
        bytes[(16 << 10) + 4200] ^= 1;
        let error = open(&bytes, SECRET, &Limits::default()).unwrap_err();
        let kinds = [ErrorKind::InvalidHeader, ErrorKind::UnsupportedFeature];
        assert!(kinds.contains(&error.kind()), "{at}: {error}");
    }
    let mut bytes = sound;
    bytes[5000] ^= 1;
    bytes[(16 << 10) + 5000] ^= 1;
    let error = open(&bytes, SECRET, &Limits::default()).unwrap_err();
    assert_eq!(error.to_string(), "the checksum of the LUKS header is wrong (field csum, offset 0x0)");
}

#[test]
fn what_demands_more_than_the_limits_is_refused_before_any_work() {
    let Some(folder) = Folder::new() else { return };
    let bytes = made(&folder, &[ARGON2ID]);
    let refused = |limits: Limits| {
        let error = open(&bytes, SECRET, &limits).unwrap_err();
        (error.kind(), error.message().to_owned())
    };
    let limits = Limits::default();
    assert_eq!(
        refused(Limits { max_argon2_memory: 65535, ..limits }),
        (ErrorKind::Limit, "key slot 0 demands 65536 bytes of memory, above the limit of 65535".to_owned())
    );
    assert_eq!(
        refused(Limits { max_argon2_work: 200_000, ..limits }),
        (
            ErrorKind::Limit,
            "key slot 0 demands 262144 bytes of memory in all passes, above the limit of 200000".to_owned()
        )
    );
    assert_eq!(
        refused(Limits { max_iterations: 999, ..limits }),
        (
            ErrorKind::Limit,
            "key slot 0 demands 1000 iterations of the digest, above the limit of 999".to_owned()
        )
    );
    let header = luks1::Luks1Header::parse(&bytes).unwrap_err();
    assert_eq!((header.kind(), header.field()), (ErrorKind::UnsupportedFeature, Some("version")));
}
