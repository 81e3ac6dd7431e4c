//! Image locks, against running QEMU processes in both directions.
#![cfg(target_os = "linux")]

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use qcow2_engine::storage::{Access, Claim, FileStorage, Locking, NewFile, Overwrite};
use qcow2_engine::{ErrorKind, ReadStorage};
use qcow2_testkit::{Fixture, Qemu};

/// A QEMU process that has an image open until this is dropped.
struct Holder(Child);

impl Holder {
    /// qemu-io on an image, after it has answered a command.
    fn io(args: &[&str], path: &Path) -> Self {
        let tool = std::env::var_os("QEMU_IO_PROG").unwrap_or_else(|| "qemu-io".into());
        let mut child = Command::new(tool)
            .args(args)
            .arg(path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.as_mut().unwrap().write_all(b"read 0 512\n").unwrap();
        let mut lines = BufReader::new(child.stdout.as_mut().unwrap()).lines();
        assert!(lines.any(|line| line.unwrap().contains("512/512 bytes")), "qemu-io does not hold the image");
        Self(child)
    }

    /// A daemon that writes `pid_file` when it has everything open.
    fn daemon(command: &mut Command, pid_file: &Path) -> Self {
        let child = Self(command.stdout(Stdio::null()).spawn().unwrap());
        let start = Instant::now();
        while std::fs::read(pid_file).map_or(true, |pid| pid.is_empty()) {
            assert!(start.elapsed() < Duration::from_secs(20), "{command:?} does not start");
            std::thread::sleep(Duration::from_millis(10));
        }
        child
    }

    fn kill(mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Opens and locks; the error's message without its hint.
fn claim(path: &Path, claim: Claim) -> Result<FileStorage, String> {
    let writer = claim == Claim::WRITER || claim == Claim::CREATOR;
    let storage = FileStorage::open(path, if writer { Access::ReadWrite } else { Access::ReadOnly }).unwrap();
    storage.lock(claim, Locking::On).map_err(|e| {
        assert_eq!((e.kind(), e.path()), (ErrorKind::Locked, Some(path)));
        e.message().split(':').next().unwrap().to_owned()
    })?;
    Ok(storage)
}

/// What of [reader, sharing reader, writer, creator] can have the image now.
fn admits(path: &Path) -> [bool; 4] {
    [Claim::READER, Claim::SHARING_READER, Claim::WRITER, Claim::CREATOR].map(|c| claim(path, c).is_ok())
}

const FREE: [bool; 4] = [true; 4];
const WHILE_READ: [bool; 4] = [true, true, false, false];
const WHILE_WRITTEN: [bool; 4] = [false, true, false, false];

struct Images {
    fixture: Fixture,
    qemu: Qemu,
}

impl Images {
    /// `base.qcow2`, its overlay `top.qcow2`, `disk.raw` and its overlay `over.qcow2`.
    #[track_caller]
    fn new() -> Option<Self> {
        let (qemu, fixture) = (Qemu::find()?, Fixture::new());
        let path = |name: &str| fixture.path(name);
        qemu.create(&path("base.qcow2"), "", Some(1 << 20));
        let backed =
            |name: &str, format: &str| format!("backing_file={},backing_fmt={format}", path(name).display());
        qemu.create(&path("top.qcow2"), &backed("base.qcow2", "qcow2"), None);
        fixture.file("disk.raw", &[0; 1 << 20]);
        qemu.create(&path("over.qcow2"), &backed("disk.raw", "raw"), None);
        Some(Self { fixture, qemu })
    }

    /// What a QEMU tool says about the lock, or nothing if it succeeded.
    fn refusal(&self, tool: &str, args: &[&str], image: &str) -> Option<String> {
        let path = self.fixture.path(image);
        let args: Vec<&str> = args.iter().copied().chain([path.to_str().unwrap()]).collect();
        let out = match tool {
            "img" => self.qemu.img(&args),
            "nbd" => self.qemu.nbd(&args),
            _ => {
                let tool = std::env::var_os("QEMU_IO_PROG").unwrap_or_else(|| "qemu-io".into());
                let out = Command::new(tool).args(&args).output().unwrap();
                qcow2_testkit::oracle::Output {
                    command: format!("qemu-io {args:?}"),
                    code: out.status.code().unwrap_or(-1),
                    stdout: String::from_utf8_lossy(&out.stdout).into_owned(),
                    stderr: String::from_utf8_lossy(&out.stderr).into_owned(),
                }
            }
        };
        if out.code == 0 {
            return None;
        }
        let message = format!("{}{}", out.stdout, out.stderr);
        let lock = message.split("Failed to get ").nth(1).unwrap_or_else(|| panic!("no lock: {out:?}"));
        Some(lock.split(" lock").next().unwrap().to_owned())
    }
}

const READ: [&str; 5] = ["-r", "-f", "qcow2", "-c", "read 0 512"];
const WRITE: [&str; 4] = ["-f", "qcow2", "-c", "write 0 512"];

#[test]
fn a_writing_qemu_keeps_others_out() {
    let Some(images) = Images::new() else { return };
    let (top, base) = (images.fixture.path("top.qcow2"), images.fixture.path("base.qcow2"));
    assert_eq!((admits(&top), admits(&base)), (FREE, FREE));
    let writer = Holder::io(&["-f", "qcow2"], &top);
    assert_eq!((admits(&top), admits(&base)), (WHILE_WRITTEN, WHILE_READ));
    assert_eq!(claim(&top, Claim::READER).unwrap_err(), "failed to get shared \"write\" lock");
    assert_eq!(claim(&top, Claim::WRITER).unwrap_err(), "failed to get \"write\" lock");
    // A process that is killed leaves no lock.
    writer.kill();
    assert_eq!((admits(&top), admits(&base)), (FREE, FREE));
}

#[test]
fn a_reading_qemu_keeps_writers_out() {
    let Some(images) = Images::new() else { return };
    let (top, base) = (images.fixture.path("top.qcow2"), images.fixture.path("base.qcow2"));
    let reader = Holder::io(&["-r", "-f", "qcow2"], &top);
    assert_eq!((admits(&top), admits(&base)), (WHILE_READ, WHILE_READ));
    drop(reader);
    let _sharing = Holder::io(&["-r", "-U", "-f", "qcow2"], &top);
    assert_eq!((admits(&top), admits(&base)), (FREE, FREE));
}

#[test]
fn daemons_lock_as_the_tools_do() {
    let Some(images) = Images::new() else { return };
    let (top, base) = (images.fixture.path("top.qcow2"), images.fixture.path("base.qcow2"));
    let installed = |tool: &str| Command::new(tool).arg("--version").output().is_ok();
    for (read_only, expected) in [(false, WHILE_WRITTEN), (true, WHILE_READ)] {
        if installed("qemu-nbd") {
            let (socket, pid) = (images.fixture.path("nbd.sock"), images.fixture.path("nbd.pid"));
            let mut command = Command::new("qemu-nbd");
            command.args(["--persistent", "-f", "qcow2", "-k"]).arg(&socket).arg("--pid-file").arg(&pid);
            command.args(read_only.then_some("-r")).arg(&top);
            let daemon = Holder::daemon(&mut command, &pid);
            assert_eq!((admits(&top), admits(&base)), (expected, WHILE_READ));
            drop(daemon);
            let _ = (std::fs::remove_file(&pid), std::fs::remove_file(&socket));
        }
        if installed("qemu-storage-daemon") {
            let pid = images.fixture.path("qsd.pid");
            let read_only = if read_only { "on" } else { "off" };
            let node = |name: &str, rest: String| format!("node-name={name},read-only={read_only},{rest}");
            let mut command = Command::new("qemu-storage-daemon");
            command.arg("--blockdev").arg(node("f", format!("driver=file,filename={}", top.display())));
            command.arg("--blockdev").arg(node("q", "driver=qcow2,file=f".into()));
            command.arg("--pidfile").arg(&pid);
            let daemon = Holder::daemon(&mut command, &pid);
            assert_eq!((admits(&top), admits(&base)), (expected, WHILE_READ));
            drop(daemon);
            let _ = std::fs::remove_file(&pid);
        }
    }
}

#[test]
fn our_writer_keeps_qemu_out() {
    let Some(images) = Images::new() else { return };
    let writer = claim(&images.fixture.path("top.qcow2"), Claim::WRITER).unwrap();
    let refusal = |tool, args: &[&str], image| images.refusal(tool, args, image);
    assert_eq!(refusal("io", &READ, "top.qcow2").as_deref(), Some("shared \"write\""));
    assert_eq!(refusal("io", &WRITE, "top.qcow2").as_deref(), Some("\"write\""));
    assert_eq!(refusal("img", &["info"], "top.qcow2").as_deref(), Some("shared \"write\""));
    assert_eq!(refusal("img", &["check"], "top.qcow2").as_deref(), Some("shared \"write\""));
    assert_eq!(refusal("nbd", &["-f", "qcow2", "-k", "/nowhere"], "top.qcow2").as_deref(), Some("\"write\""));
    assert_eq!(refusal("img", &["info", "-U"], "top.qcow2"), None);
    drop(writer);
    assert_eq!(refusal("io", &WRITE, "top.qcow2"), None);
    assert_eq!(refusal("io", &READ, "top.qcow2"), None);
}

#[test]
fn our_readers_keep_qemu_writers_out() {
    let Some(images) = Images::new() else { return };
    let refusal = |tool, args: &[&str], image| images.refusal(tool, args, image);
    let base = images.fixture.path("base.qcow2");
    let reader = claim(&base, Claim::READER).unwrap();
    assert_eq!(refusal("io", &READ, "base.qcow2"), None);
    assert_eq!(refusal("img", &["info"], "base.qcow2"), None);
    // As a backing file it is only read, so an overlay may be written.
    assert_eq!(refusal("io", &WRITE, "top.qcow2"), None);
    assert_eq!(refusal("io", &WRITE, "base.qcow2").as_deref(), Some("\"write\""));
    drop(reader);
    let sharing = claim(&base, Claim::SHARING_READER).unwrap();
    assert_eq!(refusal("io", &WRITE, "base.qcow2"), None);
    drop(sharing);
    // And a base that we write is no backing file for them.
    let _writer = claim(&base, Claim::WRITER).unwrap();
    assert_eq!(refusal("io", &WRITE, "top.qcow2").as_deref(), Some("shared \"write\""));
}

#[test]
fn raw_files_are_shared_with_readers_and_not_with_writers() {
    let Some(images) = Images::new() else { return };
    let raw = images.fixture.path("disk.raw");
    let holder = Holder::io(&["-f", "raw"], &raw);
    assert_eq!(admits(&raw), WHILE_WRITTEN);
    drop(holder);
    let sharing = claim(&raw, Claim::SHARING_READER).unwrap();
    assert_eq!(images.refusal("io", &["-f", "raw", "-c", "write 0 512"], "disk.raw"), None);
    drop(sharing);
    let _writer = claim(&raw, Claim::WRITER).unwrap();
    let refused = images.refusal("io", &["-f", "raw", "-c", "write 0 512"], "disk.raw");
    assert_eq!(refused.as_deref(), Some("\"write\""));
    // QEMU's tools read raw files, also as backing files, while others write them.
    assert_eq!(images.refusal("io", &["-r", "-f", "raw", "-c", "read 0 512"], "disk.raw"), None);
    assert_eq!(images.refusal("io", &WRITE, "over.qcow2"), None);
}

#[test]
fn an_image_in_use_is_not_replaced() {
    let Some(images) = Images::new() else { return };
    let top = images.fixture.path("top.qcow2");
    let before = std::fs::read(&top).unwrap();
    let holder = Holder::io(&["-r", "-f", "qcow2"], &top);
    let error = NewFile::create(&top, Overwrite::Replace, &[]).unwrap_err();
    assert_eq!((error.kind(), error.path()), (ErrorKind::Locked, Some(&*top)));
    drop(holder);
    assert_eq!(std::fs::read(&top).unwrap(), before);
    // While a replacement is made, nobody starts to use what goes away.
    let new = NewFile::create(&top, Overwrite::Replace, &[]).unwrap();
    assert_eq!(images.refusal("io", &READ, "top.qcow2").as_deref(), Some("shared \"write\""));
    drop(new);
    assert_eq!(images.refusal("io", &READ, "top.qcow2"), None);
}

#[cfg(unix)]
#[test]
fn a_borrowed_descriptor_locks_and_gives_the_lock_back() {
    use std::os::fd::AsFd;
    let fixture = Fixture::new();
    let path = fixture.file("image", &[0; 4096]);
    let owner = std::fs::File::options().read(true).write(true).open(&path).unwrap();
    let storage = FileStorage::from_borrowed(owner.as_fd()).unwrap();
    storage.lock(Claim::WRITER, Locking::Auto).unwrap();
    assert_eq!(admits(&path), WHILE_WRITTEN);
    storage.lock(Claim::READER, Locking::Auto).unwrap();
    assert_eq!(admits(&path), WHILE_READ);
    drop(storage);
    assert_eq!(admits(&path), FREE);
}
