//! Other tools as judges. Where they are missing, a test says that it was skipped; `QCOW2_REQUIRE_QEMU=1` makes that a failure.

#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

use std::ffi::OsString;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use qcow2_core::{Error, ErrorKind, Job, Result};
use qcow2_luks::luks1::{self, Luks1Header};
use qcow2_luks::{Limits, Unlocked};

pub(crate) const SECRET: &str = "hunter2";

pub(crate) struct Folder(tempfile::TempDir);

impl Folder {
    /// A folder, where QEMU and cryptsetup are there to judge.
    pub(crate) fn new() -> Option<Self> {
        let folder = Self(tempfile::tempdir().unwrap());
        for tool in [qemu_img(), "cryptsetup".into()] {
            if Command::new(&tool).arg("--version").output().is_err() {
                assert!(std::env::var_os("QCOW2_REQUIRE_QEMU").is_none(), "{tool:?} is missing");
                eprintln!("SKIPPED: {tool:?} is missing");
                return None;
            }
        }
        Some(folder)
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub(crate) fn write(&self, name: &str, bytes: &[u8]) -> PathBuf {
        fs::write(self.path(name), bytes).unwrap();
        self.path(name)
    }
}

fn qemu_img() -> OsString {
    std::env::var_os("QEMU_IMG_PROG").unwrap_or_else(|| "qemu-img".into())
}

/// Bytes that differ everywhere.
pub(crate) fn data(len: usize) -> Vec<u8> {
    (0..len).map(|at| (at ^ (at >> 8).wrapping_mul(31) ^ (at >> 13).wrapping_mul(7)) as u8).collect()
}

fn run(command: &mut Command, input: &[u8]) -> Output {
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(input).unwrap();
    child.wait_with_output().unwrap()
}

fn succeed(command: &mut Command, input: &[u8]) -> String {
    let output = run(command, input);
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn secret() -> String {
    format!("secret,id=s,data={SECRET}")
}

/// QEMU makes such a file.
pub(crate) fn qemu_create(image: &Path, size: &str, options: &str) {
    let mut command = Command::new(qemu_img());
    command.args([
        "create",
        "-q",
        "-f",
        "luks",
        "--object",
        &secret(),
        "-o",
        &format!("key-secret=s,{options}"),
    ]);
    succeed(command.arg(image).arg(size), b"");
}

fn luks_opts(image: &Path) -> String {
    format!("driver=luks,key-secret=s,file.filename={}", image.display())
}

/// QEMU copies the plain file into the encrypted one.
pub(crate) fn qemu_write(plain: &Path, image: &Path) {
    let mut command = Command::new(qemu_img());
    command.args(["convert", "-n", "--object", &secret(), "-f", "raw", "--target-image-opts"]);
    succeed(command.arg(plain).arg(luks_opts(image)), b"");
}

/// What QEMU reads.
pub(crate) fn qemu_to_raw(image: &Path, raw: &Path) -> Vec<u8> {
    qemu_opts_to_raw(&luks_opts(image), raw)
}

/// What QEMU reads of an image that is described so.
pub(crate) fn qemu_opts_to_raw(options: &str, raw: &Path) -> Vec<u8> {
    let mut command = Command::new(qemu_img());
    command.args(["convert", "--object", &secret(), "--image-opts", options, "-O", "raw"]);
    succeed(command.arg(raw), b"");
    fs::read(raw).unwrap()
}

/// Whether cryptsetup opens that slot with the secret.
pub(crate) fn cryptsetup_tries(image: &Path, secret: &str, slot: usize) -> bool {
    let mut command = Command::new("cryptsetup");
    command
        .args(["open", "--test-passphrase", "--key-file", "-", "--key-slot", &slot.to_string()])
        .arg(image);
    run(&mut command, secret.as_bytes()).status.success()
}

pub(crate) fn cryptsetup_opens(image: &Path, secret: &str, slot: usize) {
    assert!(cryptsetup_tries(image, secret, slot), "slot {slot}");
}

/// Runs cryptsetup, which reads `input`.
pub(crate) fn cryptsetup(args: &[&str], image: &Path, input: &str) -> String {
    succeed(Command::new("cryptsetup").args(args).arg(image), input.as_bytes())
}

/// Reads from bytes as from a file.
pub(crate) fn reader(bytes: &[u8]) -> impl Fn(u64, &mut [u8]) -> Result<()> {
    |offset, to: &mut [u8]| {
        let end = offset as usize + to.len();
        let from = bytes
            .get(offset as usize..end)
            .ok_or_else(|| Error::new(ErrorKind::Corrupt, "the file ends in key material"))?;
        to.copy_from_slice(from);
        Ok(())
    }
}

/// A file's bytes, and what a secret opens of them.
pub(crate) fn open(image: &Path, secret: &str) -> Result<(Vec<u8>, Unlocked)> {
    let bytes = fs::read(image).unwrap();
    let header = Luks1Header::parse(&bytes)?;
    let opened = luks1::unlock(&header, secret.as_bytes(), &reader(&bytes), &Job::new(), &Limits::default())?;
    Ok((bytes, opened))
}
