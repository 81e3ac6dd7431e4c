//! The oracle: QEMU's own tools, run as child processes.
//!
//! Where they are not installed, a test that needs them says so on the real standard error (the test
//! harness does not swallow it) and passes; with `QCOW2_REQUIRE_QEMU=1` it fails instead.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use crate::skip::skipped;

/// A folder for one test, removed at its end.
#[derive(Debug)]
pub struct Fixture {
    dir: PathBuf,
    /// Removes the folder when dropped.
    _guard: Option<tempfile::TempDir>,
}

impl Fixture {
    /// A new empty folder.
    pub fn new() -> Self {
        let guard = tempfile::Builder::new().prefix("qcow2-test-").tempdir().unwrap();
        Self { dir: guard.path().to_owned(), _guard: Some(guard) }
    }

    /// A folder that exists and stays.
    pub fn at(dir: &Path) -> Self {
        Self { dir: dir.to_owned(), _guard: None }
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// A path in the folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Writes a file into the folder and returns its path.
    pub fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.path(name);
        std::fs::write(&path, bytes).unwrap();
        path
    }
}

impl Default for Fixture {
    fn default() -> Self {
        Self::new()
    }
}

/// What a tool printed and how it ended.
#[derive(Debug, Clone)]
pub struct Output {
    /// The command line, for messages.
    pub command: String,
    /// Exit code; -1 for a signal.
    pub code: i32,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Output {
    /// Fails the test unless the tool succeeded; gives its standard output.
    #[track_caller]
    pub fn ok(self) -> String {
        assert!(
            self.code == 0,
            "`{}` exited with {}\n{}{}",
            self.command,
            self.code,
            self.stdout,
            self.stderr
        );
        self.stdout
    }
}

/// QEMU's tools. `QEMU_IMG_PROG`, `QEMU_IO_PROG` and `QEMU_NBD_PROG` name others than those in `PATH`.
#[derive(Debug, Clone)]
pub struct Qemu {
    img: PathBuf,
    io: PathBuf,
    nbd: PathBuf,
}

impl Qemu {
    /// The tools, or `None` with a visible line where they are not installed.
    #[track_caller]
    pub fn find() -> Option<Self> {
        let tool = |variable: &str, name: &str| {
            std::env::var_os(variable).map_or_else(|| name.into(), PathBuf::from)
        };
        let qemu = Self {
            img: tool("QEMU_IMG_PROG", "qemu-img"),
            io: tool("QEMU_IO_PROG", "qemu-io"),
            nbd: tool("QEMU_NBD_PROG", "qemu-nbd"),
        };
        let missing = [&qemu.img, &qemu.io]
            .into_iter()
            .find(|tool| !Command::new(tool).arg("--version").output().is_ok_and(|o| o.status.success()));
        let Some(missing) = missing else { return Some(qemu) };
        let why = format!("{} is not installed", missing.display());
        let required = std::env::var_os("QCOW2_REQUIRE_QEMU").is_some_and(|v| !v.is_empty() && v != "0");
        assert!(!required, "{why}");
        skipped(why);
        None
    }

    fn run(tool: &Path, args: &[&OsStr]) -> Output {
        let out = Command::new(tool)
            .args(args)
            .env("LC_ALL", "C")
            .output()
            .unwrap_or_else(|e| panic!("{}: {e}", tool.display()));
        let words: Vec<_> = args.iter().map(|a| a.to_string_lossy()).collect();
        Output {
            command: format!("{} {}", tool.display(), words.join(" ")),
            code: out.status.code().unwrap_or(-1),
            stdout: String::from_utf8_lossy(&out.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&out.stderr).into_owned(),
        }
    }

    /// Runs qemu-img.
    pub fn img<A: AsRef<OsStr>>(&self, args: &[A]) -> Output {
        Self::run(&self.img, &args.iter().map(AsRef::as_ref).collect::<Vec<_>>())
    }

    /// Runs qemu-io with these arguments; fails the test if a command fails.
    #[track_caller]
    pub fn io_with<A: AsRef<OsStr>>(&self, args: &[A]) -> String {
        let out = Self::run(&self.io, &args.iter().map(AsRef::as_ref).collect::<Vec<_>>());
        assert!(!out.stdout.contains("failed"), "`{}`\n{}", out.command, out.stdout);
        out.ok()
    }

    /// The guest bytes of an encrypted qcow2 image that QEMU finds nothing wrong with.
    #[track_caller]
    pub fn decrypted(&self, path: &Path, secret: &str) -> Vec<u8> {
        let object = format!("secret,id=s,data={secret}");
        let image = format!("driver=qcow2,encrypt.key-secret=s,file.filename={}", path.display());
        let raw = path.with_extension("decrypted");
        let to = raw.display().to_string();
        self.img(&["check", "-q", "--object", &object, "--image-opts", &image]).ok();
        self.img(&["convert", "--object", &object, "--image-opts", &image, "-O", "raw", &to]).ok();
        std::fs::read(raw).expect("the converted disk")
    }

    /// Runs qemu-nbd.
    pub fn nbd<A: AsRef<OsStr>>(&self, args: &[A]) -> Output {
        Self::run(&self.nbd, &args.iter().map(AsRef::as_ref).collect::<Vec<_>>())
    }

    /// Creates a qcow2 image. `options` is the value of `-o`; the size may be left to the backing file.
    #[track_caller]
    pub fn create(&self, path: &Path, options: &str, size: Option<u64>) {
        let mut args: Vec<&OsStr> = ["create", "-q", "-f", "qcow2"].map(OsStr::new).to_vec();
        if !options.is_empty() {
            args.extend([OsStr::new("-o"), OsStr::new(options)]);
        }
        args.push(path.as_os_str());
        let size = size.map(|s| s.to_string());
        args.extend(size.as_ref().map(OsStr::new));
        self.img(&args).ok();
    }

    /// Runs qemu-io commands on an image of `format`; fails the test if one fails.
    #[track_caller]
    pub fn io<C: AsRef<str>>(&self, path: &Path, format: &str, commands: &[C]) -> String {
        // A failed command makes qemu-io exit with 1; the command line has a limit, so go in batches.
        let mut printed = String::new();
        for batch in commands.chunks(200) {
            let mut args: Vec<&OsStr> = ["-t", "unsafe", "-f", format].map(OsStr::new).to_vec();
            for command in batch {
                args.extend([OsStr::new("-c"), OsStr::new(command.as_ref())]);
            }
            args.push(path.as_os_str());
            let out = Self::run(&self.io, &args);
            assert!(!out.stdout.contains("failed"), "`{}`\n{}", out.command, out.stdout);
            printed += &out.ok();
        }
        printed
    }

    #[track_caller]
    fn json(&self, command: &str, args: &[&OsStr]) -> Value {
        let mut all = vec![OsStr::new(command), OsStr::new("--output=json")];
        all.extend(args);
        let out = self.img(&all);
        serde_json::from_str(&out.stdout).unwrap_or_else(|e| panic!("{e}: {out:?}"))
    }

    /// The document of `qemu-img check`, whatever it found.
    #[track_caller]
    pub fn check_json(&self, path: &Path) -> Value {
        self.json("check", &[OsStr::new("-f"), OsStr::new("qcow2"), path.as_os_str()])
    }

    /// Fails the test unless `qemu-img check` finds no error and no leak.
    #[track_caller]
    pub fn assert_clean(&self, path: &Path) {
        let out = self.img(&[OsStr::new("check"), OsStr::new("-f"), OsStr::new("qcow2"), path.as_os_str()]);
        assert_eq!(out.code, 0, "{}\n{}{}", out.command, out.stdout, out.stderr);
    }

    /// The document of `qemu-img info`.
    #[track_caller]
    pub fn info_json(&self, path: &Path) -> Value {
        self.json("info", &[OsStr::new("-f"), OsStr::new("qcow2"), path.as_os_str()])
    }

    /// The document of `qemu-img map`.
    #[track_caller]
    pub fn map_json(&self, path: &Path, format: &str) -> Value {
        self.json("map", &[OsStr::new("-f"), OsStr::new(format), path.as_os_str()])
    }

    /// Fails the test unless `qemu-img compare` finds both disks identical.
    #[track_caller]
    pub fn assert_identical(&self, a: &Path, a_format: &str, b: &Path, b_format: &str) {
        let args = ["compare", "-f", a_format, "-F", b_format].map(OsStr::new);
        self.img(&[&args[..], &[a.as_os_str(), b.as_os_str()]].concat()).ok();
    }

    /// Converts; `extra` are further options, such as `-c` or `-l NAME`.
    #[track_caller]
    pub fn convert(&self, from: &Path, from_format: &str, to: &Path, to_format: &str, extra: &[&str]) {
        let mut args: Vec<&OsStr> =
            ["convert", "-t", "unsafe", "-f", from_format, "-O", to_format].map(OsStr::new).to_vec();
        args.extend(extra.iter().map(OsStr::new));
        args.extend([from.as_os_str(), to.as_os_str()]);
        self.img(&args).ok();
    }

    /// The guest bytes of an image as QEMU reads them, `extra` as for `convert`. For small disks.
    #[track_caller]
    pub fn guest_bytes(&self, path: &Path, format: &str, extra: &[&str]) -> Vec<u8> {
        let dir = Fixture::new();
        let raw = dir.path("raw");
        self.convert(path, format, &raw, "raw", extra);
        std::fs::read(raw).unwrap()
    }
}
