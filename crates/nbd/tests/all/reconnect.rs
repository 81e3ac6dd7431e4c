//! A connection that is lost, and made again: what was asked is asked once more, and nothing of it is lost or done by halves.

#![cfg(unix)]

use crate::client;

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use client::{MIB, disk, export};
use qcow2_core::storage::{ReadTransfer, WriteTransfer};
use qcow2_engine::{Error, ErrorKind, Image, Job, Mem, MemMut, ReadStorage, Result, Storage, StorageExt};
use qcow2_nbd::client::{Location, NbdStorage, Place, Times, Way};
use qcow2_nbd::server::{Address, Server, ServerOptions};
use tempfile::TempDir;

const OPTIONS: ServerOptions =
    ServerOptions { max_connections: 4, persistent: true, handshake_time: Duration::from_secs(10) };

fn serve(path: &Path, image: &Arc<Image>) -> Server {
    let address = Address::Unix(path.to_owned());
    Server::start(&address, vec![export(image)], OPTIONS, Box::new(|| {})).unwrap()
}

fn open(path: &Path, reconnect: Duration, job: &Arc<Job>) -> Result<NbdStorage> {
    let location = Location { place: Place::Unix(path.to_owned()), export: b"disk".to_vec() };
    let times = Times { connect: Duration::from_secs(5), silence: Duration::from_millis(500) };
    NbdStorage::open(&location, true, Way { times, reconnect, tls: None }, job)
}

fn socket(folder: &TempDir) -> PathBuf {
    folder.path().join("socket")
}

const LONG: Duration = Duration::from_secs(20);

fn read(storage: &NbdStorage, offset: u64) -> Result<u8> {
    let mut byte = [0];
    storage.read_exact_at(MemMut::from(&mut byte[..]), offset)?;
    Ok(byte[0])
}

#[test]
fn every_request_is_made_again_when_the_server_comes_back() {
    let folder = TempDir::new().unwrap();
    let image = disk(8 * MIB);
    let server = serve(&socket(&folder), &image);
    let storage = open(&socket(&folder), LONG, &Arc::new(Job::new())).unwrap();
    storage.write_all_at(Mem::from(&[1; 4096][..]), 0).unwrap();
    type Request = fn(&NbdStorage);
    let requests: [Request; 6] = [
        |storage| assert_eq!(read(storage, 0).unwrap(), 1),
        |storage| storage.write_all_at(Mem::from(&[2; 4096][..]), MIB).unwrap(),
        |storage| storage.sync_data().unwrap(),
        |storage| storage.write_zeroes(MIB, 1024, true).unwrap(),
        |storage| storage.discard(2 * MIB, MIB).unwrap(),
        |storage| assert_eq!(storage.run_in(4 * MIB..8 * MIB).unwrap().end, 8 * MIB),
    ];
    let mut server = Some(server);
    for request in requests {
        drop(server.take());
        thread::scope(|scope| {
            let waits = scope.spawn(|| request(&storage));
            thread::sleep(Duration::from_millis(30));
            assert!(!waits.is_finished(), "it waits");
            server = Some(serve(&socket(&folder), &image));
            waits.join().unwrap();
        });
    }
    let mut byte = [9; 1];
    image.read_at(MemMut::from(&mut byte[..]), MIB + 1024).unwrap();
    assert_eq!(byte, [2]);
    // Batches: every part of them.
    drop(server.take());
    let again = thread::spawn({
        let (path, image) = (socket(&folder), Arc::clone(&image));
        move || {
            thread::sleep(Duration::from_millis(50));
            serve(&path, &image)
        }
    });
    let bytes = [[3; 512], [4; 512]];
    let parts = bytes.each_ref().map(|bytes| [Mem::from(&bytes[..])]);
    let write = |index: usize| WriteTransfer { bufs: &parts[index], offset: index as u64 * MIB, done: Ok(0) };
    let mut batch = [write(0), write(1)];
    storage.write_batch(&mut batch);
    assert!(batch.iter().all(|write| matches!(write.done, Ok(512))));
    drop(again.join().unwrap());
    let again = thread::spawn({
        let (path, image) = (socket(&folder), Arc::clone(&image));
        move || serve(&path, &image)
    });
    let mut read = [[0; 512]; 2];
    let mut offset = 0;
    let mut batch = read.each_mut().map(|bytes| {
        offset += MIB;
        ReadTransfer { buf: MemMut::from(&mut bytes[..]), offset: offset - MIB, done: Ok(0) }
    });
    storage.read_batch(&mut batch);
    assert!(batch.iter().all(|read| matches!(read.done, Ok(512))));
    assert_eq!(read, bytes);
    drop(again.join());
}

#[test]
fn requests_of_many_threads_wait_for_one_connection() {
    let folder = TempDir::new().unwrap();
    let image = disk(8 * MIB);
    let server = serve(&socket(&folder), &image);
    let storage = open(&socket(&folder), LONG, &Arc::new(Job::new())).unwrap();
    let stop = std::sync::atomic::AtomicBool::new(false);
    thread::scope(|scope| {
        let workers: Vec<_> = (0..4u8)
            .map(|worker| {
                let (storage, stop) = (&storage, &stop);
                scope.spawn(move || {
                    let mut rounds = 0;
                    while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                        let bytes = vec![worker ^ rounds; 100_000];
                        let offset = u64::from(worker) * MIB;
                        storage.write_all_at(Mem::from(&bytes[..]), offset).unwrap();
                        let mut read = vec![0; bytes.len()];
                        storage.read_exact_at(MemMut::from(&mut read[..]), offset).unwrap();
                        assert_eq!(read, bytes);
                        rounds = rounds.wrapping_add(1);
                    }
                })
            })
            .collect();
        let mut server = server;
        for _ in 0..5 {
            thread::sleep(Duration::from_millis(20));
            drop(server);
            server = serve(&socket(&folder), &image);
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        workers.into_iter().for_each(|worker| worker.join().unwrap());
        assert_eq!(server.connections(), 1);
    });
}

#[test]
fn an_export_that_is_another_one_is_an_error() {
    let folder = TempDir::new().unwrap();
    let server = serve(&socket(&folder), &disk(8 * MIB));
    let storage = open(&socket(&folder), LONG, &Arc::new(Job::new())).unwrap();
    drop(server);
    let server = serve(&socket(&folder), &disk(4 * MIB));
    let error = read(&storage, 0).unwrap_err();
    assert!(error.message().contains("it had 8388608 bytes and has 4194304"), "{error}");
    // For good: it is not asked for again.
    drop(server);
    let _right = serve(&socket(&folder), &disk(8 * MIB));
    let begin = Instant::now();
    assert_eq!(read(&storage, 0).unwrap_err().kind(), ErrorKind::Io);
    assert!(begin.elapsed() < Duration::from_secs(5));

    let readable = |read_only| {
        let address = Address::Unix(folder.path().join("other"));
        let export = qcow2_nbd::server::Export { read_only, ..export(&disk(MIB)) };
        Server::start(&address, vec![export], OPTIONS, Box::new(|| {})).unwrap()
    };
    let server = readable(false);
    let storage = open(&folder.path().join("other"), LONG, &Arc::new(Job::new())).unwrap();
    drop(server);
    let _server = readable(true);
    let error = storage.sync_data().unwrap_err();
    assert!(error.to_string().contains("it can do other things"), "{error}");
}

#[test]
fn who_waits_has_its_time_and_no_more_and_hears_at_once_that_it_was_given_up() {
    let folder = TempDir::new().unwrap();
    let image = disk(MIB);
    let server = serve(&socket(&folder), &image);
    let job = Arc::new(Job::new());
    let never = open(&socket(&folder), Duration::ZERO, &job).unwrap();
    let soon = open(&socket(&folder), Duration::from_millis(300), &job).unwrap();
    let late = open(&socket(&folder), LONG, &job).unwrap();
    drop(server);
    let begin = Instant::now();
    assert_eq!(read(&never, 0).unwrap_err().kind(), ErrorKind::Io);
    let error: Error = read(&soon, 0).unwrap_err();
    assert!(error.message().contains("and another one failed"), "{error}");
    assert!(begin.elapsed() >= Duration::from_millis(200) && begin.elapsed() < Duration::from_secs(10));
    // Too late for it.
    let _server = serve(&socket(&folder), &image);
    assert_eq!(read(&soon, 0).unwrap_err().kind(), ErrorKind::Io);
    assert_eq!(read(&late, 0).unwrap(), 0);
    drop(_server);
    thread::scope(|scope| {
        let waits = scope.spawn(|| read(&late, 0).unwrap_err());
        thread::sleep(Duration::from_millis(50));
        job.cancel();
        assert_eq!(waits.join().unwrap().kind(), ErrorKind::Aborted);
    });
    assert!(begin.elapsed() < Duration::from_secs(10));
}

#[test]
fn a_server_that_loses_every_client_has_no_more_time() {
    let folder = TempDir::new().unwrap();
    let image = disk(MIB);
    let path = folder.path().join("inner");
    let _server = serve(&path, &image);
    // In front of a server: hands on what is said until requests come, and closes then.
    let listener = UnixListener::bind(socket(&folder)).unwrap();
    thread::spawn(move || {
        while let Ok((client, _)) = listener.accept() {
            let server = UnixStream::connect(&path).unwrap();
            let (mut from, mut to) = (server.try_clone().unwrap(), client.try_clone().unwrap());
            thread::spawn(move || std::io::copy(&mut from, &mut to));
            let (mut client, mut server) = (client, server);
            let mut bytes = [0; 4096];
            while let Ok(length @ 1..) = client.read(&mut bytes) {
                if bytes.starts_with(&0x21e4_1c71u32.to_be_bytes()) {
                    break;
                }
                server.write_all(&bytes[..length]).unwrap();
            }
            drop(server.shutdown(std::net::Shutdown::Both));
            drop(client.shutdown(std::net::Shutdown::Both));
        }
    });
    let begin = Instant::now();
    let storage = open(&socket(&folder), Duration::from_millis(300), &Arc::new(Job::new())).unwrap();
    assert_eq!(read(&storage, 0).unwrap_err().kind(), ErrorKind::Io);
    assert!(begin.elapsed() >= Duration::from_millis(250) && begin.elapsed() < Duration::from_secs(10));
}
