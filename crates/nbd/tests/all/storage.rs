//! An export as a file: what every storage keeps, on servers of several makes.

#![cfg(unix)]

use crate::client;

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use client::{MIB, disk, export};
use qcow2_core::Raw;
use qcow2_engine::create::{CreateOptions, create};
use qcow2_engine::storage::{DirectStorage, MemoryStorage, Operation, Run};
use qcow2_engine::{
    Error, ErrorKind, Image, Job, Mem, MemMut, OpenOptions, Qcow2, ReadStorage, Storage, StorageExt,
    WriteOptions,
};
use qcow2_nbd::client::{Location, NbdStorage, Place, Times, list};
use qcow2_nbd::server::{Address, Export, HANDSHAKE_TIME, Server, ServerOptions};
use qcow2_testkit::contract::{StorageContract, check_read_only};
use qcow2_testkit::skipped;
use tempfile::TempDir;

const TIMES: Times = Times { connect: Duration::from_secs(20), silence: Duration::from_secs(20) };

/// A server that is a program, ended when it is dropped.
struct Program {
    child: Child,
    folder: TempDir,
}

impl Program {
    /// Starts `program` with arguments in which SOCKET and FOLDER stand for what they are. Nothing where it is not installed.
    fn start(program: &str, arguments: &[&str]) -> Option<Self> {
        let folder = TempDir::new().unwrap();
        Self::start_in(folder, program, arguments)
    }

    fn start_in(folder: TempDir, program: &str, arguments: &[&str]) -> Option<Self> {
        let socket = folder.path().join("socket");
        let place = |text: &str| {
            text.replace("SOCKET", socket.to_str().unwrap())
                .replace("FOLDER", folder.path().to_str().unwrap())
        };
        let arguments = arguments.iter().map(|argument| place(argument));
        let started =
            Command::new(program).args(arguments).stdin(Stdio::null()).stderr(Stdio::null()).spawn();
        let Ok(mut child) = started else {
            skipped(format!("{program} is not installed"));
            return None;
        };
        let end = Instant::now() + Duration::from_secs(20);
        while UnixStream::connect(&socket).is_err() {
            assert!(Instant::now() < end && child.try_wait().unwrap().is_none(), "{program} does not listen");
            std::thread::sleep(Duration::from_millis(5));
        }
        Some(Self { child, folder })
    }

    fn nbdkit(arguments: &[&str]) -> Option<Self> {
        let fixed = ["--foreground", "--exit-with-parent", "--unix", "SOCKET"];
        Self::start("nbdkit", &[&fixed, arguments].concat())
    }

    fn location(&self) -> Location {
        at(&self.folder.path().join("socket"), "")
    }

    fn open(&self) -> NbdStorage {
        NbdStorage::open(&self.location(), true, TIMES, &Arc::new(Job::new())).unwrap()
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _gone = self.child.kill();
        let _status = self.child.wait();
    }
}

fn at(socket: &Path, export: &str) -> Location {
    Location { place: Place::Unix(socket.to_owned()), export: export.into() }
}

const OPTIONS: ServerOptions =
    ServerOptions { max_connections: 4, persistent: true, handshake_time: HANDSHAKE_TIME };

/// Our server, on a socket in the folder.
fn serve(folder: &TempDir, export: Export) -> Server {
    let address = Address::Unix(folder.path().join("socket"));
    Server::start(&address, vec![export], OPTIONS, Box::new(|| {})).unwrap()
}

fn open(server: &Server, writable: bool) -> Result<NbdStorage, Error> {
    NbdStorage::open(&at(server.address().path().unwrap(), "disk"), writable, TIMES, &Arc::new(Job::new()))
}

fn raw(bytes: &[u8]) -> Arc<Image> {
    let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::from_bytes(bytes));
    let top = Raw::new(storage).unwrap().with_write_options(&WriteOptions::default());
    Arc::new(Image::new(vec![Box::new(top)]).unwrap())
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|i| (i * 7 + i / 251) as u8 | 1).collect()
}

#[test]
fn an_export_of_our_server_keeps_the_contract() {
    let folder = TempDir::new().unwrap();
    let server = serve(&folder, export(&disk(MIB)));
    let make = || Arc::new(open(&server, true).unwrap()) as Arc<dyn Storage>;
    StorageContract { name: "our server", make: &make }.check();
    server.close();
}

#[test]
fn an_export_of_qemu_keeps_the_contract() {
    let folder = TempDir::new().unwrap();
    std::fs::write(folder.path().join("disk"), vec![0xee; MIB as usize]).unwrap();
    let arguments = ["-t", "-f", "raw", "-k", "SOCKET", "--discard=unmap", "FOLDER/disk"];
    let Some(server) = Program::start_in(folder, "qemu-nbd", &arguments) else { return };
    let make = || Arc::new(server.open()) as Arc<dyn Storage>;
    StorageContract { name: "qemu-nbd", make: &make }.check();
}

#[test]
fn exports_of_nbdkit_keep_the_contract_whatever_they_cannot_do() {
    let kinds: [&[&str]; 6] = [
        &["memory", "1M"],
        // Writes of zeroes are refused, and written as data.
        &["--filter=nozero", "memory", "1M"],
        &["--filter=noextents", "memory", "1M"],
        &["--filter=delay", "memory", "1M", "delay-read=1ms", "delay-write=1ms"],
        // Requests of whole blocks alone, and small ones.
        &[
            "--filter=blocksize-policy",
            "memory",
            "1M",
            "blocksize-minimum=4096",
            "blocksize-preferred=4096",
            "blocksize-maximum=8192",
            "blocksize-error-policy=error",
        ],
        &["--no-sr", "memory", "1M"],
    ];
    for arguments in kinds {
        let Some(server) = Program::nbdkit(arguments) else { return };
        let make = || DirectStorage::over(Arc::new(server.open()));
        StorageContract { name: &arguments.join(" "), make: &make }.check();
    }
}

#[test]
fn many_threads_and_large_requests_share_a_connection() {
    let Some(server) = Program::nbdkit(&["pattern", "1G"]) else { return };
    let storage = NbdStorage::open(&server.location(), false, TIMES, &Arc::new(Job::new())).unwrap();
    assert_eq!(storage.size().unwrap(), 1 << 30);
    // Eight bytes of the pattern are their own offset.
    let check = |offset: u64, length: usize| {
        let mut buf = vec![0; length];
        storage.read_exact_at(MemMut::from(&mut buf[..]), offset).unwrap();
        let (words, _) = buf.as_chunks::<8>();
        for (at, word) in (offset..).step_by(8).zip(words) {
            assert_eq!(u64::from_be_bytes(*word), at);
        }
    };
    check(0, 70 << 20);
    std::thread::scope(|scope| {
        for thread in 0..24_u64 {
            scope.spawn(move || (0..20).for_each(|n| check((thread * 20 + n) << 16, 100_000)));
        }
    });
}

#[test]
fn errors_of_the_server_name_the_export_and_the_command() {
    let error = ["--filter=error", "memory", "1M", "error=ENOSPC", "error-pwrite-rate=100%"];
    let Some(server) = Program::nbdkit(&error) else { return };
    let storage = server.open();
    let failed = storage.write_all_at(Mem::from(&[1; 4096][..]), 8192).unwrap_err();
    assert!(failed.is_no_space());
    assert_eq!((failed.syscall(), failed.offset()), (Some("NBD_CMD_WRITE"), Some(8192)));
    assert_eq!(failed.path(), Some(Path::new(&server.location().to_string())));
    // The next request is none the worse.
    storage.read_exact_at(MemMut::from(&mut [0; 512][..]), 0).unwrap();

    let Some(server) = Program::nbdkit(&["--filter=error", "memory", "1M", "error-rate=100%"]) else {
        return;
    };
    let storage = server.open();
    assert_eq!(storage.read_exact_at(MemMut::from(&mut [0; 512][..]), 0).unwrap_err().errno(), Some(5));
    assert!(storage.run(0..512).is_err() && storage.zero(0, 512, true).is_err());
}

#[test]
fn a_server_that_goes_away_ends_what_waits_and_what_comes_later() {
    let Some(mut server) = Program::nbdkit(&["--filter=delay", "memory", "1M", "rdelay=60"]) else { return };
    let storage = server.open();
    std::thread::scope(|scope| {
        let waits: Vec<_> = (0..20)
            .map(|_| scope.spawn(|| storage.read_exact_at(MemMut::from(&mut [0; 512][..]), 0).unwrap_err()))
            .collect();
        std::thread::sleep(Duration::from_millis(100));
        server.child.kill().unwrap();
        for wait in waits {
            assert_eq!(wait.join().unwrap().kind(), ErrorKind::Io);
        }
    });
    let later = storage.write_all_at(Mem::from(&[1; 512][..]), 0).unwrap_err();
    assert_eq!((later.kind(), later.is_transient()), (ErrorKind::Io, false));
}

#[test]
fn who_gives_up_hears_at_once_and_a_silent_server_has_its_time() {
    let Some(server) = Program::nbdkit(&["--filter=delay", "memory", "1M", "rdelay=60"]) else { return };
    let storage = server.open();
    let begin = Instant::now();
    std::thread::scope(|scope| {
        let wait = scope.spawn(|| storage.read_exact_at(MemMut::from(&mut [0; 512][..]), 0).unwrap_err());
        std::thread::sleep(Duration::from_millis(50));
        storage.connection().close();
        assert_eq!(wait.join().unwrap().kind(), ErrorKind::Aborted);
    });
    // So does one whose job is cancelled.
    let job = Arc::new(Job::new());
    let other = NbdStorage::open(&server.location(), true, TIMES, &job).unwrap();
    std::thread::scope(|scope| {
        let wait = scope.spawn(|| other.read_exact_at(MemMut::from(&mut [0; 512][..]), 0).unwrap_err());
        std::thread::sleep(Duration::from_millis(50));
        job.cancel();
        assert_eq!(wait.join().unwrap().kind(), ErrorKind::Aborted);
    });
    assert!(begin.elapsed() < Duration::from_secs(10));

    let times = Times { silence: Duration::from_millis(300), ..TIMES };
    let storage = NbdStorage::open(&server.location(), true, times, &Arc::new(Job::new())).unwrap();
    let begin = Instant::now();
    let error = storage.read_exact_at(MemMut::from(&mut [0; 512][..]), 0).unwrap_err();
    assert!(error.message().contains("has not answered for 0.3 seconds"), "{error}");
    assert!(begin.elapsed() >= Duration::from_millis(250) && begin.elapsed() < Duration::from_secs(10));
}

#[test]
fn holes_and_zeroes_are_told_of() {
    let folder = TempDir::new().unwrap();
    let image = disk(4 * MIB);
    image.write_at(Mem::from(&[1; 65536][..]), MIB).unwrap();
    image.write_at(Mem::from(&[0; 65536][..]), 2 * MIB).unwrap();
    let server = serve(&folder, export(&image));
    let storage = open(&server, true).unwrap();
    assert_eq!(storage.run_in(0..4 * MIB).unwrap(), Run::new(MIB, false));
    assert_eq!(storage.run_in(100..4 * MIB).unwrap(), Run::new(MIB, false));
    assert_eq!(storage.run_in(MIB..4 * MIB).unwrap(), Run::new(MIB + 65536, true));
    let zeroes = storage.run_in(2 * MIB..4 * MIB).unwrap();
    assert_eq!(zeroes, Run::new(2 * MIB + 65536, true), "written, whatever it is");
    assert_eq!(storage.run_in(4 * MIB..5 * MIB).unwrap(), Run::new(u64::MAX, false));
    storage.discard(MIB, 65536).unwrap();
    assert!(!storage.run_in(MIB..2 * MIB).unwrap().data);

    let Some(program) = Program::nbdkit(&["--filter=noextents", "memory", "1M"]) else { return };
    assert_eq!(program.open().run_in(0..10).unwrap(), Run::new(10, true));
}

#[test]
fn what_is_exported_for_reading_is_not_written_to() {
    let folder = TempDir::new().unwrap();
    let bytes = pattern(100_352);
    let server = serve(&folder, Export { read_only: true, ..export(&raw(&bytes)) });
    check_read_only(&open(&server, false).unwrap(), &bytes);
    let error = open(&server, true).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ReadOnly);
    assert!(error.path().is_some());
    // One that takes writes is not written to either, unless it was opened for that.
    let other = TempDir::new().unwrap();
    let writable = serve(&other, export(&raw(&bytes)));
    check_read_only(&open(&writable, false).unwrap(), &bytes);
}

#[test]
fn an_image_lives_inside_an_export() {
    let folder = TempDir::new().unwrap();
    let server = serve(&folder, export(&raw(&vec![0xee; 4 << 20])));
    let storage: Arc<dyn Storage> = Arc::new(open(&server, true).unwrap());
    let options = CreateOptions { size: 64 * MIB, ..CreateOptions::default() };
    create(Arc::clone(&storage), None, &options, &Job::new()).unwrap();
    let mut top = Qcow2::open(Arc::clone(&storage), &OpenOptions::default()).unwrap();
    top.enable_writing(WriteOptions::default()).unwrap();
    let image = Image::new(vec![Box::new(top)]).unwrap();
    let bytes = pattern(300_000);
    image.write_at(Mem::from(&bytes[..]), 5 * MIB + 7).unwrap();
    image.close().unwrap();
    drop((image, storage));
    let again: Arc<dyn Storage> = Arc::new(open(&server, false).unwrap());
    let image = Image::new(vec![Box::new(Qcow2::open(again, &OpenOptions::default()).unwrap())]).unwrap();
    let mut found = vec![0; bytes.len()];
    image.read_at(MemMut::from(&mut found[..]), 5 * MIB + 7).unwrap();
    assert!(found == bytes);
    // What does not fit is refused by the device that it is.
    let small = TempDir::new().unwrap();
    let tiny = serve(&small, export(&raw(&vec![0; 128 << 10])));
    let error = create(Arc::new(open(&tiny, true).unwrap()), None, &options, &Job::new()).unwrap_err();
    assert!(error.is_no_space(), "{error}");
}

#[test]
fn errors_of_connecting() {
    let folder = TempDir::new().unwrap();
    let fails =
        |location: &Location| NbdStorage::open(location, false, TIMES, &Arc::new(Job::new())).unwrap_err();
    let missing = fails(&at(&folder.path().join("none"), ""));
    assert_eq!((missing.errno(), missing.syscall()), (Some(2), Some("connect")));
    assert!(missing.path().unwrap().to_str().unwrap().starts_with("nbd+unix:///?socket="));
    assert_eq!(fails(&at(&folder.path().join("x".repeat(200)), "")).kind(), ErrorKind::InvalidArgument);
    let nowhere = Location::parse("nbd://no.such.host.invalid/").unwrap();
    assert!(fails(&nowhere).message().contains("no.such.host.invalid"));
    let server = serve(&folder, export(&disk(MIB)));
    let unknown = fails(&at(server.address().path().unwrap(), "other"));
    assert!(unknown.message().contains("no export 'other'"), "{unknown}");
    server.close();
    let address = Address::Tcp { host: Some("127.0.0.1".to_owned()), port: 0 };
    let server = Server::start(&address, vec![export(&disk(MIB))], OPTIONS, Box::new(|| {})).unwrap();
    let Address::Tcp { port, .. } = server.address().clone() else { unreachable!() };
    let location = Location::parse(&format!("nbd://127.0.0.1:{port}/disk")).unwrap();
    let storage = NbdStorage::open(&location, true, TIMES, &Arc::new(Job::new())).unwrap();
    assert_eq!(storage.size().unwrap(), MIB);
    assert_eq!(storage.operation(Operation::Sync), "NBD_CMD_FLUSH");
    server.close();
    assert_eq!(fails(&location).errno(), Some(111));
    let cancelled = Arc::new(Job::new());
    cancelled.cancel();
    let error = NbdStorage::open(&location, true, TIMES, &cancelled).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Aborted);
}

#[test]
fn exports_are_listed() {
    let folder = TempDir::new().unwrap();
    let server = serve(&folder, export(&disk(MIB)));
    let found = list(&at(server.address().path().unwrap(), ""), TIMES, &Job::new()).unwrap();
    let [export] = &found[..] else { panic!("{found:?}") };
    assert_eq!((&export.name[..], &export.description[..]), (&b"disk"[..], &b"a disk for tests"[..]));
    assert_eq!(export.export.map(|(size, _)| size), Some(MIB));
    assert_eq!(export.blocks.map(|sizes| sizes.maximum), Some(32 << 20));
    assert_eq!(export.contexts, [&b"base:allocation"[..], b"qemu:allocation-depth"]);
}
